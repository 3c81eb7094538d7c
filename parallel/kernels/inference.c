/* What a model computes besides attention where no gradient is recorded: embedding, products, RMSNorm, rotation, SwiGLU;
 * one after the other by one call, so that threads need not be gathered for each.
 *
 * A row's bits depend neither on the other rows nor on the number of threads: threads take rows and columns from a
 * common heap, never a part of a sum, and every sum runs in the same order. Values are float or bfloat16 (`half`), computed in float; what is rounded
 * to bfloat16, and when, is as in the torch forms beside this file, so this is compiled with -ffp-contract=off. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define WIDTH 64
enum { PER_ROW = 4 }; /* vectors of a row that a tile sums at once */
#else
#define WIDTH 32
enum { PER_ROW = 2 };
#endif
enum { LANES = WIDTH / 4, PANEL = PER_ROW * LANES, TILE = 6, STEPS = 704, BLOCK = 96, LINE = 64 };
typedef float vec __attribute__((vector_size(WIDTH)));
typedef int32_t ivec __attribute__((vector_size(WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(WIDTH)));
typedef float floats __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(WIDTH / 2), aligned(2), may_alias));
#define AT(pointer) (*(floats *)(pointer))
#ifdef __AVX2__
#define KEEP(v) __asm__("" : "+v"(v)) /* in a register: gcc would rather load it again */
#else
#define KEEP(v)
#endif

#if defined(__AVX512F__)
INLINE vec fused(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vec all(float x) { return (vec)_mm512_set1_ps(x); }
#elif defined(__AVX2__) && defined(__FMA__)
INLINE vec fused(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vec all(float x) { return (vec)_mm256_set1_ps(x); }
#else
INLINE vec fused(vec a, vec b, vec c) { return a * b + c; }
INLINE vec all(float x) { return (vec){x, x, x, x, x, x, x, x}; }
#endif

INLINE uvec to_bf16(vec v) { /* to nearest, ties to even */
    uvec bits = (uvec)v, nan = (uvec)(v != v);
    return (((bits + 0x7fff + (bits >> 16 & 1)) >> 16) & ~nan) | (nan & 0x7fc0);
}

INLINE vec settle(vec v, int half) { return half ? (vec)(to_bf16(v) << 16) : v; }

/* Up to LANES values from element i on; those behind n are 0. */
INLINE vec load(const void *from, int64_t i, int64_t n, int half) {
    const char *at = (const char *)from + i * (half ? 2 : 4);
    uint32_t some[LANES] = {0};
    if (n - i < LANES) at = memcpy(some, at, (size_t)(n - i) * (half ? 2 : 4));
    return half ? (vec)(__builtin_convertvector(*(halves *)at, uvec) << 16) : (vec)AT(at);
}

INLINE void store(void *to, int64_t i, int64_t n, int half, vec v) {
    char *at = (char *)to + i * (half ? 2 : 4);
    uint32_t some[LANES];
    char *into = n - i < LANES ? (char *)some : at;
    if (half) *(halves *)into = __builtin_convertvector(to_bf16(v), halves);
    else AT(into) = (floats)v;
    if (n - i < LANES) memcpy(at, some, (size_t)(n - i) * (half ? 2 : 4));
}

/* One thing to be done with every row; mirrored by inference.py. What the fields are for is beside each kind's function. */
typedef struct {
    int64_t kind;
    const char *x, *weight, *more;
    char *out;
    int64_t width, n, count;
    double eps;
    int (*call)(const char *);
    int64_t next; /* unit that nobody has taken yet */
} Op;
enum { NORM, ROTATE, SWIGLU, PRODUCT, GATED, EMBED, LARGEST, CALL };

INLINE void norm_row(const char *x, const char *weight, char *out, int64_t n, float eps, int half) {
    vec sums = {0};
    float sum = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = load(x, i, n, half);
        sums = fused(v, v, sums);
    }
    for (int i = 0; i < LANES; i++) sum += sums[i];
    float scale = 1 / sqrtf(sum / (float)n + eps);
    for (int64_t i = 0; i < n; i += LANES)
        store(out, i, n, half, settle(load(x, i, n, half) * scale, half) * load(weight, i, n, half));
}

/* The halves of each of a row's first heads against each other; n is the size of half a head. */
INLINE void rotate_row(char *x, const float *cosine, const float *sine, int64_t heads, int64_t n, int half) {
    for (int64_t h = 0; h < heads; h++) {
        char *first = x + 2 * h * n * (half ? 2 : 4), *second = first + n * (half ? 2 : 4);
        for (int64_t i = 0; i < n; i += LANES) {
            vec a = load(first, i, n, half), b = load(second, i, n, half);
            vec c = settle(load(cosine, i, n, 0), half), s = settle(load(sine, i, n, 0), half);
            store(first, i, n, half, fused(-b, s, settle(a * c, half)));
            store(second, i, n, half, fused(a, s, settle(b * c, half)));
        }
    }
}

/* x / (1 + e^-x), by e^-|x|: a power of two times the series of e^f, |f| <= ln(2) / 2. NaN stays NaN. */
INLINE vec silu(vec x) {
    static const float c[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    const float magic = 12582912; /* adding it rounds to a whole number, in the low bits */
    vec t = (vec)((ivec)x | INT32_MIN);
    vec whole = fused(t, all(1.44269504f), all(magic)), n = whole - magic;
    vec f = fused(n, all(-0.693359375f), t), y = all(1.0f / 5040);
    f = fused(n, all(2.12194440e-4f), f);
    for (int i = 0; i < 7; i++) y = fused(y, f, all(c[i]));
    y = (vec)(((ivec)y + ((ivec)whole << 23)) & ~(t < -87));
    ivec below = x < 0;
    vec over = (vec)((below & (ivec)(x * y)) | (~below & (ivec)x));
    return over / (y + 1);
}

INLINE void swiglu_row(const char *gate, char *out, int64_t n, int half) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec a = settle(silu(load(gate, i, n, half)), half);
        store(out, i, n, half, a * load(gate + n * (half ? 2 : 4), i, n, half));
    }
}

/* Columns of a panel of weights; 0 where such products are left to others. In bfloat16 that is where the processor has
 * no products of pairs, or has matrix units, which nothing here uses. */
int64_t inference_panel(int64_t half) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
    const int64_t single = 1;
#else
    const int64_t single = 0;
#endif
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    const int64_t pairs = 1;
#else
    const int64_t pairs = 0;
#endif
    return (half ? pairs : single) * PANEL;
}

#ifdef __AVX512BF16__
INLINE vec pairs(const char *x, vec w, vec sum) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
}
#else
INLINE vec pairs(const char *x, vec w, vec sum) { return x == 0 ? w : sum; } /* not called */
#endif

#define UNROLL _Pragma("GCC unroll 8") /* or gcc keeps the sums in memory as well */

/* Add `n` steps to the sums of up to TILE rows and a panel. A step is one value of a row, or in bfloat16 a pair; either
 * way four bytes, and LANES of them a vector of weights. `lines` of each step's prefetches go to `ahead`. */
INLINE void add_tile(const char *x, int64_t row, const char *w, int64_t n, float *sums, const char *ahead, int rows,
                     int lines, int half) {
    vec a[TILE][PER_ROW];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < PER_ROW; i++) a[r][i] = AT(sums + r * PANEL + i * LANES);
    for (int64_t k = 0; k < n; k++) {
        vec b[PER_ROW];
        UNROLL for (int i = 0; i < PER_ROW; i++) {
            b[i] = (vec)AT(w + (k * PER_ROW + i) * WIDTH);
            KEEP(b[i]);
        }
        for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + (k * lines + i) * LINE, 0, 2);
        UNROLL for (int r = 0; r < rows; r++) {
            const char *at = x + r * row + k * 4;
            UNROLL for (int i = 0; i < PER_ROW; i++)
                a[r][i] = half ? pairs(at, b[i], a[r][i]) : fused(b[i], all(*(const float *)at), a[r][i]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < PER_ROW; i++) AT(sums + r * PANEL + i * LANES) = a[r][i];
}

#define TILES(R, L) case R * 4 + L: add_tile(x, row, w, n, sums, ahead, R, L, half); break;
#define ANY(R) TILES(R, 0) TILES(R, 1) TILES(R, 2)
INLINE void add_rows(const char *x, int64_t row, const char *w, int64_t n, float *sums, const char *ahead,
                     int64_t rows, int64_t lines, int half) {
    switch (rows * 4 + lines) { ANY(1) ANY(2) ANY(3) ANY(4) ANY(5) ANY(6) }
}

static void add_floats(const char *x, int64_t row, const char *w, int64_t n, float *sums, const char *ahead,
                       int64_t rows, int64_t lines) {
    add_rows(x, row, w, n, sums, ahead, rows, lines, 0);
}

static void add_pairs(const char *x, int64_t row, const char *w, int64_t n, float *sums, const char *ahead,
                      int64_t rows, int64_t lines) {
    add_rows(x, row, w, n, sums, ahead, rows, lines, 1);
}

/* Some rows times one panel. While the tiles of rows go over some steps, which then lie in the second cache, the next
 * steps of weights are fetched to there, and in the end those of the panel `after`; one tile alone the processor keeps
 * fed by itself. */
static void multiply(const char *x, int64_t row, const char *w, int64_t rows, int64_t steps, float *sums, int half,
                     const char *after) {
    int64_t tiles = (rows + TILE - 1) / TILE, total = PANEL * 4 / LINE;
    int64_t lines = tiles == 1 ? 0 : (total + tiles - 1) / tiles;
    memset(sums, 0, (size_t)(rows * PANEL) * sizeof(float));
    for (int64_t k = 0, n; k < steps; k += n) {
        n = steps - k < STEPS ? steps - k : STEPS;
        const char *here = w + k * PANEL * 4, *next = k + n < steps ? here + n * PANEL * 4 : after;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first, asked = t * lines;
            (half ? add_pairs : add_floats)(x + first * row + k * 4, row, here, n, sums + first * PANEL,
                                            next + asked * n * LINE, count, asked < total ? lines : 0);
        }
    }
}

/* Panels of a product that are units; where gate and up stand one after the other, a unit has one of each. */
static int64_t panels_of(const Op *op) { return (op->width + PANEL - 1) / PANEL; }
static int64_t blocks_of(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }
static const char *panel_of(const Op *op, int64_t unit) {
    return op->weight + unit % panels_of(op) * op->n * PANEL * 4;
}

/* A unit of a product: x (rows, n 4-byte steps) times one panel of `weight`, plus a bias that may be null. With `count`
 * it is added to `out` (rows, width); otherwise `out` becomes it. GATED: two products, `out` becomes silu(one) x other. */
INLINE void product_unit(const Op *op, int64_t rows, int64_t unit, int half, const char *after) {
    int64_t panels = panels_of(op), blocks = blocks_of(rows), size = half ? 2 : 4, bytes = op->n * 4;
    int64_t block = unit / panels, first = rows * block / blocks, begin = unit % panels * PANEL;
    int64_t some = rows * (block + 1) / blocks - first, n = op->width - begin < PANEL ? op->width - begin : PANEL;
    const char *x = op->x + first * bytes, *w = panel_of(op, unit), *up = w + panels * PANEL * bytes;
    float sums[BLOCK * PANEL] __attribute__((aligned(WIDTH))), more[BLOCK * PANEL] __attribute__((aligned(WIDTH)));
    multiply(x, bytes, w, some, op->n, sums, half, op->kind == GATED ? up : after);
    if (op->kind == GATED) multiply(x, bytes, up, some, op->n, more, half, after);
    for (int64_t r = 0; r < some; r++)
        for (int64_t i = 0; i < n; i += LANES) {
            vec v = AT(sums + r * PANEL + i);
            char *to = op->out + ((first + r) * op->width + begin) * size;
            if (op->kind == GATED) v = settle(silu(settle(v, half)), half) * settle(AT(more + r * PANEL + i), half);
            if (op->more) v += load(op->more + begin * size, i, n, half);
            if (op->count) v = settle(v, half) + load(to, i, n, half);
            store(to, i, n, half, v);
        }
}

static void product_floats(const Op *op, int64_t rows, int64_t unit, const char *after) {
    product_unit(op, rows, unit, 0, after);
}

static void product_pairs(const Op *op, int64_t rows, int64_t unit, const char *after) {
    product_unit(op, rows, unit, 1, after);
}

/* Row `row` of a table (count, n), `x` being the rows' numbers as int64; one that there is not is never read. */
static void embed_row(const Op *op, int64_t row, int half) {
    int64_t at, bytes = op->n * (half ? 2 : 4);
    memcpy(&at, op->x + row * 8, 8);
    if (at >= 0 && at < op->count) memcpy(op->out + row * bytes, op->weight + at * bytes, (size_t)bytes);
}

/* The largest of n values and the first place where it stands; NaN is larger than all. */
INLINE void largest_row(const char *x, float *value, int64_t *place, int64_t n, int half) {
    ivec lanes, where = {0}, bad = {0};
    vec top = {0};
    for (int i = 0; i < LANES; i++) lanes[i] = i, top[i] = -INFINITY;
    for (int64_t i = 0; i + LANES <= n; i += LANES) {
        vec v = load(x, i, n, half);
        ivec more = v > top, at = lanes + (int32_t)i;
        bad |= v != v;
        top = (vec)((more & (ivec)v) | (~more & (ivec)top));
        where = (more & at) | (~more & where);
    }
    float best = top[0];
    int64_t at = where[0], whole = n / LANES * LANES, some = 0;
    for (int i = 1; i < LANES; i++)
        if (top[i] > best || (top[i] == best && where[i] < at)) best = top[i], at = where[i];
    for (int i = 0; i < LANES; i++) some |= bad[i];
    for (int64_t i = some ? 0 : whole; i < n; i++) {
        float v = load(x, i, i + 1, half)[0];
        if (v != v) {
            best = v, at = i;
            break;
        }
        if (v > best) best = v, at = i;
    }
    *value = best, *place = best == -INFINITY ? 0 : at;
}

INLINE void do_row(const Op *op, int64_t row, int half) {
    int64_t size = half ? 2 : 4, step = op->width * size;
    switch (op->kind) {
    case NORM: /* of `count` parts of a row, each by itself */
        for (int64_t at = row * step, i = 0; i < op->count; i++, at += op->n * size)
            norm_row(op->x + at, op->weight, op->out + at, op->n, (float)op->eps, half);
        break;
    case ROTATE: rotate_row(op->out + row * step, (const float *)op->x + row * op->n,
                            (const float *)op->more + row * op->n, op->count, op->n, half); break;
    case SWIGLU: swiglu_row(op->x + row * step, op->out + row * op->n * size, op->n, half); break;
    case EMBED: embed_row(op, row, half); break;
    case LARGEST:
        largest_row(op->x + row * step, (float *)op->out + row, (int64_t *)op->more + row, op->n, half);
        break;
    }
}

INLINE int64_t take(Op *op, int64_t units) { return __atomic_fetch_add(&op->next, units, __ATOMIC_RELAXED); }

/* A thread knows its next panel before it begins one, and fetches it meanwhile; in the end, one of what comes `then`. */
static void take_panels(Op *op, const Op *then, int64_t rows, int half, int64_t me) {
    int64_t units = panels_of(op) * blocks_of(rows);
    for (int64_t unit = take(op, 1), next; unit < units; unit = next) {
        next = take(op, 1);
        const char *after = next < units ? panel_of(op, next) : then ? panel_of(then, me) : op->weight;
        (half ? product_pairs : product_floats)(op, rows, unit, after);
    }
}

static void take_rows(Op *op, int64_t rows, int half, int64_t threads) {
    int64_t grab = rows / (4 * threads) + 1, last;
    for (int64_t first = take(op, grab); first < rows; first = take(op, grab)) {
        last = first + grab < rows ? first + grab : rows;
        for (int64_t row = first; row < last; row++)
            if (half) do_row(op, row, 1);
            else do_row(op, row, 0);
    }
}

static int is_product(const Op *op) { return op->kind == PRODUCT || op->kind == GATED; }

static void take_units(Op *op, const Op *end, int64_t rows, int half, int64_t threads) {
    int64_t me = 0;
#ifdef _OPENMP
    me = omp_get_thread_num();
#endif
    if (!is_product(op)) {
        take_rows(op, rows, half, threads);
        return;
    }
    const Op *then = op + 1;
    while (then < end && !is_product(then)) then++;
    take_panels(op, then < end ? then : 0, rows, half, me);
}

/* Do some things one after the other. A call to others, which have threads of their own, comes between; it returns 0
 * if all is well, and otherwise what is to be returned at once. */
int inference_run(Op *ops, int64_t count, int64_t rows, int64_t half, int64_t threads) {
    for (int64_t first = 0, last; first < count; first = last) {
        if (ops[first].kind == CALL) {
            int failed = ops[first].call(ops[first].x);
            if (failed) return failed;
            last = first + 1;
            continue;
        }
        for (last = first; last < count && ops[last].kind != CALL; last++) ops[last].next = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
        for (int64_t i = first; i < last; i++) {
            take_units(ops + i, ops + count, rows, (int)half, threads);
            if (i + 1 < last) {
#pragma omp barrier
            }
        }
    }
    return 0;
}

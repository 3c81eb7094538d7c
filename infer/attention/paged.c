/* Attention of packed queries to paged keys and values, and the writing of new ones.
 *
 * A row is one query head of one token. Its keys are taken in tiles of TILE at absolute positions, tiles in splits of
 * SPLIT, each with its own running maximum; splits are merged from the first to the last. So the bits of a row do not
 * depend on other rows, on how its request was cut into chunks, on the page size or on the number of threads.
 *
 * Computed in float, or with -DWIDE in double; bfloat16 pages are read as they are. The vectors are the compiler's, so
 * one text serves every processor. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef WIDE
#define SIZE 8
typedef double REAL;
typedef int64_t INT;
enum { MANTISSA = 52, TERMS = 13, LEAST = -1022 };
#else
#define SIZE 4
typedef float REAL;
typedef int32_t INT;
enum { MANTISSA = 23, TERMS = 7, LEAST = -126 };
#endif
#ifdef __AVX512F__
#define WIDTH 64
enum { ROWS = 4 }; /* share each value that is loaded; their sums must fit into the registers */
#else
#define WIDTH 32
enum { ROWS = 2 };
#endif
enum { LANES = WIDTH / SIZE, TILE = 32, RUN = 16, SPLIT = 512, BLOCK = 64 };
enum { F32, BF16, F64, INT8, FP8 };
typedef REAL vec __attribute__((vector_size(WIDTH), aligned(SIZE), may_alias));
typedef INT ivec __attribute__((vector_size(WIDTH), aligned(SIZE), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define AT(pointer) (*(vec *)(pointer))
#define LOW ((REAL)-1e30) /* below every score; finite, so that LOW - LOW is 0 */

/* Mirrored by cpu.py, both; of two, the first is of keys and the second of values. All strides are in bytes. */
typedef struct { /* the requests of a step */
    const int32_t *table, *context, *starts;
    const int64_t *slots;
    int64_t table_row, requests, tokens, threads;
} Place;

typedef struct {
    const char *q, *fresh[2];
    char *out, *held[2], *scales[2];
    Place at;
    int64_t q_token, q_head, fresh_token[2], fresh_head[2], page, page_head, scale_page, scale_head;
    int64_t heads, kv_heads, size, pages, page_size, window, type, stored;
    int64_t failed; /* 1: a table or slot names no page of ours; 2: memory is short */
    double scale;
} Job;

typedef struct { const char *at; int64_t lines; } Ahead; /* memory that will be read soon */

typedef struct { /* one thread's memory */
    int64_t rows, padded, state, request;
    int64_t half, unit; /* whether queries, keys and values stay bfloat16; bytes of a number of theirs */
    int64_t waiting, quantum; /* of `ahead`: how many, and lines to ask for at a time */
    Ahead ahead[2 * TILE];
    char *q, *tile[2];
    const char *run[2][TILE / RUN]; /* where each RUN keys and values of the tile are */
    REAL *scale[2], *scores, *total, *part, *wide;
} View;

/* How a request is cut: `block` queries a unit; or, if that is all of them, a unit for each split of [begin, end). */
typedef struct { int64_t share, block, queries, before, begin, end, apart, first_unit, room; } Cut;

/* Some queries of one request and the key-value head that they share, and the splits that they see. */
typedef struct { int64_t request, head, piece, start, seen, queries, begin, end; } Unit;

typedef struct Shared { /* what threads take units from, `grab` at a time */
    Job *job;
    void (*work)(struct Shared *, View *, int64_t, int64_t);
    int64_t count, next, grab;
    Cut *cuts;
    int32_t *done; /* of each request and head: how many splits are in `parts` */
    REAL *parts;
    int64_t rows;  /* the most of a unit */
    int alone;     /* each unit sees all of a request with one new token, and writes that itself */
} Shared;

/* Lanes of two vectors, by index: clang and gcc spell it differently. */
#define FOUR(F, w, i) F(i, w), F(i + 1, w), F(i + 2, w), F(i + 3, w)
#if WIDTH / SIZE == 16
#define INDICES(F, w) FOUR(F, w, 0), FOUR(F, w, 4), FOUR(F, w, 8), FOUR(F, w, 12)
#elif WIDTH / SIZE == 8
#define INDICES(F, w) FOUR(F, w, 0), FOUR(F, w, 4)
#else
#define INDICES(F, w) FOUR(F, w, 0)
#endif
#ifdef __clang__
#define PICK(a, b, F, w) __builtin_shufflevector(a, b, INDICES(F, w))
#else
#define PICK(a, b, F, w) __builtin_shuffle(a, b, (ivec){INDICES(F, w)})
#endif
#define SWAP(i, w) (((i) ^ (w)) % LANES)
#define LEFT(i, w) (((i) & (w) ? LANES + (i) - (w) : (i)) % (2 * LANES))
#define RIGHT(i, w) (((i) & (w) ? LANES + (i) : (i) + (w)) % (2 * LANES))
#define STAGES(DO) DO(1) DO(2) DO(4) DO(8)

INLINE vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)((first & (ivec)a) | (~first & (ivec)b));
}

#define LARGER(w) if (LANES > w) v = larger(v, PICK(v, v, SWAP, w));
INLINE REAL largest(vec v) { STAGES(LARGER) return v[0]; }

#define SUM(w) if (LANES > w) v += PICK(v, v, SWAP, w);
INLINE REAL total(vec v) { STAGES(SUM) return v[0]; }

/* 2^x for x <= 0: a power of two times the series of 2^f, |f| <= 1/2. Exactly 1 at 0; NaN stays NaN. */
INLINE vec power(vec x) {
    static const REAL c[] = {1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477,
        0.0013333558146428443, 0.0001540353039338161, 1.5252733804059841e-05, 1.3215486790144307e-06,
        1.0178086009239699e-07, 7.054911620801121e-09, 4.445538271870811e-10, 2.5678435993488205e-11,
        1.3691488853904128e-12};
    const REAL magic = (REAL)1.5 * (REAL)(1ll << MANTISSA); /* adding it rounds to a whole number, in the low bits */
    vec whole = x + magic, f = x - (whole - magic), y = f * c[TERMS] + c[TERMS - 1];
    for (int i = TERMS - 2; i >= 0; i--) y = y * f + c[i];
    y = (vec)((ivec)y + ((ivec)whole << MANTISSA)) + (x - x);
    return (vec)((ivec)y & ~(x < (REAL)LEAST));
}

INLINE REAL power1(REAL x) { return power((vec){0} + x)[0]; }

INLINE float real_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE float from_e4m3(uint32_t b) { /* the exponent's bias grows by 120; below 2^-6 the steps are even */
    float magnitude = (b & 0x7f) < 8 ? (float)(int32_t)(b & 7) / 512 : real_of(((b & 0x7f) << 20) + (120u << 23));
    return b & 0x80 ? -magnitude : magnitude;
}

INLINE uint8_t to_e4m3(float x) { /* to nearest, ties to even; x is within +-448 or NaN */
    uint32_t bits = bits_of(x) & 0x7fffffff, low = bits_of(real_of(bits) + 16384.0f); /* whose last bit is 2^-9 */
    uint32_t normal = (bits - (120u << 23) + 0x7ffff + (bits >> 20 & 1)) >> 20;
    return (uint8_t)(bits_of(x) >> 31 << 7 | (real_of(bits) < 0.015625f ? low & 0xf : normal > 0x7e ? 0x7f : normal));
}

INLINE uint16_t to_bf16(float x) {
    return (uint16_t)(x != x ? 0x7fc0 : (bits_of(x) + 0x7fff + (bits_of(x) >> 16 & 1)) >> 16);
}

/* Whether queries, keys and values are read as bfloat16; the numbers of a head with what makes them whole vectors. */
static int64_t is_half(const Job *j) { return SIZE == 4 && j->type == BF16 && j->stored == BF16; }

static int64_t padded_size(const Job *j) {
    int64_t lanes = is_half(j) ? 2 * LANES : LANES;
    return (j->size + lanes - 1) / lanes * lanes;
}

static int64_t bytes_of(int64_t type) { return type == F64 ? 8 : type == F32 ? 4 : type == BF16 ? 2 : 1; }

#define EACH(FROM, TO, value) \
    for (int64_t i = 0; i < n; i++) { FROM x = ((const FROM *)from)[i]; ((TO *)to)[i] = (TO)(value); } break;

static void widen(const void *from, int64_t type, int64_t n, REAL *to) {
    switch (type) {
    case F32: EACH(float, REAL, x)
    case F64: EACH(double, REAL, x)
    case BF16: EACH(uint16_t, REAL, real_of((uint32_t)x << 16))
    case INT8: EACH(int8_t, REAL, x)
    default: EACH(uint8_t, REAL, from_e4m3(x))
    }
}

static void narrow(const REAL *from, int64_t type, int64_t n, void *to) {
    switch (type) {
    case F32: EACH(REAL, float, x)
    case F64: EACH(REAL, double, x)
    case BF16: EACH(REAL, uint16_t, to_bf16((float)x))
    case INT8: EACH(REAL, int8_t, rintf((float)x))
    default: EACH(REAL, uint8_t, to_e4m3((float)x))
    }
}

/* A token's new key (side 0) or value of one head into its place; in int8 and e4m3 as multiples of a scale of its own. */
static void write_head(Job *j, View *w, int64_t t, int64_t h, int64_t side) {
    int64_t row = j->size * bytes_of(j->stored), page = j->at.slots[t] / j->page_size, place = j->at.slots[t] % j->page_size;
    const char *from = j->fresh[side] + t * j->fresh_token[side] + h * j->fresh_head[side];
    if (j->at.slots[t] < 0 || page >= j->pages) {
        j->failed = 1;
        return;
    }
    char *to = j->held[side] + page * j->page + h * j->page_head + place * row;
    if (j->stored < INT8) {
        memcpy(to, from, (size_t)row);
        return;
    }
    float top = 0, *scale = (float *)(j->scales[side] + page * j->scale_page + h * j->scale_head) + place;
    widen(from, j->type, j->size, w->wide);
    for (int64_t d = 0; d < j->size; d++) top = fabsf((float)w->wide[d]) <= top ? top : fabsf((float)w->wide[d]);
    *scale = top / (j->stored == INT8 ? 127.0f : 448.0f);
    for (int64_t d = 0; d < j->size; d++) w->wide[d] = (float)w->wide[d] / (*scale > 0 ? *scale : 1.0f);
    narrow(w->wide, j->stored, j->size, to);
}

static void write_tokens(Shared *s, View *w, int64_t index, int64_t following) {
    int64_t stop = index * RUN + RUN < s->job->at.tokens ? index * RUN + RUN : s->job->at.tokens;
    (void)following;
    for (int64_t t = index * RUN; t < stop; t++)
        for (int64_t i = 0; i < 2 * s->job->kv_heads; i++) write_head(s->job, w, t, i / 2, i % 2);
}

static void merge(const View *w, REAL *into, const REAL *from) {
    REAL *m = into + w->rows * w->padded, *l = m + w->rows;
    const REAL *m2 = from + w->rows * w->padded, *l2 = m2 + w->rows;
    for (int64_t r = 0; r < w->rows; r++) {
        REAL top = m[r] > m2[r] ? m[r] : m2[r], a = power1(m[r] - top), b = power1(m2[r] - top);
        m[r] = top, l[r] = l[r] * a + l2[r] * b;
        for (int64_t i = r * w->padded; i < (r + 1) * w->padded; i++) into[i] = into[i] * a + from[i] * b;
    }
}

/* Keys and values [first, last) of a tile, in the page where that will do; what lies around them is never used. */
static void load(Job *j, View *w, int64_t head, int64_t tile, int64_t first, int64_t last) {
    int64_t row = j->size * bytes_of(j->stored), dense = j->size == w->padded;
    int64_t same = w->half || j->stored == (SIZE == 4 ? F32 : F64), in_place = dense && same && j->page_size % RUN == 0;
    int64_t wide = w->padded * w->unit;
    for (int64_t i = 0; i < 2 * (TILE / RUN); i++) w->run[i % 2][i / 2] = w->tile[i % 2] + i / 2 * RUN * wide;
    for (int64_t at = first, stop; at < last; at = stop) {
        int64_t page = j->at.table[w->request * j->at.table_row + at / j->page_size], place = at % j->page_size;
        stop = at - place + j->page_size < last ? at - place + j->page_size : last;
        if (page < 0 || page >= j->pages) j->failed = 1;
        for (int side = 0; side < 2 && !j->failed; side++) {
            const char *from = j->held[side] + page * j->page + head * j->page_head + place * row;
            char *to = w->tile[side] + (at - tile) * wide;
            for (int64_t i = (at - tile) / RUN; in_place && i * RUN < stop - tile; i++)
                w->run[side][i] = from + (tile + i * RUN - at) * row;
            int64_t count = in_place ? 0 : dense ? 1 : stop - at, n = dense ? j->size * (stop - at) : j->size;
            for (int64_t i = 0; i < count; i++)
                if (same) memcpy(to + i * wide, from + i * row, (size_t)(n * w->unit));
                else widen(from + i * row, j->stored, n, (REAL *)(to + i * wide));
            if (j->stored >= INT8)
                widen(j->scales[side] + page * j->scale_page + head * j->scale_head + place * 4, F32, stop - at,
                      w->scale[side] + at - tile);
        }
    }
}

/* Ask for some lines of what will be read soon: pages lie anywhere, so the processor does not foresee them, and it takes
 * only so many questions at a time without standing still. */
INLINE void ask(View *w, int64_t lines) {
    while (lines > 0 && w->waiting) {
        Ahead *a = w->ahead + w->waiting - 1;
        int64_t n = a->lines < lines ? a->lines : lines;
        for (int64_t i = 0; i < n; i++) __builtin_prefetch(a->at + i * 64, 0, 2);
        a->at += n * 64, a->lines -= n, lines -= n;
        if (!a->lines) w->waiting--;
    }
}

/* Keys and values of `request` in a tile that ends before `last` are the next to be asked for; keys first. */
static void foresee(const Job *j, View *w, int64_t request, int64_t head, int64_t tile, int64_t last) {
    int64_t row = j->size * bytes_of(j->stored), lines = 0;
    if (last > tile + TILE) last = tile + TILE;
    w->waiting = 0;
    for (int side = 1; side >= 0; side--)
        for (int64_t at = tile, stop; at < last; at = stop) {
            int64_t page = j->at.table[request * j->at.table_row + at / j->page_size], place = at % j->page_size;
            stop = at - place + j->page_size < last ? at - place + j->page_size : last;
            if (page < 0 || page >= j->pages) return;
            const char *from = j->held[side] + page * j->page + head * j->page_head + place * row;
            Ahead *a = w->ahead + w->waiting++;
            a->at = from, a->lines = ((stop - at) * row + 63) / 64, lines += a->lines;
        }
    w->quantum = (lines + TILE - 1) / TILE;
}

#if SIZE == 4
typedef uint16_t halves __attribute__((vector_size(WIDTH / 2), aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(WIDTH), aligned(2), may_alias));

INLINE vec numbers(const char *at, int half) {
    return half ? (vec)(__builtin_convertvector(*(const halves *)at, uvec) << 16) : AT(at);
}

/* To each lane the products of two bfloat16 values. */
INLINE vec pairs(vec sum, const char *a, const char *b) {
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#else
    uvec x = *(const uvec *)a, y = *(const uvec *)b;
    return sum + (vec)(x << 16) * (vec)(y << 16) + (vec)(x & 0xffff0000) * (vec)(y & 0xffff0000);
#endif
}
#else
INLINE vec numbers(const char *at, int half) { return AT(at + 0 * half); }
INLINE vec pairs(vec sum, const char *a, const char *b) { return a == b ? sum : sum; } /* not called */
#endif

/* Products of one query with LANES keys: each key's in its own vector, then all vectors summed by one tree. */
#define PAIRS(w) for (int i = 0; i < LANES / 2 / w; i++) \
    a[i] = PICK(a[2 * i], a[2 * i + 1], LEFT, w) + PICK(a[2 * i], a[2 * i + 1], RIGHT, w);
INLINE vec products(const char *q, const char *k, int64_t bytes, int half) {
    vec a[LANES] = {0};
    for (int64_t h = 0; h < bytes; h += WIDTH)
        for (int i = 0; i < LANES; i++)
            if (half) a[i] = pairs(a[i], q + h, k + i * bytes + h);
            else a[i] += AT(q + h) * AT(k + i * bytes + h);
    STAGES(PAIRS)
    return a[0];
}

/* One row's weights of keys [low, high) of a tile, 0 for others; returns what its sums so far are to be multiplied by. */
INLINE REAL weigh(View *w, int64_t row, REAL *p, REAL *m, REAL *l, int64_t low, int64_t high, int half) {
    int64_t wide = w->padded * (half ? 2 : SIZE);
    vec top = (vec){0} + *m, sum = {0};
    for (int64_t c = 0; c < TILE; c += LANES) {
        vec s = {0};
        ask(w, 4 * w->quantum);
        if (c < high && c + LANES > low)
            s = products(w->q + row * wide, w->run[0][c / RUN] + c % RUN * wide, wide, half);
        AT(p + c) = s * AT(w->scale[0] + c);
    }
    for (int64_t c = 0; c < TILE; c++) p[c] = c >= low && c < high ? p[c] : -(REAL)INFINITY;
    for (int64_t c = 0; c < TILE; c += LANES) top = larger(top, AT(p + c));
    REAL most = largest(top), factor = power1(*m - most);
    for (int64_t c = 0; c < TILE; c += LANES) {
        vec x = power(AT(p + c) - most);
        sum += x;
        AT(p + c) = x * AT(w->scale[1] + c);
    }
    *l = *l * factor + total(sum), *m = most;
    return factor;
}

/* Add values [low, high) of a tile to the sums of `rows` rows, `wide` vectors at a time. */
INLINE void add_block(View *w, REAL *sums, const REAL *factor, int64_t low, int64_t high, int64_t h, int rows,
                      int wide, int half) {
    int64_t unit = half ? 2 : SIZE;
    vec a[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < wide; i++) a[r][i] = AT(sums + r * w->padded + h + i * LANES) * factor[r];
    for (int64_t c = low, stop; c < high; c = stop) {
        stop = c + 4 < high ? c + 4 : high;
        ask(w, 4 * w->quantum);
        for (; c < stop; c++)
            for (int i = 0; i < wide; i++) {
                vec x = numbers(w->run[1][c / RUN] + (c % RUN * w->padded + h + i * LANES) * unit, half);
                for (int r = 0; r < rows; r++) a[r][i] += x * w->scores[r * TILE + c];
            }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < wide; i++) AT(sums + r * w->padded + h + i * LANES) = a[r][i];
}

INLINE void add_values(View *w, REAL *sums, const REAL *factor, int64_t low, int64_t high, int rows, int half) {
    int64_t h = 0;
    for (; h + 4 * LANES <= w->padded; h += 4 * LANES) add_block(w, sums, factor, low, high, h, rows, 4, half);
    for (; h < w->padded; h += LANES) add_block(w, sums, factor, low, high, h, rows, 1, half);
}

/* One tile, loaded, for all rows of a unit; `seen` is the position of its first query. */
INLINE void attend_tile(const Job *j, View *w, REAL *state, int64_t tile, int64_t seen, int half) {
    int64_t share = j->heads / j->kv_heads;
    REAL *m = state + w->rows * w->padded, *l = m + w->rows, factor[ROWS];
    for (int64_t row = 0; row < w->rows; row += ROWS) {
        int64_t n = w->rows - row < ROWS ? w->rows - row : ROWS, low = TILE, high = 0;
        if (seen + (row + n - 1) / share < tile) continue;
        for (int64_t i = 0; i < n; i++) {
            int64_t at = seen + (row + i) / share - tile, end = at < 0 ? 0 : at < TILE ? at + 1 : TILE;
            int64_t begin = j->window && at >= j->window ? at - j->window + 1 : 0;
            REAL *p = w->scores + i * TILE;
            factor[i] = weigh(w, row + i, p, m + row + i, l + row + i, begin, end, half);
            low = begin < low ? begin : low, high = end > high ? end : high;
        }
        REAL *sums = state + row * w->padded;
        if (n == 1) add_values(w, sums, factor, low, high, 1, half);
        else if (n == 2) add_values(w, sums, factor, low, high, 2, half);
        else if (n == 3) add_values(w, sums, factor, low, high, 3 % (ROWS + 1), half);
        else add_values(w, sums, factor, low, high, ROWS, half);
    }
}

static void attend_reals(const Job *j, View *w, REAL *state, int64_t tile, int64_t seen) {
    attend_tile(j, w, state, tile, seen, 0);
}

static void attend_halves(const Job *j, View *w, REAL *state, int64_t tile, int64_t seen) {
    attend_tile(j, w, state, tile, seen, SIZE == 4);
}

/* From the last, which tends to be the longest; requests are looked for from `request` on. */
static Unit locate(const Shared *s, int64_t request, int64_t index) {
    int64_t unit = s->count - 1 - index, skipped;
    while (s->cuts[request].first_unit > unit) request--;
    Cut c = s->cuts[request];
    Unit u = {request, (unit - c.first_unit) % s->job->kv_heads, (unit - c.first_unit) / s->job->kv_heads};
    skipped = c.apart ? 0 : u.piece * c.block;
    u.start = s->job->at.starts[request] + skipped, u.seen = c.before + skipped;
    u.queries = c.queries - skipped < c.block ? c.queries - skipped : c.block;
    u.begin = c.apart ? c.begin + u.piece : c.begin, u.end = c.apart ? u.begin + 1 : c.end;
    return u;
}

/* The positions of a split that a unit sees. */
INLINE int64_t first_of(const Job *j, const Unit *u, int64_t split) {
    int64_t first = split * SPLIT;
    return j->window && u->seen - j->window + 1 > first ? u->seen - j->window + 1 : first;
}

INLINE int64_t last_of(const Unit *u, int64_t split) {
    return (split + 1) * SPLIT < u->seen + u->queries ? (split + 1) * SPLIT : u->seen + u->queries;
}

static void foresee_split(const Job *j, View *w, const Unit *u, int64_t split) {
    foresee(j, w, u->request, u->head, first_of(j, u, split) / TILE * TILE, last_of(u, split));
}

/* One split of a unit; what comes after it is asked for meanwhile. */
static void attend_split(const Shared *s, View *w, const Unit *u, int64_t split, REAL *into, int64_t following) {
    Job *j = s->job;
    int64_t first = first_of(j, u, split), last = last_of(u, split);
    memset(into, 0, sizeof(REAL) * (size_t)w->state);
    for (int64_t r = 0; r < w->rows; r++) into[w->rows * w->padded + r] = LOW;
    for (int64_t tile = first / TILE * TILE; tile < last; tile += TILE) {
        ask(w, INT64_MAX);
        load(j, w, u->head, tile, first > tile ? first : tile, last < tile + TILE ? last : tile + TILE);
        if (tile + TILE < last) foresee(j, w, u->request, u->head, tile + TILE, last);
        else if (split + 1 < u->end) foresee_split(j, w, u, split + 1);
        else if (following >= 0) {
            Unit next = locate(s, u->request, following);
            foresee_split(j, w, &next, next.begin);
        }
        (w->half ? attend_halves : attend_reals)(j, w, into, tile, u->seen);
    }
}

static void attend(Shared *s, View *w, int64_t index, int64_t following) {
    Job *j = s->job;
    Unit u = locate(s, w->request, index);
    Cut c = s->cuts[w->request = u.request];
    if (s->alone) write_head(j, w, u.start, u.head, 0), write_head(j, w, u.start, u.head, 1);
    w->rows = u.queries * c.share, w->state = w->rows * (w->padded + 2);
    for (int64_t r = 0; r < w->rows; r++) {
        const char *from = j->q + (u.start + r / c.share) * j->q_token + (u.head * c.share + r % c.share) * j->q_head;
        REAL *to = (REAL *)(w->q + r * w->padded * w->unit);
        if (w->half) memcpy(to, from, (size_t)(j->size * w->unit));
        else widen(from, j->type, j->size, to);
        for (int64_t i = 0; i < j->size && !w->half; i++) to[i] *= (REAL)j->scale;
    }
    REAL *parts = s->parts + c.room + u.head * (c.end - c.begin) * w->state;
    REAL *sums = c.apart ? parts + u.piece * w->state : w->total;
    for (int64_t split = u.begin; split < u.end; split++) {
        REAL *into = split > u.begin ? w->part : sums;
        attend_split(s, w, &u, split, into, following);
        if (split > u.begin) merge(w, sums, into);
    }
    if (c.apart) { /* whoever comes last merges, in the same order as always */
        int32_t *done = s->done + w->request * j->kv_heads + u.head;
        if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) < c.end - c.begin) return;
        sums = parts;
        for (int64_t split = 1; split < c.end - c.begin; split++) merge(w, sums, parts + split * w->state);
    }
    for (int64_t r = 0; r < w->rows; r++) {
        int64_t to = (u.start + r / c.share) * j->heads + u.head * c.share + r % c.share;
        for (int64_t i = 0; i < j->size; i++) sums[r * w->padded + i] /= sums[w->rows * (w->padded + 1) + r];
        narrow(sums + r * w->padded, j->type, j->size, j->out + to * j->size * bytes_of(j->type));
    }
}

static void *take(void *argument) {
    Shared *s = argument;
    int64_t rows = s->rows, half = is_half(s->job), h = padded_size(s->job);
    REAL *at = calloc((size_t)(h * (3 * rows + 2 * TILE + 1) + 4 * rows + (ROWS + 2) * TILE), sizeof(REAL));
    View w = {.padded = h, .request = s->job->at.requests - 1, .half = half, .unit = half ? 2 : SIZE, .total = at};
    w.part = w.total + rows * (h + 2), w.wide = w.part + rows * (h + 2), w.q = (char *)(w.wide + h);
    w.tile[0] = w.q + rows * h * SIZE, w.tile[1] = w.tile[0] + TILE * h * SIZE;
    w.scale[0] = (REAL *)w.tile[1] + TILE * h, w.scale[1] = w.scale[0] + TILE, w.scores = w.scale[1] + TILE;
    if (!at) s->job->failed = 2;
    for (int64_t i = 0; at && i < 2 * TILE; i++) w.scale[0][i] = half && i < TILE ? (REAL)s->job->scale : 1;
    for (int64_t i, stop; at && (i = __atomic_fetch_add(&s->next, s->grab, __ATOMIC_RELAXED)) < s->count;)
        for (stop = i + s->grab < s->count ? i + s->grab : s->count; i < stop; i++)
            s->work(s, &w, i, i + 1 < stop ? i + 1 : -1);
    free(at);
    return 0;
}

/* Do all units. Without OpenMP threads are started each time: a pool would not survive a fork. */
static void share_out(Shared *s) {
    int threads = (int)(s->job->at.threads < s->count ? s->job->at.threads : s->count);
    s->next = 0, s->grab = s->count / (8 * threads) + 1;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    take(s);
#else
    pthread_t started[64];
    int n = 0;
    while (n < threads - 1 && n < 64 && !pthread_create(started + n, 0, take, s)) n++;
    take(s);
    while (n > 0) pthread_join(started[--n], 0);
#endif
}

/* Write the new keys and values, then attend; returns `failed`. */
int paged_attention(Job *j) {
    int64_t padded = padded_size(j), share = j->heads / j->kv_heads, units = 0, room = 0;
    int64_t most = 1;
    int alone = 1;
    Cut *cuts = malloc((size_t)j->at.requests * sizeof(Cut));
    int32_t *done = calloc((size_t)(j->at.requests * j->kv_heads), sizeof(int32_t));
    for (int64_t r = 0; cuts && r < j->at.requests; r++) {
        Cut c = {share, share > BLOCK ? 1 : BLOCK / share, j->at.starts[r + 1] - j->at.starts[r]};
        c.before = j->at.context[r] - c.queries, c.first_unit = units, c.room = room;
        c.begin = j->window && c.before >= j->window ? (c.before - j->window + 1) / SPLIT : 0;
        c.end = (j->at.context[r] - 1) / SPLIT + 1, c.apart = c.queries <= c.block && c.end - c.begin > 1;
        units += j->kv_heads * (c.apart ? c.end - c.begin : (c.queries + c.block - 1) / c.block);
        room += c.apart * (c.end - c.begin) * j->heads * c.queries * (padded + 2);
        most = c.queries > most ? c.queries < c.block ? c.queries : c.block : most;
        alone = alone && c.queries == 1 && !c.apart;
        cuts[r] = c;
    }
    REAL *parts = malloc((size_t)(room + 1) * sizeof(REAL));
    Shared s = {j, write_tokens, (j->at.tokens + RUN - 1) / RUN, 0, 1, cuts, done, parts, most * share, alone};
    j->failed = cuts && done && parts ? 0 : 2;
    if (!j->failed && !alone) share_out(&s);
    s.work = attend, s.count = units;
    if (!j->failed) share_out(&s);
    free(cuts), free(done), free(parts);
    return (int)j->failed;
}

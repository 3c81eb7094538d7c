// SHA-256 of two streams at once, with the processor's own instructions (SHA-NI).
//
// Each round needs the result of the one before, for which the processor waits; the rounds of a second stream fit into
// that time. A state is kept as the instructions want it: words F E B A H G D C.

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

// Take up `blocks` blocks of 64 bytes of each of N streams.
#define COMPRESS(NAME, N)                                                                                      \
    __attribute__((target("sha,sse4.1"))) static void NAME(                                                    \
        uint32_t *const *state, const uint8_t *const *data, size_t blocks) {                                   \
        const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bULL, 0x0405060700010203ULL);                     \
        __m128i a[N], b[N], m[N][4];                                                                           \
        for (int n = 0; n < N; n++) {                                                                          \
            a[n] = _mm_loadu_si128((const __m128i *)state[n]);                                                 \
            b[n] = _mm_loadu_si128((const __m128i *)(state[n] + 4));                                           \
        }                                                                                                      \
        for (size_t at = 0; at < 64 * blocks; at += 64) {                                                      \
            __m128i a0[N], b0[N];                                                                              \
            for (int n = 0; n < N; n++) {                                                                      \
                a0[n] = a[n];                                                                                  \
                b0[n] = b[n];                                                                                  \
                for (int i = 0; i < 4; i++)                                                                    \
                    m[n][i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data[n] + at + 16 * i)), swap); \
            }                                                                                                  \
            UNROLLED for (int i = 0; i < 16; i++) {                                                            \
                const __m128i k = _mm_loadu_si128((const __m128i *)(K + 4 * i));                               \
                UNROLLED for (int n = 0; n < N; n++) {                                                         \
                    if (i >= 4) {                                                                              \
                        __m128i w = _mm_sha256msg1_epu32(m[n][i & 3], m[n][(i + 1) & 3]);                      \
                        w = _mm_add_epi32(w, _mm_alignr_epi8(m[n][(i + 3) & 3], m[n][(i + 2) & 3], 4));        \
                        m[n][i & 3] = _mm_sha256msg2_epu32(w, m[n][(i + 3) & 3]);                              \
                    }                                                                                          \
                    const __m128i x = _mm_add_epi32(m[n][i & 3], k);                                           \
                    b[n] = _mm_sha256rnds2_epu32(b[n], a[n], x);                                               \
                    a[n] = _mm_sha256rnds2_epu32(a[n], b[n], _mm_shuffle_epi32(x, 0x0e));                      \
                }                                                                                              \
            }                                                                                                  \
            for (int n = 0; n < N; n++) {                                                                      \
                a[n] = _mm_add_epi32(a[n], a0[n]);                                                             \
                b[n] = _mm_add_epi32(b[n], b0[n]);                                                             \
            }                                                                                                  \
        }                                                                                                      \
        for (int n = 0; n < N; n++) {                                                                          \
            _mm_storeu_si128((__m128i *)state[n], a[n]);                                                       \
            _mm_storeu_si128((__m128i *)(state[n] + 4), b[n]);                                                 \
        }                                                                                                      \
    }

#define UNROLLED _Pragma("GCC unroll 16")
COMPRESS(one, 1)
COMPRESS(two, 2)

// Blocks of two streams, side by side as far as both go.
void sha256_two(uint32_t *state0, const uint8_t *data0, size_t blocks0,
                uint32_t *state1, const uint8_t *data1, size_t blocks1) {
    const size_t both = blocks0 < blocks1 ? blocks0 : blocks1;
    uint32_t *states[2] = {state0, state1};
    const uint8_t *data[2] = {data0, data1};
    two(states, data, both);
    data[0] += 64 * both;
    data[1] += 64 * both;
    one(states, data, blocks0 - both);
    one(states + 1, data + 1, blocks1 - both);
}

// Whether this processor has the instructions.
int sha256_can(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1) || !(c & bit_SSSE3))
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
}

#else

void sha256_two(uint32_t *state0, const uint8_t *data0, size_t blocks0,
                uint32_t *state1, const uint8_t *data1, size_t blocks1) {}

int sha256_can(void) { return 0; }

#endif

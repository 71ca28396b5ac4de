// The two loops of a ConvMixer training step that PyTorch's CPU kernels leave slow.
//
//   depthwise_weight_grad   gradient of a depthwise k x k convolution's weight and bias
//   act_norm_forward        batch-norm of an activation, plus an optional shortcut, in two passes
//   act_norm_backward       its gradient, in two passes
//
// Activations are channels-last, [rows, channels] with rows = images x height x width, in fp32 or bf16. Everything is
// computed in fp32, totals over rows are kept in fp64. `channels` is a multiple of 16.
// GCC's and Clang's vector types stand for the registers, so one text serves AVX-512, AVX2 and NEON.
// native.py builds this file at first use.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Floats in a vector register, and how many registers may hold sums.
#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 27;
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 11;
#else
constexpr int LANES = 4, SUMS = 11;
#endif
typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));

struct bf16 {
    uint16_t bits;
};

inline f32 splat(float v) { return f32{} + v; }

inline f32 load(const float *p) {
    f32 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline f32 load(const bf16 *p) {
#ifdef __AVX512F__  // GCC 12 makes two conversions of the general form
    return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    u16 v;
    std::memcpy(&v, p, sizeof v);
    return (f32)(__builtin_convertvector(v, u32) << 16);
#endif
}

inline void store(float *p, f32 v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16 *p, f32 v) {  // rounds to nearest even; a NaN stays one
#ifdef __AVX512BF16__
    const auto half = _mm512_cvtneps_pbh((__m512)v);
#else
    u32 bits = (u32)v;
    bits = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : u32{} + 0x7fc0;
    const auto half = __builtin_convertvector(bits, u16);
#endif
    std::memcpy(p, &half, sizeof half);
}

// ---- depthwise weight gradient ----
// dW[c, r, k] = sum over n, h, w of g[n, h, w, c] * x[n, h + r - pad, w + k - pad, c].
// One image and LANES channels at a time are copied into fp32 tiles, x with its zero border. They stay in the cache
// while R x K taps at once are summed in registers, as many as the registers hold.

template <int R, int K>
void taps(const float *x, const float *g, int64_t H, int64_t W, int64_t x_width, float *sums, int64_t row) {
    f32 a[R][K];
    for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k++) a[r][k] = load(sums + (r * row + k) * LANES);
    for (int64_t h = 0; h < H; h++)
        for (int64_t w = 0; w < W; w++) {
            const f32 gv = load(g + (h * W + w) * LANES);
            const float *xv = x + (h * x_width + w) * LANES;
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
#pragma GCC unroll 16
                for (int k = 0; k < K; k++) a[r][k] += gv * load(xv + (r * x_width + k) * LANES);
        }
    for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k++) store(sums + (r * row + k) * LANES, a[r][k]);
}

template <int K>
void all_taps(const float *x, const float *g, int64_t H, int64_t W, int64_t x_width, float *sums) {
    constexpr int R = K * K <= SUMS ? K : 2 * K > SUMS ? 1 : SUMS / K, whole = K - K % R;
    for (int r = 0; r < whole; r += R) taps<R, K>(x + r * x_width * LANES, g, H, W, x_width, sums + r * K * LANES, K);
    for (int r = whole; r < K; r++) taps<1, K>(x + r * x_width * LANES, g, H, W, x_width, sums + r * K * LANES, K);
}

void all_taps(int64_t K, const float *x, const float *g, int64_t H, int64_t W, int64_t x_width, float *sums) {
    switch (K) {
        case 1: return all_taps<1>(x, g, H, W, x_width, sums);
        case 2: return all_taps<2>(x, g, H, W, x_width, sums);
        case 3: return all_taps<3>(x, g, H, W, x_width, sums);
        case 4: return all_taps<4>(x, g, H, W, x_width, sums);
        case 5: return all_taps<5>(x, g, H, W, x_width, sums);
        case 6: return all_taps<6>(x, g, H, W, x_width, sums);
        case 7: return all_taps<7>(x, g, H, W, x_width, sums);
        case 8: return all_taps<8>(x, g, H, W, x_width, sums);
        case 9: return all_taps<9>(x, g, H, W, x_width, sums);
    }
    for (int64_t r = 0; r < K; r++) {
        const float *xr = x + r * x_width * LANES;
        float *row = sums + r * K * LANES;
        int64_t k = 0;
        for (; k + 8 <= K; k += 8) taps<1, 8>(xr + k * LANES, g, H, W, x_width, row + k * LANES, K);
        for (; k < K; k++) taps<1, 1>(xr + k * LANES, g, H, W, x_width, row + k * LANES, K);
    }
}

template <class T>
void weight_grad(int threads, const T *x, const T *g, float *dw, float *db, int64_t N, int64_t C, int64_t H, int64_t W,
                 int64_t K) {
    const int64_t pad = (K - 1) / 2, x_width = W + K - 1, blocks = C / LANES, sums = (K * K + 1) * LANES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> totals(blocks * sums), x_tile((H + K - 1) * x_width * LANES), g_tile(H * W * LANES);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++)
            for (int64_t b = 0; b < blocks; b++) {
                f32 bias = {};
                for (int64_t h = 0; h < H; h++)
                    for (int64_t w = 0; w < W; w++) {
                        const int64_t i = ((n * H + h) * W + w) * C + b * LANES;
                        const f32 gv = load(g + i);
                        bias += gv;
                        store(&g_tile[(h * W + w) * LANES], gv);
                        store(&x_tile[((h + pad) * x_width + w + pad) * LANES], load(x + i));
                    }
                float *total = &totals[b * sums];
                all_taps(K, x_tile.data(), g_tile.data(), H, W, x_width, total);
                store(total + K * K * LANES, load(total + K * K * LANES) + bias);
            }
#pragma omp critical
        for (int64_t c = 0; c < C; c++) {
            const float *total = &totals[c / LANES * sums + c % LANES];
            for (int64_t t = 0; t < K * K; t++) dw[c * K * K + t] += total[t * LANES];
            db[c] += total[K * K * LANES];
        }
    }
}

// ---- activation ----

// Normal distribution function and density on |z| <= 5 as polynomials in u = 2 z^2 / 25 - 1 (degree 12, interpolated at
// Chebyshev nodes, highest power first): (Phi(z) - 1/2) / z and phi(z). Multiply-adds only, no exp and no division;
// GELU is then right to 2e-6 and its slope to 2e-5, where bf16 rounds to 4e-3 of the value.
constexpr int DEGREE = 12;
constexpr float PHI_INTEGRAL[DEGREE + 1] = {
    7.059529889e-04f, -1.674031024e-03f, 1.462631626e-03f, -2.534322441e-03f, 6.667809095e-03f,
    -1.129974332e-02f, 1.628706977e-02f, -2.321634442e-02f, 3.146487102e-02f, -4.045071080e-02f,
    5.151894316e-02f, -7.029593736e-02f, 1.413637996e-01f};
constexpr float PHI[DEGREE + 1] = {
    1.129975263e-02f, -2.410976775e-02f, 1.160084270e-02f, -1.254857332e-02f, 4.930810258e-02f,
    -6.850092113e-02f, 6.231001019e-02f, -5.773485824e-02f, 4.914722592e-02f, -3.177726641e-02f,
    1.503522042e-02f, -4.797560163e-03f, 7.701397990e-04f};


inline f32 horner(const float *coefficients, f32 u) {
    f32 sum = splat(coefficients[0]);
#pragma GCC unroll 16
    for (int i = 1; i <= DEGREE; i++) sum = sum * u + coefficients[i];
    return sum;
}

struct Activated {
    f32 value, slope;
};

struct Relu {
    static Activated at(f32 z) { return {z < 0.f ? f32{} : z, z > 0.f ? splat(1.f) : f32{}}; }
};

struct Gelu {  // the exact one, z Phi(z)
    static Activated at(f32 z) {
        f32 inside = z > 5.f ? splat(5.f) : z;
        inside = inside < -5.f ? splat(-5.f) : inside;
        const f32 u = inside * inside * 0.08f - 1.f;
        const f32 cdf = 0.5f + inside * horner(PHI_INTEGRAL, u);
        return {z * cdf, cdf + inside * horner(PHI, u)};
    }
};

// ---- activation, then batch-norm with the batch's own statistics; bf16 only ----

constexpr int64_t CHUNK = 32;  // rows summed in fp32 before they join an fp64 total

// Sums over rows, for each channel, of the two vectors that `terms(row x channels + channel, channel)` gives.
template <class Terms>
std::vector<double> column_sums(int threads, int64_t rows, int64_t C, Terms terms) {
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    std::vector<double> totals(2 * C);
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> mine(2 * C);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < chunks; k++) {
            const int64_t end = (k + 1) * CHUNK < rows ? (k + 1) * CHUNK : rows;
            for (int64_t c = 0; c < C; c += LANES) {
                f32 first = {}, second = {};
                for (int64_t r = k * CHUNK; r < end; r++) terms(r * C + c, c, first, second);
                for (int l = 0; l < LANES; l++) {
                    mine[c + l] += first[l];
                    mine[C + c + l] += second[l];
                }
            }
        }
#pragma omp critical
        for (int64_t c = 0; c < 2 * C; c++) totals[c] += mine[c];
    }
    return totals;
}

// y = gamma (a - mean) / sqrt(var + eps) + beta [+ shortcut] with a = act(z); writes mean and (biased) var too.
template <class Act>
void forward(int threads, const bf16 *z, const bf16 *shortcut, const float *gamma, const float *beta, bf16 *y, float *mean,
             float *var, int64_t rows, int64_t C, double eps) {
    const auto totals = column_sums(threads, rows, C, [=](int64_t i, int64_t, f32 &first, f32 &second) {
        const f32 a = Act::at(load(z + i)).value;
        first += a;
        second += a * a;
    });
    std::vector<float> scale(C), shift(C);
    for (int64_t c = 0; c < C; c++) {
        const double m = totals[c] / rows, v = totals[C + c] / rows - m * m;
        mean[c] = m;
        var[c] = v < 0 ? 0 : v;
        scale[c] = gamma[c] / std::sqrt(var[c] + eps);
        shift[c] = beta[c] - m * scale[c];
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < C; c += LANES) {
            const int64_t i = r * C + c;
            f32 v = Act::at(load(z + i)).value * load(&scale[c]) + load(&shift[c]);
            if (shortcut) v += load(shortcut + i);
            store(y + i, v);
        }
}

// With xhat = (a - mean) rstd: dgamma = sum dy xhat, dbeta = sum dy,
// dz = act'(z) gamma rstd (dy - dbeta / rows - xhat dgamma / rows), written as act'(z) (A dy + B a + D).
template <class Act>
void backward(int threads, const bf16 *z, const bf16 *dy, const float *gamma, const float *mean, const float *var, bf16 *dz,
              float *dgamma, float *dbeta, int64_t rows, int64_t C, double eps) {
    const auto totals = column_sums(threads, rows, C, [=](int64_t i, int64_t c, f32 &first, f32 &second) {
        const f32 d = load(dy + i);
        first += d;
        second += d * (Act::at(load(z + i)).value - load(mean + c));
    });
    std::vector<float> A(C), B(C), D(C);
    for (int64_t c = 0; c < C; c++) {
        const double rstd = 1 / std::sqrt(var[c] + eps), a = gamma[c] * rstd, b = -a * rstd * rstd * totals[C + c] / rows;
        dbeta[c] = totals[c];
        dgamma[c] = totals[C + c] * rstd;
        A[c] = a;
        B[c] = b;
        D[c] = -a * totals[c] / rows - b * mean[c];
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < C; c += LANES) {
            const int64_t i = r * C + c;
            const Activated a = Act::at(load(z + i));
            store(dz + i, (load(&A[c]) * load(dy + i) + load(&B[c]) * a.value + load(&D[c])) * a.slope);
        }
}

}  // namespace

extern "C" {

void depthwise_weight_grad(int is_bf16, int threads, const void *x, const void *g, float *dw, float *db, int64_t N,
                           int64_t C, int64_t H, int64_t W, int64_t K) {
    if (is_bf16) weight_grad(threads, (const bf16 *)x, (const bf16 *)g, dw, db, N, C, H, W, K);
    else weight_grad(threads, (const float *)x, (const float *)g, dw, db, N, C, H, W, K);
}

void act_norm_forward(int gelu, int threads, const bf16 *z, const bf16 *shortcut, const float *gamma, const float *beta,
                      bf16 *y, float *mean, float *var, int64_t rows, int64_t C, double eps) {
    (gelu ? forward<Gelu> : forward<Relu>)(threads, z, shortcut, gamma, beta, y, mean, var, rows, C, eps);
}

void act_norm_backward(int gelu, int threads, const bf16 *z, const bf16 *dy, const float *gamma, const float *mean,
                       const float *var, bf16 *dz, float *dgamma, float *dbeta, int64_t rows, int64_t C, double eps) {
    (gelu ? backward<Gelu> : backward<Relu>)(threads, z, dy, gamma, mean, var, dz, dgamma, dbeta, rows, C, eps);
}

}  // extern "C"

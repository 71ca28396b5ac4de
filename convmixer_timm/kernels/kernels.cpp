// The loops of a ConvMixer that PyTorch's CPU kernels leave slow.
//
//   depthwise_weight_grad    gradient of a depthwise k x k convolution's weight and bias
//   act_norm                 batch-norm of an activation, plus an optional shortcut, in two passes
//   act_norm_backward        its gradient, in two passes
//   act_norm_inference       the same by a norm's running statistics, in one pass
//   spatial_mixing           depthwise convolution, activation, batch-norm and residual, in two passes
//   spatial_mixing_backward  its gradient, in two passes
//   spatial_mixing_inference the same by a norm's running statistics, in one pass
//
// Activations are channels-last, [rows, channels] with rows = images x height x width, in fp32 or bf16. Everything is
// computed in fp32, only a convolution of bf16 in products of bf16 where the processor has them; totals over rows are kept
// in fp64. Threads' totals join in the threads' order: the same call gives the same bits. `channels` is a multiple of 16.
// GCC's and Clang's vector types stand for the registers, so one text serves AVX-512, AVX2 and NEON.
// build.py builds this file at first use.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <omp.h>
#include <optional>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef __clang__
// Predictive commoning keeps what it has loaded in registers that the sums need: twice the time at kernel size 5 or 9.
#pragma GCC optimize("no-predictive-commoning")
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
typedef double f64 __attribute__((vector_size(8 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));

using Vectors = std::vector<f32>;  // aligned to the registers

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

inline f32 clamp(f32 v, float limit) {
#ifdef __AVX512F__  // GCC 12 makes a comparison and a blend of each half of the general form
    return (f32)_mm512_max_ps((__m512)splat(-limit), _mm512_min_ps((__m512)splat(limit), (__m512)v));
#else
    v = v > limit ? splat(limit) : v;
    return v < -limit ? splat(-limit) : v;
#endif
}

inline void add(double *totals, f32 v) {
    f64 sum;
    std::memcpy(&sum, totals, sizeof sum);
    sum += __builtin_convertvector(v, f64);
    std::memcpy(totals, &sum, sizeof sum);
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

// What each thread of a parallel region works with, made there, so that the memory is near it. Nothing may be thrown out of such
// a region: `check` after it tells of what could not be made.
class Scratch {
    std::atomic<bool> failed{false};

  public:
    template <class Make>
    auto make(Make make) {  // empty in every thread where one of them lacked the memory
        std::optional<decltype(make())> mine;
        try {
            mine.emplace(make());
        } catch (const std::bad_alloc &) {
            failed = true;
        }
#pragma omp barrier
        if (failed) mine.reset();
        return mine;
    }
    void check() const {
        if (failed) throw std::bad_alloc();
    }
};

// ---- depthwise convolution ----
// One image and LANES channels at a time are copied into tiles, with a zero border where the convolution reaches over the edge.
// They stay in the cache meanwhile.

// Also asks for the block of channels that comes next: its rows lie too far apart for a processor to foresee them.
template <class T>
inline f32 load_ahead(const T *p) {
    __builtin_prefetch(p + LANES, 0, 2);
    return load(p);
}

// What a tile has of a feature map in T at each position, and how that is multiplied: the value in fp32 or, where the processor
// multiplies pairs of bf16, the value and its neighbour to the right, as which filters and gradients are rounded too.
template <class T>
struct Packed {
    static constexpr int AT_ONCE = 1;
    static f32 round(f32 v) { return v; }
    static f32 pack(f32 v, f32) { return v; }
    static f32 multiply_add(f32 a, f32 b, f32 sum) { return sum + a * b; }
};

#ifdef __AVX512BF16__
template <>
struct Packed<bf16> {
    static constexpr int AT_ONCE = 2;
    static f32 round(f32 v) { return (f32)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)); }
    static f32 pack(f32 v, f32 right) { return (f32)((u32)v | (u32)right << 16); }
    static f32 multiply_add(f32 a, f32 b, f32 sum) {
        return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif

struct Shape {
    int64_t N, C, H, W, K;

    int64_t blocks() const { return C / LANES; }
    int64_t taps() const { return K * K; }
    int64_t index(int64_t n, int64_t b, int64_t h, int64_t w) const { return ((n * H + h) * W + w) * C + b * LANES; }
};

constexpr int MOST = 8;  // positions of a row that a convolution makes at once

template <class T>
struct Tile {
    int64_t W, width;
    Vectors vectors;
    float *start, *inside;

    // `before`: border rows and columns before the image, of K - 1 in all. One more column takes the pairs that begin before
    // an image without a border there, and what follows is read, for nothing, where a row has less than MOST positions.
    Tile(const Shape &s, int64_t K, int64_t before)
        : W(s.W), width(s.W + K), vectors((s.H + K - 1) * width + 1 + MOST), start((float *)(vectors.data() + 1)),
          inside(start + before * (width + 1) * LANES) {}
    float *at(int64_t h, int64_t w) { return inside + (h * width + w) * LANES; }

    // Sets row h to `value(w)`.
    template <class Value>
    void fill(int64_t h, Value value) {
        f32 left = {};
        for (int64_t w = 0; w < W; w++) {
            const f32 v = Packed<T>::round(value(w));
            if (Packed<T>::AT_ONCE == 1) store(at(h, w), v);
            else store(at(h, w - 1), Packed<T>::pack(left, v));
            left = v;
        }
        if (Packed<T>::AT_ONCE == 2) store(at(h, W - 1), Packed<T>::pack(left, f32{}));
    }
};

// line[w] = start + sum over r, k of filters[r, k] * x[r, w + k] for a row of positions, B of them at once, which share what is
// loaded; the last B may lie over others. K is the filters' size, or 0 for any size.
template <class T, int K, int B>
void convolve_row(const float *x, int64_t width, const float *filters, int64_t size, int64_t W, f32 start, float *line) {
    constexpr int S = Packed<T>::AT_ONCE, STEPS = (K + S - 1) / S;
    const int64_t rows = K ? K : size, steps = (rows + S - 1) / S;
    for (int64_t at = 0; at < W; at += B) {
        const int64_t w = std::max<int64_t>(0, std::min(at, W - B));
        f32 sums[B];
#pragma GCC unroll 16
        for (int j = 0; j < B; j++) sums[j] = start;
        const float *taps = filters;
        for (int64_t r = 0; r < rows; r++) {
            const float *xr = x + (r * width + w) * LANES;
            if constexpr (K > 0) {
                f32 a[STEPS];
#pragma GCC unroll 16
                for (int k = 0; k < STEPS; k++) a[k] = load(taps + k * LANES);
#pragma GCC unroll 32
                for (int i = 0; i < B + S * (STEPS - 1); i++) {
                    const f32 v = load(xr + i * LANES);
#pragma GCC unroll 16
                    for (int k = 0; k < STEPS; k++) {
                        const int j = i - S * k;
                        if (j >= 0 && j < B) sums[j] = Packed<T>::multiply_add(a[k], v, sums[j]);
                    }
                }
            } else {
                for (int64_t k = 0; k < steps; k++) {
                    const f32 a = load(taps + k * LANES);
#pragma GCC unroll 16
                    for (int j = 0; j < B; j++) sums[j] = Packed<T>::multiply_add(a, load(xr + (S * k + j) * LANES), sums[j]);
                }
            }
            taps += steps * LANES;
        }
#pragma GCC unroll 16
        for (int j = 0; j < B; j++) store(line + (w + j) * LANES, sums[j]);
    }
}

// The convolution by filters of size K, a row at a time.
template <class T>
struct Convolution {
    using Row = decltype(&convolve_row<T, 0, MOST>);
    Row row;
    int64_t K;
    Vectors line;

    explicit Convolution(const Shape &s) : row(for_size(s.K, s.W)), K(s.K), line(std::max<int64_t>(s.W, MOST)) {}

    // Row h of what is made of a tile; it stands until the next.
    const float *at(Tile<T> &x, int64_t h, const float *filters, f32 start) {
        row(x.start + h * x.width * LANES, x.width, filters, K, x.W, start, (float *)line.data());
        return (float *)line.data();
    }

  private:
    template <int K>
    static Row for_width(int64_t W) {
        int best = MOST;  // the most at once with the fewest over others
        for (int b = MOST - 1; b > MOST / 2; b--)
            if ((W + b - 1) / b * b < (W + best - 1) / best * best) best = b;
        switch (best) {
            case 5: return convolve_row<T, K, 5>;
            case 6: return convolve_row<T, K, 6>;
            case 7: return convolve_row<T, K, 7>;
        }
        return convolve_row<T, K, MOST>;
    }
    static Row for_size(int64_t K, int64_t W) {
        switch (K) {
            case 3: return for_width<3>(W);
            case 5: return for_width<5>(W);
            case 7: return for_width<7>(W);
            case 9: return for_width<9>(W);
        }
        return for_width<0>(W);
    }
};

// weights[r, k] += sum over h, w of g[h, w] * x[h + r, w + k], R x K of them at once, as many as the registers hold.
template <class T, int R, int K>
void weight_sums(Tile<T> &x, int64_t from, Tile<T> &g, int64_t H, float *weights) {
    f32 a[R][K];
    for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k++) a[r][k] = load(weights + (r * K + k) * LANES);
    const int64_t width = x.width, W = g.W;
    for (int64_t h = 0; h < H; h++) {
        const float *xv = x.start + from + h * width * LANES, *gv = g.at(h, 0);
        for (int64_t w = 0; w < W; w += Packed<T>::AT_ONCE) {
            const f32 v = load(gv + w * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
#pragma GCC unroll 16
                for (int k = 0; k < K; k++)
                    a[r][k] = Packed<T>::multiply_add(v, load(xv + (r * width + k + w) * LANES), a[r][k]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k++) store(weights + (r * K + k) * LANES, a[r][k]);
}

template <class T, int K>
void all_weight_sums(Tile<T> &x, Tile<T> &g, int64_t H, float *weights) {
    constexpr int R = K * K <= SUMS ? K : 2 * K > SUMS ? 1 : SUMS / K, whole = K - K % R;
    int r = 0;
    for (; r < whole; r += R) weight_sums<T, R, K>(x, r * x.width * LANES, g, H, weights + r * K * LANES);
    for (; r < K; r++) weight_sums<T, 1, K>(x, r * x.width * LANES, g, H, weights + r * K * LANES);
}

template <class T>
void all_weight_sums(const Shape &s, Tile<T> &x, Tile<T> &g, float *weights) {
    switch (s.K) {
        case 1: return all_weight_sums<T, 1>(x, g, s.H, weights);
        case 2: return all_weight_sums<T, 2>(x, g, s.H, weights);
        case 3: return all_weight_sums<T, 3>(x, g, s.H, weights);
        case 4: return all_weight_sums<T, 4>(x, g, s.H, weights);
        case 5: return all_weight_sums<T, 5>(x, g, s.H, weights);
        case 6: return all_weight_sums<T, 6>(x, g, s.H, weights);
        case 7: return all_weight_sums<T, 7>(x, g, s.H, weights);
        case 8: return all_weight_sums<T, 8>(x, g, s.H, weights);
        case 9: return all_weight_sums<T, 9>(x, g, s.H, weights);
    }
    for (int64_t r = 0; r < s.K; r++) {
        const int64_t from = r * x.width * LANES;
        float *row = weights + r * s.K * LANES;
        int64_t k = 0;
        for (; k + 8 <= s.K; k += 8) weight_sums<T, 1, 8>(x, from + k * LANES, g, s.H, row + k * LANES);
        for (; k < s.K; k++) weight_sums<T, 1, 1>(x, from + k * LANES, g, s.H, row + k * LANES);
    }
}

// What a thread sums for the gradients of weights and bias, [blocks, taps + 1, LANES].
struct WeightSums {
    Shape s;
    Vectors sums;

    explicit WeightSums(const Shape &s) : s(s), sums(s.blocks() * (s.taps() + 1)) {}
    float *weights(int64_t b) { return (float *)&sums[b * (s.taps() + 1)]; }
    void add_bias(int64_t b, f32 v) { sums[b * (s.taps() + 1) + s.taps()] += v; }
};

// One a thread.
struct AllWeightSums {
    std::vector<std::unique_ptr<WeightSums>> of;

    explicit AllWeightSums(int threads) : of(threads) {}
    WeightSums &mine(const Shape &s) {
        auto &sums = of[omp_get_thread_num()];
        sums = std::make_unique<WeightSums>(s);
        return *sums;
    }
    void write(const Shape &s, float *dw, float *db) {
        for (int64_t c = 0; c < s.C; c++)
            for (int64_t t = 0; t <= s.taps(); t++) {
                float total = 0;
                for (auto &sums : of)
                    if (sums) total += sums->weights(c / LANES)[t * LANES + c % LANES];
                (t < s.taps() ? dw[c * s.taps() + t] : db[c]) = total;
            }
    }
};

template <class T>
void weight_grad(int threads, const T *x, const T *g, float *dw, float *db, const Shape s) {
    AllWeightSums all(threads);
    struct Mine {
        WeightSums &sums;
        Tile<T> x_tile, g_tile;
    };
    Scratch scratch;
#pragma omp parallel num_threads(threads)
    if (auto mine = scratch.make([&] { return Mine{all.mine(s), Tile<T>(s, s.K, (s.K - 1) / 2), Tile<T>(s, 1, 0)}; })) {
        WeightSums &sums = mine->sums;
        Tile<T> &x_tile = mine->x_tile, &g_tile = mine->g_tile;
#pragma omp for collapse(2) schedule(static)
        for (int64_t n = 0; n < s.N; n++)
            for (int64_t b = 0; b < s.blocks(); b++) {
                f32 bias = {};
                for (int64_t h = 0; h < s.H; h++) {
                    g_tile.fill(h, [&](int64_t w) {
                        const f32 gv = load_ahead(g + s.index(n, b, h, w));
                        bias += gv;
                        return gv;
                    });
                    x_tile.fill(h, [&](int64_t w) { return load_ahead(x + s.index(n, b, h, w)); });
                }
                all_weight_sums(s, x_tile, g_tile, sums.weights(b));
                sums.add_bias(b, bias);
            }
    }
    scratch.check();
    all.write(s, dw, db);
}

// ---- activation ----

struct Activated {
    f32 value, slope;
};

// Each has `Exact`, which takes its place where a norm divides by so little that what is wrong would show.
template <class T>
struct Relu {
    using Exact = Relu;
    static Activated at(f32 z) { return {z < 0.f ? f32{} : z, z > 0.f ? splat(1.f) : f32{}}; }
};

// The exact GELU, z Phi(z), as right as the type of the activations asks for.
template <class T>
struct Gelu;

// For bf16: normal distribution function and density on |z| <= 4.5 as polynomials in u = 2 z^2 / 4.5^2 - 1 (degree 8, fitted
// for the least error, highest power first): (Phi(z) - 1/2) / z and phi(z), at the limit 1/2 / 4.5 and 0. Multiply-adds only,
// no exp and no division; right to 4e-5 and its slope to 3e-4, where bf16 rounds to 4e-3 of the value.
constexpr float LIMIT = 4.5f;
constexpr int DEGREE = 8;
constexpr float PHI_INTEGRAL[DEGREE + 1] = {
    3.425182076e-03f, -9.445899166e-03f, 1.215168182e-02f, -1.660224795e-02f, 2.762698755e-02f,
    -4.060165584e-02f, 5.482374877e-02f, -7.716856897e-02f, 1.569018811e-01f};
constexpr float PHI[DEGREE + 1] = {
    4.079324752e-02f, -8.667603135e-02f, 5.601731315e-02f, -3.684263304e-02f, 6.653690338e-02f,
    -6.330211461e-02f, 3.316103294e-02f, -1.218700968e-02f, 2.499298193e-03f};

// Even and odd powers apart: half the steps that wait for the one before.
inline f32 polynomial(const float *coefficients, f32 u) {
    const f32 v = u * u;
    f32 even = splat(coefficients[0]), odd = splat(coefficients[1]);
#pragma GCC unroll 16
    for (int i = 2; i <= DEGREE; i += 2) even = even * v + coefficients[i];
#pragma GCC unroll 16
    for (int i = 3; i < DEGREE; i += 2) odd = odd * v + coefficients[i];
    return even + u * odd;
}

template <int N>
inline f32 powers(const float (&coefficients)[N], f32 v) {  // lowest power first
    f32 sum = splat(coefficients[N - 1]);
#pragma GCC unroll 16
    for (int i = N - 2; i >= 0; i--) sum = sum * v + coefficients[i];
    return sum;
}

// For fp32: Phi(-a) = exp(-a^2 / 2) t g(t) with t = 1 / (1 + 0.23 a), a >= 0, the form of Abramowitz and Stegun 7.1.26;
// g fitted for the least relative error (4e-8). Value and slope are right to 2e-7 of max(1, |z|), also in the tail.
constexpr float TAIL[] = {9.197228540e-02f, 8.829508343e-02f,  1.107239450e-01f, -1.432243333e-02f,
                          2.768910925e-01f, -2.582827262e-01f, 2.814576994e-01f, -7.673496556e-02f};
constexpr float EXP2[] = {1.f,
                          6.931472004e-01f,
                          2.402265111e-01f,
                          5.550339988e-02f,
                          9.618039071e-03f,
                          1.339558400e-03f,
                          1.546561496e-04f};

template <>
struct Gelu<float> {
    using Exact = Gelu;
    static f32 exp2(f32 v) {  // for -126 < v <= 0
        const f32 shifted = v + 12582912.f;  // 1.5 * 2^23: the integer next to v stands in the last bits
        const f32 fraction = powers(EXP2, v - (shifted - 12582912.f));
        return (f32)((u32)fraction + ((u32)shifted << 23));
    }
    static Activated at(f32 z) {
        const f32 inside = clamp(z, 9.f);  // beyond, the tail is 0 next to 1, and its products are subnormal: slow on Intel
        const u32 negative = (u32)((i32)z >> 31), sign = (u32)z & 0x80000000;  // all bits, or the first
        const f32 a = (f32)((u32)inside & 0x7fffffff), bell = exp2(a * a * -0.72134752f);
        const f32 t = 1.f / (1.f + 0.23f * a), tail = bell * (t * powers(TAIL, t));
        const f32 cdf = (f32)((u32)splat(1.f) & ~negative) - (f32)((u32)tail ^ sign);
        return {(f32)((u32)z & ~negative) - a * tail, cdf + inside * bell * 0.39894228f};
    }
};

template <>
struct Gelu<bf16> {
    using Exact = Gelu<float>;
    static Activated at(f32 z) {
        const f32 inside = clamp(z, LIMIT), u = inside * inside * (2 / (LIMIT * LIMIT)) - 1.f;
        const f32 cdf = 0.5f + inside * polynomial(PHI_INTEGRAL, u);
        return {z * cdf, cdf + inside * polynomial(PHI, u)};
    }
};

// ---- activation, then batch-norm with the batch's own statistics ----

constexpr int64_t CHUNK = 32;  // rows summed in fp32 before they join an fp64 total

// Two totals a channel, first and second, summed by each thread for itself.
struct Totals {
    int64_t C;
    std::vector<std::vector<double>> of;

    Totals(int threads, int64_t C) : C(C), of(threads) {}
    std::vector<double> &mine() {
        auto &sums = of[omp_get_thread_num()];
        sums.assign(2 * C, 0);
        return sums;
    }
    std::vector<double> joined() const {
        std::vector<double> totals(2 * C);
        for (auto &sums : of)
            for (size_t c = 0; c < sums.size(); c++) totals[c] += sums[c];
        return totals;
    }
};

// Sums over rows, for each channel, of the two vectors that `terms(row x channels + channel, channel)` adds up.
template <class Terms>
std::vector<double> column_sums(int threads, int64_t rows, int64_t C, Terms terms) {
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    Totals totals(threads, C);
    struct Mine {
        std::vector<double> &sums;
        Vectors part;
    };
    Scratch scratch;
#pragma omp parallel num_threads(threads)
    if (auto mine = scratch.make([&] { return Mine{totals.mine(), Vectors(2 * C / LANES)}; })) {
        std::vector<double> &sums = mine->sums;
        Vectors &part = mine->part;
#pragma omp for schedule(static)
        for (int64_t k = 0; k < chunks; k++) {
            const int64_t end = (k + 1) * CHUNK < rows ? (k + 1) * CHUNK : rows;
            for (auto &v : part) v = f32{};
            for (int64_t r = k * CHUNK; r < end; r++)
                for (int64_t c = 0; c < C; c += LANES) terms(r * C + c, c, part[2 * c / LANES], part[2 * c / LANES + 1]);
            for (int64_t c = 0; c < C; c += LANES) {
                add(&sums[c], part[2 * c / LANES]);
                add(&sums[C + c], part[2 * c / LANES + 1]);
            }
        }
    }
    scratch.check();
    return totals.joined();
}

using Blocks = std::vector<char>;  // of channels, whether something holds for them

// The same sums anew for some blocks of channels.
template <class Terms>
void sum_again(int threads, int64_t rows, int64_t C, const Blocks &which, std::vector<double> &totals, Terms terms) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < C / LANES; b++) {
        if (!which[b]) continue;
        const int64_t c = b * LANES;
        double *firsts = &totals[c], *seconds = &totals[C + c];
        for (int l = 0; l < LANES; l++) firsts[l] = seconds[l] = 0;
        for (int64_t start = 0; start < rows; start += CHUNK) {
            f32 first = {}, second = {};
            for (int64_t r = start; r < rows && r < start + CHUNK; r++) terms(r * C + c, c, first, second);
            add(firsts, first);
            add(seconds, second);
        }
    }
}

// The blocks of channels whose norm makes more of what is wrong in a value or slope than bf16 rounds to: they take the exact
// activation.
template <class Act>
Blocks steep_blocks(const float *gamma, const float *var, int64_t C, double eps) {
    Blocks steep(C / LANES);
    if (std::is_same_v<Act, typename Act::Exact>) return steep;
    for (int64_t c = 0; c < C; c++)
        if (std::abs(gamma[c]) / std::sqrt(var[c] + eps) > 16) steep[c / LANES] = true;
    return steep;
}

// Does `work(activation, row x channels + channel, channel)` everywhere, and once more where it is to be exact: a question in
// the loop itself would cost all of them.
template <class Act, class Work>
void everywhere(int threads, int64_t rows, int64_t C, const Blocks &steep, Work work) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < C; c += LANES) work(Act(), r * C + c, c);
        for (int64_t c = 0; c < C; c += LANES) {
            if (!steep[c / LANES]) continue;
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) work(typename Act::Exact(), r * C + c, c);
        }
    }
}

// mean and (biased) var of a = act(z) from the totals of a - pivot and its square, in fp32: near the pivot it keeps the digits
// that the variance is made of. Blocks of channels that lie far from theirs, and steep ones, are summed once more.
template <class T, class Act>
void statistics(int threads, std::vector<double> totals, std::vector<float> pivot, const T *z, const float *gamma, float *mean,
                float *var, int64_t rows, int64_t C, double eps) {
    Blocks again(C / LANES);
    auto write = [&] {
        for (int64_t c = 0; c < C; c++) {
            const double d = totals[c] / rows, v = totals[C + c] / rows - d * d;
            mean[c] = pivot[c] + d;
            var[c] = v < 0 ? 0 : v;
            if (d * d > 16 * v) again[c / LANES] = true;
        }
    };
    write();
    const Blocks steep = steep_blocks<Act>(gamma, var, C, eps);
    for (int64_t b = 0; b < C / LANES; b++) {
        again[b] |= steep[b];
        if (again[b]) std::memcpy(&pivot[b * LANES], mean + b * LANES, sizeof(f32));
    }
    sum_again(threads, rows, C, again, totals, [&](int64_t i, int64_t c, f32 &first, f32 &second) {
        const f32 d = Act::Exact::at(load(z + i)).value - load(&pivot[c]);
        first += d;
        second += d * d;
    });
    write();
}

// gamma (a - mean) / sqrt(var + eps) + beta with a = act(z).
template <class Act>
struct Norm {
    std::vector<float> scale;
    Blocks steep;
    const float *beta, *mean;

    Norm(const float *gamma, const float *beta, const float *mean, const float *var, int64_t C, double eps)
        : scale(C), steep(steep_blocks<Act>(gamma, var, C, eps)), beta(beta), mean(mean) {
        for (int64_t c = 0; c < C; c++) scale[c] = gamma[c] / std::sqrt(var[c] + eps);
    }
    template <class Activation>
    f32 at(Activation act, f32 z, int64_t c) const {
        return (act.at(z).value - load(mean + c)) * load(&scale[c]) + load(beta + c);
    }
};

// y = the same [+ shortcut].
template <class T, class Act>
void normalise(int threads, const T *z, const T *shortcut, const float *gamma, const float *beta, T *y, const float *mean,
               const float *var, int64_t rows, int64_t C, double eps) {
    const Norm<Act> norm(gamma, beta, mean, var, C, eps);
    everywhere<Act>(threads, rows, C, norm.steep, [&](auto act, int64_t i, int64_t c) {
        f32 v = norm.at(act, load(z + i), c);
        if (shortcut) v += load(shortcut + i);
        store(y + i, v);
    });
}

constexpr int64_t SAMPLES = 16;  // values whose mean the others are summed around

template <class T, class Act>
void forward(int threads, const T *z, const T *shortcut, const float *gamma, const float *beta, T *y, float *mean, float *var,
             int64_t rows, int64_t C, double eps) {
    std::vector<float> pivot(C);
    for (int64_t k = 0; k < SAMPLES; k++)
        for (int64_t c = 0; c < C; c += LANES) {
            const f32 a = Act::at(load(z + k * rows / SAMPLES * C + c)).value;
            store(&pivot[c], load(&pivot[c]) + a * (1.f / SAMPLES));
        }
    const auto totals = column_sums(threads, rows, C, [&](int64_t i, int64_t c, f32 &first, f32 &second) {
        const f32 d = Act::at(load(z + i)).value - load(&pivot[c]);
        first += d;
        second += d * d;
    });
    statistics<T, Act>(threads, totals, pivot, z, gamma, mean, var, rows, C, eps);
    normalise<T, Act>(threads, z, shortcut, gamma, beta, y, mean, var, rows, C, eps);
}

// With xhat = (a - mean) rstd: dgamma = sum dy xhat, dbeta = sum dy,
// dz = act'(z) gamma rstd (dy - dbeta / rows - xhat dgamma / rows), written as act'(z) (A dy + B a + D).
template <class T, class Act>
struct InputGrad {
    std::vector<float> A, B, D;
    Blocks steep;
    const float *mean;

    InputGrad(int threads, const T *z, const T *dy, const float *gamma, const float *mean, const float *var,
              float *dgamma, float *dbeta, int64_t rows, int64_t C, double eps)
        : A(C), B(C), D(C), steep(steep_blocks<Act>(gamma, var, C, eps)), mean(mean) {
        auto terms = [=](auto act) {
            return [=](int64_t i, int64_t c, f32 &first, f32 &second) {
                const f32 d = load(dy + i);
                first += d;
                second += d * (act.at(load(z + i)).value - load(mean + c));
            };
        };
        auto totals = column_sums(threads, rows, C, terms(Act()));
        sum_again(threads, rows, C, steep, totals, terms(typename Act::Exact()));
        for (int64_t c = 0; c < C; c++) {
            const double rstd = 1 / std::sqrt(var[c] + eps), a = gamma[c] * rstd;
            const double b = -a * rstd * rstd * totals[C + c] / rows;
            dbeta[c] = totals[c];
            dgamma[c] = totals[C + c] * rstd;
            A[c] = a;
            B[c] = b;
            D[c] = -a * totals[c] / rows;
        }
    }
    template <class Activation>
    f32 at(Activation act, f32 z, f32 dy, int64_t c) const {
        const Activated a = act.at(z);
        return (load(&A[c]) * dy + load(&B[c]) * (a.value - load(mean + c)) + load(&D[c])) * a.slope;
    }
};

template <class T, class Act>
void backward(int threads, const T *z, const T *dy, const float *gamma, const float *mean, const float *var, T *dz, float *dgamma,
              float *dbeta, int64_t rows, int64_t C, double eps) {
    const InputGrad<T, Act> grad(threads, z, dy, gamma, mean, var, dgamma, dbeta, rows, C, eps);
    everywhere<Act>(threads, rows, C, grad.steep, [&](auto act, int64_t i, int64_t c) {
        store(dz + i, grad.at(act, load(z + i), load(dy + i), c));
    });
}

// ---- depthwise convolution, activation, batch-norm [and residual] as one ----
// Forwards the convolution's pass over memory takes the totals that the norm needs. Backwards the gradient of the
// convolution's output lives in a tile only: both convolutions that need it are made there.

// Filters [C, K, K] as [blocks, K, taps of a row, LANES], packed as tiles are; on request turned by 180 degrees.
template <class T>
struct Filters {
    int64_t each;  // of a block
    Vectors vectors;

    Filters(const float *weight, const Shape &s, bool turned) {
        constexpr int S = Packed<T>::AT_ONCE;
        const int64_t steps = (s.K + S - 1) / S;
        each = s.K * steps;
        vectors.resize(s.blocks() * each);
        for (int64_t b = 0; b < s.blocks(); b++)
            for (int64_t r = 0; r < s.K; r++)
                for (int64_t k = 0; k < s.K; k += S) {
                    auto tap = [&](int64_t k) {
                        f32 v = {};
                        const int64_t t = turned ? s.taps() - 1 - (r * s.K + k) : r * s.K + k;
                        for (int l = 0; l < LANES && k < s.K; l++) v[l] = weight[(b * LANES + l) * s.taps() + t];
                        return Packed<T>::round(v);
                    };
                    vectors[b * each + r * steps + k / S] = Packed<T>::pack(tap(k), tap(k + 1));
                }
    }
    const float *of(int64_t b) const { return (const float *)&vectors[b * each]; }
};

// Mean of act of the convolution at some positions, of images from first to last, for each channel.
template <class T, class Act>
std::vector<float> sampled(const T *x, const float *weight, const float *bias, const Shape &s) {
    const Filters<float> filters(weight, s, false);
    std::vector<float> out(s.C);
    const int64_t before = (s.K - 1) / 2;
    for (int64_t k = 0; k < SAMPLES; k++) {
        const int64_t n = k * s.N / SAMPLES, position = (s.H / 2 * s.W + s.W / 2 + k * s.H * s.W / SAMPLES) % (s.H * s.W);
        for (int64_t b = 0; b < s.blocks(); b++) {
            f32 sum = load(bias + b * LANES);
            for (int64_t t = 0; t < s.taps(); t++) {
                const int64_t h = position / s.W + t / s.K - before, w = position % s.W + t % s.K - before;
                if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
                sum += load(filters.of(b) + t * LANES) * load(x + s.index(n, b, h, w));
            }
            store(&out[b * LANES], load(&out[b * LANES]) + Act::at(sum).value * (1.f / SAMPLES));
        }
    }
    return out;
}

// Fills a tile with some rows of block b of image n, and with what the convolution reaches of those before and after. What is
// made of them is for the same places of `out`.
template <class T>
void fill_rows(Tile<T> &tile, const T *x, T *out, const Shape &s, int64_t n, int64_t b, int64_t first, int64_t rows) {
    const int64_t before = (s.K - 1) / 2;
    for (int64_t h = -before; h < rows + s.K - 1 - before; h++) {
        if (first + h < 0 || first + h >= s.H) {
            tile.fill(h, [](int64_t) { return f32{}; });
            continue;
        }
        tile.fill(h, [&](int64_t w) {
            const int64_t i = s.index(n, b, first + h, w);
            __builtin_prefetch(out + i, 1, 2);
            return load_ahead(x + i);
        });
    }
}

template <class T, class Act>
void mixing_forward(int threads, const T *x, const float *weight, const float *bias, const float *gamma, const float *beta,
                    bool residual, T *y, T *z, float *mean, float *var, const Shape s, double eps) {
    const Filters<T> filters(weight, s, false);
    const auto pivot = sampled<T, Act>(x, weight, bias, s);
    Totals totals(threads, s.C);
    struct Mine {
        std::vector<double> &sums;
        Tile<T> tile;
        Convolution<T> convolution;
    };
    Scratch scratch;
#pragma omp parallel num_threads(threads)
    if (auto mine = scratch.make([&] { return Mine{totals.mine(), Tile<T>(s, s.K, (s.K - 1) / 2), Convolution<T>(s)}; })) {
        std::vector<double> &sums = mine->sums;
        Tile<T> &tile = mine->tile;
        Convolution<T> &convolution = mine->convolution;
#pragma omp for collapse(2) schedule(static)
        for (int64_t n = 0; n < s.N; n++)
            for (int64_t b = 0; b < s.blocks(); b++) {
                const int64_t c = b * LANES;
                fill_rows(tile, x, z, s, n, b, 0, s.H);
                for (int64_t h = 0; h < s.H; h++) {
                    const float *line = convolution.at(tile, h, filters.of(b), load(bias + c));
                    f32 first = {}, second = {};
                    for (int64_t w = 0; w < s.W; w++) {
                        const int64_t i = s.index(n, b, h, w);
                        store(z + i, load(line + w * LANES));
                        const f32 d = Act::at(load(z + i)).value - load(&pivot[c]);  // of z as it is rounded in memory
                        first += d;
                        second += d * d;
                    }
                    add(&sums[c], first);
                    add(&sums[s.C + c], second);
                }
            }
    }
    scratch.check();
    const int64_t rows = s.N * s.H * s.W;
    statistics<T, Act>(threads, totals.joined(), pivot, z, gamma, mean, var, rows, s.C, eps);
    normalise<T, Act>(threads, z, residual ? x : nullptr, gamma, beta, y, mean, var, rows, s.C, eps);
}

constexpr int64_t BAND = 4096;  // positions of a tile, which so stays in the cache with images of any size

// The same by given statistics: what the convolution makes is normalised before it leaves the cache.
template <class T, class Act>
void mixing_inference(int threads, const T *x, const float *weight, const float *bias, const float *gamma, const float *beta,
                      const float *mean, const float *var, bool residual, T *y, const Shape s, double eps) {
    const Filters<T> filters(weight, s, false);
    const Norm<Act> norm(gamma, beta, mean, var, s.C, eps);
    const int64_t band = std::min(s.H, std::max(s.K, BAND / (s.W + s.K - 1))), bands = (s.H + band - 1) / band;
    const Shape part{s.N, s.C, band, s.W, s.K};
    struct Mine {
        Tile<T> tile;
        Convolution<T> convolution;
    };
    Scratch scratch;
#pragma omp parallel num_threads(threads)
    if (auto mine = scratch.make([&] { return Mine{Tile<T>(part, s.K, (s.K - 1) / 2), Convolution<T>(part)}; })) {
        Tile<T> &tile = mine->tile;
        Convolution<T> &convolution = mine->convolution;
#pragma omp for collapse(3) schedule(static)
        for (int64_t n = 0; n < s.N; n++)
            for (int64_t k = 0; k < bands; k++)
                for (int64_t b = 0; b < s.blocks(); b++) {
                    const int64_t c = b * LANES, start = k * band, rows = std::min(band, s.H - start);
                    fill_rows(tile, x, y, s, n, b, start, rows);
                    auto write = [&](auto act) {
                        for (int64_t h = 0; h < rows; h++) {
                            const float *line = convolution.at(tile, h, filters.of(b), load(bias + c));
                            for (int64_t w = 0; w < s.W; w++) {
                                const int64_t i = s.index(n, b, start + h, w);
                                f32 v = norm.at(act, load(line + w * LANES), c);
                                if (residual) v += load(x + i);
                                store(y + i, v);
                            }
                        }
                    };
                    if (norm.steep[b]) write(typename Act::Exact());
                    else write(Act());
                }
    }
    scratch.check();
}

// dx, or dw and db, may be null: nobody needs them.
template <class T, class Act>
void mixing_backward(int threads, const T *x, const T *z, const T *dy, const float *weight, const float *gamma,
                     const float *mean, const float *var, bool residual, T *dx, float *dw, float *db, float *dgamma,
                     float *dbeta, const Shape s, double eps) {
    const InputGrad<T, Act> grad(threads, z, dy, gamma, mean, var, dgamma, dbeta, s.N * s.H * s.W, s.C, eps);
    const Filters<T> filters(weight, s, true);
    AllWeightSums all(threads);
    struct Mine {
        WeightSums &sums;
        Tile<T> x_tile, dz_tile;
        Convolution<T> convolution;
    };
    Scratch scratch;
#pragma omp parallel num_threads(threads)
    if (auto mine = scratch.make([&] {
            return Mine{all.mine(s), Tile<T>(s, s.K, (s.K - 1) / 2), Tile<T>(s, s.K, s.K / 2), Convolution<T>(s)};
        })) {
        WeightSums &sums = mine->sums;
        Tile<T> &x_tile = mine->x_tile, &dz_tile = mine->dz_tile;
        Convolution<T> &convolution = mine->convolution;
#pragma omp for collapse(2) schedule(static)
        for (int64_t n = 0; n < s.N; n++)
            for (int64_t b = 0; b < s.blocks(); b++) {
                const int64_t c = b * LANES;
                f32 bias = {};
                auto fill = [&](auto act) {
                    for (int64_t h = 0; h < s.H; h++) {
                        dz_tile.fill(h, [&](int64_t w) {
                            const int64_t i = s.index(n, b, h, w);
                            if (dx) __builtin_prefetch(dx + i, 1, 2);  // to be written once both convolutions are made
                            const f32 dz = grad.at(act, load_ahead(z + i), load_ahead(dy + i), c);
                            bias += dz;
                            return dz;
                        });
                        if (dw) x_tile.fill(h, [&](int64_t w) { return load_ahead(x + s.index(n, b, h, w)); });
                    }
                };
                if (grad.steep[b]) fill(typename Act::Exact());
                else fill(Act());
                if (dw) {
                    all_weight_sums(s, x_tile, dz_tile, sums.weights(b));
                    sums.add_bias(b, bias);
                }
                for (int64_t h = 0; dx && h < s.H; h++) {
                    const float *line = convolution.at(dz_tile, h, filters.of(b), f32{});
                    for (int64_t w = 0; w < s.W; w++) {
                        const int64_t i = s.index(n, b, h, w);
                        f32 v = load(line + w * LANES);
                        if (residual) v += load(dy + i);
                        store(dx + i, v);
                    }
                }
            }
    }
    scratch.check();
    if (dw) all.write(s, dw, db);
}

// Whether there was the memory to do `call`.
template <class Call>
bool in_memory(Call call) {
    try {
        call();
        return true;
    } catch (const std::bad_alloc &) {
        return false;
    }
}

// The same of `call(T(), Act())` by the activations' type and function.
template <class Call>
bool for_type(bool is_bf16, bool gelu, Call call) {
    auto with = [&](auto type) {
        using T = decltype(type);
        if (gelu) call(type, Gelu<T>());
        else call(type, Relu<T>());
    };
    return in_memory([&] {
        if (is_bf16) with(bf16());
        else with(float());
    });
}

}  // namespace

// What operators.py calls: the activations' type, threads and size, then arguments and results in its signatures' order. Each
// says whether there was the memory to work with.

extern "C" {

bool depthwise_weight_grad(int64_t is_bf16, int64_t threads, int64_t N, int64_t C, int64_t H, int64_t W, const void *x,
                           const void *g, int64_t K, float *dw, float *db) {
    const Shape s{N, C, H, W, K};
    return in_memory([&] {
        if (is_bf16) weight_grad(threads, (const bf16 *)x, (const bf16 *)g, dw, db, s);
        else weight_grad(threads, (const float *)x, (const float *)g, dw, db, s);
    });
}

bool act_norm(int64_t is_bf16, int64_t threads, int64_t N, int64_t C, int64_t H, int64_t W, const void *z,
              const void *shortcut, const float *gamma, const float *beta, int64_t gelu, double eps, void *y, float *mean,
              float *var) {
    return for_type(is_bf16, gelu, [&](auto type, auto act) {
        using T = decltype(type);
        forward<T, decltype(act)>(threads, (const T *)z, (const T *)shortcut, gamma, beta, (T *)y, mean, var, N * H * W, C,
                                  eps);
    });
}

bool act_norm_inference(int64_t is_bf16, int64_t threads, int64_t N, int64_t C, int64_t H, int64_t W, const void *z,
                        const void *shortcut, const float *gamma, const float *beta, const float *mean, const float *var,
                        int64_t gelu, double eps, void *y) {
    return for_type(is_bf16, gelu, [&](auto type, auto act) {
        using T = decltype(type);
        normalise<T, decltype(act)>(threads, (const T *)z, (const T *)shortcut, gamma, beta, (T *)y, mean, var, N * H * W, C,
                                    eps);
    });
}

bool act_norm_backward(int64_t is_bf16, int64_t threads, int64_t N, int64_t C, int64_t H, int64_t W, const void *z,
                       const void *dy, const float *gamma, const float *mean, const float *var, int64_t gelu, double eps,
                       void *dz, float *dgamma, float *dbeta) {
    return for_type(is_bf16, gelu, [&](auto type, auto act) {
        using T = decltype(type);
        backward<T, decltype(act)>(threads, (const T *)z, (const T *)dy, gamma, mean, var, (T *)dz, dgamma, dbeta, N * H * W,
                                   C, eps);
    });
}

bool spatial_mixing(int64_t is_bf16, int64_t threads, int64_t N, int64_t C, int64_t H, int64_t W, const void *x,
                    const float *weight, const float *bias, const float *gamma, const float *beta, int64_t K,
                    int64_t residual, int64_t gelu, double eps, void *y, void *z, float *mean, float *var) {
    const Shape s{N, C, H, W, K};
    return for_type(is_bf16, gelu, [&](auto type, auto act) {
        using T = decltype(type);
        mixing_forward<T, decltype(act)>(threads, (const T *)x, weight, bias, gamma, beta, residual, (T *)y, (T *)z, mean, var,
                                         s, eps);
    });
}

bool spatial_mixing_inference(int64_t is_bf16, int64_t threads, int64_t N, int64_t C, int64_t H, int64_t W, const void *x,
                              const float *weight, const float *bias, const float *gamma, const float *beta,
                              const float *mean, const float *var, int64_t K, int64_t residual, int64_t gelu, double eps,
                              void *y) {
    const Shape s{N, C, H, W, K};
    return for_type(is_bf16, gelu, [&](auto type, auto act) {
        using T = decltype(type);
        mixing_inference<T, decltype(act)>(threads, (const T *)x, weight, bias, gamma, beta, mean, var, residual, (T *)y, s,
                                           eps);
    });
}

bool spatial_mixing_backward(int64_t is_bf16, int64_t threads, int64_t N, int64_t C, int64_t H, int64_t W, const void *x,
                             const void *z, const void *dy, const float *weight, const float *gamma, const float *mean,
                             const float *var, int64_t K, int64_t residual, int64_t gelu, double eps, int64_t for_x,
                             int64_t for_weight, void *dx, float *dw, float *db, float *dgamma, float *dbeta) {
    const Shape s{N, C, H, W, K};
    return for_type(is_bf16, gelu, [&](auto type, auto act) {
        using T = decltype(type);
        mixing_backward<T, decltype(act)>(threads, (const T *)x, (const T *)z, (const T *)dy, weight, gamma, mean, var,
                                          residual, (T *)dx, dw, db, dgamma, dbeta, s, eps);
    });
}

}  // extern "C"

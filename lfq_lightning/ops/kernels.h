// The kernels: fake quantization of consecutive elements and its gradients, for four element types, compiled for each
// instruction set. The arithmetic is float32 and the same everywhere; compile with -ffp-contract=off, since a fused
// multiply-add would round differently from the exported integer model.

#pragma once

#include "elements.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VERSIONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONED
#endif

namespace lfq {
namespace {

using std::int64_t;

constexpr float EPS = 1.1920928955078125e-7f;
constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds half to even
constexpr int LANES = 16;                  // partial sums a block keeps, on every instruction set
constexpr int64_t BLOCK = 2048;            // elements a partial sum covers: 128 additions a lane; also a tile

enum Saturation { LSQ, EXCLUSIVE, INCLUSIVE };

// ---- one element --------------------------------------------------------------------------------------------------

// NaN survives both comparisons.
INLINE float clamp(float v, float low, float high) {
    v = low > v ? low : v;
    return high < v ? high : v;
}

// Right for magnitudes up to 2^22: clamp first. Never -0.0.
INLINE float round_half_even(float v) { return (v + TO_INTEGER) - TO_INTEGER; }

// Rounding is monotone and the limits are integers, so clamping first gives the same integer.
INLINE float fake_quantized(float x, float s, float low, float high) {
    return round_half_even(clamp(x / s, low, high)) * s;
}

// `through` is what x's gradient is where it passes.
struct Terms { float dx, scale, zero_point; };  // zero_point without its factor -s

template <int SATURATION>
INLINE Terms gradient_terms(float x, float g, float through, float s, float low, float high) {
    const float u = x / s;
    const float c = round_half_even(clamp(u, low, high));
    bool passes, learns;
    if (SATURATION == LSQ) {
        passes = learns = (u > low) & (u < high);
    } else {
        const float r = round_half_even(clamp(u, low - 1.0f, high + 1.0f));
        passes = (r >= low) & (r <= high);
        learns = SATURATION == EXCLUSIVE ? passes : (r > low) & (r < high);
    }
    const bool finite = __builtin_fabsf(x) <= 0x1.fffffep127f;
    const float weight = learns ? c - u : c;
    return {passes & finite ? through : 0.0f, finite ? g * weight : 0.0f, finite & !learns ? g : 0.0f};
}

// ---- kernels: the elements of a run share one scale; in rows, each column has its own ------------------------------

template <typename T>
INLINE void forward_of(const T* from, T* to, int64_t n, float s, float low, float high) {
    Unordered<T> x_strip, y_strip;
    for (int64_t i = 0; i < n; i += STRIP) {
        const int length = static_cast<int>(n - i < STRIP ? n - i : STRIP);
        const float* UNALIASED x = x_strip.read(from + i, length);
        float* UNALIASED y = y_strip.target(to + i);
        for (int j = 0; j < length; ++j) y[j] = fake_quantized(x[j], s, low, high);
        y_strip.write(to + i, length);
    }
}

template <typename T>
INLINE void forward_of(const T* UNALIASED x, T* UNALIASED y, int64_t rows, int64_t width, const float* UNALIASED s,
                       const float* UNALIASED low, const float* UNALIASED high) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width)
        for (int64_t c = 0; c < width; ++c) store(y[c], fake_quantized(load(x[c]), s[c], low[c], high[c]));
}

// The gradient of x is g where it passes. Of float64 a strip holds whether it does, since float32 does not hold g.
template <typename T>
INLINE float through(float g) { return g; }
template <>
INLINE float through<double>(float) { return 1.0f; }

template <typename S, typename T>
INLINE void write_passed(const S& strip, T* to, const T*, int n) { strip.write(to, n); }
template <typename S>
INLINE void write_passed(const S& strip, double* to, const double* g, int n) {
    for (int j = 0; j < n; ++j) to[j] = strip.space[j] != 0.0f ? g[j] : 0.0;
}

// What gradients are asked for; the kernels come in one version for each answer.
struct Wanted {
    int saturation;
    bool scale, zero_point;
};

template <typename T>
struct Run {
    const T *x, *g;
    T* dx;
    int64_t n;
    float s, low, high;
    float *scale, *zero_point;  // one partial sum each
};

// The sum of `n` partial sums, a multiple of LANES, in an order that no instruction set changes.
INLINE float sum_strip(const float* UNALIASED sums, int n) {
    float lanes[LANES] = {};
    for (int k = 0; k < n; k += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += sums[k + j];
    double total = 0.0;
    for (int j = 0; j < LANES; ++j) total += lanes[j];
    return static_cast<float>(total);
}

template <int SATURATION, bool SCALE, bool ZERO_POINT, typename T>
INLINE void backward_of(const Run<T>& run) {
    const float s = run.s, low = run.low, high = run.high;
    // A sum for each place in a strip: no addition waits for the one before it.
    alignas(64) float scale[STRIP], zero_point[STRIP];
    const int sums = run.n < STRIP ? static_cast<int>(run.n + LANES - 1) / LANES * LANES : STRIP;
    std::memset(scale, 0, sums * sizeof(float));
    std::memset(zero_point, 0, sums * sizeof(float));
    Unordered<T> x_strip, g_strip, dx_strip;
    for (int64_t i = 0; i < run.n; i += STRIP) {
        const int n = static_cast<int>(run.n - i < STRIP ? run.n - i : STRIP);
        const float *UNALIASED x = x_strip.read(run.x + i, n), *UNALIASED g = g_strip.read(run.g + i, n);
        float* UNALIASED dx = dx_strip.target(run.dx + i);
#pragma omp simd
        for (int j = 0; j < n; ++j) {
            const Terms t = gradient_terms<SATURATION>(x[j], g[j], through<T>(g[j]), s, low, high);
            dx[j] = t.dx;
            if (SCALE) scale[j] += t.scale;
            if (ZERO_POINT) zero_point[j] += t.zero_point;
        }
        write_passed(dx_strip, run.dx + i, run.g + i, n);
    }
    if (SCALE) *run.scale = sum_strip(scale, sums);
    if (ZERO_POINT) *run.zero_point = sum_strip(zero_point, sums);
}

template <typename T>
struct Rows {
    const T *x, *g;
    T* dx;
    int64_t rows, width;
    const float *s, *low, *high;
    float *scale, *zero_point;  // a partial sum a column, added to
};

template <int SATURATION, bool SCALE, bool ZERO_POINT, typename T>
INLINE void backward_of(const Rows<T>& all) {
    Strip<T> x_strip, g_strip, dx_strip;
    for (int64_t r = 0; r < all.rows; ++r) {
        for (int64_t begin = 0; begin < all.width; begin += STRIP) {
            const int64_t at = r * all.width + begin;
            const int n = static_cast<int>(all.width - begin < STRIP ? all.width - begin : STRIP);
            const float *UNALIASED x = x_strip.read(all.x + at, n), *UNALIASED g = g_strip.read(all.g + at, n);
            float* UNALIASED dx = dx_strip.target(all.dx + at);
            const float *UNALIASED s = all.s + begin, *UNALIASED low = all.low + begin;
            const float* UNALIASED high = all.high + begin;
            float *UNALIASED scale = all.scale + begin, *UNALIASED zero_point = all.zero_point + begin;
#pragma omp simd
            for (int c = 0; c < n; ++c) {
                const Terms t = gradient_terms<SATURATION>(x[c], g[c], through<T>(g[c]), s[c], low[c], high[c]);
                dx[c] = t.dx;
                if (SCALE) scale[c] += t.scale;
                if (ZERO_POINT) zero_point[c] += t.zero_point;
            }
            write_passed(dx_strip, all.dx + at, all.g + at, n);
        }
    }
}

template <int SATURATION, typename Work>
INLINE void backward_of(const Work& work, const Wanted& wanted) {
    if (wanted.scale & wanted.zero_point) backward_of<SATURATION, true, true>(work);
    else if (wanted.scale) backward_of<SATURATION, true, false>(work);
    else if (wanted.zero_point) backward_of<SATURATION, false, true>(work);
    else backward_of<SATURATION, false, false>(work);
}

template <typename Work>
INLINE void backward_of(const Work& work, const Wanted& wanted) {
    if (wanted.saturation == LSQ) backward_of<LSQ>(work, wanted);
    else if (wanted.saturation == EXCLUSIVE) backward_of<EXCLUSIVE>(work, wanted);
    else backward_of<INCLUSIVE>(work, wanted);
}

// Each kernel once for each element type, and each of those once for each instruction set.
#define DEFINE_KERNELS(T)                                                                                            \
    VERSIONED void forward_run(const T* x, T* y, int64_t n, float s, float low, float high) {                        \
        forward_of(x, y, n, s, low, high);                                                                           \
    }                                                                                                                \
    VERSIONED void forward_rows(const T* x, T* y, int64_t rows, int64_t width, const float* s, const float* low,     \
                                const float* high) {                                                                 \
        forward_of(x, y, rows, width, s, low, high);                                                                 \
    }                                                                                                                \
    VERSIONED void backward_run(const Run<T>& run, const Wanted& wanted) { backward_of(run, wanted); }               \
    VERSIONED void backward_rows(const Rows<T>& rows, const Wanted& wanted) { backward_of(rows, wanted); }
DEFINE_KERNELS(float)
DEFINE_KERNELS(double)
DEFINE_KERNELS(Half)
DEFINE_KERNELS(BFloat)

}  // namespace
}  // namespace lfq

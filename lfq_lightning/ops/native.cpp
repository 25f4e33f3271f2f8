// Fake quantization of CPU tensors: one pass forward, one pass backward, and sums whose order no thread count changes.
//
// No torch headers: Python passes data pointers. The OpenMP runtime is whichever torch has loaded.
// Compile with -ffp-contract=off: a fused multiply-add would round differently from the exported integer model.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VERSIONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONED
#endif
#define INLINE inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using std::int64_t;

constexpr float EPS = 1.1920928955078125e-7f;
constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds half to even
constexpr int LANES = 16;                  // partial sums a block keeps, on every instruction set
constexpr int64_t BLOCK = 2048;            // elements a partial sum covers: 128 additions a lane
constexpr int64_t ROWS = 64;               // rows a partial sum of the column kernel covers
constexpr int64_t SERIAL = 32768;          // elements below which threads cost more than they bring

// Python's ops/layout.py says what the fields mean.
struct Layout {
    int64_t channels, numel, segments, groups, row, chunk, width, repeat;
};

enum DType { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };
enum Saturation { LSQ, EXCLUSIVE, INCLUSIVE };

// ---- element types ------------------------------------------------------------------------------------------------

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

INLINE uint32_t bits_of(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
INLINE float float_of(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }

INLINE float load(float v) { return v; }
INLINE float load(double v) { return static_cast<float>(v); }
INLINE float load(BFloat v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
INLINE float load(Half v) {
    const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
    const float scaled = float_of(magnitude) * 0x1p112f;                   // exact, subnormals included
    return float_of(bits_of(scaled) | special | static_cast<uint32_t>(v.bits & 0x8000u) << 16);
}

INLINE void store(float& to, float v) { to = v; }
INLINE void store(double& to, float v) { to = static_cast<double>(v); }
INLINE void store(BFloat& to, float v) {
    const uint32_t u = bits_of(v);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    to.bits = static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}
INLINE void store(Half& to, float v) {
    const uint32_t sign = bits_of(v) & 0x80000000u, u = bits_of(v) ^ sign;
    const uint32_t subnormal = bits_of(float_of(u) + 0.5f) - 0x3f000000u;  // the addition rounds to 2^-24
    const uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
    const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = u < 0x38800000u ? subnormal : normal;
    to.bits = static_cast<uint16_t>((u >= 0x47800000u ? special : finite) | sign >> 16);
}

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

struct Terms { float dx, scale, zero_point; };  // zero_point without its factor -s

template <int SATURATION>
INLINE Terms gradient_terms(float x, float g, float s, float low, float high) {
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
    return {passes & finite ? g : 0.0f, finite ? g * weight : 0.0f, finite & !learns ? g : 0.0f};
}

// ---- runs: consecutive elements share one scale -------------------------------------------------------------------

template <typename T>
INLINE void forward_run(const T* x, T* y, int64_t n, float s, float low, float high) {
    for (int64_t i = 0; i < n; ++i) store(y[i], fake_quantized(load(x[i]), s, low, high));
}

INLINE float sum_lanes(const float* lanes) {
    double total = 0.0;
    for (int j = 0; j < LANES; ++j) total += lanes[j];
    return static_cast<float>(total);
}

template <typename T, int SATURATION, bool LEARN, bool ZERO_POINT>
INLINE void backward_run(const T* x, const T* g, T* dx, int64_t n, float s, float low, float high, float* partial) {
    float scale[LANES] = {}, zero_point[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
#pragma omp simd
        for (int j = 0; j < LANES; ++j) {
            const Terms t = gradient_terms<SATURATION>(load(x[i + j]), load(g[i + j]), s, low, high);
            store(dx[i + j], t.dx);
            if (LEARN) scale[j] += t.scale;
            if (ZERO_POINT) zero_point[j] += t.zero_point;
        }
    }
    for (int j = 0; i < n; ++i, ++j) {
        const Terms t = gradient_terms<SATURATION>(load(x[i]), load(g[i]), s, low, high);
        store(dx[i], t.dx);
        if (LEARN) scale[j] += t.scale;
        if (ZERO_POINT) zero_point[j] += t.zero_point;
    }
    if (LEARN) partial[0] = sum_lanes(scale);
    if (ZERO_POINT) partial[1] = sum_lanes(zero_point);
}

// ---- columns: each has its own scale ------------------------------------------------------------------------------

template <typename T>
INLINE void forward_rows(const T* x, T* y, int64_t rows, int64_t width, const float* s, const float* low,
                         const float* high) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width)
        for (int64_t c = 0; c < width; ++c) store(y[c], fake_quantized(load(x[c]), s[c], low[c], high[c]));
}

template <typename T, int SATURATION, bool LEARN, bool ZERO_POINT>
INLINE void backward_rows(const T* x, const T* g, T* dx, int64_t rows, int64_t width, const float* s, const float* low,
                          const float* high, float* scale, float* zero_point) {
    for (int64_t c = 0; c < width; ++c) scale[c] = zero_point[c] = 0.0f;
    for (int64_t r = 0; r < rows; ++r, x += width, g += width, dx += width) {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) {
            const Terms t = gradient_terms<SATURATION>(load(x[c]), load(g[c]), s[c], low[c], high[c]);
            store(dx[c], t.dx);
            if (LEARN) scale[c] += t.scale;
            if (ZERO_POINT) zero_point[c] += t.zero_point;
        }
    }
}

// ---- one block of work, compiled for each instruction set ---------------------------------------------------------

struct Block {
    const void* x;
    const void* g;
    void* out;  // y forward, dx backward
    int64_t start, length, rows, width;
    const float *s, *low, *high;
    float *scale, *zero_point;  // partial sums
};

template <typename T>
INLINE void forward_block(const Block& b) {
    const T* x = static_cast<const T*>(b.x) + b.start;
    T* y = static_cast<T*>(b.out) + b.start;
    if (b.width) forward_rows(x, y, b.rows, b.width, b.s, b.low, b.high);
    else forward_run(x, y, b.length, *b.s, *b.low, *b.high);
}

template <typename T, int SATURATION, bool LEARN, bool ZERO_POINT>
INLINE void backward_block(const Block& b) {
    const T* x = static_cast<const T*>(b.x) + b.start;
    const T* g = static_cast<const T*>(b.g) + b.start;
    T* dx = static_cast<T*>(b.out) + b.start;
    if (b.width) {
        backward_rows<T, SATURATION, LEARN, ZERO_POINT>(x, g, dx, b.rows, b.width, b.s, b.low, b.high, b.scale,
                                                        b.zero_point);
    } else {
        float partial[2];
        backward_run<T, SATURATION, LEARN, ZERO_POINT>(x, g, dx, b.length, *b.s, *b.low, *b.high, partial);
        if (LEARN) *b.scale = partial[0];
        if (ZERO_POINT) *b.zero_point = partial[1];
    }
}

template <typename T, int SATURATION>
INLINE void backward_block(const Block& b, bool learn, bool zero_point) {
    if (learn & zero_point) backward_block<T, SATURATION, true, true>(b);
    else if (learn) backward_block<T, SATURATION, true, false>(b);
    else if (zero_point) backward_block<T, SATURATION, false, true>(b);
    else backward_block<T, SATURATION, false, false>(b);
}

template <typename T>
INLINE void backward_block(const Block& b, int saturation, bool learn, bool zero_point) {
    if (saturation == LSQ) backward_block<T, LSQ>(b, learn, zero_point);
    else if (saturation == EXCLUSIVE) backward_block<T, EXCLUSIVE>(b, learn, zero_point);
    else backward_block<T, INCLUSIVE>(b, learn, zero_point);
}

#define FOR_EACH_TYPE(APPLY) APPLY(float, f32) APPLY(double, f64) APPLY(Half, f16) APPLY(BFloat, bf16)
#define DEFINE(T, NAME)                                                                        \
    VERSIONED void forward_##NAME(const Block& b) { forward_block<T>(b); }                     \
    VERSIONED void backward_##NAME(const Block& b, int saturation, bool learn, bool zero_point) { \
        backward_block<T>(b, saturation, learn, zero_point);                                   \
    }
FOR_EACH_TYPE(DEFINE)

void run_forward(int dtype, const Block& b) {
    switch (dtype) {
        case FLOAT32: return forward_f32(b);
        case FLOAT64: return forward_f64(b);
        case FLOAT16: return forward_f16(b);
        default: return forward_bf16(b);
    }
}

void run_backward(int dtype, const Block& b, int saturation, bool learn, bool zero_point) {
    switch (dtype) {
        case FLOAT32: return backward_f32(b, saturation, learn, zero_point);
        case FLOAT64: return backward_f64(b, saturation, learn, zero_point);
        case FLOAT16: return backward_f16(b, saturation, learn, zero_point);
        default: return backward_bf16(b, saturation, learn, zero_point);
    }
}

// ---- cutting a tensor into blocks ---------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The cut depends on the layout alone, never on the number of threads.
struct Cut {
    const Layout& layout;
    int64_t per_segment, blocks;

    explicit Cut(const Layout& l)
        : layout(l),
          per_segment(l.width ? 0 : ceil_div(l.chunk, BLOCK)),
          blocks(l.width ? ceil_div(l.width ? l.numel / l.width : 0, ROWS) : l.segments * per_segment) {}

    // Partial sums: one a block, or one a column of a block of rows.
    int64_t partials() const { return layout.width ? blocks * layout.width : blocks; }

    // qparams: s, low and high, each `channels` long, or `width` long where columns are expanded.
    void place(int64_t i, const float* qparams, float* partial, Block& b) const {
        if (layout.width) {
            const int64_t row = i * ROWS, rows = layout.numel / layout.width - row;
            b.start = row * layout.width;
            b.rows = rows < ROWS ? rows : ROWS;
            b.width = layout.width;
            b.s = qparams;
            b.low = qparams + layout.width;
            b.high = qparams + 2 * layout.width;
            b.scale = partial + i * layout.width;
        } else {
            const int64_t segment = i / per_segment, offset = (i % per_segment) * BLOCK;
            const int64_t begin = (segment % layout.groups) * layout.chunk;
            const int64_t rest = (layout.row - begin < layout.chunk ? layout.row - begin : layout.chunk) - offset;
            b.start = (segment / layout.groups) * layout.row + begin + offset;
            b.length = rest < 0 ? 0 : rest < BLOCK ? rest : BLOCK;
            b.width = 0;
            b.s = qparams + segment % layout.channels;
            b.low = b.s + layout.channels;
            b.high = b.low + layout.channels;
            b.scale = partial + i;
        }
        b.zero_point = b.scale + partials();
    }
};

// Columns that share a scale get a copy of it each.
std::unique_ptr<float[]> expand(const float* qparams, const Layout& l) {
    if (l.width == 0 || l.repeat == 1) return nullptr;
    std::unique_ptr<float[]> out(new float[3 * l.width]);
    for (int64_t k = 0; k < 3; ++k)
        for (int64_t c = 0; c < l.width; ++c) out[k * l.width + c] = qparams[k * l.channels + c / l.repeat];
    return out;
}

// Second stage: partial sums in order, in float64.
void add_up(const Cut& cut, const float* partial, double* total) {
    const Layout& l = cut.layout;
    for (int64_t c = 0; c < l.channels; ++c) total[c] = 0.0;
    if (l.width) {
        for (int64_t i = 0; i < cut.blocks; ++i)
            for (int64_t c = 0; c < l.width; ++c) total[c / l.repeat] += partial[i * l.width + c];
    } else {
        for (int64_t i = 0; i < cut.blocks; ++i) total[(i / cut.per_segment) % l.channels] += partial[i];
    }
}

}  // namespace

// Writes y, and in `qparams` (3, channels) the s, low and high that were used.
EXPORT void lfq_forward(int dtype, const void* x, void* y, const float* scale, const float* zero_point, float* qparams,
                        const Layout* layout, float quant_min, float quant_max, int threads) {
    for (int64_t c = 0; c < layout->channels; ++c) {
        const float z = round_half_even(clamp(zero_point[c], quant_min, quant_max));
        qparams[c] = z != z ? z : clamp(scale[c], EPS, __builtin_inff());  // NaN in, NaN out
        qparams[layout->channels + c] = quant_min - z;
        qparams[2 * layout->channels + c] = quant_max - z;
    }
    const auto expanded = expand(qparams, *layout);
    const float* used = expanded ? expanded.get() : qparams;
    const Cut cut(*layout);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && layout->numel >= SERIAL)
    for (int64_t i = 0; i < cut.blocks; ++i) {
        Block b{};
        b.x = x;
        b.out = y;
        cut.place(i, used, nullptr, b);
        run_forward(dtype, b);
    }
}

// Writes dx, and d_scale and d_zero_point (channels,) where they are not null.
EXPORT void lfq_backward(int dtype, const void* g, const void* x, void* dx, const float* qparams, float* d_scale,
                         float* d_zero_point, const Layout* layout, int saturation, float grad_factor, int threads) {
    const auto expanded = expand(qparams, *layout);
    const float* used = expanded ? expanded.get() : qparams;
    const Cut cut(*layout);
    const std::unique_ptr<float[]> partial(new float[2 * cut.partials() + 1]);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && layout->numel >= SERIAL)
    for (int64_t i = 0; i < cut.blocks; ++i) {
        Block b{};
        b.x = x;
        b.g = g;
        b.out = dx;
        cut.place(i, used, partial.get(), b);
        run_backward(dtype, b, saturation, d_scale != nullptr, d_zero_point != nullptr);
    }
    const std::unique_ptr<double[]> total(new double[layout->channels]);
    if (d_scale) {
        add_up(cut, partial.get(), total.get());
        for (int64_t c = 0; c < layout->channels; ++c) d_scale[c] = static_cast<float>(total[c]) * grad_factor;
    }
    if (d_zero_point) {
        add_up(cut, partial.get() + cut.partials(), total.get());
        for (int64_t c = 0; c < layout->channels; ++c)
            d_zero_point[c] = static_cast<float>(-qparams[c] * total[c]) * grad_factor;
    }
}

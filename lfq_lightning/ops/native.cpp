// Fake quantization of CPU tensors: one pass forward, one pass backward, and sums whose order no thread count changes.
//
// No torch headers: Python passes data pointers. The OpenMP runtime is whichever torch has loaded.

#include <memory>

#include "layout.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace lfq;

// s, low and high of each column: column c uses scale (c / repeat) % channels. Null where that is c itself.
std::unique_ptr<float[]> expand(const float* qparams, const Layout& l) {
    if (l.width == 0 || (l.repeat == 1 && l.width == l.channels)) return nullptr;
    std::unique_ptr<float[]> out(new float[3 * l.width]);
    float* to = out.get();
    for (int64_t k = 0; k < 3; ++k, qparams += l.channels)
        for (int64_t period = 0; period < l.width; period += l.channels * l.repeat)
            for (int64_t c = 0; c < l.channels; ++c)
                for (int64_t j = 0; j < l.repeat; ++j) *to++ = qparams[c];
    return out;
}

// Second stage: partial sums in order, in float64.
void add_up(const Cut& cut, const float* partial, double* total) {
    const Layout& l = cut.layout;
    for (int64_t c = 0; c < l.channels; ++c) total[c] = 0.0;
    const int64_t repeat = l.width ? l.repeat : cut.per_segment, count = cut.partials();
    for (int64_t i = 0; i < count;)
        for (int64_t c = 0; c < l.channels && i < count; ++c)
            for (int64_t j = 0; j < repeat; ++j) total[c] += partial[i++];
}

// ---- the two passes -----------------------------------------------------------------------------------------------

// What Python packs, field by field: ops/native.py.
struct Forward {
    const Layout* layout;
    const void* x;
    void* y;
    const float *scale, *zero_point;
    float* qparams;  // (3, channels): receives the s, low and high that were used
    float quant_min, quant_max;
    int threads;
};

struct Backward {
    const Layout* layout;
    const void* g;
    const int64_t* g_view;
    const void* x;
    void* dx;
    const float* qparams;
    float *d_scale, *d_zero_point;  // (channels,), or null where not asked for
    float grad_factor;
    int saturation, threads;
};

template <typename T>
void forward(const Forward& call) {
    const Layout& l = *call.layout;
    const Cut cut(l);
    const auto expanded = expand(call.qparams, l);
    const float* s = expanded ? expanded.get() : call.qparams;
    const int64_t count = l.width ? l.width : l.channels;
    const float *low = s + count, *high = low + count;
    const Input<T> x{static_cast<const T*>(call.x), l.view};
    T* y = static_cast<T*>(call.y);
    cut.for_each_block(call.threads, [&](const Block& b) {
        alignas(64) T space[BLOCK];
        if (!l.width) {
            const int64_t c = b.channel;
            const T* from = x.tile(b.start, b.length, space);
            return forward_run(from, y + b.start, b.length, s[c], low[c], high[c]);
        }
        cut.tiles(b, [&](int64_t start, int64_t rows, int64_t c, int64_t columns) {
            const T* from = x.tile(start, rows * columns, space);
            forward_rows(from, y + start, rows, columns, s + c, low + c, high + c);
        });
    });
}

template <typename T>
void backward(const Backward& call) {
    const Layout& l = *call.layout;
    const Cut cut(l);
    const auto expanded = expand(call.qparams, l);
    const float* s = expanded ? expanded.get() : call.qparams;
    const int64_t count = l.width ? l.width : l.channels;
    const float *low = s + count, *high = low + count;
    const Wanted wanted{call.saturation, call.d_scale != nullptr, call.d_zero_point != nullptr};
    const std::unique_ptr<float[]> partial(new float[2 * cut.partials() + 1]);
    float *scale = partial.get(), *zero_point = scale + cut.partials();
    const Input<T> x{static_cast<const T*>(call.x), l.view}, g{static_cast<const T*>(call.g), call.g_view};
    T* dx = static_cast<T*>(call.dx);
    cut.for_each_block(call.threads, [&](const Block& b) {
        alignas(64) T x_space[BLOCK], g_space[BLOCK];
        float *block_scale = scale + b.partial, *block_zero_point = zero_point + b.partial;
        if (!l.width) {
            const int64_t c = b.channel;
            const T *from = x.tile(b.start, b.length, x_space), *upstream = g.tile(b.start, b.length, g_space);
            const Run<T> run{from, upstream, dx + b.start, b.length, s[c], low[c], high[c], block_scale,
                             block_zero_point};
            return backward_run(run, wanted);
        }
        for (int64_t c = 0; c < l.width; ++c) block_scale[c] = block_zero_point[c] = 0.0f;
        cut.tiles(b, [&](int64_t start, int64_t rows, int64_t c, int64_t columns) {
            const int64_t n = rows * columns;
            const T *from = x.tile(start, n, x_space), *upstream = g.tile(start, n, g_space);
            const Rows<T> work{from, upstream, dx + start, rows, columns, s + c, low + c, high + c, block_scale + c,
                               block_zero_point + c};
            backward_rows(work, wanted);
        });
    });
    const std::unique_ptr<double[]> total(new double[l.channels]);
    if (wanted.scale) {
        add_up(cut, scale, total.get());
        for (int64_t c = 0; c < l.channels; ++c) call.d_scale[c] = static_cast<float>(total[c]) * call.grad_factor;
    }
    if (wanted.zero_point) {
        add_up(cut, zero_point, total.get());
        for (int64_t c = 0; c < l.channels; ++c)
            call.d_zero_point[c] = static_cast<float>(-call.qparams[c] * total[c]) * call.grad_factor;
    }
}

}  // namespace

EXPORT void lfq_forward(const Forward* call) {
    const Layout& l = *call->layout;
    for (int64_t c = 0; c < l.channels; ++c) {
        const float z = round_half_even(clamp(call->zero_point[c], call->quant_min, call->quant_max));
        const float s = clamp(call->scale[c], EPS, __builtin_inff());
        call->qparams[c] = z != z || s != s ? __builtin_nanf("") : s;
        call->qparams[l.channels + c] = call->quant_min - z;
        call->qparams[2 * l.channels + c] = call->quant_max - z;
    }
    switch (l.dtype) {
        case FLOAT32: return forward<float>(*call);
        case FLOAT64: return forward<double>(*call);
        case FLOAT16: return forward<Half>(*call);
        default: return forward<BFloat>(*call);
    }
}

EXPORT void lfq_backward(const Backward* call) {
    switch (call->layout->dtype) {
        case FLOAT32: return backward<float>(*call);
        case FLOAT64: return backward<double>(*call);
        case FLOAT16: return backward<Half>(*call);
        default: return backward<BFloat>(*call);
    }
}

// Fake quantization of CPU tensors: one pass forward, one pass backward, and sums whose order no thread count changes.
//
// No torch headers: Python passes data pointers. The OpenMP runtime is whichever torch has loaded.

#include <cstring>
#include <memory>

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace lfq;

constexpr int64_t ROWS = 64;  // rows a partial sum of the column kernel covers

// Python's ops/layout.py says what the fields mean. `view` is null where x lies as y does.
struct Layout {
    int64_t dtype, channels, numel, segments, groups, row, chunk, width, repeat;
    const int64_t* view;
};

enum DType { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };

// ---- where elements lie -------------------------------------------------------------------------------------------

constexpr int MOST_DIMENSIONS = 64;  // torch's own limit

// A view is [dimensions, sizes, strides], outermost first, in the order in which the results lie in memory.
template <typename T>
void gather(const T* data, const int64_t* view, int64_t start, int64_t n, T* to) {
    const int64_t last = view[0] - 1, *size = view + 1, *stride = size + view[0];
    int64_t index[MOST_DIMENSIONS];
    for (int64_t d = last; d >= 0; start /= size[d--]) {
        index[d] = start % size[d];
        data += index[d] * stride[d];
    }
    while (true) {
        const int64_t rest = size[last] - index[last], run = rest < n ? rest : n;
        if (stride[last] == 1) std::memcpy(to, data, run * sizeof(T));
        else for (int64_t i = 0; i < run; ++i) to[i] = data[i * stride[last]];
        if ((n -= run) == 0) return;
        to += run;
        data -= index[last] * stride[last];
        index[last] = 0;
        int64_t d = last - 1;
        for (; ++index[d] == size[d]; --d) {
            data -= (size[d] - 1) * stride[d];
            index[d] = 0;
        }
        data += stride[d];
    }
}

// Elements in the order of the results: where they are, or gathered in a tile that stays in the first-level cache.
template <typename T>
struct Input {
    const T* data;
    const int64_t* view;

    const T* tile(int64_t start, int64_t n, T* space) const {
        if (!view) return data + start;
        gather(data, view, start, n, space);
        return space;
    }
};

// ---- cutting a tensor into blocks ---------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Block {
    int64_t start, length;  // elements; of rows: length / width of them
    int64_t channel;        // of a run
    int64_t partial;        // where its partial sums begin
};

// The cut depends on the layout alone, never on the number of threads.
struct Cut {
    const Layout& layout;
    int64_t per_segment, blocks;

    explicit Cut(const Layout& l)
        : layout(l),
          per_segment(l.width ? 0 : ceil_div(l.chunk, BLOCK)),
          blocks(l.width ? ceil_div(l.numel, ROWS * l.width) : l.segments * per_segment) {}

    // Partial sums: one a block, or one a column of a block of rows.
    int64_t partials() const { return layout.width ? blocks * layout.width : blocks; }

    Block at(int64_t i) const {
        const Layout& l = layout;
        if (l.width) {
            const int64_t start = i * ROWS * l.width;
            return {start, least(ROWS * l.width, l.numel - start), 0, i * l.width};
        }
        const int64_t segment = i / per_segment, offset = (i - segment * per_segment) * BLOCK;
        const int64_t row = segment / l.groups, begin = (segment - row * l.groups) * l.chunk;
        const int64_t rest = least(l.row - begin, l.chunk) - offset;
        return {row * l.row + begin + offset, rest < 0 ? 0 : least(rest, BLOCK), segment % l.channels, i};
    }

    // Calls work(tile start, rows, first column, columns) for tiles of at most BLOCK elements of a block of rows.
    template <typename Work>
    void tiles(const Block& b, const Work& work) const {
        const int64_t width = layout.width, rows = b.length / width;
        const int64_t columns = least(width, BLOCK), step = BLOCK / columns;
        for (int64_t r = 0; r < rows; r += step)
            for (int64_t c = 0; c < width; c += columns)
                work(b.start + r * width + c, least(step, rows - r), c, least(columns, width - c));
    }

    template <typename Work>
    void for_each_block(int threads, const Work& work) const {
        if (threads <= 1) {
            for (int64_t i = 0; i < blocks; ++i) work(at(i));
            return;
        }
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < blocks; ++i) work(at(i));
    }
};

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

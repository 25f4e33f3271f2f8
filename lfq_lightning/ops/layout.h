// How a tensor lies in memory, and how it is cut into blocks that share scales.

#pragma once

#include <cstring>

#include "kernels.h"

namespace lfq {
namespace {

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

}  // namespace
}  // namespace lfq

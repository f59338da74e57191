// Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
//
// A refinement in evaluation, in one pass over the rows of a map: expand, convolve, reduce, and weight the values. Each row
// of the expanded maps is made once, stays in a ring with the rows around it, and is never written to memory; nor is the
// refined map where only what it makes of the values is wanted.
//
// Names as in folding_refiner.py. Shapes: B batch, H heads, E expanded heads, N rows and columns, k the kernel's side, D the
// width of a head.

#include "vectors.h"

namespace {

// A batch norm in evaluation as gain x + bias.
struct Affine {
    Floats gain, bias;

    Affine(const float* const* norm, int64_t channels, double eps) : gain(channels), bias(channels) {
        const float *weight = norm[0], *shift = norm[1], *mean = norm[2], *variance = norm[3];
        for (int64_t c = 0; c < channels; ++c) {
            gain[c] = weight[c] / std::sqrt(variance[c] + float(eps));
            bias[c] = shift[c] - gain[c] * mean[c];
        }
    }
};

// (M, K) with a gain for each row -> (M / BLOCK, K, BLOCK), as `product` reads it; M rounded up with zeros.
Floats packed(const float* weight, const Floats& gain, int64_t m, int64_t k) {
    Floats result(rounded(m, BLOCK) * k, 0.0f);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < k; ++j) result[(i / BLOCK * k + j) * BLOCK + i % BLOCK] = gain[i] * weight[i * k + j];
    return result;
}

struct Problem {
    const void *map, *value;  // (B, H, N, N); (B, N, H D), or null where the refined map is wanted
    void* output;             // as `value`, or as `map`
    int64_t batch, heads, expanded, size, kernel, value_width;
    bool is_bfloat16, has_expansion;
    Floats expand, expand_bias, local, local_bias, reduce, identity, constant;
    int64_t block_rows;  // a task is so many rows of an image
    std::atomic<int64_t> next{0};

    int64_t blocks() const { return divided(size, block_rows); }
};

// to (M, V vectors) = bias + weight (M / BLOCK, K, BLOCK) times from (K, V vectors)
template <int V, bool ACTIVATE>
inline void product(const Floats& weight, const float* bias, const float* from, int64_t from_stride, float* to,
                    int64_t to_stride, int64_t m, int64_t k) {
    for (int64_t first = 0; first < m; first += BLOCK)
        block_product<V, ACTIVATE>(weight.data() + first * k, 1, BLOCK, bias ? bias + first : nullptr, from, from_stride,
                                   to + first * to_stride, to_stride, k);
}

// to (E, R rows, V vectors) = the convolution at R rows and a column, of the rows around. K is the kernel's side where it is
// known early.
template <int R, int V, int K>
inline void convolve(const Problem& p, const float* const* around, int64_t stride, int64_t column, float* to) {
    const int64_t k = K ? K : p.kernel;
    for (int64_t e = 0; e < p.expanded; ++e) {
        const float* w = p.local.data() + e * k * k;
        Vector sums[R][V];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v] = all(p.local_bias[e]);
#pragma GCC unroll 4
        for (int64_t i = 0; i < k + R - 1; ++i) {
            const float* row = around[i] + e * stride + column;
#pragma GCC unroll 3
            for (int64_t j = 0; j < k; ++j)
                for (int v = 0; v < V; ++v) {
                    const Vector values = load(row + j + v * WIDTH);
                    for (int r = 0; r < R; ++r)
                        if (i - r >= 0 && i - r < k) sums[r][v] += w[(i - r) * k + j] * values;
                }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) store(to + ((e * R + r) * V + v) * WIDTH, relu6(sums[r][v]));
    }
}

// What a thread needs of its own, and what it does.
class Worker {
   public:
    explicit Worker(Problem& problem)
        : p(problem),
          pad(p.kernel / 2),
          width(rounded(p.size, WIDTH)),
          lead(rounded(pad, WIDTH)),
          stride(width + 2 * lead),
          rows_stride(rounded(p.expanded, BLOCK) * stride + WIDTH),
          ring((p.kernel + 1) * rows_stride, 0.0f),
          nothing(rows_stride, 0.0f),
          source(p.heads * width, 0.0f),
          hidden((p.expanded + BLOCK) * 4 * WIDTH),
          reduced((p.heads + BLOCK) * 4 * WIDTH),
          around(p.kernel + 1),
          values(p.value ? p.heads : 0, p.size, p.value_width),
          refined(p.value ? p.heads * GROUP * width : 0, 0.0f),
          weighted(BLOCK * values.columns) {}

    void work() {
        for (int64_t task; (task = p.next.fetch_add(1)) < p.batch * p.blocks();) {
            const int64_t image = task / p.blocks(), first = task % p.blocks() * p.block_rows;
            const int64_t last = std::min(first + p.block_rows, p.size);
            if (p.value && image != taken) {
                for (int64_t h = 0; h < p.heads; ++h) values.take(p.value, image, p.heads, h, h, p.is_bfloat16);
                taken = image;
            }
            made = std::max<int64_t>(first - pad, 0);
            for (begin = first; begin < last; begin += GROUP) {
                const int64_t count = std::min(GROUP, last - begin);
                refine_rows(image, begin, begin + count);
                if (p.value) weigh_rows(image, count);
            }
        }
    }

   private:
    // Rows that are refined, in pairs, before they weight the values, in blocks.
    static constexpr int64_t GROUP = 2 * BLOCK;

    void refine_rows(int64_t image, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row += 2) {
            const int64_t rows = std::min<int64_t>(last - row, 2);
            for (; made < std::min(row + rows + pad, p.size); ++made) expand(image, made);
            for (int64_t i = 0; i < p.kernel + rows - 1; ++i) {
                const int64_t at = row - pad + i;
                around[i] = (at < 0 || at >= p.size ? nothing.data() : ring.data() + at % (p.kernel + 1) * rows_stride) + lead - pad;
            }
            int64_t column = 0;
            for (; column + WIDTH < width; column += 2 * WIDTH)
                rows == 2 ? refine_tile<2, 2>(image, row, column) : refine_tile<1, 2>(image, row, column);
            for (; column < width; column += WIDTH)
                rows == 2 ? refine_tile<2, 1>(image, row, column) : refine_tile<1, 1>(image, row, column);
        }
    }

    // What the group's rows make of the values.
    void weigh_rows(int64_t image, int64_t count) {
        for (int64_t h = 0; h < p.heads; ++h)
            for (int64_t i = 0; i < count; i += BLOCK) {
                values.weigh(refined_row(h, begin + i), width, h, weighted.data());
                for (int64_t r = i; r < std::min(i + BLOCK, count); ++r)
                    write(p.output, ((image * p.size + begin + r) * p.heads + h) * p.value_width, p.value_width,
                          p.is_bfloat16, weighted.data() + (r - i) * values.columns);
            }
    }

    float* refined_row(int64_t head, int64_t row) { return refined.data() + (head * GROUP + row - begin) * width; }

    int64_t place(int64_t image, int64_t head, int64_t row) const {
        return ((image * p.heads + head) * p.size + row) * p.size;
    }

    // A row of an image's expanded maps, into the ring.
    void expand(int64_t image, int64_t row) {
        for (int64_t h = 0; h < p.heads; ++h) {
            read(p.map, place(image, h, row), p.size, p.is_bfloat16, source.data() + h * width);
            if (row + 1 < p.size) fetch(p.map, place(image, h, row + 1), p.size, p.is_bfloat16, false);
        }
        float* to = ring.data() + row % (p.kernel + 1) * rows_stride;
        if (p.has_expansion) {
            int64_t column = 0;
            for (; column + 3 * WIDTH < width; column += 4 * WIDTH) expand_columns<4>(to, column);
            for (; column + WIDTH < width; column += 2 * WIDTH) expand_columns<2>(to, column);
            for (; column < width; column += WIDTH) expand_columns<1>(to, column);
        } else {
            for (int64_t h = 0; h < p.heads; ++h)
                std::memcpy(to + h * stride + lead, source.data() + h * width, p.size * sizeof(float));
        }
        for (int64_t e = 0; e < p.expanded; ++e)  // beside the map there is nothing
            std::fill(to + e * stride + lead + p.size, to + (e + 1) * stride, 0.0f);
    }

    template <int V>
    void expand_columns(float* to, int64_t column) {
        product<V, true>(p.expand, p.expand_bias.data(), source.data() + column, width, to + lead + column, stride, p.expanded,
                         p.heads);
    }

    template <int R, int V>
    void refine_tile(int64_t image, int64_t first, int64_t column) {
        constexpr int TILE = R * V;
        if (p.kernel == 3)
            convolve<R, V, 3>(p, around.data(), stride, column, hidden.data());
        else
            convolve<R, V, 0>(p, around.data(), stride, column, hidden.data());
        product<TILE, false>(p.reduce, nullptr, hidden.data(), TILE * WIDTH, reduced.data(), TILE * WIDTH, p.heads,
                                p.expanded);
        const int64_t count = std::min(V * WIDTH, p.size - column);
        const bool in_place = count == V * WIDTH && !p.is_bfloat16;
        for (int64_t h = 0; h < p.heads; ++h) {
            const float gain = p.identity[h], bias = p.constant[h];
            for (int64_t r = 0; r < R; ++r) {
                const int64_t at = place(image, h, first + r) + column;
                const float* z = reduced.data() + (h * TILE + r * V) * WIDTH;
                float row[V * WIDTH] = {};
                const float* from = in_place ? static_cast<const float*>(p.map) + at : row;
                float* to = p.value ? refined_row(h, first + r) + column : in_place ? static_cast<float*>(p.output) + at : row;
                if (!in_place) read(p.map, at, count, p.is_bfloat16, row);
                for (int v = 0; v < V; ++v)
                    store(to + v * WIDTH, load(z + v * WIDTH) + all(gain) * load(from + v * WIDTH) + all(bias));
                if (to == row) write(p.output, at, count, p.is_bfloat16, row);
            }
        }
    }

    Problem& p;
    const int64_t pad, width, lead, stride, rows_stride;  // `lead`: where the map begins in a row, so that vectors lie well
    Floats ring, nothing, source, hidden, reduced;
    std::vector<const float*> around;
    Values values;
    Floats refined, weighted;
    int64_t taken = -1;  // the image whose values are here
    int64_t begin, made;  // the group's first row, and the next expanded row to make
};

// One that finds no memory leaves its work to the others.
void work(void* problem) {
    try {
        Worker(*static_cast<Problem*>(problem)).work();
    } catch (const std::bad_alloc&) {
    }
}

}  // namespace

// Returns 0, or 1 where there is too little memory.
//   tensors: map; values, or null where the refined map is wanted; output; expansion's weight (E, H) or null; local attention's (E, k, k); reduction's (H, E); then weight,
//            bias, mean and variance of the norms after these three (those of a missing expansion null), and of the output
//   sizes:   B, H, E, N, k, D, whether map, values and output are in bfloat16, threads
//   eps:     of the four norms
extern "C" int refiner_refine(const void* const* tensors, const int64_t* sizes, const double* eps, double scale,
                              Parallel parallel) try {
    const auto floats = reinterpret_cast<const float* const*>(tensors);
    Problem p;
    p.map = tensors[0];
    p.value = tensors[1];
    p.output = const_cast<void*>(tensors[2]);
    p.batch = sizes[0], p.heads = sizes[1], p.expanded = sizes[2], p.size = sizes[3], p.kernel = sizes[4];
    p.value_width = sizes[5];
    p.is_bfloat16 = sizes[6] != 0;
    p.has_expansion = floats[3] != nullptr;
    if (p.has_expansion) {
        const Affine norm(floats + 6, p.expanded, eps[0]);
        p.expand = packed(floats[3], norm.gain, p.expanded, p.heads);
        p.expand_bias = norm.bias;
        p.expand_bias.resize(p.expanded + BLOCK);
    }
    const Affine local(floats + 10, p.expanded, eps[1]), reduction(floats + 14, p.heads, eps[2]),
        output(floats + 18, p.heads, eps[3]);
    const int64_t area = p.kernel * p.kernel;
    p.local.resize(p.expanded * area);
    for (int64_t i = 0; i < p.expanded * area; ++i) p.local[i] = local.gain[i / area] * floats[4][i];
    p.local_bias = local.bias;
    Floats gain(p.heads);
    p.identity.resize(p.heads), p.constant.resize(p.heads);
    for (int64_t h = 0; h < p.heads; ++h) {
        p.identity[h] = float(scale) * output.gain[h];
        p.constant[h] = float(scale) * output.bias[h] + p.identity[h] * reduction.bias[h];
        gain[h] = p.identity[h] * reduction.gain[h];
    }
    p.reduce = packed(floats[5], gain, p.heads, p.expanded);

    const int64_t operations = p.batch * p.size * p.size * p.expanded * (2 * p.heads + area);
    const int64_t threads = operations < (1 << 20) ? 1 : sizes[7];  // starting them takes as long as so many
    const int64_t tasks_of_image = threads == 1 ? 1 : divided(4 * threads, p.batch);
    p.block_rows = std::max(divided(p.size, tasks_of_image), std::min(4 * p.kernel, p.size));
    in_threads(work, &p, threads, parallel);
    return p.next < p.batch * p.blocks();
} catch (const std::bad_alloc&) {
    return 1;
}

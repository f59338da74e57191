// Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
//
// A refinement in evaluation, in one pass over the rows of a map: expand, convolve, reduce. Each row of the expanded maps
// is made once, stays in a ring with the rows around it, and is never written to memory. `native_refiner.py` compiles it.
//
// Names as in folding_refiner.py. Shapes: B batch, H heads, E expanded heads, N rows and columns, k the kernel's side.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

// Floats in a vector, and rows of a matrix whose product with some vectors is made at a time: so many that all sums stay in
// registers.
#ifdef __AVX512F__
constexpr int64_t WIDTH = 16, BLOCK = 6;
#else
constexpr int64_t WIDTH = 8, BLOCK = 3;
#endif
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector values) { *reinterpret_cast<Vector*>(to) = values; }
inline Vector all(float value) { return Vector{} + value; }

inline Vector relu6(Vector values) {  // NaN stays NaN
    values = all(0) > values ? all(0) : values;
    return all(6) < values ? all(6) : values;
}

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);  // NaN stays NaN
}

// A batch norm in evaluation as gain x + bias.
struct Affine {
    std::vector<float> gain, bias;

    Affine(const float* const* norm, int64_t channels, double eps) : gain(channels), bias(channels) {
        const float *weight = norm[0], *shift = norm[1], *mean = norm[2], *variance = norm[3];
        for (int64_t c = 0; c < channels; ++c) {
            gain[c] = weight[c] / std::sqrt(variance[c] + float(eps));
            bias[c] = shift[c] - gain[c] * mean[c];
        }
    }
};

// (M, K) with a gain for each row -> (M / BLOCK, K, BLOCK), as `product` reads it; M rounded up with zeros.
std::vector<float> packed(const float* weight, const std::vector<float>& gain, int64_t m, int64_t k) {
    std::vector<float> result((m + BLOCK - 1) / BLOCK * BLOCK * k, 0.0f);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < k; ++j) result[(i / BLOCK * k + j) * BLOCK + i % BLOCK] = gain[i] * weight[i * k + j];
    return result;
}

struct Problem {
    const void* map;  // (B, H, N, N)
    void* output;
    int64_t batch, heads, expanded, size, kernel;
    bool is_bfloat16, has_expansion;
    std::vector<float> expand, expand_bias, local, local_bias, reduce, identity, constant;
    int64_t block_rows;  // a task is so many rows of an image
    std::atomic<int64_t> next{0};
};

// to (M, V vectors) = bias + weight (M / BLOCK, K, BLOCK) times from (K, V vectors)
template <int V, bool ACTIVATE>
inline void product(const std::vector<float>& weight, const float* bias, const float* from, int64_t from_stride, float* to,
                    int64_t to_stride, int64_t m, int64_t k) {
    for (int64_t first = 0; first < m; first += BLOCK) {
        Vector sums[BLOCK][V];
        for (int i = 0; i < BLOCK; ++i)
            for (int v = 0; v < V; ++v) sums[i][v] = all(bias ? bias[first + i] : 0.0f);
        const float* w = weight.data() + first * k;
        for (int64_t j = 0; j < k; ++j)
            for (int v = 0; v < V; ++v) {
                const Vector values = load(from + j * from_stride + v * WIDTH);
                for (int i = 0; i < BLOCK; ++i) sums[i][v] += w[j * BLOCK + i] * values;
            }
        for (int i = 0; i < BLOCK; ++i)
            for (int v = 0; v < V; ++v)
                store(to + (first + i) * to_stride + v * WIDTH, ACTIVATE ? relu6(sums[i][v]) : sums[i][v]);
    }
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
          width((p.size + WIDTH - 1) / WIDTH * WIDTH),
          stride(width + 2 * pad),
          rows_stride((p.expanded + BLOCK - 1) / BLOCK * BLOCK * stride + WIDTH),
          ring((p.kernel + 1) * rows_stride, 0.0f),
          nothing(rows_stride, 0.0f),
          source(p.heads * width, 0.0f),
          hidden((p.expanded + BLOCK) * 4 * WIDTH),
          reduced((p.heads + BLOCK) * 4 * WIDTH),
          around(p.kernel + 1) {}

    void work() {
        const int64_t blocks = (p.size + p.block_rows - 1) / p.block_rows;
        for (int64_t task; (task = p.next.fetch_add(1)) < p.batch * blocks;) {
            const int64_t first = task % blocks * p.block_rows;
            refine_rows(task / blocks, first, std::min(first + p.block_rows, p.size));
        }
    }

   private:
    void refine_rows(int64_t image, int64_t first, int64_t last) {
        int64_t made = std::max<int64_t>(first - pad, 0);  // the next expanded row to make
        for (int64_t row = first; row < last; row += 2) {
            const int64_t rows = std::min<int64_t>(last - row, 2);
            for (; made < std::min(row + rows + pad, p.size); ++made) expand(image, made);
            for (int64_t i = 0; i < p.kernel + rows - 1; ++i) {
                const int64_t at = row - pad + i;
                around[i] = at < 0 || at >= p.size ? nothing.data() : ring.data() + at % (p.kernel + 1) * rows_stride;
            }
            int64_t column = 0;
            for (; column + WIDTH < width; column += 2 * WIDTH)
                rows == 2 ? refine_tile<2, 2>(image, row, column) : refine_tile<1, 2>(image, row, column);
            for (; column < width; column += WIDTH)
                rows == 2 ? refine_tile<2, 1>(image, row, column) : refine_tile<1, 1>(image, row, column);
        }
    }

    int64_t place(int64_t image, int64_t head, int64_t row) const {
        return ((image * p.heads + head) * p.size + row) * p.size;
    }

    // A row of an image's expanded maps, into the ring.
    void expand(int64_t image, int64_t row) {
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t at = place(image, h, row);
            float* to = source.data() + h * width;
            if (p.is_bfloat16) {
                const uint16_t* from = static_cast<const uint16_t*>(p.map) + at;
                for (int64_t c = 0; c < p.size; ++c) to[c] = from_bfloat16(from[c]);
            } else {
                std::memcpy(to, static_cast<const float*>(p.map) + at, p.size * sizeof(float));
            }
        }
        float* to = ring.data() + row % (p.kernel + 1) * rows_stride;
        if (p.has_expansion) {
            int64_t column = 0;
            for (; column + 3 * WIDTH < width; column += 4 * WIDTH) expand_columns<4>(to, column);
            for (; column + WIDTH < width; column += 2 * WIDTH) expand_columns<2>(to, column);
            for (; column < width; column += WIDTH) expand_columns<1>(to, column);
        } else {
            for (int64_t h = 0; h < p.heads; ++h)
                std::memcpy(to + h * stride + pad, source.data() + h * width, p.size * sizeof(float));
        }
        for (int64_t e = 0; e < p.expanded; ++e)  // beside the map there is nothing
            std::fill(to + e * stride + pad + p.size, to + (e + 1) * stride, 0.0f);
    }

    template <int V>
    void expand_columns(float* to, int64_t column) {
        product<V, true>(p.expand, p.expand_bias.data(), source.data() + column, width, to + pad + column, stride, p.expanded,
                         p.heads);
    }

    template <int R, int V>
    void refine_tile(int64_t image, int64_t first, int64_t column) {
        constexpr int VECTORS = R * V;
        if (p.kernel == 3)
            convolve<R, V, 3>(p, around.data(), stride, column, hidden.data());
        else
            convolve<R, V, 0>(p, around.data(), stride, column, hidden.data());
        product<VECTORS, false>(p.reduce, nullptr, hidden.data(), VECTORS * WIDTH, reduced.data(), VECTORS * WIDTH, p.heads,
                                p.expanded);
        const int64_t count = std::min(V * WIDTH, p.size - column);
        for (int64_t h = 0; h < p.heads; ++h) {
            const float gain = p.identity[h], bias = p.constant[h];
            for (int64_t r = 0; r < R; ++r) {
                const int64_t at = place(image, h, first + r) + column;
                const float* z = reduced.data() + (h * VECTORS + r * V) * WIDTH;
                if (p.is_bfloat16) {
                    const uint16_t* from = static_cast<const uint16_t*>(p.map) + at;
                    uint16_t* to = static_cast<uint16_t*>(p.output) + at;
                    for (int64_t c = 0; c < count; ++c) to[c] = to_bfloat16(z[c] + gain * from_bfloat16(from[c]) + bias);
                } else {
                    const float* from = static_cast<const float*>(p.map) + at;
                    float* to = static_cast<float*>(p.output) + at;
                    for (int64_t c = 0; c < count; ++c) to[c] = z[c] + gain * from[c] + bias;
                }
            }
        }
    }

    Problem& p;
    const int64_t pad, width, stride, rows_stride;
    std::vector<float> ring, nothing, source, hidden, reduced;
    std::vector<const float*> around;
};

int64_t tasks(const Problem& p) { return p.batch * ((p.size + p.block_rows - 1) / p.block_rows); }

// One that finds no memory leaves its work to the others.
void work(void* problem) {
    try {
        Worker(*static_cast<Problem*>(problem)).work();
    } catch (const std::bad_alloc&) {
    }
}

}  // namespace

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

// Returns 0, or 1 where there is too little memory.
//   tensors: map, output; expansion's weight (E, H) or null; local attention's (E, k, k); reduction's (H, E); then weight,
//            bias, mean and variance of the norms after these three (those of a missing expansion null), and of the output
//   sizes:   B, H, E, N, k, whether the maps are in bfloat16, threads
//   eps:     of the four norms
//   parallel: GOMP_parallel of the OpenMP that torch uses, so that both share their threads; or null
extern "C" int refiner_refine(const void* const* tensors, const int64_t* sizes, const double* eps, double scale,
                              Parallel parallel) try {
    const auto floats = reinterpret_cast<const float* const*>(tensors);
    Problem p;
    p.map = tensors[0];
    p.output = const_cast<void*>(tensors[1]);
    p.batch = sizes[0], p.heads = sizes[1], p.expanded = sizes[2], p.size = sizes[3], p.kernel = sizes[4];
    p.is_bfloat16 = sizes[5] != 0;
    p.has_expansion = floats[2] != nullptr;
    if (p.has_expansion) {
        const Affine norm(floats + 5, p.expanded, eps[0]);
        p.expand = packed(floats[2], norm.gain, p.expanded, p.heads);
        p.expand_bias = norm.bias;
        p.expand_bias.resize(p.expanded + BLOCK);
    }
    const Affine local(floats + 9, p.expanded, eps[1]), reduction(floats + 13, p.heads, eps[2]),
        output(floats + 17, p.heads, eps[3]);
    const int64_t area = p.kernel * p.kernel;
    p.local.resize(p.expanded * area);
    for (int64_t i = 0; i < p.expanded * area; ++i) p.local[i] = local.gain[i / area] * floats[3][i];
    p.local_bias = local.bias;
    std::vector<float> gain(p.heads);
    p.identity.resize(p.heads), p.constant.resize(p.heads);
    for (int64_t h = 0; h < p.heads; ++h) {
        p.identity[h] = float(scale) * output.gain[h];
        p.constant[h] = float(scale) * output.bias[h] + p.identity[h] * reduction.bias[h];
        gain[h] = p.identity[h] * reduction.gain[h];
    }
    p.reduce = packed(floats[4], gain, p.heads, p.expanded);

    const int64_t operations = p.batch * p.size * p.size * p.expanded * (2 * p.heads + area);
    const int64_t threads = operations < (1 << 20) ? 1 : sizes[6];  // starting them takes as long as so many
    const int64_t tasks_of_image = threads == 1 ? 1 : (4 * threads + p.batch - 1) / p.batch;
    p.block_rows = std::max((p.size + tasks_of_image - 1) / tasks_of_image, std::min(4 * p.kernel, p.size));
    if (threads == 1) {
        work(&p);
    } else if (parallel) {
        parallel(work, &p, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, &p);
        work(&p);
        for (auto& other : others) other.join();
    }
    return p.next < tasks(p);
} catch (const std::bad_alloc&) {
    return 1;
}

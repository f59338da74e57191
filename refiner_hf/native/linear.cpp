// Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
//
// A linear layer in inference, whose weight was brought into the order of the product before.
//
// Shapes: inputs (M, K), weight (N, K), packed weight (N rounded up / PANEL, K, PANEL), bias (N), outputs (M, N).

#include "vectors.h"

namespace {

constexpr int64_t PANEL = VECTORS * WIDTH;  // columns of the outputs that are made together
constexpr int64_t DEPTH = 1024;                          // of a panel at a time; with more it would leave the second cache
constexpr int AHEAD = WIDTH == 16 ? 16 : 0;              // rows of a panel, from the second cache into the first
constexpr int64_t ROWS = 1024;                           // of a task at most
constexpr int64_t LINE = 64 / sizeof(float);             // what is fetched at a time
constexpr int64_t SAMPLED = 8;                           // of so many rows one number tells whether the weight is still the same

struct Linear {
    const float *inputs, *packed, *bias;  // bias may be null
    float* outputs;
    int64_t m, n, k;
    bool has_gelu;
    int64_t panels, task_rows;  // a task is a panel times so many rows
    std::atomic<int64_t> next{0};

    int64_t tasks() const { return panels * divided(m, task_rows); }
};

// x / 2 (1 + erf(x / sqrt 2)); erf as Abramowitz and Stegun's 7.1.26 has it, off by 1.5e-7 at most.
inline Vector gelu(Vector x) {
    const Vector size = x < all(0) ? -x : x;
    const Vector t = all(1) / (all(1) + all(0.3275911f * 0.70710678f) * size);
    Vector sum = all(1.061405429f);
    for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = sum * t + all(factor);
    const Vector beyond = sum * t * exponential(all(-0.5f) * x * x);  // 1 - erf(|x| / sqrt 2)
    return (x < all(0) ? all(0) : x) - all(0.5f) * size * beyond;
}

class Worker {
   public:
    explicit Worker(Linear& linear) : l(linear), rest(BLOCK * std::min(DEPTH, l.k)) {}

    void work() {
        for (int64_t task; (task = l.next.fetch_add(1)) < l.tasks();)
            for (int64_t depth = 0; depth < l.k; depth += DEPTH) multiply(task % l.panels, task / l.panels * l.task_rows, depth);
    }

   private:
    void multiply(int64_t panel, int64_t first, int64_t depth) {
        const int64_t last = std::min(first + l.task_rows, l.m), k = std::min(DEPTH, l.k - depth);
        const float* packed = l.packed + (panel * l.k + depth) * PANEL;
        // What comes next in memory is fetched meanwhile, a piece with each block of rows.
        const int64_t piece = rounded(divided(k * PANEL, divided(last - first, BLOCK)), LINE);
        const float* ahead = packed + k * PANEL;
        for (int64_t row = first; row < last; row += BLOCK) {
            for (int64_t i = 0; i < piece; i += LINE) __builtin_prefetch(ahead + i, 0, 2);
            ahead += piece;
            const int64_t rows = std::min(BLOCK, last - row);
            const float* from = l.inputs + row * l.k + depth;
            int64_t stride = l.k;
            if (rows < BLOCK) {
                for (int64_t i = 0; i < rows; ++i) std::memcpy(rest.data() + i * k, from + i * l.k, k * sizeof(float));
                from = rest.data(), stride = k;
            }
            block_product<VECTORS, false, AHEAD>(from, stride, 1, nullptr, packed, PANEL, sums, PANEL, k);
            for (int64_t i = 0; i < rows; ++i) finish(row + i, panel * PANEL, depth, sums + i * PANEL);
        }
    }

    // A row of sums into the outputs: with those of the depths before or the bias, and at last the activation.
    void finish(int64_t row, int64_t column, int64_t depth, float* from) {
        const int64_t columns = std::min(PANEL, l.n - column);
        float* to = l.outputs + row * l.n + column;
        const float* added = depth ? to : l.bias ? l.bias + column : nullptr;
        const bool activated = l.has_gelu && depth + DEPTH >= l.k;
        int64_t c = 0;
        for (; c + WIDTH <= columns; c += WIDTH) {
            Vector values = load(from + c);
            if (added) values += load(added + c);
            store(to + c, activated ? gelu(values) : values);
        }
        if (c == columns) return;
        for (int64_t i = c; i < columns; ++i)
            if (added) from[i] += added[i];
        if (activated) store(from + c, gelu(load(from + c)));
        std::memcpy(to + c, from + c, (columns - c) * sizeof(float));
    }

    Linear& l;
    Floats rest;  // the last rows of the inputs
    alignas(64) float sums[BLOCK * PANEL];
};

// One that finds no memory leaves its work to the others.
void work(void* linear) {
    try {
        Worker(*static_cast<Linear*>(linear)).work();
    } catch (const std::bad_alloc&) {
    }
}

void pack(const float* weight, float* packed, int64_t n, int64_t k) {
    for (int64_t row = 0; row < n; row += PANEL)
        transpose(weight + row * k, k, packed + row * k, PANEL, std::min(PANEL, n - row), k);
}

// Whether some numbers, spread over rows and columns, are still the weight's.
bool is_current(const float* weight, const float* packed, int64_t n, int64_t k) {
    for (int64_t row = 0; row < n; row += SAMPLED) {
        const int64_t column = row * k / n, i = row % PANEL;
        if (std::memcmp(weight + row * k + column, packed + (row - i) * k + column * PANEL + i, sizeof(float))) return false;
    }
    return true;
}

}  // namespace

// Brings a weight into the order of the product.
//   tensors: weight; packed weight, which has room for N rounded up to 64 rows
//   sizes:   N, K, threads
extern "C" int refiner_pack(const void* const* tensors, const int64_t* sizes, Parallel) {
    pack(static_cast<const float*>(tensors[0]), static_cast<float*>(const_cast<void*>(tensors[1])), sizes[0], sizes[1]);
    return 0;
}

// Returns 0, or 1 where there is too little memory.
//   tensors: inputs, weight, packed weight, bias or null, outputs
//   sizes:   M, N, K, whether a GELU follows, threads
extern "C" int refiner_linear(const void* const* tensors, const int64_t* sizes, Parallel parallel) {
    const auto floats = reinterpret_cast<const float* const*>(tensors);
    Linear l;
    l.inputs = floats[0], l.packed = floats[2], l.bias = floats[3], l.outputs = const_cast<float*>(floats[4]);
    l.m = sizes[0], l.n = sizes[1], l.k = sizes[2];
    l.has_gelu = sizes[3] != 0;
    if (l.m == 0 || l.n == 0) return 0;
    if (!is_current(floats[1], l.packed, l.n, l.k)) pack(floats[1], const_cast<float*>(l.packed), l.n, l.k);
    l.panels = divided(l.n, PANEL);
    const int64_t threads = l.m * l.n * l.k < (1 << 20) ? 1 : sizes[4];  // starting them takes as long as so many
    const int64_t parts = std::max(threads > 1 ? divided(4 * threads, l.panels) : 1, divided(l.m, ROWS));
    l.task_rows = rounded(divided(l.m, parts), BLOCK);
    in_threads(work, &l, threads, parallel);
    return l.next < l.tasks();
}

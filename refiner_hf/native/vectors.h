// Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
//
// What the functions are made of: vectors of floats, products of small matrices, numbers in bfloat16, threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
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
typedef int32_t Integers __attribute__((vector_size(WIDTH * sizeof(int32_t)), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector values) { *reinterpret_cast<Vector*>(to) = values; }
inline Vector all(float value) { return Vector{} + value; }

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }            // rounded up
inline int64_t rounded(int64_t a, int64_t b) { return divided(a, b) * b; }  // up to a multiple

inline Vector relu6(Vector values) {  // NaN stays NaN
    values = all(0) > values ? all(0) : values;
    return all(6) < values ? all(6) : values;
}

// e to the power of numbers that aren't positive, with a relative error below 3e-7; NaN stays NaN.
inline Vector exponential(Vector x) {
    const Vector magic = all(12582912.0f);  // 1.5 * 2^23: whoever adds it is rounded to an integer, in the lowest bits
    const Vector shifted = x * all(1.44269504f) + magic;
    const Vector n = shifted - magic;
    const Vector r = x - n * all(0.693359375f) - n * all(-2.12194440e-4f);  // x - n log 2, the logarithm as a sum
    Vector power = all(1.0f / 720);
    for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) power = power * r + all(factor);
    const Integers exponent = ((Integers)shifted - (Integers)magic + 127) << 23;
    return x < all(-87.0f) ? all(0) : power * (Vector)exponent;
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

// Some numbers of a tensor in float32 or bfloat16, as floats.
inline void read(const void* tensor, int64_t at, int64_t count, bool is_bfloat16, float* to) {
    if (is_bfloat16) {
        const uint16_t* from = static_cast<const uint16_t*>(tensor) + at;
        for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(from[i]);
    } else {
        std::memcpy(to, static_cast<const float*>(tensor) + at, count * sizeof(float));
    }
}

inline void write(void* tensor, int64_t at, int64_t count, bool is_bfloat16, const float* from) {
    if (is_bfloat16) {
        uint16_t* to = static_cast<uint16_t*>(tensor) + at;
        for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
    } else {
        std::memcpy(static_cast<float*>(tensor) + at, from, count * sizeof(float));
    }
}

// A block of BLOCK rows of a matrix product: to (BLOCK, V vectors) = bias + weight (BLOCK, K) times from (K, V vectors).
template <int V, bool ACTIVATE>
inline void block_product(const float* weight, int64_t weight_row, int64_t weight_column, const float* bias, const float* from,
                          int64_t from_stride, float* to, int64_t to_stride, int64_t k) {
    Vector sums[BLOCK][V];
    for (int i = 0; i < BLOCK; ++i)
        for (int v = 0; v < V; ++v) sums[i][v] = all(bias ? bias[i] : 0.0f);
    for (int64_t j = 0; j < k; ++j)
        for (int v = 0; v < V; ++v) {
            const Vector values = load(from + j * from_stride + v * WIDTH);
            for (int i = 0; i < BLOCK; ++i) sums[i][v] += weight[i * weight_row + j * weight_column] * values;
        }
    for (int i = 0; i < BLOCK; ++i)
        for (int v = 0; v < V; ++v) store(to + i * to_stride + v * WIDTH, ACTIVATE ? relu6(sums[i][v]) : sums[i][v]);
}

// The same for rows of any length, `columns` a multiple of WIDTH.
inline void row_product(const float* weight, int64_t weight_row, int64_t weight_column, const float* from, int64_t columns,
                        float* to, int64_t to_stride, int64_t k) {
    int64_t c = 0;
    for (; c + 3 * WIDTH < columns; c += 4 * WIDTH)
        block_product<4, false>(weight, weight_row, weight_column, nullptr, from + c, columns, to + c, to_stride, k);
    for (; c + WIDTH < columns; c += 2 * WIDTH)
        block_product<2, false>(weight, weight_row, weight_column, nullptr, from + c, columns, to + c, to_stride, k);
    for (; c < columns; c += WIDTH)
        block_product<1, false>(weight, weight_row, weight_column, nullptr, from + c, columns, to + c, to_stride, k);
}

// The values of an image's heads, (N, H D) in memory, as (H, N, D rounded up to vectors): what maps weight.
struct Values {
    const int64_t heads, size, width, columns;
    std::vector<float> numbers;

    Values(int64_t heads, int64_t size, int64_t width)
        : heads(heads), size(size), width(width), columns(rounded(width, WIDTH)), numbers(heads * size * columns, 0.0f) {}

    // Those of one head into the place of the h-th.
    void take(const void* tensor, int64_t image, int64_t all_heads, int64_t head, int64_t h, bool is_bfloat16) {
        for (int64_t n = 0; n < size; ++n)
            read(tensor, ((image * size + n) * all_heads + head) * width, width, is_bfloat16,
                 numbers.data() + (h * size + n) * columns);
    }

    // to (BLOCK, columns) = BLOCK rows of the h-th head's map times its values.
    void weigh(const float* rows, int64_t stride, int64_t h, float* to) const {
        row_product(rows, stride, 1, numbers.data() + h * size * columns, columns, to, columns, size);
    }
};

}  // namespace

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel of the OpenMP that torch uses

// work(problem) in so many threads; `parallel` is null where torch has another OpenMP.
inline void in_threads(void (*work)(void*), void* problem, int64_t threads, Parallel parallel) {
    if (threads == 1) {
        work(problem);
    } else if (parallel) {
        parallel(work, problem, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, problem);
        work(problem);
        for (auto& other : others) other.join();
    }
}

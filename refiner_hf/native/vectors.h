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
#include <utility>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

// Floats in a vector; and of a matrix product, rows and vectors that are made at a time: so many that all sums stay in registers.
constexpr int64_t BLOCK = 6;
#ifdef __AVX512F__
constexpr int64_t WIDTH = 16, VECTORS = 4;
#else
constexpr int64_t WIDTH = 8, VECTORS = 2;
#endif
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(WIDTH * sizeof(int32_t)), aligned(4), may_alias));

// Floats from a place where a vector lies in one cache line; otherwise each would be read and written in two pieces.
template <class T>
struct Aligned {
    typedef T value_type;
    static constexpr auto PLACE = std::align_val_t(sizeof(Vector));

    T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), PLACE)); }
    void deallocate(T* first, std::size_t) noexcept { ::operator delete(first, PLACE); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
typedef std::vector<float, Aligned<float>> Floats;

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector values) { *reinterpret_cast<Vector*>(to) = values; }
inline Vector all(float value) { return value - Vector{}; }  // adding would take an operation, for the sake of -0

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }            // rounded up
inline int64_t rounded(int64_t a, int64_t b) { return divided(a, b) * b; }  // up to a multiple

// The larger and the smaller of two numbers; `b` where one is NaN. GCC makes two operations of such a condition.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline Vector smaller(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (Vector)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

inline Vector relu6(Vector values) { return smaller(all(6), larger(all(0), values)); }  // NaN stays NaN

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

// From the halves of two vectors that begin at FIRST: a[FIRST], b[FIRST], a[FIRST + 1], b[FIRST + 1], ...
template <int FIRST, int... I>
inline Vector interleaved(Vector a, Vector b, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * int(WIDTH))...);
#else
    return __builtin_shuffle(a, b, Integers{(FIRST + I / 2 + I % 2 * int(WIDTH))...});
#endif
}

// to (columns, rows) = from (rows, columns), WIDTH of each.
inline void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    constexpr std::make_integer_sequence<int, WIDTH> indices{};
    Vector rows[WIDTH], next[WIDTH];
    for (int i = 0; i < WIDTH; ++i) rows[i] = load(from + i * from_stride);
    // Row i and the row half of them further become rows 2 i and 2 i + 1: after all halvings, columns.
    for (int done = 1; done < WIDTH; done *= 2) {
        for (int i = 0; i < WIDTH / 2; ++i) {
            next[2 * i] = interleaved<0>(rows[i], rows[i + WIDTH / 2], indices);
            next[2 * i + 1] = interleaved<WIDTH / 2>(rows[i], rows[i + WIDTH / 2], indices);
        }
        for (int i = 0; i < WIDTH; ++i) rows[i] = next[i];
    }
    for (int i = 0; i < WIDTH; ++i) store(to + i * to_stride, rows[i]);
}

// The same for any number of rows and columns.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
    const int64_t whole_rows = rows / WIDTH * WIDTH, whole_columns = columns / WIDTH * WIDTH;
    for (int64_t r = 0; r < whole_rows; r += WIDTH)
        for (int64_t c = 0; c < whole_columns; c += WIDTH)
            transpose_square(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
            to[c * to_stride + r] = from[r * from_stride + c];
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

// Brings rows of a tensor nearer that will soon be read or written: memory is slower than what is done with it.
inline void fetch(const void* tensor, int64_t at, int64_t count, bool is_bfloat16, bool written) {
    const int64_t size = is_bfloat16 ? sizeof(uint16_t) : sizeof(float);
    const char* from = static_cast<const char*>(tensor) + at * size;
    for (int64_t i = 0; i < count * size; i += 64) written ? __builtin_prefetch(from + i, 1) : __builtin_prefetch(from + i, 0);
}

// A block of BLOCK rows of a matrix product: to (BLOCK, V vectors) = bias + weight (BLOCK, K) times from (K, V vectors). Of
// `from`, the row that comes AHEAD rows later is fetched, where that isn't 0.
template <int V, bool ACTIVATE, int AHEAD = 0>
inline void block_product(const float* weight, int64_t weight_row, int64_t weight_column, const float* bias, const float* from,
                          int64_t from_stride, float* to, int64_t to_stride, int64_t k) {
    if constexpr (V > VECTORS) {
        block_product<VECTORS, ACTIVATE, AHEAD>(weight, weight_row, weight_column, bias, from, from_stride, to, to_stride, k);
        block_product<V - VECTORS, ACTIVATE, AHEAD>(weight, weight_row, weight_column, bias, from + VECTORS * WIDTH, from_stride,
                                                    to + VECTORS * WIDTH, to_stride, k);
        return;
    }
    Vector sums[BLOCK][V];  // in registers, if all loops over them are unrolled
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[i][v] = all(bias ? bias[i] : 0.0f);
    for (int64_t j = 0; j < k; ++j) {
        Vector values[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const float* at = from + j * from_stride + v * WIDTH;
            if (AHEAD) __builtin_prefetch(at + AHEAD * from_stride);
            values[v] = load(at);
        }
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK; ++i) {
            const Vector factor = all(weight[i * weight_row + j * weight_column]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[i][v] += factor * values[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; ++i)
#pragma GCC unroll 4
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
    Floats numbers;

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

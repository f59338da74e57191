// Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
//
// A convolution with kernel 3 and its ReLU in inference, by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, arXiv 1509.09308,
// section 4.1): four neighbouring outputs take 16 multiplications for each channel, where one by one they would take 36.
//
// Shapes: B batch, H x W pixels, K channels of the inputs and N of the outputs, both multiples of WIDTH. Inputs (B, H, W, K),
// outputs (B, H, W, N).

#include "vectors.h"

namespace {

constexpr int64_t POINTS = 16;                           // of a tile, transformed: 4 x 4
constexpr int64_t TILES = 6 * BLOCK;                     // of 2 x 2 outputs, in a task
constexpr int64_t PANEL = VECTORS * WIDTH;  // channels of the outputs that are made together

// B^T d B of 4 x 4 vectors.
inline void transform_inputs(const Vector (&d)[4][4], Vector (&to)[4][4]) {
    Vector half[4][4];
    for (int i = 0; i < 4; ++i) {
        half[0][i] = d[0][i] - d[2][i];
        half[1][i] = d[1][i] + d[2][i];
        half[2][i] = d[2][i] - d[1][i];
        half[3][i] = d[1][i] - d[3][i];
    }
    for (int i = 0; i < 4; ++i) {
        to[i][0] = half[i][0] - half[i][2];
        to[i][1] = half[i][1] + half[i][2];
        to[i][2] = half[i][2] - half[i][1];
        to[i][3] = half[i][1] - half[i][3];
    }
}

struct Convolution {
    const float *inputs, *bias;
    float* outputs;
    int64_t batch, height, width, channels, filters;
    Floats weight;          // (N / PANEL, POINTS, K, PANEL)
    int64_t rows, columns;  // of tiles in an image
    std::atomic<int64_t> next{0};

    int64_t tasks_of_image() const { return divided(rows * columns, TILES); }
    int64_t tasks() const { return batch * tasks_of_image(); }
};

class Worker {
   public:
    explicit Worker(Convolution& convolution)
        : c(convolution),
          transformed(POINTS * TILES * c.channels, 0.0f),
          products(POINTS * TILES * PANEL),
          nothing(c.channels, 0.0f) {}

    void work() {
        for (int64_t task; (task = c.next.fetch_add(1)) < c.tasks();) {
            const int64_t image = task / c.tasks_of_image(), first = task % c.tasks_of_image() * TILES;
            const int64_t count = std::min(TILES, c.rows * c.columns - first);
            for (int64_t t = 0; t < count; ++t) take_tile(image, (first + t) / c.columns, (first + t) % c.columns, t);
            for (int64_t n = 0; n < c.filters; n += PANEL) {
                for (int64_t p = 0; p < POINTS; ++p) multiply(p, n, count);
                for (int64_t t = 0; t < count; ++t) make_tile(image, (first + t) / c.columns, (first + t) % c.columns, t, n);
            }
        }
    }

   private:
    const float* pixel(int64_t image, int64_t y, int64_t x) const {
        if (y < 0 || y >= c.height || x < 0 || x >= c.width) return nothing.data();
        return c.inputs + ((image * c.height + y) * c.width + x) * c.channels;
    }

    // Tile t of the task: 4 x 4 pixels, of which its outputs are the middle.
    void take_tile(int64_t image, int64_t row, int64_t column, int64_t t) {
        const float* from[4][4];
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) from[i][j] = pixel(image, 2 * row - 1 + i, 2 * column - 1 + j);
        for (int64_t k = 0; k < c.channels; k += WIDTH) {
            Vector values[4][4], points[4][4];
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) values[i][j] = load(from[i][j] + k);
            transform_inputs(values, points);
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) store(transformed.data() + ((i * 4 + j) * TILES + t) * c.channels + k, points[i][j]);
        }
    }

    // The p-th point of all tiles with a panel of the weight.
    void multiply(int64_t p, int64_t n, int64_t count) {
        const float* weight = c.weight.data() + (n / PANEL * POINTS + p) * c.channels * PANEL;
        for (int64_t t = 0; t < count; t += BLOCK)
            block_product<VECTORS, false>(transformed.data() + (p * TILES + t) * c.channels, c.channels, 1, nullptr, weight,
                                          PANEL, products.data() + (p * TILES + t) * PANEL, PANEL, c.channels);
    }

    // A^T m A of the products of a tile, the bias, and the activation.
    void make_tile(int64_t image, int64_t row, int64_t column, int64_t t, int64_t first) {
        for (int64_t n = first; n < std::min(first + PANEL, c.filters); n += WIDTH) {
            const float* from = products.data() + t * PANEL + n - first;
            Vector half[2][4];
            for (int j = 0; j < 4; ++j) {
                Vector m[4];
                for (int i = 0; i < 4; ++i) m[i] = load(from + (i * 4 + j) * TILES * PANEL);
                half[0][j] = m[0] + m[1] + m[2];
                half[1][j] = m[1] - m[2] - m[3];
            }
            const Vector bias = load(c.bias + n);
            for (int i = 0; i < 2; ++i) {
                const int64_t y = 2 * row + i, x = 2 * column;
                if (y >= c.height) break;
                float* to = c.outputs + ((image * c.height + y) * c.width + x) * c.filters + n;
                store(to, larger(all(0), half[i][0] + half[i][1] + half[i][2] + bias));
                if (x + 1 < c.width) store(to + c.filters, larger(all(0), half[i][1] - half[i][2] - half[i][3] + bias));
            }
        }
    }

    Convolution& c;
    Floats transformed, products;  // (POINTS, TILES, K), (POINTS, TILES, PANEL)
    const Floats nothing;          // a pixel beside the image
};

// One that finds no memory leaves its work to the others.
void work(void* convolution) {
    try {
        Worker(*static_cast<Convolution*>(convolution)).work();
    } catch (const std::bad_alloc&) {
    }
}

// G g G^T of each kernel, (N, K, 3, 3) -> (N / PANEL, POINTS, K, PANEL).
Floats transformed_weight(const float* weight, int64_t filters, int64_t channels) {
    Floats result(rounded(filters, PANEL) * POINTS * channels, 0.0f);
    for (int64_t n = 0; n < filters; n += WIDTH)
        for (int64_t k = 0; k < channels; ++k) {
            Vector g[3][3], half[4][3];
            for (int64_t i = 0; i < WIDTH; ++i)
                for (int j = 0; j < 9; ++j) g[j / 3][j % 3][i] = weight[((n + i) * channels + k) * 9 + j];
            for (int j = 0; j < 3; ++j) {
                half[0][j] = g[0][j];
                half[1][j] = (g[0][j] + g[1][j] + g[2][j]) * all(0.5f);
                half[2][j] = (g[0][j] - g[1][j] + g[2][j]) * all(0.5f);
                half[3][j] = g[2][j];
            }
            float* to = result.data() + (n / PANEL * POINTS * channels + k) * PANEL + n % PANEL;
            const auto put = [&](int point, Vector values) { store(to + point * channels * PANEL, values); };
            for (int i = 0; i < 4; ++i) {
                put(i * 4, half[i][0]);
                put(i * 4 + 1, (half[i][0] + half[i][1] + half[i][2]) * all(0.5f));
                put(i * 4 + 2, (half[i][0] - half[i][1] + half[i][2]) * all(0.5f));
                put(i * 4 + 3, half[i][2]);
            }
        }
    return result;
}

}  // namespace

// Returns 0, or 1 where there is too little memory.
//   tensors: inputs, weight (N, K, 3, 3), bias (N), outputs
//   sizes:   B, H, W, K, N, threads
extern "C" int refiner_convolve(const void* const* tensors, const int64_t* sizes, Parallel parallel) try {
    const auto floats = reinterpret_cast<const float* const*>(tensors);
    Convolution c;
    c.inputs = floats[0], c.bias = floats[2], c.outputs = const_cast<float*>(floats[3]);
    c.batch = sizes[0], c.height = sizes[1], c.width = sizes[2], c.channels = sizes[3], c.filters = sizes[4];
    c.weight = transformed_weight(floats[1], c.filters, c.channels);
    c.rows = divided(c.height, 2), c.columns = divided(c.width, 2);
    in_threads(work, &c, sizes[5], parallel);
    return c.next < c.tasks();
} catch (const std::bad_alloc&) {
    return 1;
}

// Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
//
// A layer's own map in inference, and what it makes of the values: a few rows of a head at a time go from scores to their
// softmax, get the rows of the map before added, are written, and weight the values, all in the processor's nearest cache.
//
// Shapes: B batch, H heads, N tokens, D the width of a head.

#include "vectors.h"

namespace {

struct Attention {
    const void *query, *key, *value, *previous;  // three times (B, N, H D); (B, H, N, N) or null
    void *map, *output;                          // (B, H, N, N), (B, N, H D)
    int64_t batch, heads, size, width;
    bool is_bfloat16;
    float scaling;
    int64_t blocks, block_rows;  // a task is so many rows of a head
    std::atomic<int64_t> next{0};

    int64_t tasks() const { return batch * heads * blocks; }
};

class Worker {
   public:
    explicit Worker(Attention& attention)
        : a(attention),
          columns(rounded(a.size, WIDTH)),
          rows_of_keys(a.size * a.width),
          keys(a.width * columns, 0.0f),
          values(1, a.size, a.width),
          query(BLOCK * a.width),
          rows(BLOCK * columns),
          before(columns, 0.0f),
          weighted(BLOCK * values.columns) {}

    void work() {
        for (int64_t task; (task = a.next.fetch_add(1)) < a.tasks();) {
            const int64_t place = task / a.blocks, image = place / a.heads, head = place % a.heads;
            const int64_t first = task % a.blocks * a.block_rows, last = std::min(first + a.block_rows, a.size);
            if (place != taken) {
                take_keys(image, head);
                values.take(a.value, image, a.heads, head, 0, a.is_bfloat16);
                taken = place;
            }
            for (int64_t row = first; row < last; row += BLOCK) make_rows(image, head, row, std::min(BLOCK, last - row));
        }
    }

   private:
    int64_t of_token(int64_t image, int64_t token, int64_t head) const {
        return ((image * a.size + token) * a.heads + head) * a.width;
    }

    // Transposed: (D, N).
    void take_keys(int64_t image, int64_t head) {
        for (int64_t n = 0; n < a.size; ++n)
            read(a.key, of_token(image, n, head), a.width, a.is_bfloat16, rows_of_keys.data() + n * a.width);
        transpose(rows_of_keys.data(), a.width, keys.data(), columns, a.size, a.width);
    }

    void make_rows(int64_t image, int64_t head, int64_t first, int64_t count) {
        const int64_t place = ((image * a.heads + head) * a.size + first) * a.size;
        if (a.previous) fetch(a.previous, place, count * a.size, a.is_bfloat16, false);
        fetch(a.map, place, count * a.size, a.is_bfloat16, true);
        for (int64_t i = 0; i < count; ++i) {
            float* to = query.data() + i * a.width;
            read(a.query, of_token(image, first + i, head), a.width, a.is_bfloat16, to);
            for (int64_t d = 0; d < a.width; ++d) to[d] *= a.scaling;
        }
        row_product(query.data(), a.width, 1, keys.data(), columns, rows.data(), columns, a.width);
        for (int64_t i = 0; i < count; ++i) {
            float* row = rows.data() + i * columns;
            const int64_t at = place + i * a.size;
            if (a.previous) read(a.previous, at, a.size, a.is_bfloat16, before.data());
            softmax(row);
            write(a.map, at, a.size, a.is_bfloat16, row);
        }
        values.weigh(rows.data(), columns, 0, weighted.data());
        for (int64_t i = 0; i < count; ++i)
            write(a.output, of_token(image, first + i, head), a.width, a.is_bfloat16, weighted.data() + i * values.columns);
    }

    // softmax(row), and the row before added where there is one.
    void softmax(float* row) const {
        std::fill(row + a.size, row + columns, -INFINITY);
        Vector largest = all(-INFINITY), sum = all(0);
        for (int64_t c = 0; c < columns; c += WIDTH) {
            const Vector scores = load(row + c);
            largest = larger(scores, largest);
        }
        float top = largest[0], total = 0;
        for (int64_t i = 1; i < WIDTH; ++i) top = std::max(top, largest[i]);
        for (int64_t c = 0; c < columns; c += WIDTH) {
            const Vector power = exponential(load(row + c) - all(top));
            store(row + c, power);
            sum += power;
        }
        for (int64_t i = 0; i < WIDTH; ++i) total += sum[i];
        for (int64_t c = 0; c < columns; c += WIDTH)  // `before` is zero where there is none
            store(row + c, load(row + c) * all(1 / total) + all(a.scaling) * load(before.data() + c));
    }

    Attention& a;
    const int64_t columns;
    Floats rows_of_keys, keys;
    Values values;
    Floats query, rows, before, weighted;
    int64_t taken = -1;  // the head whose keys and values are here
};

// One that finds no memory leaves its work to the others.
void work(void* attention) {
    try {
        Worker(*static_cast<Attention*>(attention)).work();
    } catch (const std::bad_alloc&) {
    }
}

}  // namespace

// Returns 0, or 1 where there is too little memory.
//   tensors: query, key, value; map to be added or null; map and output to be written
//   sizes:   B, H, N, D, whether all are in bfloat16, threads
//   scaling: of the scores, and of the map that is added
extern "C" int refiner_attend(const void* const* tensors, const int64_t* sizes, double scaling, Parallel parallel) {
    Attention a;
    a.query = tensors[0], a.key = tensors[1], a.value = tensors[2], a.previous = tensors[3];
    a.map = const_cast<void*>(tensors[4]), a.output = const_cast<void*>(tensors[5]);
    a.batch = sizes[0], a.heads = sizes[1], a.size = sizes[2], a.width = sizes[3];
    a.is_bfloat16 = sizes[4] != 0;
    a.scaling = float(scaling);
    const int64_t operations = 2 * a.batch * a.heads * a.size * a.size * a.width;
    const int64_t threads = operations < (1 << 20) ? 1 : sizes[5];  // starting them takes as long as so many
    a.blocks = threads == 1 ? 1 : divided(4 * threads, a.batch * a.heads);
    a.block_rows = rounded(divided(a.size, a.blocks), BLOCK);
    a.blocks = divided(a.size, a.block_rows);
    in_threads(work, &a, threads, parallel);
    return a.next < a.tasks();
}

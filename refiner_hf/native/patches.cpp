// Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
//
// Images whose channels lie side by side, cut into patches whose channels lie one after the other, as a convolution's weight
// has them.
//
// Shapes: B batch, C channels, R x S patches of r x s pixels. Images (B, R r, S s, C), patches (B, R, S, C, r, s).

#include "vectors.h"

namespace {

struct Cut {
    const float* images;
    float* patches;
    int64_t batch, rows, columns, height, width, channels;  // B, R, S, r, s, C
    std::atomic<int64_t> next{0};

    int64_t tasks() const { return batch * rows; }
};

// One that finds no memory leaves its work to the others.
void work(void* given) try {
    Cut& c = *static_cast<Cut*>(given);
    const int64_t area = c.height * c.width, run = c.width * c.channels;  // numbers of a patch that lie in one piece
    std::vector<float> patch(area * c.channels);
    for (int64_t task; (task = c.next.fetch_add(1)) < c.tasks();)
        for (int64_t column = 0; column < c.columns; ++column) {
            for (int64_t i = 0; i < c.height; ++i) {
                const float* from = c.images + ((task * c.height + i) * c.columns + column) * run;
                std::memcpy(patch.data() + i * run, from, run * sizeof(float));
            }
            transpose(patch.data(), c.channels, c.patches + (task * c.columns + column) * area * c.channels, area, area, c.channels);
        }
} catch (const std::bad_alloc&) {
}

}  // namespace

// Returns 0, or 1 where there is too little memory.
//   tensors: images, patches
//   sizes:   B, R, S, r, s, C, threads
extern "C" int refiner_patches(const void* const* tensors, const int64_t* sizes, Parallel parallel) {
    Cut c;
    c.images = static_cast<const float*>(tensors[0]), c.patches = static_cast<float*>(const_cast<void*>(tensors[1]));
    c.batch = sizes[0], c.rows = sizes[1], c.columns = sizes[2], c.height = sizes[3], c.width = sizes[4], c.channels = sizes[5];
    in_threads(work, &c, sizes[6], parallel);
    return c.next < c.tasks();
}

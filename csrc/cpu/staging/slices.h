// Sums over a batch that is cut into slices, alike whatever the number of threads: each slice has sums of its own, and
// these are added up in order. As many slices are made at once as there are threads, so that a thread has memory for one.
#pragma once

#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

// As few as take no more rounds.
int64_t slices_at_once(const Threads& threads, int64_t slices) {
  return divide_up(slices, divide_up(slices, larger(threads.count, int64_t{1})));
}

// round(begin, end) for some slices after the others.
template <class Round>
void for_each_round(const Threads& threads, int64_t slices, const Round& round) {
  const int64_t at_once = slices_at_once(threads, slices);
  for (int64_t begin = 0; begin < slices; begin += at_once) round(begin, smaller(begin + at_once, slices));
}

// body(begin, end) for parts of `size` sums.
template <class Body>
void for_each_chunk(const Threads& threads, int64_t size, const Body& body) {
  constexpr int64_t chunk = 1 << 15;
  for_each_item(threads, divide_up(size, chunk),
                [&](int64_t i) { body(i * chunk, smaller((i + 1) * chunk, size)); });
}

// body(slice, item, sums) adds what an item makes of a slice to its `size` sums: those of the first are the total itself,
// each other's a copy.
template <class T, class Body>
void add_slices(const Threads& threads, int64_t slices, int64_t items, T* total, int64_t size,
                const Body& body) {
  const int64_t most_copies = smaller(slices_at_once(threads, slices), slices - 1);
  const SharedScratch memory(static_cast<size_t>(most_copies * size) * sizeof(T));
  T* copies = static_cast<T*>(memory.memory());
  for_each_round(threads, slices, [&](int64_t first, int64_t end) {
    const int64_t copied = larger(first, int64_t{1}), count = end - copied;
    for_each_chunk(threads, count * size,
                   [&](int64_t i, int64_t chunk_end) { fill_zero(copies + i, chunk_end - i); });
    for_each_item(threads, (end - first) * items, [&](int64_t item) {
      const int64_t slice = first + item / items;
      body(slice, item % items, slice == 0 ? total : copies + (slice - copied) * size);
    });
    for_each_chunk(threads, count > 0 ? size : 0, [&](int64_t begin, int64_t chunk_end) {
      for (const T* copy = copies; copy < copies + count * size; copy += size) {
        for (int64_t i = begin; i < chunk_end; ++i) total[i] += copy[i];
      }
    });
  });
}

}  // namespace
}  // namespace groupconv::cpu

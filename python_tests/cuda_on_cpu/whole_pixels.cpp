// What the tests ask about products of whole pixels: how they are cut, how their weights are laid out, and
// whether they are what was launched.
#include "cuda/whole_pixels.cuh"

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace groupconv::cuda {
namespace {

std::string at(const char* what, int64_t where) { return std::string(what) + " " + std::to_string(where); }

// One more than the index of a row's weight for an item of the list of sources; 0: there is none.
int64_t weight_for(const Plan& plan, bool transposed, int32_t channel, int64_t item) {
  int64_t offset = 0;
  for (int64_t g = 0; g < plan.groups(); ++g) {
    const int64_t rows = plan.row_offsets[g + 1] - plan.row_offsets[g];
    const int64_t sources = plan.source_offsets[g + 1] - plan.source_offsets[g];
    const int64_t source = item - plan.source_offsets[g];
    for (int64_t row = 0; row < rows && source >= 0 && source < sources; ++row) {
      if (plan.row_list[plan.row_offsets[g] + row] != channel) continue;
      return 1 + offset + (transposed ? source * rows + row : row * sources + source);
    }
    offset += rows * sources;
  }
  return 0;
}

// Every weight in one place, zeros around, and no two tiles in the same.
template <class T, int Columns>
std::string check_layout(const PlanProblem& problem, const Plan& plan) {
  std::vector<T> weights(static_cast<size_t>(problem.entries) + 1);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(i + 1);
  ProductArguments<T> a{};
  a.dest.batch = 1;
  a.weight = weights.data();
  a.layout = {problem.transposed, 0};
  const int64_t measured = WholePixelLayout(nullptr, plan, problem, sizeof(T)).words();
  std::vector<int64_t> scratch(static_cast<size_t>(measured) + 2, -1);
  const WholePixelLayout layout(scratch.data() + reinterpret_cast<uintptr_t>(scratch.data()) / 8 % 2, plan,
                                problem, sizeof(T));
  launch(lay_out_weights<T, Columns>, 3, whole_pixel_threads, 0, nullptr, a, plan, layout);

  constexpr int summed = mma_summed<T>;
  const int64_t items = plan.source_offsets[plan.groups()];
  std::vector<int> rows(static_cast<size_t>(problem.row_channels()), 0);
  std::set<int64_t> taken;
  int64_t found = 0;
  for (int64_t t = 0; t < plan.tiles(); ++t) {
    const WholePixelTile& tile = layout.tiles[t];
    if (tile.rows < 1 || tile.rows > Columns * fragment_rows) return at("no or too many rows in tile", t);
    for (int r = 0; r < tile.rows; ++r) ++rows.at(static_cast<size_t>(tile.first_row + r));
    if (tile.first_item % source_alignment != 0) return at("not aligned: the sources of tile", t);
    if (tile.first_item + tile.steps * summed > WholePixelMemory::padded_items(items))
      return at("sources beyond the list in tile", t);
    bool neighbours = true;
    for (int64_t i = tile.first_item; i < std::min<int64_t>(tile.first_item + tile.steps * summed, items);
         ++i) {
      const int64_t first = i / source_alignment * source_alignment;
      const bool whole = first + source_alignment <= items && plan.source_list[first] % source_alignment == 0;
      neighbours &= whole && plan.source_list[i] == plan.source_list[first] + i - first;
    }
    if (neighbours != tile.sources_are_neighbours) return at("neighbours or not in tile", t);
    for (int j = 0; j < Columns; ++j) {
      if (WholePixelTile::end(tile.range[j]) > tile.steps) return at("steps beyond the last in tile", t);
      for (int step = WholePixelTile::begin(tile.range[j]); step < WholePixelTile::end(tile.range[j]);
           ++step) {
        const int64_t fragment = tile.fragment_of(j, step);
        if (fragment >= tile.fragment_count) return at("fragments beyond the last in tile", t);
        if (!taken.insert(tile.first_fragment + fragment).second) return at("a fragment twice in tile", t);
        const auto* values =
            reinterpret_cast<const T*>(layout.fragments + (tile.first_fragment + fragment) * fragment_bytes);
        for (int i = 0; i < fragment_elements<T>; ++i) {
          const int row = j * fragment_rows + i / summed;
          const int64_t item = tile.first_item + step * summed + i % summed;
          int64_t expected = 0;
          if (row < tile.rows && item < items)
            expected = weight_for(plan, problem.transposed, plan.rows[tile.first_row + row], item);
          if (static_cast<float>(values[i]) != static_cast<float>(expected))
            return at("a wrong weight in tile", t);
          found += expected != 0;
        }
      }
    }
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    if (rows[r] != 1) return at("not in one tile: row", static_cast<int64_t>(r));
  }
  if (found != problem.entries) return at("weights that are missing:", problem.entries - found);
  if (static_cast<int64_t>(taken.size()) != *plan.counter()) return "fragments that no tile has";
  if (*plan.counter() > most_fragments(plan, problem, sizeof(T)))
    return at("more than expected: ", *plan.counter());
  return {};
}

constexpr int narrow = narrow_tile_rows / fragment_rows, wide = wide_tile_rows / fragment_rows;

template <int Columns>
int64_t launches_of() {
  const auto of = [](auto* kernel) { return cuda_on_cpu::launches[reinterpret_cast<const void*>(kernel)]; };
  return of(whole_pixels<float, Columns>) + of(whole_pixels<__half, Columns>) +
         of(whole_pixels<__nv_bfloat16, Columns>);
}

}  // namespace
}  // namespace groupconv::cuda

using namespace groupconv;
using namespace groupconv::cuda;

extern "C" {

__attribute__((visibility("default"))) int64_t narrow_whole_pixel_launches() { return launches_of<narrow>(); }
__attribute__((visibility("default"))) int64_t wide_whole_pixel_launches() { return launches_of<wide>(); }

// An empty text, or what is wrong with the layout of a sound table's weights.
__attribute__((visibility("default"))) const char* check_whole_pixel_layout(const int32_t* table,
                                                                            int64_t length, int64_t entries,
                                                                            bool transposed,
                                                                            int64_t element_bytes,
                                                                            int64_t tile_rows) {
  static std::string answer;
  PlanProblem problem;
  problem.table = table;
  problem.length = length;
  problem.in_channels = table[0];
  problem.out_channels = table[1];
  problem.entries = entries;
  problem.transposed = transposed;
  problem.tile_rows = tile_rows;
  problem.packs_groups = true;
  std::vector<int64_t> scratch(static_cast<size_t>(Plan(nullptr, problem).words()), -1);
  const Plan plan(scratch.data(), problem);
  run_plan(problem, plan, nullptr);
  if (!plan.valid()) return "it is not valid";
  const bool is_narrow = tile_rows == narrow_tile_rows;
  if (element_bytes == 2) {
    answer =
        is_narrow ? check_layout<__half, narrow>(problem, plan) : check_layout<__half, wide>(problem, plan);
  } else {
    answer =
        is_narrow ? check_layout<float, narrow>(problem, plan) : check_layout<float, wide>(problem, plan);
  }
  return answer.c_str();
}

// Pixels, stages, resident fragments, blocks, bytes; and the least alignment of what lies in shared memory.
__attribute__((visibility("default"))) void whole_pixel_cut(int64_t source_channels, int64_t row_channels,
                                                            int64_t source_items, int64_t element_bytes,
                                                            bool has_residual, bool has_bias, int64_t pixels,
                                                            int64_t weight_bytes, int64_t shared_bytes,
                                                            int64_t multiprocessors, int64_t* found) {
  const WholePixelSizes sizes{source_channels, row_channels, source_items,
                              element_bytes,   has_residual, has_bias};
  const WholePixelCut cut = cut_whole_pixels(sizes, pixels, weight_bytes, {shared_bytes, multiprocessors});
  const WholePixelMemory memory(sizes, cut);
  found[0] = cut.pixels;
  found[1] = cut.stages;
  found[2] = cut.resident;
  found[3] = cut.blocks;
  found[4] = memory.bytes;
  found[5] = memory.source_pitch;
  found[6] = memory.dest_pitch;
  found[7] = memory.sources | memory.dests | memory.fragments | memory.source_at | memory.dest_at |
             memory.bias | memory.rows | memory.items;
}

}  // extern "C"

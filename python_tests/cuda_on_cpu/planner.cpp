// What the tests ask of the planners: a plan made and looked through, and the choices from sizes.
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include "cuda/launch.h"
#include "cuda/product.cuh"
#include "cuda/weight_grad_fma.cuh"

namespace groupconv::cuda {
namespace {

using Pairs = std::map<std::pair<int64_t, int64_t>, int>;  // row and column, both items of the lists

std::string wrong(const char* what, int64_t where) { return std::string(what) + " " + std::to_string(where); }

std::string check_rows(const Plan& plan, const PlanProblem& problem) {
  const int64_t items = plan.row_offsets[plan.groups()];
  std::set<int32_t> seen;
  std::map<int32_t, std::vector<int32_t>> readers;
  for (int64_t i = 0; i < items; ++i) readers[plan.row_list[i]].push_back(static_cast<int32_t>(i));
  for (int64_t r = 0; r < problem.row_channels(); ++r) {
    const int32_t channel = plan.rows[r];
    if (channel < 0 || channel >= problem.row_channels()) return wrong("no channel in row", r);
    if (!seen.insert(channel).second) return wrong("two rows for channel", channel);
    const std::vector<int32_t> found(plan.readers + plan.reader_first[r], plan.readers + plan.reader_last[r]);
    if (found != readers[channel]) return wrong("wrong readers in row", r);
  }
  return {};
}

std::string check_runs(const int32_t* runs, const int32_t* list, int64_t items) {
  for (int64_t i = 0; i < items; ++i) {
    int expected = 1;
    while (expected < 8 && i + expected < items && list[i + expected] == list[i] + expected) ++expected;
    if (runs[i] != expected) return wrong("wrong mark of a run at", i);
  }
  return {};
}

// Every row is in one tile, with every source that it reads.
std::string check_product_tiles(const Plan& plan, const PlanProblem& problem) {
  ProductArguments<float> a{};
  a.dest.batch = 1;
  std::vector<int> covered(static_cast<size_t>(problem.row_channels()), 0);
  for (int64_t item = 0; item < product_tiles(a, plan, 1); ++item) {
    const ProductTile tile(a, plan, item, problem.tile_rows, 1);
    if (tile.rows < 1 || tile.rows > problem.tile_rows) return wrong("no or too many rows in tile", item);
    if (tile.first_row + tile.rows > problem.row_channels())
      return wrong("rows beyond the last in tile", item);
    for (int64_t r = tile.first_row; r < tile.first_row + tile.rows; ++r) ++covered[static_cast<size_t>(r)];
  }
  for (int64_t r = 0; r < problem.row_channels(); ++r) {
    if (covered[static_cast<size_t>(r)] != 1) return wrong("not in one tile: row", r);
  }
  return {};
}

// Every weight is in one tile, and in its own place.
std::string check_weight_tiles(const Plan& plan, const PlanProblem& problem) {
  std::vector<int> covered(static_cast<size_t>(problem.entries), 0);
  for (int64_t item = 0; item < plan.tiles(); ++item) {
    const WeightTile tile(plan, item, problem.tile_rows, problem.tile_columns);
    if (tile.rows > problem.tile_rows || tile.columns > problem.tile_columns)
      return wrong("too large: tile", item);
    for (int64_t r = tile.first_row; r < tile.first_row + tile.rows; ++r) {
      for (int64_t c = tile.first_column; c < tile.first_column + tile.columns; ++c) {
        const int64_t entry = entry_of(plan, 0, r, c);
        if (entry >= 0) ++covered[static_cast<size_t>(entry)];
      }
    }
  }
  for (int64_t e = 0; e < problem.entries; ++e) {
    if (covered[static_cast<size_t>(e)] != 1) return wrong("not in one tile: weight", e);
  }
  return {};
}

}  // namespace
}  // namespace groupconv::cuda

using namespace groupconv;
using namespace groupconv::cuda;

extern "C" {

// An empty text, or what is wrong with the plan of a sound table.
__attribute__((visibility("default"))) const char* check_plan(const int32_t* table, int64_t length,
                                                              int64_t entries, bool transposed,
                                                              int64_t tile_rows, int64_t tile_columns,
                                                              bool packs_groups) {
  static std::string answer;
  PlanProblem problem;
  problem.table = table;
  problem.length = length;
  problem.in_channels = table[0];
  problem.out_channels = table[1];
  problem.entries = entries;
  problem.transposed = transposed;
  problem.tile_rows = tile_rows;
  problem.tile_columns = tile_columns;
  problem.packs_groups = packs_groups;
  std::vector<int64_t> scratch(static_cast<size_t>(Plan(nullptr, problem).words()), -1);
  const Plan plan(scratch.data(), problem);
  run_plan(problem, plan, nullptr);
  if (!plan.valid()) return "it is not valid";
  if (plan.tiles() > plan.max_tiles) return "it has more tiles than the host expects";
  answer = check_rows(plan, problem);
  if (answer.empty()) answer = check_runs(plan.row_runs, plan.row_list, plan.row_offsets[plan.groups()]);
  if (answer.empty())
    answer = check_runs(plan.source_runs, plan.source_list, plan.source_offsets[plan.groups()]);
  if (answer.empty()) {
    answer = tile_columns > 0 ? check_weight_tiles(plan, problem) : check_product_tiles(plan, problem);
  }
  return answer.c_str();
}

// What is chosen from sizes: kernel, rows and columns of a tile, slices.
__attribute__((visibility("default"))) void choices(int element, int64_t in_channels, int64_t out_channels,
                                                    int64_t table_length, int64_t entries, int64_t area,
                                                    int64_t pixels, int64_t longest_side, int64_t* found) {
  PlanProblem problem;
  problem.length = table_length;
  problem.in_channels = in_channels;
  problem.out_channels = out_channels;
  problem.entries = entries;
  const ProductChoice product =
      choose_product(static_cast<Element>(element), problem, area, pixels, longest_side);
  const WeightGradChoice grad =
      choose_weight_grad(static_cast<Element>(element), problem, area, pixels, longest_side);
  found[0] = static_cast<int64_t>(product.kernel);
  found[1] = product.partition.tile_rows;
  found[2] = product.plan_words;
  found[3] = static_cast<int64_t>(grad.kernel);
  found[4] = grad.partition.tile_rows;
  found[5] = grad.slices;
  found[6] = channel_slices(pixels, out_channels);
  found[7] = chain_blocks(pixels, entries);
  const ProductChoice two_level =
      choose_product(static_cast<Element>(element), problem, area, pixels, longest_side, true);
  found[8] = static_cast<int64_t>(two_level.kernel);
}

}  // extern "C"

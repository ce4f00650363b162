// The driver of a window's convolution and input gradient between NCHW images with lanes over destination channels
// (multiply_lanes.h).
//
// Groups are the outer loop: a group's weights are brought into lanes once for all images. Of each tile the planes of
// the group's sources are staged as in convolve.h; sums of up to 28 pixels, which follow each other in the image, are
// transposed and leave for it with residual and clamp. The few destinations that a group has beyond whole vectors are
// rows of pixels of the same planes (multiply.h).
#pragma once

#include "cpu/products/multiply.h"
#include "cpu/products/multiply_lanes.h"
#include "cpu/staging/packed_memory.h"
#include "cpu/staging/reach.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/weights.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/transpose.h"

namespace groupconv::cpu {
namespace {

// Where rows are not staged by vectors it suits nothing.
template <class Stored, bool = expands_rows<Stored>>
struct LaneConvolution {
  explicit LaneConvolution(const ConvolveProblem<Stored>&) {}
  static bool suits(const ConvolveProblem<Stored>&) { return false; }
  void run() const {}
};

template <class Stored>
class LaneConvolution<Stored, true> {
  using T = compute_t<Stored>;
  static constexpr int64_t lanes = Vec<T>::lanes;
  // The sums of a tile, filled up to squares that are transposed.
  static constexpr int64_t most_sums = divide_up(int64_t{most_lane_sums(1)}, lanes) * lanes * lanes;

 public:
  static bool suits(const ConvolveProblem<Stored>& p) {
    // Below this depth transposing the sums, and below so many pixels the weights, takes more than lanes gain.
    constexpr int64_t least_depth = 64, least_pixels = 32;
    constexpr int64_t most_bytes = 512 << 10;  // of a group's weights, in every thread's scratch
    const Sweep& sweep = *p.sweep;
    const Sides<Stored> sides(p);
    if (p.coarse || sides.taps < 2 || sweep.rows < 2) return false;
    if (lane_tiles(sweep.cols, together(sweep)) == 0) return false;
    if (!stages_vectors<Stored, T>(p.source, Planes(sweep), sweep.cols + sweep.halo_cols)) return false;
    if (p.dest.channels_last() || p.dest.stride_w != 1 || !p.dest.flat() || !is_clamp(p.activation))
      return false;
    if (sweep.dest_step_h != 1 || sweep.dest_step_w != 1 || (p.transposed && p.partition->inputs_overlap))
      return false;
    const int64_t pixels = p.dest.batch * sweep.rows * sweep.cols;
    if (pixels < least_pixels) return false;
    int64_t in_lanes = 0, taken = 0;
    for (int64_t g = 0; g < sides.groups; ++g) {
      if (weights_of(sides, g) * static_cast<int64_t>(sizeof(T)) > most_bytes) return false;
      in_lanes += sides.dests.count(g) - dests_by_rows(sides, g);
      taken += width_of(sides, g);
    }
    if (4 * in_lanes < 3 * taken || 2 * in_lanes < sides.dests.offsets[sides.groups]) return false;
    if (tiling(sweep, sides.most_sources, 1).across > 1) return false;
    return p.partition->entries() * sides.taps >= least_depth * sides.dests.offsets[sides.groups];
  }

  explicit LaneConvolution(const ConvolveProblem<Stored>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        sides_(problem),
        planes_(sweep_),
        runs_(runs_of_taps(sweep_, taps_together)),
        range_(clamp_range<T>(p_.activation)) {}

  void run() const {
    const int64_t wanted = p_.threads.run ? divide_up(pieces_for_threads, p_.dest.batch * sides_.groups) : 1;
    const Tiling tiles = tiling(sweep_, sides_.most_sources, wanted);
    const PlaneShape shape(sweep_, tiles.tile(sweep_, 0));  // no tile is larger
    const int64_t vectors = divide_up(shape.size, lanes), left = -planes_.first_col - planes_.phases[0].col;
    Workspace shared;
    shared.plan<GapVector>(vectors);
    shared.plan<GapVector>(vectors);
    shared.plan<int64_t>(sides_.groups);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    const Gaps gaps{shared.take<GapVector>(vectors), shared.take<GapVector>(vectors)};
    list_gaps<T>(gaps.source, vectors, shape.pitch, left, left + p_.source.width);
    list_gaps<T>(gaps.dest, vectors, shape.pitch, 0, sweep_.cols);
    int64_t* starts = shared.take<int64_t>(sides_.groups);
    int64_t weights = 0;
    for (int64_t g = 0; g < sides_.groups && p_.keeper; ++g) {
      starts[g] = weights;
      weights += weights_of(sides_, g);
    }
    PackedMemory<T> packed;
    packed.open(sides_, &packer<LaneConvolution>, weights, smaller(most_by_rows(sweep_), lanes));

    // Every cut gives the same sums; one for each thread or two pack the weights least often.
    const int64_t units = p_.dest.batch * tiles.count;
    const int64_t slices =
        smaller(units, p_.threads.count > 1 ? divide_up(4 * p_.threads.count, sides_.groups) : 1);
    for_each_item(p_.threads, sides_.groups * slices, [&](int64_t item) {
      const int64_t group = item / slices, slice = item % slices;
      const bool in_kept = packed.kept() && (packed.filled() || slice == 0);  // one of the slices fills it
      run_units(group, in_kept ? packed.kept() + starts[group] : nullptr, !packed.filled(), tiles, shape,
                gaps, units * slice / slices, units * (slice + 1) / slices);
    });
    packed.keep();
  }

 private:
  // Between rows of a tile's planes, and of the sums that are rows.
  struct Gaps {
    GapVector *source, *dest;
  };

  // The last of a group's destinations, where a vector of lanes for each pixel would take longer than rows of pixels:
  // their vectors hold the gaps between rows too, and a multiply-add takes more loads.
  static int64_t dests_by_rows(const Sides<Stored>& sides, int64_t group) {
    const int64_t left = sides.dests.count(group) % lanes;
    return left <= most_by_rows(*sides.problem.sweep) ? left : 0;
  }
  static int64_t most_by_rows(const Sweep& sweep) {
    const int64_t pixels = sweep.rows * sweep.cols;
    const int64_t vectors =
        divide_up(pixels + (sweep.rows - 1) * (sweep.halo_cols - sweep.shared_cols), lanes);
    return (9 * pixels - 1) / (10 * vectors);
  }
  // Of a group's other destinations.
  static int64_t width_of(const Sides<Stored>& sides, int64_t group) {
    return divide_up(sides.dests.count(group) - dests_by_rows(sides, group), lanes) * lanes;
  }
  static int64_t weights_of(const Sides<Stored>& sides, int64_t group) {
    return sides.sources.count(group) * sides.taps * width_of(sides, group);
  }
  // Where a tile ends changes no sum.
  static Tiling tiling(const Sweep& sweep, int64_t most_sources, int64_t wanted) {
    return Tiling(sweep, most_sources, 0, sizeof(T), wanted);
  }
  static int together(const Sweep& sweep) {
    return runs_of_taps(sweep, taps_together) == TapRuns::none ? 1 : taps_together;
  }

  // `kept`: where the group's weights are kept, or null.
  void run_units(int64_t group, T* kept, bool packs, const Tiling& tiles, const PlaneShape& largest,
                 const Gaps& gaps, int64_t begin, int64_t end) const {
    const int64_t weights_in_scratch = kept ? 0 : weights_of(sides_, group);
    const int64_t by_rows = dests_by_rows(sides_, group), in_lanes = sides_.dests.count(group) - by_rows;
    const int64_t count = sides_.sources.count(group), width = width_of(sides_, group);
    const int64_t depth = count * sides_.taps, depth_by_rows = by_rows > 0 ? depth : 0;
    const int64_t distance = row_distance<T>(largest.size);
    Workspace space;
    space.plan<T>(weights_in_scratch);
    space.plan<T>(width);
    space.plan<T>(count * distance);
    space.plan<T>(most_sums);
    space.plan<const T*>(depth);
    space.plan<const T*>(depth_by_rows);
    space.plan<int64_t>(depth_by_rows);
    space.plan<T>(most_columns<T> * depth_by_rows);
    space.open();
    T* scratch = space.take<T>(weights_in_scratch);
    T* weight = kept ? kept : scratch;
    T* bias = space.take<T>(width);
    T* staged = space.take<T>(count * distance);
    T* sums = space.take<T>(most_sums);
    const T** sources = space.take<const T*>(depth);
    MultiplyJob<T, Stored> rows{};
    rows.depth = depth_by_rows;
    rows.rows = by_rows;
    rows.gaps = gaps.dest;
    open_rows(rows, space, group, staged, distance, largest.pitch);

    for (int64_t first = 0; first < in_lanes && packs; first += lanes) {
      pack(group, first, smaller(lanes, in_lanes - first), weight + first * depth);
    }
    for (int64_t r = 0; r < width; ++r)
      bias[r] = r < in_lanes ? sides_.bias(sides_.dests.of(group)[r]) : T(0);
    const int64_t run = together(sweep_);
    const int64_t leftmost = runs_ == TapRuns::descending ? run - 1 : 0;
    for (int64_t i = 0, j = 0; i < count; ++i) {
      for (int64_t t = leftmost; t < sides_.taps; t += run) {
        const Tap& tap = sweep_.taps[static_cast<size_t>(t)];
        sources[j++] = staged + i * distance + tap.row * largest.pitch + tap.col;
      }
    }

    LanesJob<T> job{};
    job.first_tap = leftmost * lanes;
    job.step = leftmost > 0 ? -lanes : lanes;
    job.sources = sources;
    job.channels = count;
    job.runs = sides_.taps / run;
    job.pitch = largest.pitch;
    job.sums = sums;
    const ChannelSet channels{sides_.sources.of(group), count};
    for (int64_t unit = begin; unit < end; ++unit) {
      const Tile tile = tiles.tile(sweep_, unit % tiles.count);
      const int64_t n = unit / tiles.count;
      stage_vectors(p_.source, n, channels, planes_, tile, PlaneShape(sweep_, tile), gaps.source, staged,
                    distance, p_.prologue);
      for (int64_t first = 0; first < in_lanes; first += lanes) {
        job.weight = weight + first * depth;
        job.bias = bias + first;
        run_lanes(job, n, tile, sides_.dests.of(group) + first, smaller(lanes, in_lanes - first));
      }
      if (by_rows > 0) run_rows(rows, n, tile, largest.pitch, sides_.dests.of(group) + in_lanes);
    }
  }

  // weights[j][lane]: of `lanes` destinations from `first` on, zero where none is.
  void pack(int64_t group, int64_t first, int64_t count, T* weights) const {
    const int64_t row = sides_.dest_step(group);
    pack_lanes(
        sides_.weight(group) + first * row, row, sides_.source_step(group), sides_.sources.count(group),
        sides_.taps, p_.window_area, [&](int64_t t) { return sweep_.taps[static_cast<size_t>(t)].weight; },
        count, lanes, weights);
  }

  // Where the last destinations of a group, by rows, find their sources and weights.
  void open_rows(MultiplyJob<T, Stored>& job, Workspace& space, int64_t group, const T* staged,
                 int64_t distance, int64_t pitch) const {
    const T** sources = space.take<const T*>(job.depth);
    int64_t* steps = space.take<int64_t>(job.depth);
    for (int64_t j = 0; j < job.depth; ++j) {
      const int64_t i = j / sides_.taps;
      const Tap& tap = sweep_.taps[static_cast<size_t>(j % sides_.taps)];
      sources[j] = staged + i * distance + tap.row * pitch + tap.col;
      steps[j] = i * sides_.source_step(group) + tap.weight;
    }
    job.sources = sources;
    job.steps = steps;
    job.columns = space.take<T>(most_columns<T> * job.depth);
    const int64_t row = sides_.dest_step(group);
    job.weight = sides_.weight(group) + (sides_.dests.count(group) - job.rows) * row;
    job.weight_row_stride = row;
  }

  // Where a tile's sums go.
  struct Rows {
    Stored* dests[lanes];
    const Stored* residuals[lanes];
  };
  Rows rows_of(int64_t n, const Tile& tile, const int32_t* channels, int64_t count) const {
    Rows rows;
    for (int64_t r = 0; r < count; ++r) {
      rows.dests[r] = p_.dest.at(n, channels[r], tile.row, 0);
      rows.residuals[r] = p_.residual.data ? p_.residual.at(n, channels[r], tile.row, 0) : nullptr;
    }
    return rows;
  }

  void run_rows(MultiplyJob<T, Stored> job, int64_t n, const Tile& tile, int64_t pitch,
                const int32_t* channels) const {
    const Rows rows = rows_of(n, tile, channels, job.rows);
    T bias[lanes];
    for (int64_t r = 0; r < job.rows; ++r) bias[r] = sides_.bias(channels[r]);
    job.dests = rows.dests;
    job.residuals = p_.residual.data ? rows.residuals : nullptr;
    job.bias = bias;
    job.length = tile_length(tile, pitch);
    job.pixels = tile.rows * tile.cols;
    job.clamped = p_.activation != Activation::none;
    job.low = range_.low;
    job.high = range_.high;
    multiply_rows(job);
  }

  void run_lanes(LanesJob<T> job, int64_t n, const Tile& tile, const int32_t* channels, int64_t count) const {
    const Rows to = rows_of(n, tile, channels, count);
    const int taps = together(sweep_);
    const int64_t across = lane_tiles(tile.cols, taps);
    const int64_t at_once = lane_rows(divide_up(tile.cols, across), taps);
    const bool in_order = across == 1 || at_once == 1;  // the image's
    for (int64_t row = 0, rows; row < tile.rows; row += rows) {
      const Met met = met_from(tile.row + row);
      for (rows = 1; rows < smaller(at_once, tile.rows - row); ++rows) {
        if (met_from(tile.row + row + rows) != met) break;
      }
      job.begin = met.begin / taps;
      job.end = met.end / taps;
      for (int64_t i = 0, col = 0; i < across; ++i) {
        const int64_t pixels = divide_up(tile.cols - col, across - i);
        job.offset = row * job.pitch + col;
        taps == 1 ? multiply_lanes<T, 1>(job, pixels, rows)
                  : multiply_lanes<T, taps_together>(job, pixels, rows);
        const int64_t run = across == 1 ? rows * pixels : pixels;  // that follow each other in the image
        for (int64_t s = 0; s * run < rows * pixels; ++s) {
          const int64_t at = (row + s) * tile.cols + col;
          const int64_t left = in_order ? tile.rows * tile.cols - at : tile.cols - col;
          finish(job.sums + s * run * lanes, run, left, at, to, count);
        }
        col += pixels;
      }
    }
  }

  // The taps that meet the image from a row of the lattice: those above and below it read nothing but zeros.
  struct Met {
    int64_t begin, end;

    bool operator==(const Met&) const = default;
  };
  Met met_from(int64_t row) const {
    const int64_t top = planes_.first_row + planes_.phases[0].row + row;
    Met met{0, 0};
    for (int64_t t = 0; t < sides_.taps; ++t) {
      const int64_t y = top + sweep_.taps[static_cast<size_t>(t)].row;
      if (y < 0 || y >= p_.source.height) continue;
      if (met.end == 0) met.begin = t;
      met.end = t + 1;
    }
    return met;
  }

  // `pixels` sums of all lanes to the pixels of `count` channels from the `at`-th on, of which `left` are not there yet:
  // without masks to store by, a vector that does not reach beyond them is stored as a whole.
  void finish(const T* sums, int64_t pixels, int64_t left, int64_t at, const Rows& to, int64_t count) const {
    const auto low = Vec<T>::broadcast(range_.low), high = Vec<T>::broadcast(range_.high);
    for (int64_t p = 0; p < pixels; p += lanes) {
      const auto mask = Vec<T>::first(smaller(lanes, pixels - p));
      const bool whole = !has_mask_registers && p + lanes <= left;
      Vec<T> block[lanes];
      load_square([&](int i) GROUPCONV_INLINE_LAMBDA { return sums + (p + i) * lanes; }, block);
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) {
        if (r >= count) break;
        if (p_.residual.data) block[r] = block[r] + Vec<T>::load(to.residuals[r] + at + p, mask);
        const Vec<T> x = clamp(low, high, block[r]);
        if (whole) {
          x.store(to.dests[r] + at + p);
        } else {
          x.store(to.dests[r] + at + p, mask);
        }
      }
    }
  }

  const ConvolveProblem<Stored>& p_;
  const Sweep& sweep_;
  Sides<Stored> sides_;
  Planes planes_;
  TapRuns runs_;
  ClampRange<T> range_;
};

}  // namespace
}  // namespace groupconv::cpu

// Both images of a weight gradient in pairs of pixels, as rows in scratch: the input's with what the taps reach beside
// the tile, the gradient's with zeros there.
#pragma once

#include "cpu/kernels.h"
#include "cpu/staging/pair_rows.h"
#include "cpu/staging/planes.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

// Some images' tile, and where its pixels lie in a row.
struct PairBlock {
  int64_t n, images;
  Tile tile;
  RowPlaces places;
  int64_t at_once;  // places that are multiplied
  bool begins;      // nothing has been summed yet
};

// Rows of some channels' places.
struct PairRows {
  BFloat16 *inputs, *grads;
  int64_t input_distance, grad_distance;
  SpreadRows input_rows, grad_rows;
  WantedChannels wanted_inputs, wanted_grads;
};

class PairSides {
 public:
  PairSides(const WeightGradProblem<BFloat16>& problem, const Planes& planes, int64_t most_inputs,
            int64_t most_outputs)
      : input_whole(problem.input.channels_last()),
        grad_whole(problem.grad.channels_last()),
        input_direct(!input_whole && problem.input.stride_w == 1 && problem.sweep->pointwise() &&
                     problem.sweep->rows == 1 && problem.sweep->cols % 2 == 0),
        input_rows(input_direct  ? 0
                   : input_whole ? problem.input.channels
                                 : most_inputs),
        grad_rows(grad_whole ? problem.grad.channels : most_outputs),
        p_(problem),
        sweep_(*problem.sweep),
        planes_(planes),
        input_spread_(sweep_.rows > 1 && SpreadRows::suits(p_.input) && planes_.count == 1 &&
                      planes_.step_h == 1 && planes_.step_w == 1),
        grad_spread_(sweep_.rows > 1 && SpreadRows::suits(p_.grad)) {}

  const bool input_whole, grad_whole;  // all channels at once
  const bool input_direct;             // nothing is staged
  const int64_t input_rows, grad_rows;

  void plan(Workspace& space, const RowPlaces& most) const {
    space.plan<BFloat16>(inputs_size(most));
    space.plan<BFloat16>(grads_size(most));
    SpreadRows::plan(space, most.size);
    SpreadRows::plan(space, most.size);
    plan_wanted(space, input_whole ? p_.input.channels : 0);
    plan_wanted(space, grad_whole ? p_.grad.channels : 0);
  }
  void open(Workspace& space, const RowPlaces& most, PairRows& rows) const {
    rows.input_distance = input_distance(most);
    rows.grad_distance = grad_distance(most);
    rows.inputs = space.take<BFloat16>(inputs_size(most));
    rows.grads = space.take<BFloat16>(grads_size(most));
    rows.input_rows.open(space, most.size);
    rows.grad_rows.open(space, most.size);
    rows.wanted_inputs = want(space, input_whole ? p_.input.channels : 0, rows.input_distance, nullptr);
    rows.wanted_grads =
        want(space, grad_whole ? p_.grad.channels : 0, rows.grad_distance, p_.partition->outputs.channels);
  }
  static int64_t grad_distance(const RowPlaces& most) { return row_distance<BFloat16>(most.padded); }

  // What is staged is between and before these zeros.
  void clear(const PairBlock& block, const PairRows& rows) const {
    const RowPlaces& places = block.places;
    const bool in_one_piece = sweep_.pointwise() && sweep_.rows == 1 && places.size == block.tile.cols;
    const int64_t first = in_one_piece ? block.images * places.size : 0;
    for (int64_t r = 0; r < input_rows; ++r) {
      fill_zero(rows.inputs + r * rows.input_distance + first, planes_.count * places.plane - first);
    }
    for (int64_t r = 0; r < grad_rows; ++r) {
      fill_zero(rows.grads + r * rows.grad_distance + first, places.padded - first);
    }
  }

  void list_rows(const PairBlock& block, PairRows& rows) const {
    const int64_t pitch = block.places.pitch;
    if (spreads_input(block.tile)) {
      const Inside down = rows_inside(block.tile), across = cols_inside(block.tile);
      rows.input_rows.list((down.end - down.begin) * pitch, pitch, across.begin, across.end);
    }
    if (spreads_grad(block.tile)) {
      rows.grad_rows.list(tile_length(block.tile, pitch), pitch, 0, block.tile.cols);
    }
  }

  void stage_input(ChannelSet channels, const PairBlock& block, const PairRows& rows) const {
    PlaneShape shape(sweep_, block.tile);
    shape.pitch = block.places.pitch;
    for (int64_t i = 0; i < block.images; ++i) {
      BFloat16* to = rows.inputs + i * block.places.size;
      if (input_whole) {
        transpose_planes(p_.input, block.n + i, rows.wanted_inputs, planes_, block.tile, shape, to,
                         block.places.plane);
      } else if (spreads_input(block.tile)) {
        const Inside down = rows_inside(block.tile);
        const int64_t y = planes_.first_row + block.tile.row + planes_.phases[0].row + down.begin;
        for (int64_t c = 0; c < channels.count; ++c) {
          rows.input_rows.run(p_.input.at(block.n + i, channels[c], y, 0),
                              to + c * rows.input_distance + down.begin * shape.pitch,
                              (down.end - down.begin) * shape.pitch);
        }
      } else {
        copy_planes(p_.input, block.n + i, channels, planes_, block.tile, shape, to, rows.input_distance,
                    block.places.plane, {});
      }
    }
  }

  void stage_grad(ChannelSet channels, const PairBlock& block, const PairRows& rows) const {
    const Tile& tile = block.tile;
    const Image<const BFloat16> part = p_.grad.crop(tile.row, tile.col, tile.rows, tile.cols);
    const Tile all{0, 0, tile.rows, tile.cols};
    const Phase origin{0, 0};
    const Planes lattice(origin);
    PlaneShape shape(sweep_, all);
    shape.rows = tile.rows;
    shape.pitch = block.places.pitch;
    for (int64_t i = 0; i < block.images; ++i) {
      BFloat16* to = rows.grads + i * block.places.size;
      if (grad_whole) {
        transpose_planes(part, block.n + i, rows.wanted_grads, lattice, all, shape, to, 0);
      } else if (spreads_grad(tile)) {
        for (int64_t c = 0; c < channels.count; ++c) {
          rows.grad_rows.run(part.at(block.n + i, channels[c], 0, 0), to + c * rows.grad_distance,
                             tile_length(tile, shape.pitch));
        }
      } else {
        copy_planes(part, block.n + i, channels, lattice, all, shape, to, rows.grad_distance, 0, {});
      }
    }
  }

 private:
  int64_t input_distance(const RowPlaces& most) const {
    return row_distance<BFloat16>(planes_.count * most.plane);
  }
  int64_t inputs_size(const RowPlaces& most) const { return input_rows * input_distance(most); }
  // And rows that are never wanted.
  int64_t grads_size(const RowPlaces& most) const { return (grad_rows + block_rows) * grad_distance(most); }

  static void plan_wanted(Workspace& space, int64_t channels) {
    space.plan<int64_t>(channels);
    space.plan<int32_t>(channels);
  }
  // `order`: of the rows, or null: that of the channels.
  static WantedChannels want(Workspace& space, int64_t channels, int64_t distance, const int32_t* order) {
    int64_t* starts = space.take<int64_t>(channels);
    int32_t* first = space.take<int32_t>(channels);
    int64_t count = 0;
    for (int64_t i = 0; i < channels; ++i) starts[order ? order[i] : i] = i * distance;
    for (int64_t c = 0; c < channels; c += WantedChannels::at_once) {
      first[count++] = static_cast<int32_t>(smaller(c, channels - WantedChannels::at_once));
    }
    return {first, count, starts};
  }

  // The part of a plane's rows and columns that lies in the image.
  Inside rows_inside(const Tile& tile) const {
    return {planes_.first_row + tile.row, tile.rows + sweep_.halo_rows, 1, planes_.phases[0].row,
            p_.input.height};
  }
  Inside cols_inside(const Tile& tile) const {
    return {planes_.first_col + tile.col, tile.cols + sweep_.halo_cols, 1, planes_.phases[0].col,
            p_.input.width};
  }
  bool spreads_input(const Tile& tile) const {
    const Inside cols = cols_inside(tile);
    return input_spread_ && cols.end - cols.begin == p_.input.width;
  }
  bool spreads_grad(const Tile& tile) const { return grad_spread_ && tile.cols == p_.grad.width; }

  const WeightGradProblem<BFloat16>& p_;
  const Sweep& sweep_;
  const Planes& planes_;
  const bool input_spread_, grad_spread_;  // by the vector, where tiles have whole rows
};

}  // namespace
}  // namespace groupconv::cpu

// A chain of pointwise partitioned convolutions, y = act(W_S … W_2 W_1 x + bias): IGCV2's stages in one pass.
//
// A tile of pixels goes through all stages while it lies in a core's own cache; memory sees the input and
// the output only. The permutations between the stages are only the order of channel lists.
//
// multiply_rows does the sums. Groups are small and many, so the rows of all channels that a stage reads and
// writes are listed once a tile, and a group takes its part of the list. A stage whose groups write the channels
// they read, no more than multiply_rows takes at a time, works in place. A tile is as wide as the L2 allows: rows
// of one cache line or two, thousands of bytes apart, cost more in pages and prefetching than an L1-sized tile
// gains.
//
// Backward, the hidden tensors of the tile are computed again, each in rows of its own, two buffers take the
// gradients in turn, and correlate_rows meets a hidden tensor with the gradient of the next; its sums over
// pixels are added up across lanes once a tile.
//
// Floor: multiply-adds of the stages, or the bytes of input and output alone, whichever is longer.
#pragma once

#include "cpu/products/correlate.h"
#include "cpu/products/multiply.h"
#include "cpu/staging/slices.h"
#include "cpu/staging/stage.h"
#include "cpu/staging/unstage.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

// One tile of a tensor of the chain, a row per channel: in the image itself or in scratch.
template <class T>
struct TileRows {
  T* first = nullptr;
  int64_t distance = 0;

  T* of(int64_t channel) const { return first + channel * distance; }
};

// Takes a tile through a stage: dest = W · source, or Wᵀ · source.
template <class T>
class StageRows {
 public:
  // Of a chain's longest lists.
  StageRows(const ChainStage<T>* stages, int64_t count) {
    for (int64_t s = 0; s < count; ++s) {
      const PartitionView& partition = *stages[s].partition;
      for (const ChannelLists& lists : {partition.inputs, partition.outputs})
        most_rows_ = larger<int64_t>(most_rows_, lists.offsets[partition.groups]);
      most_depth_ = larger(most_depth_, larger(partition.most_inputs, partition.most_outputs));
    }
  }

  void plan(Workspace& space) const {
    space.plan<const T*>(most_rows_);
    space.plan<T*>(most_rows_);
    space.plan<T>(most_rows_);
    space.plan<T>(most_columns<T> * most_depth_);
    space.plan<int64_t>(most_depth_);
  }
  void open(Workspace& space) {
    sources_ = space.take<const T*>(most_rows_);
    dests_ = space.take<T*>(most_rows_);
    bias_ = space.take<T>(most_rows_);
    columns_ = space.take<T>(most_columns<T> * most_depth_);
    steps_ = space.take<int64_t>(most_depth_);
  }

  // `job` says what happens at the end; `bias`: one per channel, or null.
  void apply(const ChainStage<T>& stage, TileRows<const T> source, TileRows<T> dest, const T* bias,
             MultiplyJob<T> job) const {
    const PartitionView& partition = *stage.partition;
    list_rows(partition.inputs, partition.outputs, partition.groups, source, dest);
    if (bias) {
      for (int64_t i = 0; i < partition.out_channels; ++i) bias_[i] = bias[partition.outputs.channels[i]];
    }
    for (int64_t i = 0; i < most_depth_; ++i) steps_[i] = i;
    for (int64_t g = 0; g < partition.groups; ++g) {
      job.rows = partition.outputs.count(g);
      job.depth = partition.inputs.count(g);
      job.weight_row_stride = job.depth;
      job.bias = bias ? bias_ + partition.outputs.offsets[g] : nullptr;
      multiply_group(stage, g, partition.inputs, partition.outputs, job);
    }
  }

  void apply_transposed(const ChainStage<T>& stage, TileRows<const T> source, TileRows<T> dest,
                        MultiplyJob<T> job) const {
    const PartitionView& partition = *stage.partition;
    if (partition.inputs_overlap || !partition.inputs_complete) {
      for (int64_t c = 0; c < partition.in_channels; ++c) fill_zero(dest.of(c), job.length);
    }
    list_rows(partition.outputs, partition.inputs, partition.groups, source, dest);
    job.accumulate = partition.inputs_overlap;
    for (int64_t g = 0; g < partition.groups; ++g) {
      job.rows = partition.inputs.count(g);
      job.depth = partition.outputs.count(g);
      job.weight_row_stride = 1;
      for (int64_t i = 0; i < job.depth; ++i) steps_[i] = i * job.rows;
      multiply_group(stage, g, partition.outputs, partition.inputs, job);
    }
  }

 private:
  void list_rows(const ChannelLists& reads, const ChannelLists& writes, int64_t groups,
                 TileRows<const T> source, TileRows<T> dest) const {
    for (int64_t i = 0; i < reads.offsets[groups]; ++i) sources_[i] = source.of(reads.channels[i]);
    for (int64_t i = 0; i < writes.offsets[groups]; ++i) dests_[i] = dest.of(writes.channels[i]);
  }

  void multiply_group(const ChainStage<T>& stage, int64_t g, const ChannelLists& reads,
                      const ChannelLists& writes, MultiplyJob<T>& job) const {
    job.sources = sources_ + reads.offsets[g];
    const int64_t after = g + 1 < stage.partition->groups ? reads.count(g + 1) : 0;
    job.next = after >= job.depth ? job.sources + job.depth : nullptr;
    job.dests = dests_ + writes.offsets[g];
    job.weight = stage.weight + stage.partition->weight_offsets[g];
    job.columns = columns_;
    job.steps = steps_;
    multiply_rows(job);
  }

  int64_t most_rows_ = 0, most_depth_ = 0;
  const T** sources_ = nullptr;
  T** dests_ = nullptr;
  T *bias_ = nullptr, *columns_ = nullptr;
  int64_t* steps_ = nullptr;
};

// A tile of rows of the stage overwrites nothing that another one has yet to read.
inline bool works_in_place(const PartitionView& partition) {
  for (int64_t g = 0; g < partition.groups; ++g) {
    const int64_t count = partition.inputs.count(g);
    if (count != partition.outputs.count(g) || count > max_tile_rows) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (partition.inputs.of(g)[i] != partition.outputs.of(g)[i]) return false;
    }
  }
  return true;
}

// The image is rows as it lies.
template <class T, class Element>
bool is_rows(const Image<Element>& image) {
  return __is_same(const Element, const T) && image.stride_w == 1 && !image.channels_last();
}

// A tile of an image that is rows. Only asked for then.
template <class Wanted, class Element>
TileRows<Wanted> rows_of(const Image<Element>& image, int64_t n, const Tile& tile) {
  if constexpr (__is_same(const Wanted, const Element)) {
    return {image.at(n, 0, 0, tile.col), image.stride_c};
  } else {
    return {};
  }
}

template <class T, class Stored>
TileRows<const T> staged_rows(const Image<const Stored>& image, int64_t n, const Sweep& sweep,
                              const Tile& tile, TileRows<T> scratch) {
  const Phase origin{0, 0};
  const PlaneShape shape(sweep, tile);
  stage(image, n, {nullptr, image.channels}, Planes(origin), tile, shape, scratch.first, scratch.distance,
        shape.size);
  return {scratch.first, scratch.distance};
}

template <class T, class Stored>
void write_rows(TileRows<const T> rows, const Finish<T>& finish, const Sweep& sweep, const Tile& tile,
                const Image<Stored>& image, int64_t n) {
  unstage(rows.first, rows.distance, tile.cols, {nullptr, image.channels}, sweep, tile, finish,
          Image<const Stored>{}, image, n);
}

// Tiles of equal width, no wider than `widest` unless that is less than a tile of registers.
template <class T>
struct ChainTiles {
  int64_t pixels, width, count;

  ChainTiles(int64_t all, int64_t widest, int64_t wanted) : pixels(all) {
    constexpr int64_t unit = tile_vectors(max_tile_rows) * Vec<T>::lanes;
    const int64_t most = larger(widest / unit, int64_t{1}) * unit;
    const int64_t needed = widest < pixels ? divide_up(pixels, most) : int64_t{1};
    width = divide_up(divide_up(pixels, larger(needed, wanted)), unit) * unit;
    count = divide_up(pixels, width);
  }
  Tile tile(int64_t index) const { return {0, index * width, 1, smaller(width, pixels - index * width)}; }
};

template <class Stored>
class Chain {
  using T = compute_t<Stored>;
  // Half of it where two tensors take turns. Beside the lines of the images it fits the L2.
  static constexpr int64_t scratch_bytes = int64_t{768} << 10;

 public:
  explicit Chain(const ChainProblem<Stored>& problem)
      : p_(problem),
        finish_(p_.activation),
        most_channels_(p_.source.channels),
        source_direct_(is_rows<T>(p_.source)),
        dest_direct_(is_rows<T>(p_.dest) && is_clamp(p_.activation)) {
    if constexpr (__is_same(Stored, T)) {
      const int64_t depth =
          p_.stages[p_.count - 1].partition->entries() / larger(p_.dest.channels, int64_t{1});
      // Fetching lines gains nothing: the products of a small group do not last until they come.
      const bool streams = dest_direct_ && stores_to(p_.dest, depth) == Stores::streamed;
      if (streams) stores_ = Stores::streamed;
    }
    int current = 0;
    for (int64_t s = 0; s < p_.count; ++s) {
      most_channels_ = larger(most_channels_, p_.stages[s].partition->out_channels);
      const bool last = s + 1 == p_.count;
      current = buffer_after(s, current);
      if (current > 0 && !(last && dest_direct_)) buffers_ = 2;
    }
  }

  void run() const {
    const int64_t wanted = p_.threads.run ? divide_up(pieces_for_threads, p_.dest.batch) : 1;
    const int64_t fit = scratch_bytes / (buffers_ * most_channels_ * static_cast<int64_t>(sizeof(T)));
    const ChainTiles<T> tiles(p_.sweep->cols, fit, wanted);
    for_each_item(p_.threads, p_.dest.batch * tiles.count,
                  [&](int64_t item) { run_tile(item / tiles.count, tiles.tile(item % tiles.count)); });
  }

 private:
  // Which buffer a stage writes, if it reads `current` or the image.
  int buffer_after(int64_t s, int current) const {
    if (s == 0 && source_direct_) return 0;
    return works_in_place(*p_.stages[s].partition) ? current : 1 - current;
  }

  void run_tile(int64_t n, const Tile& tile) const {
    const int64_t distance = row_distance<T>(tile.cols);
    StageRows<T> rows(p_.stages, p_.count);
    Workspace space;
    for (int i = 0; i < buffers_; ++i) space.plan<T>(most_channels_ * distance);
    rows.plan(space);
    space.open();
    TileRows<T> buffers[2];
    for (int i = 0; i < buffers_; ++i) buffers[i] = {space.take<T>(most_channels_ * distance), distance};
    rows.open(space);

    TileRows<const T> source = source_direct_ ? rows_of<const T>(p_.source, n, tile)
                                              : staged_rows(p_.source, n, *p_.sweep, tile, buffers[0]);
    MultiplyJob<T> job{};
    job.length = tile.cols;
    int current = 0;
    for (int64_t s = 0; s < p_.count; ++s) {
      const bool last = s + 1 == p_.count;
      current = buffer_after(s, current);
      const TileRows<T> dest = last && dest_direct_ ? rows_of<T>(p_.dest, n, tile) : buffers[current];
      if (last) {
        job.clamped = dest_direct_ && p_.activation != Activation::none;
        job.low = finish_.range.low;
        job.high = finish_.range.high;
        job.stores = stores_;  // tiles begin lines, being whole tiles of registers
      }
      rows.apply(p_.stages[s], source, dest, last ? p_.bias : nullptr, job);
      source = {dest.first, dest.distance};
    }
    if (!dest_direct_) write_rows(source, finish_, *p_.sweep, tile, p_.dest, n);
    finish_stores(stores_);
  }

  const ChainProblem<Stored>& p_;
  Finish<T> finish_;
  int64_t most_channels_;
  bool source_direct_, dest_direct_;
  int buffers_ = 1;
  Stores stores_ = Stores::plain;
};

template <class Stored>
class ChainGrad {
  using T = compute_t<Stored>;
  static constexpr int64_t scratch_bytes = int64_t{1} << 20;
  // Beyond that the sums across lanes no longer weigh anything; below, they weigh more than anything else.
  static constexpr int64_t widest = 528, narrowest = 144;

 public:
  explicit ChainGrad(const ChainGradProblem<Stored>& problem)
      : p_(problem),
        most_channels_(p_.source.channels),
        source_direct_(is_rows<T>(p_.source)),
        grad_direct_(is_rows<T>(p_.grad)),
        dest_direct_(is_rows<T>(p_.source_grad)) {
    if (!source_direct_) hidden_rows_ = p_.source.channels;
    for (int64_t s = 1; s <= p_.count; ++s) {
      const PartitionView& partition = *p_.stages[s - 1].partition;
      most_channels_ = larger(most_channels_, partition.out_channels);
      if (s < p_.count) hidden_rows_ += partition.out_channels;
      entries_ += partition.entries();
      most_ = larger(most_, larger(partition.most_inputs, partition.most_outputs));
    }
    const int64_t kept = (grad_direct_ ? 0 : 1) + p_.count - (dest_direct_ ? 1 : 0);
    buffers_ = kept < 2 ? 1 : 2;
  }

  void run() const {
    const int64_t channels = hidden_rows_ + buffers_ * most_channels_;
    const int64_t fit = scratch_bytes / (channels * static_cast<int64_t>(sizeof(T)));
    const ChainTiles<T> tiles(p_.sweep->cols, smaller(larger(fit, narrowest), widest), 1);
    const int64_t units = p_.source.batch * tiles.count;
    const auto run_slice = [&](int64_t slice, int64_t, T* weight_grad) {
      for (int64_t unit = units * slice / p_.slices; unit < units * (slice + 1) / p_.slices; ++unit) {
        run_tile(unit / tiles.count, tiles.tile(unit % tiles.count), weight_grad);
      }
    };
    add_slices(p_.threads, p_.slices, 1, p_.weight_grad, p_.weight_grad ? entries_ : 0, run_slice);
  }

 private:
  void run_tile(int64_t n, const Tile& tile, T* weight_grad) const {
    const int64_t distance = row_distance<T>(tile.cols);
    StageRows<T> rows(p_.stages, p_.count);
    Workspace space;
    space.plan<T>(hidden_rows_ * distance);
    for (int i = 0; i < buffers_; ++i) space.plan<T>(most_channels_ * distance);
    space.plan<TileRows<const T>>(p_.count);
    space.plan<const T*>(2 * most_);
    space.plan<int64_t>(most_);
    rows.plan(space);
    space.open();
    T* scratch = space.take<T>(hidden_rows_ * distance);
    TileRows<T> buffers[2];
    for (int i = 0; i < buffers_; ++i) buffers[i] = {space.take<T>(most_channels_ * distance), distance};
    TileRows<const T>* hidden = space.take<TileRows<const T>>(p_.count);
    const T** pointers = space.take<const T*>(2 * most_);
    int64_t* steps = space.take<int64_t>(most_);
    for (int64_t i = 0; i < most_; ++i) steps[i] = i;
    rows.open(space);

    MultiplyJob<T> job{};
    job.length = tile.cols;
    if (p_.weight_grad) {
      if (source_direct_) {
        hidden[0] = rows_of<const T>(p_.source, n, tile);
      } else {
        hidden[0] = staged_rows(p_.source, n, *p_.sweep, tile, TileRows<T>{scratch, distance});
        scratch += p_.source.channels * distance;
      }
      for (int64_t s = 1; s < p_.count; ++s) {
        const ChainStage<T>& stage = p_.stages[s - 1];
        rows.apply(stage, hidden[s - 1], {scratch, distance}, nullptr, job);
        hidden[s] = {scratch, distance};
        scratch += stage.partition->out_channels * distance;
      }
    }

    int current = grad_direct_ ? 1 : 0;
    TileRows<const T> grad = grad_direct_ ? rows_of<const T>(p_.grad, n, tile)
                                          : staged_rows(p_.grad, n, *p_.sweep, tile, buffers[0]);
    int64_t entry = entries_;
    for (int64_t s = p_.count; s > 0; --s) {
      const ChainStage<T>& stage = p_.stages[s - 1];
      entry -= stage.partition->entries();
      if (p_.weight_grad) {
        correlate(stage, grad, hidden[s - 1], tile.cols, weight_grad + entry, pointers, steps);
      }
      if (s == 1 && !p_.source_grad.data) return;
      current = 1 - current;
      const TileRows<T> dest =
          s == 1 && dest_direct_ ? rows_of<T>(p_.source_grad, n, tile) : buffers[current];
      rows.apply_transposed(stage, grad, dest, job);
      grad = {dest.first, dest.distance};
    }
    if (!dest_direct_) {
      write_rows(grad, Finish<T>(Activation::none), *p_.sweep, tile, p_.source_grad, n);
    }
  }

  // weight_grad += grads · inputsᵀ, the blocks of the partition only.
  void correlate(const ChainStage<T>& stage, TileRows<const T> grads, TileRows<const T> inputs,
                 int64_t length, T* weight_grad, const T** pointers, const int64_t* steps) const {
    const PartitionView& partition = *stage.partition;
    CorrelateJob<T> job{};
    job.grads = pointers;
    job.sources = pointers + most_;
    job.steps = steps;
    job.length = length;
    for (int64_t g = 0; g < partition.groups; ++g) {
      job.rows = partition.outputs.count(g);
      job.depth = partition.inputs.count(g);
      for (int64_t r = 0; r < job.rows; ++r) pointers[r] = grads.of(partition.outputs.of(g)[r]);
      for (int64_t i = 0; i < job.depth; ++i) pointers[most_ + i] = inputs.of(partition.inputs.of(g)[i]);
      job.weight_grad = weight_grad + partition.weight_offsets[g];
      job.weight_row_stride = job.depth;
      correlate_rows(job);
    }
  }

  const ChainGradProblem<Stored>& p_;
  int64_t most_channels_, hidden_rows_ = 0, entries_ = 0, most_ = 1;
  bool source_direct_, grad_direct_, dest_direct_;
  int buffers_;
};

template <class Stored>
void chain(const ChainProblem<Stored>& problem) {
  Chain<Stored>(problem).run();
}

template <class Stored>
void chain_grad(const ChainGradProblem<Stored>& problem) {
  ChainGrad<Stored>(problem).run();
}

}  // namespace
}  // namespace groupconv::cpu

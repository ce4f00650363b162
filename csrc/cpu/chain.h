// A chain of pointwise partitioned convolutions, y = act(W_S … W_2 W_1 x + bias): IGCV2's stages in one pass.
//
// A tile of pixels goes through all stages while it lies in a core's own cache; memory sees the input and
// the output only. The permutations between the stages are only the order of channel lists.
//
// multiply_block: R destination channels × V vectors of pixels in registers, one source channel a step, its
// R weights as broadcast operands: V + R loads for R · V multiply-adds. With 32 registers 12 × 2, with 16
// 6 × 2. Groups are small and their number is large, so channels are found by list and distance, without a
// pointer made for each, and a stage whose groups write the channels they read, at most R of them, works in
// place. A tile is as wide as the L2 allows: rows of one cache line or two, thousands of bytes apart, cost
// more in pages and prefetching than an L1-sized tile gains.
//
// Backward, the hidden tensors of the tile are computed again, each in rows of its own, two buffers take the
// gradients in turn, and correlate_rows meets a hidden tensor with the gradient of the next; its sums over
// pixels are added up across lanes once a tile.
//
// Floor: multiply-adds of the stages, or the bytes of input and output alone, whichever is longer.
#pragma once

#include "cpu/correlate.h"
#include "cpu/workspace.h"

namespace groupconv::cpu {
namespace {

// One tile of a tensor of the chain, a row per channel: in the image itself or in scratch.
template <class T>
struct TileRows {
  T* first = nullptr;
  int64_t distance = 0;

  T* of(int64_t channel) const { return first + channel * distance; }
};

constexpr int block_vectors = 2;
constexpr int block_rows = vector_registers == 32 ? 12 : 6;
template <class T>
constexpr int64_t block_width = block_vectors * Vec<T>::lanes;

// dest channel writes[r] = bias + Σ_j weight[r · row_step + j · depth_step] · source channel reads[j].
template <class T>
struct BlockJob {
  TileRows<const T> source;
  TileRows<T> dest;
  const int32_t* reads;
  const int32_t* writes;
  int64_t depth, rows;
  const T* weight;
  int64_t row_step, depth_step;
  const T* bias;    // by channel, or null
  bool accumulate;  // add to what dest holds
  bool prefetch;    // source lies in memory: fetch what the next block reads
  bool clamped;
  T low, high;
};

template <class T, int R, bool Prefetch>
void multiply_block(const BlockJob<T>& job, int64_t row, int64_t pixel) {
  using V_ = Vec<T>;
  constexpr int lanes = V_::lanes, V = block_vectors;
  const int32_t* writes = job.writes + row;
  V_ sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const V_ start = job.bias ? V_::broadcast(job.bias[writes[r]]) : zero<T>();
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v] = start;
  }
  const T* first = job.source.first + pixel;
  const T* weight = job.weight + row * job.row_step;
  const int64_t row_step = job.row_step;
  for (int64_t j = 0; j < job.depth; ++j, weight += job.depth_step) {
    const T* source = first + job.reads[j] * job.source.distance;
    V_ x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      x[v] = V_::load(source + v * lanes);
      pin(x[v]);
      if constexpr (Prefetch) {
        __builtin_prefetch(source + (V + v) * lanes);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V_ w = V_::broadcast(weight[r * row_step]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(w, x[v], sums[r][v]);
    }
  }
  T* dests[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) dests[r] = job.dest.of(writes[r]) + pixel;
  if (job.accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = sums[r][v] + V_::load(dests[r] + v * lanes);
    }
  }
  if (job.clamped) {
    const V_ low = V_::broadcast(job.low), high = V_::broadcast(job.high);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = clamp(low, high, sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v].store(dests[r] + v * lanes);
  }
}

template <class T, bool Prefetch, int R = block_rows>
void multiply_rows_of_block(const BlockJob<T>& job, int64_t row, int64_t rows, int64_t pixel) {
  if constexpr (R > 0) {
    if (rows == R) return multiply_block<T, R, Prefetch>(job, row, pixel);
    multiply_rows_of_block<T, Prefetch, R - 1>(job, row, rows, pixel);
  }
}

// All rows, in equal parts of at most block_rows, over `length` pixels: a multiple of the block's width.
template <class T>
void multiply_blocks(const BlockJob<T>& job, int64_t length) {
  const int64_t parts = divide_up(job.rows, int64_t{block_rows});
  for (int64_t pixel = 0; pixel < length; pixel += block_width<T>) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t row = job.rows * part / parts, rows = job.rows * (part + 1) / parts - row;
      if (job.prefetch) {
        multiply_rows_of_block<T, true>(job, row, rows, pixel);
      } else {
        multiply_rows_of_block<T, false>(job, row, rows, pixel);
      }
    }
  }
}

// The stage as the forward pass has it; `job` comes with source, dest and what happens at the end.
template <class T>
void apply_stage(const ChainStage<T>& stage, BlockJob<T> job, int64_t length) {
  const PartitionView& partition = *stage.partition;
  for (int64_t g = 0; g < partition.groups; ++g) {
    job.reads = partition.inputs.of(g);
    job.writes = partition.outputs.of(g);
    job.depth = partition.inputs.count(g);
    job.rows = partition.outputs.count(g);
    job.weight = stage.weight + partition.weight_offsets[g];
    job.row_step = job.depth;
    job.depth_step = 1;
    multiply_blocks(job, length);
  }
}

// dest = Wᵀ · source.
template <class T>
void apply_transposed(const ChainStage<T>& stage, BlockJob<T> job, int64_t length) {
  const PartitionView& partition = *stage.partition;
  if (partition.inputs_overlap || !partition.inputs_complete) {
    for (int64_t c = 0; c < partition.in_channels; ++c) fill_zero(job.dest.of(c), length);
  }
  job.accumulate = partition.inputs_overlap;
  for (int64_t g = 0; g < partition.groups; ++g) {
    job.reads = partition.outputs.of(g);
    job.writes = partition.inputs.of(g);
    job.depth = partition.outputs.count(g);
    job.rows = partition.inputs.count(g);
    job.weight = stage.weight + partition.weight_offsets[g];
    job.row_step = 1;
    job.depth_step = job.rows;
    multiply_blocks(job, length);
  }
}

// A block of the stage overwrites nothing that another one has yet to read.
inline bool works_in_place(const PartitionView& partition) {
  for (int64_t g = 0; g < partition.groups; ++g) {
    const int64_t count = partition.inputs.count(g);
    if (count != partition.outputs.count(g) || count > block_rows) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (partition.inputs.of(g)[i] != partition.outputs.of(g)[i]) return false;
    }
  }
  return true;
}

// A tile of an image, where it is rows and the tile is whole blocks; else {}.
template <class T, class Element>
TileRows<Element> direct_rows(const Image<Element>& image, int64_t n, const Tile& tile) {
  if constexpr (__is_same(const Element, const T)) {
    if (image.stride_w == 1 && !image.channels_last() && tile.cols % block_width<T> == 0) {
      return {image.at(n, 0, 0, tile.col), image.stride_c};
    }
  }
  return {};
}

// A tile of an image as rows: as it lies, or staged into `scratch` with zeros up to whole blocks.
template <class T, class Stored>
TileRows<const T> read_rows(const Image<const Stored>& image, int64_t n, const Sweep& sweep, const Tile& tile,
                            TileRows<T> scratch) {
  if constexpr (__is_same(Stored, T)) {
    if (const auto rows = direct_rows<T>(image, n, tile); rows.first) return rows;
  }
  if (tile.cols % block_width<T> != 0) fill_zero(scratch.first, image.channels * scratch.distance);
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

template <class T>
int64_t whole_blocks(int64_t pixels) {
  return divide_up(pixels, block_width<T>) * block_width<T>;
}

template <class Stored>
class Chain {
  using T = compute_t<Stored>;
  static constexpr int64_t buffer_bytes = int64_t{512} << 10;

 public:
  explicit Chain(const ChainProblem<Stored>& problem) : p_(problem), finish_(p_.activation) {
    most_channels_ = p_.source.channels;
    for (int64_t s = 0; s < p_.count; ++s) {
      most_channels_ = larger(most_channels_, p_.stages[s].partition->out_channels);
    }
  }

  void run() const {
    const int64_t pixels = p_.sweep->cols;
    const int64_t fit = buffer_bytes / (most_channels_ * static_cast<int64_t>(sizeof(T)));
    const int64_t widest = larger(fit / block_width<T>, int64_t{1}) * block_width<T>;
    const int64_t wanted = p_.threads.run ? divide_up(pieces_for_threads, p_.dest.batch) : 1;
    const int64_t width = whole_blocks<T>(divide_up(pixels, larger(divide_up(pixels, widest), wanted)));
    const int64_t tiles = divide_up(pixels, width);
    for_each_item(p_.threads, p_.dest.batch * tiles, [&](int64_t item) {
      const int64_t first = item % tiles * width;
      run_tile(item / tiles, {0, first, 1, smaller(width, pixels - first)});
    });
  }

 private:
  void run_tile(int64_t n, const Tile& tile) const {
    const int64_t distance = row_distance<T>(whole_blocks<T>(tile.cols));
    Workspace space;
    space.plan<T>(most_channels_ * distance);
    space.plan<T>(most_channels_ * distance);
    space.open();
    TileRows<T> buffers[2];
    for (auto& buffer : buffers) buffer = {space.take<T>(most_channels_ * distance), distance};

    BlockJob<T> job{};
    job.source = read_rows<T>(p_.source, n, *p_.sweep, tile, buffers[0]);
    job.prefetch = job.source.first != buffers[0].first;
    TileRows<T> output{};
    if constexpr (__is_same(Stored, T)) {
      if (is_clamp(p_.activation)) output = direct_rows<T>(p_.dest, n, tile);
    }
    int current = job.prefetch ? 1 : 0;
    for (int64_t s = 0; s < p_.count; ++s) {
      const bool last = s + 1 == p_.count;
      if (job.prefetch || !works_in_place(*p_.stages[s].partition)) current = 1 - current;
      job.dest = last && output.first ? output : buffers[current];
      if (last) {
        job.bias = p_.bias;
        job.clamped = output.first && p_.activation != Activation::none;
        job.low = finish_.range.low;
        job.high = finish_.range.high;
      }
      apply_stage(p_.stages[s], job, whole_blocks<T>(tile.cols));
      job.source = {job.dest.first, job.dest.distance};
      job.prefetch = false;
    }
    if (!output.first) write_rows(job.source, finish_, *p_.sweep, tile, p_.dest, n);
  }

  const ChainProblem<Stored>& p_;
  Finish<T> finish_;
  int64_t most_channels_;
};

template <class Stored>
class ChainGrad {
  using T = compute_t<Stored>;
  static constexpr int64_t budget = 2 * tile_bytes;
  // Beyond that the sums across lanes no longer weigh anything; below, they weigh more than anything else.
  static constexpr int64_t widest = 512, narrowest = 128;

 public:
  explicit ChainGrad(const ChainGradProblem<Stored>& problem) : p_(problem) {
    most_channels_ = p_.source.channels;
    hidden_rows_ = p_.source.channels;
    for (int64_t s = 1; s <= p_.count; ++s) {
      most_channels_ = larger(most_channels_, channels(s));
      if (s < p_.count) hidden_rows_ += channels(s);
      entries_ += p_.stages[s - 1].partition->entries();
      for (int64_t g = 0; g < p_.stages[s - 1].partition->groups; ++g) {
        const PartitionView& partition = *p_.stages[s - 1].partition;
        most_ = larger(most_, larger(partition.inputs.count(g), partition.outputs.count(g)));
      }
    }
  }

  void run() const {
    const int64_t pixels = p_.sweep->cols;
    const int64_t fit = budget / ((hidden_rows_ + most_channels_) * static_cast<int64_t>(sizeof(T)));
    const int64_t most = whole_blocks<T>(smaller(larger(fit, narrowest), widest));
    const int64_t width = whole_blocks<T>(divide_up(pixels, divide_up(pixels, most)));
    const int64_t tiles = divide_up(pixels, width);
    const int64_t units = p_.source.batch * tiles;
    for_each_item(p_.threads, p_.slices, [&](int64_t slice) {
      for (int64_t unit = units * slice / p_.slices; unit < units * (slice + 1) / p_.slices; ++unit) {
        const int64_t first = unit % tiles * width;
        run_tile(slice, unit / tiles, {0, first, 1, smaller(width, pixels - first)});
      }
    });
  }

 private:
  int64_t channels(int64_t s) const {
    return s == 0 ? p_.source.channels : p_.stages[s - 1].partition->out_channels;
  }

  void run_tile(int64_t slice, int64_t n, const Tile& tile) const {
    const int64_t length = whole_blocks<T>(tile.cols);
    const int64_t distance = row_distance<T>(length);
    Workspace space;
    space.plan<T>(hidden_rows_ * distance);
    for (int i = 0; i < 2; ++i) space.plan<T>(most_channels_ * distance);
    space.plan<TileRows<const T>>(p_.count);
    space.plan<const T*>(2 * most_);
    space.plan<int64_t>(most_);
    space.open();
    T* scratch = space.take<T>(hidden_rows_ * distance);
    TileRows<T> buffers[2];
    for (auto& buffer : buffers) buffer = {space.take<T>(most_channels_ * distance), distance};
    TileRows<const T>* hidden = space.take<TileRows<const T>>(p_.count);
    const T** pointers = space.take<const T*>(2 * most_);
    int64_t* steps = space.take<int64_t>(most_);
    for (int64_t i = 0; i < most_; ++i) steps[i] = i;

    BlockJob<T> job{};
    if (p_.weight_grad) {
      hidden[0] = read_rows<T>(p_.source, n, *p_.sweep, tile, TileRows<T>{scratch, distance});
      for (int64_t s = 1; s < p_.count; ++s) {
        scratch += channels(s - 1) * distance;
        job.source = hidden[s - 1];
        job.dest = {scratch, distance};
        apply_stage(p_.stages[s - 1], job, length);
        hidden[s] = {scratch, distance};
      }
    }

    job.source = read_rows<T>(p_.grad, n, *p_.sweep, tile, buffers[0]);
    TileRows<T> output{};
    if constexpr (__is_same(Stored, T)) {
      if (p_.source_grad.data) output = direct_rows<T>(p_.source_grad, n, tile);
    }
    int current = 0;
    int64_t entry = (slice + 1) * entries_;
    for (int64_t s = p_.count; s > 0; --s) {
      const ChainStage<T>& stage = p_.stages[s - 1];
      entry -= stage.partition->entries();
      if (p_.weight_grad) {
        correlate(stage, job.source, hidden[s - 1], tile.cols, p_.weight_grad + entry, pointers, steps);
      }
      if (s == 1 && !p_.source_grad.data) return;
      current = 1 - current;
      job.dest = s == 1 && output.first ? output : buffers[current];
      apply_transposed(stage, job, length);
      job.source = {job.dest.first, job.dest.distance};
    }
    if (!output.first) {
      write_rows(job.source, Finish<T>(Activation::none), *p_.sweep, tile, p_.source_grad, n);
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
  int64_t entries_ = 0, hidden_rows_, most_channels_, most_ = 1;
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

// The driver of a sweep for matrix registers between channels_last images: forward pass and input gradient of
// bfloat16.
//
// Sums are blocks of 16 pixels × 16 destination channels, four of them at a time. Pixels are the left operands, 32
// channels of each side by side, weights the right ones (matrix_weights.h). A tile goes through three steps:
//   staged      its source pixels, padding included, with the channels of each in the groups' order (pixel_order.h),
//               filled up with zeros to 32 for every group, or set of groups that share registers (group_sets.h)
//   multiplied  16 pixels equally far apart are a segment, for a tap as for the next; sums are finished and rounded
//               on their way out of the registers, with pixels' destinations in the groups' order
//   put back    into the order of the image's channels, as 16-bit numbers
// A residual takes the way of the last step backwards beforehand, to where its sums will be.
//
// Rows of a tile follow each other where the lattice steps from pixel to pixel, and segments may reach across the gap
// between them; else every row has segments of its own. Sums of pixels in the gaps are garbage that nobody reads.
#pragma once

#include "cpu/staging/matrix_weights.h"
#include "cpu/staging/pixel_order.h"
#include "cpu/staging/pixels.h"
#include "cpu/staging/unstage.h"

namespace groupconv::cpu {
namespace {

class MatrixPixelConvolution {
  static constexpr int64_t span = 2 * block_rows;  // pixels that are multiplied at once, and destinations

  struct Group {  // or some that share registers
    GroupSet set;
    int64_t first_read, first_sum;  // of a pixel
    int64_t depth, dest_blocks;     // registers
  };

 public:
  static bool suits(const ConvolveProblem<BFloat16>& p) {
    if (!p.source.channels_last() || !p.dest.channels_last() || p.sweep->far_taps) return false;
    return p.dest.batch * p.sweep->rows * p.sweep->cols >= span && fills_registers(Sides(p), block_cols);
  }

  explicit MatrixPixelConvolution(const ConvolveProblem<BFloat16>& problem)
      : p_(problem),
        sweep_(*problem.sweep),
        sides_(problem),
        reach_(sweep_),
        finish_(p_.activation),
        skip_h_(reach_.rows() == 1 ? sweep_.source_step_h : 1),
        skip_w_(reach_.cols() == 1 ? sweep_.source_step_w : 1),
        step_h_(sweep_.source_step_h / skip_h_),
        step_w_(sweep_.source_step_w / skip_w_) {
    for_each_set(sides_, [&](const GroupSet& set) {
      ++sets_;
      joins_ = joins_ || set.joins();
      reads_ += round_up(set.of(sides_.sources).count, block_depth);
      sums_ += round_up(set.of(sides_.dests).count, block_cols);
    });
    pixel_ = row_distance<BFloat16>(reads_);
    sum_distance_ = row_distance<BFloat16>(sums_);
  }

  // False where a sum was infinite or none and groups share registers, see sums_seen.h.
  bool run() {
    Workspace shared;
    plan(shared);
    const SharedScratch memory(shared.bytes());
    shared.open(memory);
    open(shared);
    const MatrixWeights weights(sides_, true);
    const Tiling tiling(sweep_, pixel_ * step_h_ * step_w_, sum_distance_, sizeof(BFloat16),
                        p_.threads.run ? divide_up(pieces_for_threads, p_.dest.batch) : 1);
    const int64_t cols = (tiling.tile_cols - 1) * step_w_ + reach_.cols();
    row_ = cols * pixel_;
    for (int64_t t = 0; t < sides_.taps; ++t) {
      const Shift shift = shift_of(sweep_, sweep_.taps[static_cast<size_t>(t)]);
      taps_[t] = (shift.row - reach_.top) * row_ + (shift.col - reach_.left) * pixel_;
    }
    bool finite = true;
    for_each_item(p_.threads, p_.dest.batch * tiling.count, [&](int64_t item) {
      if (!run_tile(weights, item / tiling.count, tiling.tile(sweep_, item % tiling.count)))
        __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    return finite;
  }

 private:
  // Where a tile's pixels lie among those that are staged, and its sums.
  struct Segments {
    bool across;    // rows
    int64_t count;  // even
    int64_t in_row;
    int64_t pitch;  // from a row's first sums to the next's, in pixels

    Segments(const Tile& tile, int64_t staged_cols, bool steps) {
      const int64_t all = divide_up((tile.rows - 1) * staged_cols + tile.cols, block_rows);
      in_row = divide_up(tile.cols, block_rows);
      across = !steps && all <= tile.rows * in_row;
      pitch = across ? staged_cols : in_row * block_rows;
      count = round_up(across ? all : tile.rows * in_row, 2);
    }
  };

  // A tile of an image.
  struct Job {
    int64_t n;
    Tile tile;
    const BFloat16* staged;
    BFloat16* sums;  // of each pixel, or of the residual until then
    float* block;    // [32][32]
    char* scratch;   // for a change of order
    SumsSeen seen;
  };
  // 32 pixels × 32 destinations whose sums are in `block`.
  struct Done {
    BFloat16* sums = nullptr;
    const float* bias;
    bool wide;  // more than 16 destinations
  };

  void plan(Workspace& shared) const {
    shared.plan<Group>(sets_);
    shared.plan<float>(sums_);
    shared.plan<int64_t>(sides_.taps);
    shared.plan<int32_t>(reads_);
    shared.plan<int32_t>(p_.dest.channels);
    shared.plan<int32_t>(sums_);
    PixelOrder::plan(shared, reads_, p_.source.channels);
    PixelOrder::plan(shared, p_.dest.channels, sums_);
    if (p_.residual.data) PixelOrder::plan(shared, sums_, p_.dest.channels);
  }

  void open(Workspace& shared) {
    groups_ = shared.take<Group>(sets_);
    bias_ = shared.take<float>(sums_);
    taps_ = shared.take<int64_t>(sides_.taps);
    int32_t* reads = shared.take<int32_t>(reads_);             // channel of each read
    int32_t* places = shared.take<int32_t>(p_.dest.channels);  // sum of each channel
    int32_t* channels = shared.take<int32_t>(sums_);           // channel of each sum
    for (int64_t c = 0; c < p_.dest.channels; ++c) places[c] = no_channel;
    int64_t read = 0, sum = 0;
    Group* group = groups_;
    for_each_set(sides_, [&](const GroupSet& set) {
      const ChannelSet sources = set.of(sides_.sources), dests = set.of(sides_.dests);
      *group++ = {set, read, sum, divide_up(sources.count, block_depth), divide_up(dests.count, block_cols)};
      for (int64_t i = 0; i < round_up(sources.count, block_depth); ++i) {
        reads[read++] = static_cast<int32_t>(i < sources.count ? sources[i] : no_channel);
      }
      for (int64_t r = 0; r < round_up(dests.count, block_cols); ++r, ++sum) {
        const bool exists = r < dests.count;
        channels[sum] = exists ? static_cast<int32_t>(dests[r]) : no_channel;
        bias_[sum] = exists ? sides_.bias(dests[r]) : 0;
        if (exists) places[dests[r]] = static_cast<int32_t>(sum);
      }
    });
    in_.open(shared, reads, reads_, p_.source.channels);
    out_.open(shared, places, p_.dest.channels, sums_);
    if (p_.residual.data) residual_in_.open(shared, channels, sums_, p_.dest.channels);
  }

  // Whether all sums are finite; true, unseen, where no groups share registers.
  bool run_tile(const MatrixWeights& weights, int64_t n, const Tile& tile) const {
    const Segments segments(tile, row_ / pixel_, step_h_ > 1 || step_w_ > 1);
    const int64_t rows = (tile.rows - 1) * step_h_ + reach_.rows();
    const int64_t staged = rows * row_ + span * step_w_ * pixel_;  // a segment may reach beyond
    const int64_t summed = segments.count * block_rows * sum_distance_;
    const int64_t scratch =
        larger(larger(in_.scratch_bytes(), out_.scratch_bytes()), residual_in_.scratch_bytes());
    Workspace space;
    space.plan<BFloat16>(staged);
    space.plan<BFloat16>(summed);
    space.plan<float>(span * span);
    space.plan<char>(scratch);
    space.open();
    BFloat16* pixels = space.take<BFloat16>(staged);
    Job job{n, tile, pixels, space.take<BFloat16>(summed), space.take<float>(span * span), nullptr, {}};
    job.scratch = space.take<char>(scratch);

    stage(job, rows, pixels);
    fill_zero(pixels + rows * row_, staged - rows * row_);
    if (p_.residual.data) {
      for_each_row(job, segments, p_.residual, [&](const BFloat16* from, int64_t stride, BFloat16* sums) {
        residual_in_.run(from, stride, sums, sum_distance_, tile.cols, job.scratch);
      });
    }
    multiply_tile(weights, job, segments);
    for_each_row(job, segments, p_.dest, [&](BFloat16* to, int64_t stride, const BFloat16* sums) {
      out_.run(sums, sum_distance_, to, stride, tile.cols, job.scratch);
    });
    return job.seen.all_finite();
  }

  void stage(const Job& job, int64_t rows, BFloat16* to) const {
    const Image<const BFloat16>& image = p_.source;
    const int64_t cols = (job.tile.cols - 1) * step_w_ + reach_.cols();
    const int64_t top = job.tile.row * sweep_.source_step_h + reach_.top;
    const int64_t left = job.tile.col * sweep_.source_step_w + reach_.left;
    const Inside inside(0, cols, skip_w_, left, image.width);
    for (int64_t row = 0; row < rows; ++row, to += row_) {
      const int64_t y = top + row * skip_h_;
      if (y < 0 || y >= image.height) {
        fill_zero(to, cols * pixel_);
        continue;
      }
      fill_zero(to, inside.begin * pixel_);
      in_.run(image.at(job.n, 0, y, left + inside.begin * skip_w_), skip_w_ * image.stride_w,
              to + inside.begin * pixel_, pixel_, inside.end - inside.begin, job.scratch);
      fill_zero(to + inside.end * pixel_, (cols - inside.end) * pixel_);
    }
  }

  // body(first pixel of a tile's row in the image, from one to the next there, its sums)
  template <class Element, class Body>
  void for_each_row(const Job& job, const Segments& segments, const Image<Element>& image,
                    const Body& body) const {
    const int64_t x = job.tile.col * sweep_.dest_step_w + sweep_.dest_origin_w;
    for (int64_t row = 0; row < job.tile.rows; ++row) {
      const int64_t y = (job.tile.row + row) * sweep_.dest_step_h + sweep_.dest_origin_h;
      body(image.at(job.n, 0, y, x), sweep_.dest_step_w * image.stride_w,
           job.sums + row * segments.pitch * sum_distance_);
    }
  }

  // The weights of 32 destinations stay in L1 while all pixels of the tile pass.
  void multiply_tile(const MatrixWeights& weights, Job& job, const Segments& segments) const {
    const MatrixRegisters registers;
    Done done;
    for (const Group *end = groups_ + sets_, *at = groups_; at < end; ++at) {
      const Group& group = *at;
      const auto segment = [&](int64_t s) GROUPCONV_INLINE_LAMBDA {
        const int64_t pixel = segments.across ? s * block_rows : s % segments.in_row * block_rows;
        const int64_t row = segments.across ? 0 : s / segments.in_row * step_h_;
        return job.staged + group.first_read + row * row_ + pixel * step_w_ * pixel_;
      };
      for (int64_t block = 0; block < group.dest_blocks; block += 2) {
        const int64_t sum = group.first_sum + block * block_cols;
        const bool wide = block + 1 < group.dest_blocks;
        const BFloat16* first = weights.of(group.set, block * block_cols);
        const int64_t next = weights.row_block(group.set);
        for (int64_t s = 0; s < segments.count; s += 2) {
          if (wide) {
            multiply<true>(first, next, group.depth, segment(s), segment(s + 1));
          } else {
            multiply<false>(first, next, group.depth, segment(s), segment(s + 1));
          }
          finish_block(job, done);  // the one before, while this one is multiplied
          store_register<0>(job.block, span * sizeof(float));
          store_register<2>(job.block + block_rows * span, span * sizeof(float));
          if (wide) {
            store_register<1>(job.block + block_cols, span * sizeof(float));
            store_register<3>(job.block + block_rows * span + block_cols, span * sizeof(float));
          }
          done = {job.sums + s * block_rows * sum_distance_ + sum, bias_ + sum, wide};
        }
      }
    }
    finish_block(job, done);
  }

  // Registers 0 to 3 are sums, 4 and 5 pixels, 6 and 7 weights.
  template <bool Wide>
  GROUPCONV_INLINE void multiply(const BFloat16* weights, int64_t next_block, int64_t depth,
                                 const BFloat16* upper, const BFloat16* lower) const {
    const int64_t distance = step_w_ * pixel_ * static_cast<int64_t>(sizeof(BFloat16));
    clear_register<0>();
    clear_register<2>();
    if constexpr (Wide) {
      clear_register<1>();
      clear_register<3>();
    }
    for (int64_t t = 0; t < sides_.taps; ++t) {
      const BFloat16 *high = upper + taps_[t], *low = lower + taps_[t];
      for (int64_t k = 0; k < depth; ++k, high += block_depth, low += block_depth) {
        load_register<4>(high, distance);
        load_register<6>(weights, register_row_bytes);
        multiply_registers<0, 4, 6>();
        if constexpr (Wide) {
          load_register<7>(weights + next_block, register_row_bytes);
          multiply_registers<1, 4, 7>();
        }
        load_register<5>(low, distance);
        multiply_registers<2, 5, 6>();
        if constexpr (Wide) multiply_registers<3, 5, 7>();
        weights += register_numbers;
      }
    }
  }

  void finish_block(Job& job, const Done& done) const {
    if (!done.sums) return;
    if (joins_) look_at(job, done);
    if (!is_clamp(p_.activation)) {
      finish_each(job, done);
    } else if (done.wide) {
      finish_clamped<2>(job, done);
    } else {
      finish_clamped<1>(job, done);
    }
  }

  static void look_at(Job& job, const Done& done) {
    const int64_t width = done.wide ? span : block_cols;
    for (int64_t i = 0; i < span; ++i) {
      for (int64_t c = 0; c < width; c += block_cols) {
        job.seen.look(Vec<float>::load(job.block + i * span + c));
      }
    }
  }

  template <int Vectors>
  GROUPCONV_INLINE void finish_clamped(const Job& job, const Done& done) const {
    using V_ = Vec<float>;
    V_ bias[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) bias[v] = V_::load(done.bias + v * V_::lanes);
    const V_ low = V_::broadcast(finish_.range.low), high = V_::broadcast(finish_.range.high);
    const bool adds = p_.residual.data, clamps = p_.activation != Activation::none;
    const float* from = job.block;
    BFloat16* to = done.sums;
    for (int64_t i = 0; i < span; ++i, from += span, to += sum_distance_) {
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        V_ x = V_::load(from + v * V_::lanes) + bias[v];
        if (adds) x = x + V_::load(to + v * V_::lanes);
        if (clamps) x = clamp(low, high, x);
        x.store(to + v * V_::lanes);
      }
    }
  }

  void finish_each(const Job& job, const Done& done) const {
    using V_ = Vec<float>;
    const int64_t width = done.wide ? span : block_cols;
    float* sums = job.block;
    BFloat16* to = done.sums;
    for (int64_t i = 0; i < span; ++i, sums += span, to += sum_distance_) {
      for (int64_t c = 0; c < width; c += V_::lanes)
        (V_::load(sums + c) + V_::load(done.bias + c)).store(sums + c);
      finish_run(finish_, sums, 1, p_.residual.data ? to : nullptr, to, 1, width);
    }
  }

  const ConvolveProblem<BFloat16>& p_;
  const Sweep& sweep_;
  Sides<BFloat16> sides_;
  Reach reach_;
  Finish<float> finish_;
  int64_t skip_h_, skip_w_;  // from one staged pixel to the next in the image
  int64_t step_h_, step_w_;  // from one lattice pixel to the next among those that are staged
  int64_t sets_ = 0;
  bool joins_ = false;
  int64_t reads_ = 0, sums_ = 0;  // of a pixel
  int64_t pixel_, row_ = 0;       // from one staged pixel, or row of them, to the next
  int64_t sum_distance_;
  Group* groups_ = nullptr;
  float* bias_ = nullptr;
  int64_t* taps_ = nullptr;  // of what a tap reads from what the lattice pixel does
  PixelOrder in_, out_, residual_in_;
};

}  // namespace
}  // namespace groupconv::cpu

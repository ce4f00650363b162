// Weight gradient of a depthwise convolution in NCHW: lanes are pixels of a row, read where they lie.
//
// Tile: 4 gradient rows × 1 vector of pixels, the sums of up to 3 columns of the window at once (as many as
// leave the registers room). Down a column, each loaded source vector meets all the gradients it belongs to.
//   registers  9 sums, 4 gradients, 1 source
//   loads      3×3: 18 sources and 4 gradients for 36 multiply-adds
// With 32 registers a window of 3×3 with stride 1 goes down strips instead (depthwise/grad_strips.h).
//
// A row outside the image, and a lane outside it, has no product: gradients are masked with the sources, so
// that an Inf in one does not meet a zero in the other.
#pragma once

#include "cpu/depthwise/depthwise.h"
#include "cpu/depthwise/prologue.h"
#include "cpu/staging/slices.h"

namespace groupconv::cpu {
namespace {

template <class Stored>
class DepthwiseGradRows {
  using T = compute_t<Stored>;
  using V_ = Vec<T>;
  static constexpr int lanes = V_::lanes;
  static constexpr int most_sums = vector_registers == 32 ? 21 : 9;

 public:
  explicit DepthwiseGradRows(const WeightGradProblem<Stored>& problem)
      : p_(problem), sweep_(*problem.sweep), grid_(sweep_), prepared_(p_.input, p_.prologue, sweep_, grid_) {}

  static bool suits(const WeightGradProblem<Stored>& p) {
    return is_rows(p.input) && is_rows(p.grad) && p.sweep->source_step_w <= 2;
  }

  void run() const {
    constexpr int64_t groups_per_item = 16;
    const int64_t groups = p_.partition->groups;
    const int64_t chunks = divide_up(groups, groups_per_item);
    add_slices(p_.threads, p_.slices, chunks, p_.weight_grad, p_.partition->entries() * p_.window_area,
               [&](int64_t slice, int64_t chunk, T* weight_grad) {
                 const int64_t first = chunk * groups_per_item;
                 run_groups(slice, first, smaller(first + groups_per_item, groups), weight_grad);
               });
  }

 private:
  void run_groups(int64_t slice, int64_t first, int64_t end, T* weight_grad) const {
    const PartitionView& partition = *p_.partition;
    Workspace space;
    space.plan<Stored>(prepared_.size());
    space.open();
    Stored* prepared = space.take<Stored>(prepared_.size());
    const int64_t begin = p_.input.batch * slice / p_.slices;
    const int64_t beyond = p_.input.batch * (slice + 1) / p_.slices;
    for (int64_t g = first; g < end; ++g) {
      for (int64_t j = 0; j < partition.outputs.count(g); ++j) {
        const Channel channel{begin,
                              beyond,
                              partition.inputs.of(g)[0],
                              partition.outputs.of(g)[j],
                              weight_grad + (partition.weight_offsets[g] + j) * p_.window_area,
                              prepared};
        run_channel(channel);
      }
    }
  }

  struct Channel {
    int64_t first_image, end_image, input, output;
    T* weight_grad;    // [window]
    Stored* prepared;  // scratch
  };

  void run_channel(const Channel& channel) const {
    const bool shares_rows = grid_.row_step == 1 && sweep_.source_step_h == sweep_.source_step_w;
    switch (shares_rows ? sweep_.source_step_w * 10 + grid_.rows : sweep_.source_step_w) {
      case 13: return add_columns<4, 3, 1>(channel);
      case 15: return add_columns<4, 5, 1>(channel);
      case 17: return add_columns<4, 7, 1>(channel);
      case 23: return add_columns<4, 3, 2>(channel);
      case 25: return add_columns<4, 5, 2>(channel);
      case 27: return add_columns<4, 7, 2>(channel);
    }
    return sweep_.source_step_w == 1 ? add_columns<1, 1, 1>(channel) : add_columns<1, 1, 2>(channel);
  }

  template <int R, int Height, int Step>
  void add_columns(const Channel& channel) const {
    constexpr int cols = smaller(3, most_sums / Height);
    for (int64_t top = 0; top < grid_.rows; top += Height) {
      int64_t j = 0;
      for (; j + cols <= grid_.cols; j += cols) add_window<R, Height, Step, cols>(channel, top, j);
      for (; j < grid_.cols; ++j) add_window<R, Height, Step, 1>(channel, top, j);
    }
  }

  template <int R, int Height, int Step, int Cols>
  void add_window(const Channel& channel, int64_t top, int64_t first_col) const {
    V_ sums[Height * Cols];
#pragma GCC unroll 21
    for (int i = 0; i < Height * Cols; ++i) sums[i] = zero<T>();
    for (int64_t n = channel.first_image; n < channel.end_image; ++n) {
      const Stored* grads = p_.grad.at(n, channel.output, 0, 0);
      for (int64_t row = 0; row < sweep_.rows;) {
        const Band<Stored> band = prepared_.band(n, channel.input, row, channel.prepared);
        for (; row + R <= band.end_row; row += R) {
          add_rows<R, Height, Step, Cols>(band, grads, row, top, first_col, sums);
        }
        for (; row < band.end_row; ++row) {
          add_rows<1, Height, Step, Cols>(band, grads, row, top, first_col, sums);
        }
      }
    }
    T totals[Height * Cols];
    sum_each<Height * Cols>(sums, totals);
    for (int i = 0; i < Height; ++i) {
      for (int k = 0; k < Cols; ++k) {
        channel.weight_grad[grid_.weight(top + i, first_col + k)] += totals[i * Cols + k];
      }
    }
  }

  template <int R, int Height, int Step, int Cols>
  GROUPCONV_INLINE void add_rows(const Band<Stored>& band, const Stored* grads, int64_t row, int64_t top,
                                 int64_t first_col, V_ (&sums)[Height * Cols]) const {
    constexpr int source_rows = (Height == 1 ? 1 : Step) * (R - 1) + Height;
    const int64_t first = row * sweep_.source_step_h + grid_.row(top);
    for (int64_t col = 0; col < sweep_.cols; col += lanes) {
      const uint32_t all = (1u << smaller<int64_t>(lanes, sweep_.cols - col)) - 1;
      const Stored* from = grads + row * p_.grad.stride_h + col;
#pragma GCC unroll 3
      for (int k = 0; k < Cols; ++k) {
        const int64_t x = col * Step + grid_.col(first_col + k);
        // Lanes whose source pixel exists, and the same for every pixel of the load.
        const uint32_t lanes_inside = all & pixels_inside(x, lanes, Step, p_.input.width);
        const uint32_t exists = Step == 1 ? lanes_inside : pixels_inside(x, Step * lanes, 1, p_.input.width);
        V_ g[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) g[r] = V_::load(from + r * p_.grad.stride_h, V_::from_bits(lanes_inside));
#pragma GCC unroll 13
        for (int i = 0; i < source_rows; ++i) {
          const int64_t y = first + i;
          if (__builtin_expect(y < 0 || y >= p_.input.height, 0)) continue;
          V_ source = load_stepped<T, Step>(band.plane + y * band.stride_h + x, exists);
          if (Step > 1) source = only(source, V_::from_bits(lanes_inside));
          pin(source);
#pragma GCC unroll 7
          for (int h = 0; h < Height; ++h) {
            const int step = Height == 1 ? 1 : Step;
            const int r = (i - h) / step;
            if (i >= h && r * step == i - h && r < R) {
              sums[h * Cols + k] = multiply_add(g[r], source, sums[h * Cols + k]);
            }
          }
        }
      }
    }
  }

  const WeightGradProblem<Stored>& p_;
  const Sweep& sweep_;
  TapGrid grid_;
  PreparedPlane<Stored> prepared_;
};

}  // namespace
}  // namespace groupconv::cpu

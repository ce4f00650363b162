// A tile of some images that is read later, for memory to bring line by line meanwhile: a strip for each channel of rows,
// or for each image of pixels. Lists of channels lead anywhere, so nobody else can guess them.
#pragma once

#include "cpu/staging/planes.h"
#include "cpu/vector/fetched_lines.h"
#include "cpu/vector/stores.h"

namespace groupconv::cpu {
namespace {

class LinesAhead {
 public:
  LinesAhead() = default;
  template <class Stored>
  LinesAhead(const Image<const Stored>& image, int64_t n, int64_t images, ChannelSet channels,
             const Tile& tile)
      : channels_(image.channels_last() ? ChannelSet{nullptr, 1} : channels),
        strips_(images * channels_.count) {
    const int64_t rows = smaller(tile.rows, image.height - tile.row);
    const int64_t cols = smaller(tile.cols, image.width - tile.col);
    if (rows <= 0 || cols <= 0) {
      strips_ = 0;
      return;
    }
    constexpr int64_t size = sizeof(Stored);
    first_ = reinterpret_cast<const char*>(image.at(n, 0, tile.row, tile.col));
    image_bytes_ = image.stride_n * size;
    channel_bytes_ = image.stride_c * size;
    strip_bytes_ = ((rows - 1) * image.stride_h + cols * image.stride_w) * size;
  }

  // About how many.
  int64_t lines() const { return strips_ * divide_up(strip_bytes_, line_bytes); }

  // Whether there was one left.
  GROUPCONV_INLINE bool fetch() {
    if (lines_ == 0 && !next_strip()) return false;
    __builtin_prefetch(at_, 0, into_l2);
    at_ += line_bytes;
    --lines_;
    return true;
  }

 private:
  bool next_strip() {
    if (strip_ == strips_) return false;
    const int64_t channel = channels_[strip_ % channels_.count];
    const char* first = first_ + strip_ / channels_.count * image_bytes_ + channel * channel_bytes_;
    const int64_t before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(first) % line_bytes);
    at_ = first - before;
    lines_ = divide_up(before + strip_bytes_, line_bytes);
    ++strip_;
    return true;
  }

  ChannelSet channels_{nullptr, 0};
  int64_t strips_ = 0, strip_bytes_ = 0;
  const char* first_ = nullptr;
  int64_t image_bytes_ = 0, channel_bytes_ = 0;
  int64_t strip_ = 0, lines_ = 0;
  const char* at_ = nullptr;
};

}  // namespace
}  // namespace groupconv::cpu

// What a convolution is, as plain data: images with strides, and the window that slides over them.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace groupconv {

// A batch of images with any element strides: NCHW, channels_last and views of either are one thing.
template <class T>
struct Image {
  T* data = nullptr;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;

  GROUPCONV_INLINE T* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return data + n * stride_n + c * stride_c + h * stride_h + w * stride_w;
  }
  // Neighbouring channels are neighbours in memory, so pixels have to be transposed into rows.
  GROUPCONV_INLINE bool channels_last() const { return channels > 1 && stride_c == 1 && height * width > 1; }
  // All pixels of one channel lie one after the other, `stride_w` apart.
  GROUPCONV_INLINE bool flat() const { return height == 1 || stride_h == width * stride_w; }
  // A rectangle of every image.
  GROUPCONV_INLINE Image crop(int64_t row, int64_t col, int64_t rows, int64_t cols) const {
    Image part = *this;
    part.data = at(0, 0, row, col);
    part.height = rows;
    part.width = cols;
    return part;
  }
  // A flat image as images of one long row.
  GROUPCONV_INLINE Image as_row() const {
    Image row = *this;
    row.width = height * width;
    row.height = 1;
    return row;
  }
};

struct Window {
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;

  GROUPCONV_INLINE int64_t area() const { return kernel_h * kernel_w; }
  GROUPCONV_INLINE int64_t reach_h() const { return dilation_h * (kernel_h - 1) + 1; }
  GROUPCONV_INLINE int64_t reach_w() const { return dilation_w * (kernel_w - 1) + 1; }
  GROUPCONV_INLINE int64_t out_height(int64_t height) const {
    return (height + pad_top + pad_bottom - reach_h()) / stride_h + 1;
  }
  GROUPCONV_INLINE int64_t out_width(int64_t width) const {
    return (width + pad_left + pad_right - reach_w()) / stride_w + 1;
  }
};

}  // namespace groupconv

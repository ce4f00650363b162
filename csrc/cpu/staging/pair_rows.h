// Images as rows of pixels that are multiplied in pairs: bfloat16 as it is stored, several images behind each other.
//
// Where a window's taps reach beyond their row, or beyond their image, they find zeros. One row's zeros at
// its end are the next one's at its beginning, and images share theirs likewise. Rows begin at even
// positions, so that two neighbouring pixels of a plane are a pair whatever the tap's row.
#pragma once

#include "cpu/staging/planes.h"
#include "cpu/staging/workspace.h"
#include "cpu/vector/matrix_registers.h"
#include "cpu/vector/strides.h"

namespace groupconv::cpu {
namespace {

// Where the pixels of a tile of some images lie in a row.
struct RowPlaces {
  int64_t pitch, size;  // from one row of the tile, and from one image, to the next
  int64_t padded;       // places of all, a whole number of products
  int64_t reach;        // how much further on some tap reads, rounded to even
  int64_t plane;        // places of a plane, with what its taps reach
  bool any_odd;         // some tap reads an odd number of places further on

  RowPlaces(const Sweep& sweep, const Planes& planes, const Tile& tile, int64_t images, int64_t height,
            int64_t width)
      : RowPlaces(sweep, tile, images, Shared(sweep, planes, tile, height, width)) {}

  // No tile has more that is no larger.
  static RowPlaces most(const Sweep& sweep, const Tile& tile, int64_t images) {
    return {sweep, tile, images, Shared(sweep, tile)};
  }

  int64_t shift(const Tap& tap) const { return tap.row * pitch + tap.col; }

 private:
  // Rows of an image and columns of a row that no other one has.
  struct Shared {
    int64_t rows, cols;

    Shared(const Sweep& sweep, const Tile& tile)
        : rows(tile.rows + sweep.halo_rows), cols(tile.cols + sweep.halo_cols) {}
    Shared(const Sweep& sweep, const Planes& planes, const Tile& tile, int64_t height, int64_t width)
        : Shared(sweep, tile) {
      int64_t top = rows, bottom = tile.rows, left = cols, right = tile.cols;
      for (int64_t p = 0; p < planes.count; ++p) {
        const Inside down(planes.first_row + tile.row, rows, planes.step_h, planes.phases[p].row, height);
        const Inside across(planes.first_col + tile.col, cols, planes.step_w, planes.phases[p].col, width);
        top = smaller(top, down.begin);
        bottom = larger(bottom, down.end);
        left = smaller(left, across.begin);
        right = larger(right, across.end);
      }
      rows = larger(bottom, rows - top);
      cols = larger(right, cols - left);
    }
  };

  RowPlaces(const Sweep& sweep, const Tile& tile, int64_t images, const Shared& shared)
      : pitch(round_up(shared.cols, 2)), size(pitch * shared.rows), any_odd(false) {
    int64_t furthest = 0;
    for (const Tap& tap : sweep.taps) {
      any_odd |= shift(tap) % 2 != 0;
      furthest = larger(furthest, shift(tap));
    }
    padded = round_up((images - 1) * size + tile_length(tile, pitch) + any_odd, block_depth);
    // The last image has the zeros below it for itself.
    const int64_t staged = (images - 1) * size + (tile.rows + sweep.halo_rows) * pitch;
    reach = round_up(furthest, 2);
    plane = larger(padded + reach, staged);
  }
};

// Images whose pixels follow each other, to rows with gaps: a permutation for every vector of places.
class SpreadRows {
  struct Vector {
    uint16_t pixel[Vec<BFloat16>::lanes];  // of those from `before` on
    uint32_t places;                       // that have one
    int32_t before;
  };

 public:
  static bool suits(const Image<const BFloat16>& image) {
    return !image.channels_last() && image.stride_w == 1 && image.flat();
  }
  static void plan(Workspace& space, int64_t places) { space.plan<Vector>(vectors_for(places)); }
  void open(Workspace& space, int64_t places) { vectors_ = space.take<Vector>(vectors_for(places)); }

  // Of rows `pitch` long the columns [begin, end) are pixels.
  void list(int64_t places, int64_t pitch, int64_t begin, int64_t end) {
    int64_t col = 0, pixels = 0;
    for (int64_t v = 0; v < vectors_for(places); ++v) {
      Vector& vector = vectors_[v];
      vector = {{}, 0, static_cast<int32_t>(pixels)};
      for (int64_t lane = 0; lane < Vec<BFloat16>::lanes; ++lane) {
        if (begin <= col && col < end && v * Vec<BFloat16>::lanes + lane < places) {
          vector.pixel[lane] = static_cast<uint16_t>(pixels++ - vector.before);
          vector.places |= uint32_t{1} << lane;
        }
        if (++col == pitch) col = 0;
      }
    }
  }

  void run(const BFloat16* from, BFloat16* to, int64_t places) const {
    using V_ = Vec<BFloat16>;
    const Vector* vector = vectors_;
    for (int64_t at = 0; at < places; at += V_::lanes, ++vector) {
      const V_ x = V_::load(from + vector->before, V_::first(__builtin_popcount(vector->places)));
      merge_permuted(V_::nothing(), V_::from_bits(vector->places), V_::load_index(vector->pixel), x)
          .store(to + at, V_::first(smaller<int64_t>(V_::lanes, places - at)));
    }
  }

 private:
  static int64_t vectors_for(int64_t places) { return divide_up(places, Vec<BFloat16>::lanes); }

  Vector* vectors_ = nullptr;
};

// Eight channels of 32 pixels: each two pixels' pairs of channels become two channels' pairs of pixels.
template <class Even, class Odd, class Store>
GROUPCONV_INLINE void transpose_words(const Even& even, const Odd& odd, const Store& store) {
  constexpr __mmask32 second = 0xaaaaaaaa;
  __m512 evens[columns_at_once], odds[columns_at_once];
  load_columns(even, evens);
  load_columns(odd, odds);
#pragma GCC unroll 4
  for (int i = 0; i < columns_at_once; ++i) {
    const __m512i a = _mm512_castps_si512(evens[i]), b = _mm512_castps_si512(odds[i]);
    store(2 * i, _mm512_mask_blend_epi16(second, a, _mm512_slli_epi32(b, 16)));
    store(2 * i + 1, _mm512_mask_blend_epi16(second, _mm512_srli_epi32(a, 16), b));
  }
}

// The channels of a channels_last image that somebody wants, eight at a time, and where their rows begin.
struct WantedChannels {
  static constexpr int64_t at_once = 8;
  const int32_t* first;  // of every eight
  int64_t count;
  const int64_t* starts;  // of each channel's row
};

// Neighbouring pixels to the rows of their channels, from there on.
void transpose_pixels(const BFloat16* from, int64_t pixel_stride, int64_t pixels,
                      const WantedChannels& wanted, BFloat16* to) {
  constexpr int64_t lanes = Vec<BFloat16>::lanes;
  const auto pairs = [](const BFloat16* p)
                         GROUPCONV_INLINE_LAMBDA { return reinterpret_cast<const Pair<BFloat16>*>(p); };
  const Strides strides(2 * pixel_stride * static_cast<int64_t>(sizeof(BFloat16)));
  for (; pixels >= lanes; pixels -= lanes, from += lanes * pixel_stride, to += lanes) {
    for (int64_t b = 0; b < wanted.count; ++b) {
      const int64_t c = wanted.first[b];
      const int64_t* starts = wanted.starts + c;
      const auto strip = [&](const BFloat16* first) GROUPCONV_INLINE_LAMBDA {
        const Pair<BFloat16>* low = pairs(first);
        const Pair<BFloat16>* high = strides.at(low, 8);
        return [low, high, &strides](int i)
                   GROUPCONV_INLINE_LAMBDA { return i < 8 ? strides.at(low, i) : strides.at(high, i - 8); };
      };
      transpose_words(strip(from + c), strip(from + pixel_stride + c),
                      [&](int i, __m512i row)
                          GROUPCONV_INLINE_LAMBDA { _mm512_storeu_si512(to + starts[i], row); });
    }
  }
  if (pixels == 0) return;
  const BFloat16* pixel[lanes];
  for (int64_t i = 0; i < lanes; ++i) pixel[i] = from + smaller(i, pixels - 1) * pixel_stride;
  const auto present = Vec<BFloat16>::first(pixels);
  for (int64_t b = 0; b < wanted.count; ++b) {
    const int64_t c = wanted.first[b];
    const int64_t* starts = wanted.starts + c;
    transpose_words([&](int i) GROUPCONV_INLINE_LAMBDA { return pairs(pixel[2 * i] + c); },
                    [&](int i) GROUPCONV_INLINE_LAMBDA { return pairs(pixel[2 * i + 1] + c); },
                    [&](int i, __m512i row)
                        GROUPCONV_INLINE_LAMBDA { _mm512_mask_storeu_epi16(to + starts[i], present, row); });
  }
}

// copy_planes of a channels_last image.
void transpose_planes(const Image<const BFloat16>& image, int64_t n, const WantedChannels& wanted,
                      const Planes& planes, const Tile& tile, const PlaneShape& shape, BFloat16* rows,
                      int64_t plane_distance) {
  const int64_t first_row = planes.first_row + tile.row, first_col = planes.first_col + tile.col;
  for (int64_t plane = 0; plane < planes.count; ++plane, rows += plane_distance) {
    const Phase phase = planes.phases[plane];
    const Inside down(first_row, shape.rows, planes.step_h, phase.row, image.height);
    const Inside right(first_col, shape.pitch, planes.step_w, phase.col, image.width);
    for (int64_t row = down.begin; row < down.end && right.begin < right.end; ++row) {
      transpose_pixels(image.at(n, 0, (first_row + row) * planes.step_h + phase.row,
                                (first_col + right.begin) * planes.step_w + phase.col),
                       planes.step_w * image.stride_w, right.end - right.begin, wanted,
                       rows + row * shape.pitch + right.begin);
    }
  }
}

}  // namespace
}  // namespace groupconv::cpu

// Launches forward_tiles for one element type; each conv2d_forward_<type>.cu instantiates it.
#pragma once

#include <type_traits>

#include "cuda/forward_tiles.cuh"
#include "cuda/launch.h"

namespace groupconv::cuda {

template <class T>
Image<T> typed(const Image<std::conditional_t<std::is_const_v<T>, const void, void>>& image) {
  return {static_cast<T*>(image.data),
          image.batch,
          image.channels,
          image.height,
          image.width,
          image.stride_n,
          image.stride_c,
          image.stride_h,
          image.stride_w};
}

// Beyond this many blocks a block takes several tiles.
constexpr int64_t most_blocks = 1 << 14;

template <class T, class Tile>
cudaError_t launch_tiles(const Conv2dForward& f, const Plan& plan, cudaStream_t stream) {
  const ForwardArguments<T> arguments{typed<const T>(f.input),
                                      typed<T>(f.output),
                                      typed<const T>(f.residual),
                                      static_cast<const T*>(f.weight),
                                      static_cast<const T*>(f.bias),
                                      f.window,
                                      f.activation};
  const int64_t pixels = f.output.batch * f.output.height * f.output.width;
  const int64_t most_tiles = plan.max_groups + f.output.channels / Tile::outputs;
  const int64_t pixel_tiles = (pixels + Tile::pixels - 1) / Tile::pixels;
  // Divided, not multiplied: the product may not fit.
  const int64_t blocks = pixel_tiles > most_blocks / most_tiles ? most_blocks : pixel_tiles * most_tiles;
  forward_tiles<T, Tile><<<static_cast<unsigned>(blocks), tile_threads, 0, stream>>>(arguments, plan);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_forward(const Conv2dForward& f, const Plan& plan, bool narrow, cudaStream_t stream) {
  return narrow ? launch_tiles<T, NarrowTile>(f, plan, stream) : launch_tiles<T, WideTile>(f, plan, stream);
}

}  // namespace groupconv::cuda

// The entry points of the passes with sums by channel, for all element types: they are small.
#include <algorithm>

#include "cuda/channel_pass.cuh"
#include "cuda/launch.cuh"
#include "cuda/typed.cuh"

namespace groupconv::cuda {
namespace {

template <class T>
ChannelPass pass_over(const Image<T>& image, int64_t slices) {
  return {image.batch, image.channels, image.height, image.width, slices, image.stride_c == 1};
}

int64_t blocks_for_pass(const ChannelPass& pass) {
  const int64_t lanes = pass.channels_last ? pass_lanes : 1;
  return blocks_for((pass.channels + lanes - 1) / lanes, pass.slices);
}

template <class From, class To>
cudaError_t add_up(const From* partial, const ChannelPass& pass, To* total, cudaStream_t stream) {
  return launch(add_slices<From, To>, blocks_of_threads(pass.channels, pass_threads), pass_threads, 0, stream,
                partial, pass.slices, pass_sums * pass.channels, total, pass.channels);
}

}  // namespace

int64_t channel_slices(int64_t pixels, int64_t channels) {
  constexpr int64_t enough_blocks = 1024, least_pixels = 1024;
  const int64_t wanted = enough_blocks * pass_lanes / std::max<int64_t>(channels, 1);
  return std::max<int64_t>(std::min(wanted, pixels / least_pixels), 1);
}

cudaError_t run_epilogue_grad(Element element, const EpilogueGradProblem& p, cudaStream_t stream) {
  return for_element(element, [&](auto type) {
    using T = decltype(type);
    const ChannelPass pass = pass_over(p.grad, p.slices);
    const UndoClamp<T> visit{typed<const T>(p.grad), typed<const T>(p.output), typed<T>(p.unclamped),
                             p.activation};
    auto* partial = p.bias_grad ? static_cast<Sum<T>*>(p.partial) : nullptr;
    const cudaError_t error = launch(pass_channels<T, UndoClamp<T>>, blocks_for_pass(pass), pass_threads, 0,
                                     stream, pass, visit, partial);
    if (error != cudaSuccess || !partial) return error;
    return add_up(partial, pass, static_cast<T*>(p.bias_grad), stream);
  });
}

cudaError_t run_prologue_grad(Element element, const PrologueGradProblem& p, cudaStream_t stream) {
  return for_element(element, [&](auto type) {
    using T = decltype(type);
    const ChannelPass pass = pass_over(p.input, p.slices);
    const UndoPrologue<T> visit{typed<const T>(p.input), typed<T>(p.grad), typed<T>(p.before)};
    auto* partial = static_cast<Sum<T>*>(p.partial);
    cudaError_t error = launch(pass_channels<T, UndoPrologue<T>>, blocks_for_pass(pass), pass_threads, 0,
                               stream, pass, visit, partial);
    if (error == cudaSuccess) error = add_up(partial, pass, static_cast<Sum<T>*>(p.scale_grad), stream);
    if (error != cudaSuccess) return error;
    return add_up(partial + pass.channels, pass, static_cast<Sum<T>*>(p.shift_grad), stream);
  });
}

}  // namespace groupconv::cuda

// Runs one forward convolution by the CUDA kernels, on the CPU: conv2d_forward PROBLEM RESULT
//
// PROBLEM is 26 int64 (the fields of Problem), then the table (int32), input, weight, bias and residual
// (float64); RESULT is the output (float64). Each array is an allocation of its own, of exactly its size,
// so that the address sanitizer sees every step beyond it.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>

#include "cuda/forward_tiles.cuh"
#include "cuda/plan.cuh"

using namespace groupconv;
using namespace groupconv::cuda;

struct Problem {
  int64_t batch, in_channels, in_height, in_width, out_channels, out_height, out_width;
  Window window;
  int64_t channels_last, has_bias, has_residual, activation, entries, table_length;
  int64_t narrow, backwards;
};

template <class T>
struct Array {
  int64_t size;
  std::unique_ptr<T[]> data;

  explicit Array(int64_t size) : size(size), data(new T[static_cast<size_t>(size)]) {}
  Array(int64_t size, std::FILE* file) : Array(size) {
    const size_t count = static_cast<size_t>(size);
    if (std::fread(data.get(), sizeof(T), count, file) != count) std::exit(2);
  }
};

template <class T>
Image<T> image(T* data, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  if (channels_last) return {data, n, c, h, w, c * h * w, 1, w * c, c};
  return {data, n, c, h, w, c * h * w, h * w, w, 1};
}

template <class Tile>
void run(const Problem& p, const ForwardArguments<double>& arguments, const int32_t* table) {
  Array<int64_t> scratch(Plan(nullptr, p.table_length, p.out_channels).words());
  const Plan plan(scratch.data.get(), p.table_length, p.out_channels);
  const PlanProblem problem{table, p.table_length, p.in_channels, p.out_channels, p.entries, Tile::outputs};
  cuda_on_cpu::launch(1, plan_threads, p.backwards, [&] { make_plan(problem, plan); });
  // Fewer blocks than tiles, so that blocks take several.
  cuda_on_cpu::launch(3, tile_threads, p.backwards, [&] { forward_tiles<double, Tile>(arguments, plan); });
}

int main(int, char** argv) {
  std::FILE* file = std::fopen(argv[1], "rb");
  Problem p;
  if (!file || std::fread(&p, sizeof p, 1, file) != 1) return 2;
  const int64_t out_size = p.batch * p.out_channels * p.out_height * p.out_width;
  const Array<int32_t> table(p.table_length, file);
  const Array<double> input(p.batch * p.in_channels * p.in_height * p.in_width, file);
  const Array<double> weight(p.entries * p.window.area(), file);
  const Array<double> bias(p.has_bias ? p.out_channels : 0, file);
  const Array<double> residual(p.has_residual ? out_size : 0, file);
  Array<double> output(out_size);
  for (int64_t i = 0; i < out_size; ++i) output.data[i] = std::numeric_limits<double>::infinity();

  const ForwardArguments<double> arguments{
      image<const double>(input.data.get(), p.batch, p.in_channels, p.in_height, p.in_width, p.channels_last),
      image<double>(output.data.get(), p.batch, p.out_channels, p.out_height, p.out_width, p.channels_last),
      image<const double>(p.has_residual ? residual.data.get() : nullptr, p.batch, p.out_channels,
                          p.out_height, p.out_width, false),
      weight.data.get(),
      p.has_bias ? bias.data.get() : nullptr,
      p.window,
      static_cast<Activation>(p.activation)};
  p.narrow ? run<NarrowTile>(p, arguments, table.data.get()) : run<WideTile>(p, arguments, table.data.get());

  file = std::fopen(argv[2], "wb");
  const size_t count = static_cast<size_t>(out_size);
  return file && std::fwrite(output.data.get(), sizeof(double), count, file) == count ? std::fclose(file) : 2;
}

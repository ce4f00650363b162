// What the tests of warp-group products ask: where elements lie by a descriptor, which sums a thread has, where the
// kernels put elements, and the kernel itself on a problem that the launcher would give to another.
#include "cuda/launch_wgmma.cuh"

using namespace groupconv;
using namespace groupconv::cuda;

namespace {

template <class T>
Image<T> image_of(T* data, const int64_t*& sizes) {
  const Image<T> image{data, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
  sizes += 8;
  return image;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void be_hopper(bool hopper) { cuda_on_cpu::hopper = hopper; }

__attribute__((visibility("default"))) unsigned matrix_address(uint64_t descriptor, unsigned line, unsigned k,
                                                               bool k_major, unsigned element_bytes) {
  return cuda_on_cpu::MatrixDescriptor(descriptor).address(line, k, k_major, element_bytes);
}

__attribute__((visibility("default"))) void place_of_sum(unsigned thread, unsigned i, unsigned* place) {
  place[0] = cuda_on_cpu::line_of_sum(thread, i);
  place[1] = cuda_on_cpu::column_of_sum(thread, i);
}

__attribute__((visibility("default"))) uint64_t swizzled_descriptor(unsigned address) {
  return describe_swizzled(address);
}

__attribute__((visibility("default"))) int swizzled_place(int row, int column) {
  return swizzled(row, column);
}

// The rows of a tile for warp-groups, or 0 where another kernel is chosen.
__attribute__((visibility("default"))) int64_t wgmma_rows_of(int element, int64_t in_channels,
                                                             int64_t out_channels, int64_t entries,
                                                             int64_t area, int64_t pixels,
                                                             int64_t longest_side, bool two_level) {
  PlanProblem problem;
  problem.length = shortest_table(out_channels) + in_channels;
  problem.in_channels = in_channels;
  problem.out_channels = out_channels;
  problem.entries = entries;
  const ProductChoice choice =
      choose_product(static_cast<Element>(element), problem, area, pixels, longest_side, two_level);
  const bool chosen = choice.kernel == ProductKernel::wgmma_64 || choice.kernel == ProductKernel::wgmma_128;
  return chosen ? choice.partition.tile_rows : 0;
}

// `sizes`: of the source, the written image and the residual, the window, the table's length, channels and entries.
// `data`: source, written image, residual, weight, bias, the prologue's scale and shift, table.
__attribute__((visibility("default"))) int run_wgmma(bool bf16, int tile_rows, int strip_tiles,
                                                     bool transposed, bool dense, bool relu_before,
                                                     int activation, const int64_t* sizes,
                                                     void* const* data) {
  ProductProblem problem;
  problem.source = image_of<const void>(data[0], sizes);
  problem.dest = image_of<void>(data[1], sizes);
  problem.residual = image_of<const void>(data[2], sizes);
  problem.weight = data[3];
  problem.bias = data[4];
  problem.before = {data[5], data[6], relu_before};
  problem.activation = static_cast<Activation>(activation);
  problem.window = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                    sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]};
  PlanProblem partition;
  partition.table = static_cast<const int32_t*>(data[7]);
  partition.length = sizes[10];
  partition.in_channels = sizes[11];
  partition.out_channels = sizes[12];
  partition.entries = sizes[13];
  partition.transposed = transposed;
  partition.tile_rows = tile_rows;
  partition.packs_groups = true;
  problem.dense_columns = dense ? partition.in_channels : 0;
  problem.partition = partition;
  std::vector<int64_t> scratch(static_cast<size_t>(Plan(nullptr, partition).words()), -1);
  problem.plan = scratch.data();
  const Plan plan(scratch.data(), partition);
  run_plan(partition, plan, nullptr);
  const auto run = tile_rows == 128
                       ? (bf16 ? launch_wgmma_strips<__nv_bfloat16, 128> : launch_wgmma_strips<__half, 128>)
                       : (bf16 ? launch_wgmma_strips<__nv_bfloat16, 64> : launch_wgmma_strips<__half, 64>);
  return run(problem, plan, strip_tiles, nullptr);
}

// A product of one warp-group as it should be, less one thing; the sum of what came out.
__attribute__((visibility("default"))) float one_product(int without) {
  static float total;
  static const uint16_t ones[8] = {0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00};
  total = 0;
  const auto kernel = +[](int without) {
    char* memory = dynamic_shared();
    memory += (swizzled_alignment - shared_address(memory) % swizzled_alignment) % swizzled_alignment;
    const int thread = threadIdx.x;
    for (int part = 0; part < 4; ++part) copy_16_async(memory + (thread * 4 + part) * 16, ones, true);
    commit_copies();
    wait_copies<0>();
    if (without != 1) show_to_products();
    if (without != 2) __syncthreads();
    float sums[32];
    if (without != 3) begin_products();
    const uint64_t factor = describe_swizzled(shared_address(memory));
    multiply_async<false>(sums, factor, without == 4 && thread == 77 ? factor + 2 : factor, false, __half());
    commit_products();
    if (without == 5) copy_16_async(memory + thread * 64, ones, true);
    if (without == 6) sums[3] += 1;
    multiply_async<true>(sums, factor, factor, true, __half());
    commit_products();
    if (without != 7) wait_products<0>(sums);
    for (const float sum : sums) total += sum;
  };
  launch(kernel, 1, 128, 8192 + swizzled_alignment, nullptr, without);
  return total;
}

}  // extern "C"

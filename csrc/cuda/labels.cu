// The entry points on learned groups, for all element types: their kernels are small.
#include <algorithm>

#include "cuda/channel_pass.cuh"
#include "cuda/labels.cuh"
#include "cuda/launch.cuh"
#include "cuda/typed.cuh"

namespace groupconv::cuda {

__global__ void __launch_bounds__(label_threads, 2) make_table(LabelTable t) {
  int32_t* const in_offsets = t.table + 4;
  int32_t* const out_offsets = in_offsets + t.groups + 1;
  int32_t* const inputs = out_offsets + t.groups + 1;
  int32_t* const outputs = inputs + t.in_channels;
  const int64_t offsets = t.groups + 1, items = 2 * offsets + t.in_channels + t.out_channels;
  for (int64_t i = first_item(); i < items + 1; i += all_threads()) {
    int64_t rest = i;
    if (rest < offsets) {
      in_offsets[rest] = count_smaller(t.in_labels, t.in_channels, rest);
    } else if ((rest -= offsets) < offsets) {
      out_offsets[rest] = count_smaller(t.out_labels, t.out_channels, rest);
    } else if ((rest -= offsets) < t.in_channels) {
      inputs[place_of(t.in_labels, t.in_channels, rest)] = static_cast<int32_t>(rest);
    } else if ((rest -= t.in_channels) < t.out_channels) {
      outputs[place_of(t.out_labels, t.out_channels, rest)] = static_cast<int32_t>(rest);
    } else {
      t.table[0] = static_cast<int32_t>(t.in_channels);
      t.table[1] = static_cast<int32_t>(t.out_channels);
      t.table[2] = static_cast<int32_t>(t.groups);
      t.table[3] = static_cast<int32_t>(t.in_channels);
    }
  }
}

__global__ void __launch_bounds__(label_threads, 2)
    label_channels(Gates gates, int32_t* in_labels, int32_t* out_labels) {
  const int64_t ins = gates.factors.in_channels, outs = gates.factors.out_channels;
  const bool finite = gates.finite();
  for (int64_t i = first_item(); i < ins + outs; i += all_threads()) {
    const bool is_input = i < ins;
    const int32_t label = is_input ? gate_label(gates, ins, i) : gate_label(gates, outs, i - ins);
    (is_input ? in_labels[i] : out_labels[i - ins]) = finite ? label : -1;
  }
}

namespace {

template <class... Parameters>
cudaError_t launch_over(int64_t items, cudaStream_t stream, void (*kernel)(Parameters...),
                        std::type_identity_t<Parameters>... arguments) {
  return launch(kernel, blocks_of_threads(items, label_threads), label_threads, 0, stream, arguments...);
}

template <class From, class To>
cudaError_t move_elements(const PackProblem& p, const Plan& plan, cudaStream_t stream) {
  return launch_over(std::max(p.partition.entries * p.area, p.to_count), stream, move_packed<From, To>,
                     static_cast<const From*>(p.from), static_cast<To*>(p.to), p.pack,
                     p.partition.in_channels, p.area, p.to_count, plan);
}

}  // namespace

cudaError_t run_label_table(const int32_t* in_labels, int64_t in_channels, const int32_t* out_labels,
                            int64_t out_channels, int64_t groups, int32_t* table, cudaStream_t stream) {
  return launch_over(label_table_length(in_channels, out_channels, groups), stream, make_table,
                     {in_labels, in_channels, out_labels, out_channels, groups, table});
}

cudaError_t run_row_labels(Element element, const void* logits, int64_t rows, int64_t groups, int32_t* labels,
                           cudaStream_t stream) {
  return for_element(element, [&](auto type) {
    using T = decltype(type);
    return launch_over(rows, stream, label_rows<T>, static_cast<const T*>(logits), rows, groups, labels);
  });
}

cudaError_t run_pack(const PackProblem& p, cudaStream_t stream) {
  const Plan plan(p.plan, p.partition);
  if (const cudaError_t error = run_plan(p.partition, plan, stream); error != cudaSuccess) return error;
  if (p.from_element == Element::f32 && p.to_element == Element::bf16) {
    return move_elements<float, __nv_bfloat16>(p, plan, stream);
  }
  if (p.from_element == Element::bf16 && p.to_element == Element::f32) {
    return move_elements<__nv_bfloat16, float>(p, plan, stream);
  }
  if (p.from_element != p.to_element) return cudaErrorInvalidValue;
  return for_element(p.from_element, [&](auto type) {
    return move_elements<decltype(type), decltype(type)>(p, plan, stream);
  });
}

cudaError_t run_mask(Element element, const MaskProblem& p, cudaStream_t stream) {
  return for_element(element, [&](auto type) {
    using T = decltype(type);
    const int64_t count = p.out_channels * p.in_channels * p.area;
    return launch_over(count, stream, mask_elements<T>, static_cast<const T*>(p.from), static_cast<T*>(p.to),
                       count, {p.in_labels, p.out_labels, p.in_channels, p.area});
  });
}

cudaError_t run_label_grad(Element element, const LabelGradProblem& p, cudaStream_t stream) {
  const Plan plan(p.plan, p.partition);
  if (const cudaError_t error = run_plan(p.partition, plan, stream); error != cudaSuccess) return error;
  return for_element(element, [&](auto type) {
    using T = decltype(type);
    const int64_t ins = p.partition.in_channels, outs = p.partition.out_channels;
    auto* by_input = static_cast<Sum<T>*>(p.by_input);
    auto* by_output = static_cast<Sum<T>*>(p.by_output);
    cudaError_t error =
        launch_over(std::max(ins, outs * 32) * p.groups, stream, label_sums<T>, static_cast<const T*>(p.grad),
                    static_cast<const T*>(p.weight), by_input, by_output, p.groups, ins, outs, p.area, plan);
    if (error != cudaSuccess) return error;
    error = launch_over(ins, stream, logit_grads<T>, static_cast<const T*>(p.input_logits), by_input,
                        p.in_winners, ins, p.groups, static_cast<T*>(p.input_logit_grad));
    if (error != cudaSuccess) return error;
    return launch_over(outs, stream, logit_grads<T>, static_cast<const T*>(p.output_logits), by_output,
                       p.out_winners, outs, p.groups, static_cast<T*>(p.output_logit_grad));
  });
}

cudaError_t run_kronecker_labels(const KroneckerFactors& factors, const double* gates, int32_t* in_labels,
                                 int32_t* out_labels, cudaStream_t stream) {
  return launch_over(factors.in_channels + factors.out_channels, stream, label_channels, {factors, gates},
                     in_labels, out_labels);
}

int64_t kronecker_slices(int64_t entries) {
  constexpr int64_t entries_of_a_slice = 1 << 13, most = 64;
  return std::clamp<int64_t>(entries / entries_of_a_slice, 1, most);
}

cudaError_t run_kronecker_grad(Element element, const KroneckerGradProblem& p, cudaStream_t stream) {
  return for_element(element, [&](auto type) {
    using T = decltype(type);
    const Gates gates{p.factors, p.gates};
    const int64_t entries = p.factors.in_channels * p.factors.out_channels;
    const auto* grad = static_cast<const T*>(p.grad);
    cudaError_t error = launch_over(entries, stream, mask_by_gates<T>, gates, grad,
                                    static_cast<T*>(p.weight_grad), entries, p.area);
    if (error != cudaSuccess || p.factors.count == 0) return error;
    auto* partial = static_cast<Sum<T>*>(p.partial);
    error = launch(gate_sums<T>, blocks_for(p.slices, p.factors.count), label_threads, 0, stream, gates, grad,
                   static_cast<const T*>(p.weight), partial, p.slices, entries, p.area);
    if (error != cudaSuccess) return error;
    return launch(add_slices<Sum<T>, Sum<T>>, 1, pass_threads, 0, stream, partial, p.slices, p.factors.count,
                  static_cast<Sum<T>*>(p.gate_grad), p.factors.count);
  });
}

}  // namespace groupconv::cuda

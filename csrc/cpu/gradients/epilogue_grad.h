// Back through the epilogue y = clamp(sum + bias + residual): the gradient of the sum, and the bias's.
//
// The gradient passes where the output lies between the bounds or is NaN, as in torch; what was clamped, and
// what lies on a bound, gives zero. The bias's gradient adds up all pixels of a channel: in vectors over a run
// of them, from run to run in double, in an order that does not depend on the number of threads.
#pragma once

#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

// The bounds of a clamp, none of which NaN exceeds.
template <class T>
struct ClampGrad {
  T low = T(0), high;

  explicit ClampGrad(Activation activation)
      : high(activation == Activation::relu6 ? T(6) : std::numeric_limits<T>::quiet_NaN()) {}
};

// Hands body(i, gradient of the sum, lanes) on, vector by vector; without an output nothing was clamped.
template <class Stored, class T, class Body>
GROUPCONV_INLINE void for_each_unclamped(const ClampGrad<T>& clamp, const Stored* grad, const Stored* output,
                                         int64_t count, const Body& body) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const auto low = Vec<T>::broadcast(clamp.low), high = Vec<T>::broadcast(clamp.high);
  const auto run = [&](auto vector_at) GROUPCONV_INLINE_LAMBDA {
    for (int64_t i = 0; i < count; i += lanes) {
      const int64_t some = smaller(lanes, count - i);
      body(i, vector_at(i, some), some);
    }
  };
  if (output) {
    run([&](int64_t i, int64_t some) GROUPCONV_INLINE_LAMBDA {
      return between(low, high, load_widened<T>(output + i, some), load_widened<T>(grad + i, some));
    });
  } else {
    run([&](int64_t i, int64_t some) GROUPCONV_INLINE_LAMBDA { return load_widened<T>(grad + i, some); });
  }
}

// to[i] = gradient of the sum, where `to` is given; returns their sum.
template <class Stored, class T, class To>
T unclamp_row(const ClampGrad<T>& clamp, const Stored* grad, const Stored* output, To* to, int64_t count) {
  Vec<T> sum = zero<T>();
  if (to) {
    for_each_unclamped(clamp, grad, output, count,
                       [&](int64_t i, Vec<T> x, int64_t some) GROUPCONV_INLINE_LAMBDA {
                         store_narrowed(x, to + i, some);
                         sum = sum + x;
                       });
  } else {
    for_each_unclamped(clamp, grad, output, count,
                       [&](int64_t, Vec<T> x, int64_t) GROUPCONV_INLINE_LAMBDA { sum = sum + x; });
  }
  return sum.sum();
}

template <class Stored>
class EpilogueGrad {
  using T = compute_t<Stored>;

 public:
  explicit EpilogueGrad(const EpilogueGradProblem<Stored>& problem) : p_(problem), clamp_(p_.activation) {}

  void run() const {
    if (p_.grad.channels_last()) {
      for_each_item(p_.threads, p_.slices, [&](int64_t slice) { run_pixels(slice); });
    } else {
      for_each_item(p_.threads, p_.grad.channels, [&](int64_t c) { run_channel(c); });
    }
  }

 private:
  const Stored* output(int64_t n, int64_t c, int64_t y) const {
    return p_.output.data ? p_.output.at(n, c, y, 0) : nullptr;
  }
  Stored* dest(int64_t n, int64_t c, int64_t y) const {
    return p_.unclamped.data ? p_.unclamped.at(n, c, y, 0) : nullptr;
  }

  void run_channel(int64_t c) const {
    double sum = 0;
    for (int64_t n = 0; n < p_.grad.batch; ++n) {
      for (int64_t y = 0; y < p_.grad.height; ++y) {
        sum += unclamp_row(clamp_, p_.grad.at(n, c, y, 0), output(n, c, y), dest(n, c, y), p_.grad.width);
      }
    }
    if (p_.bias_grad) p_.bias_grad[c] += sum;
  }

  // Lanes over channels: the sums of some pixels of a row are kept in a line, in L1.
  void run_pixels(int64_t slice) const {
    constexpr int64_t pixels_of_line = 256;
    const int64_t channels = p_.grad.channels, rows = p_.grad.batch * p_.grad.height;
    Workspace space;
    space.plan<T>(channels);
    space.open();
    T* line = space.take<T>(channels);
    double* sums = p_.bias_grad ? p_.bias_grad + slice * channels : nullptr;
    for (int64_t row = rows * slice / p_.slices; row < rows * (slice + 1) / p_.slices; ++row) {
      const int64_t n = row / p_.grad.height, y = row % p_.grad.height;
      for (int64_t x = 0; x < p_.grad.width; ++x) {
        if (x % pixels_of_line == 0) fill_zero(line, channels);
        Stored* to = p_.unclamped.data ? p_.unclamped.at(n, 0, y, x) : nullptr;
        for_each_unclamped(clamp_, p_.grad.at(n, 0, y, x),
                           p_.output.data ? p_.output.at(n, 0, y, x) : nullptr, channels,
                           [&](int64_t c, Vec<T> value, int64_t some) GROUPCONV_INLINE_LAMBDA {
                             if (to) store_narrowed(value, to + c, some);
                             const auto mask = Vec<T>::first(some);
                             (Vec<T>::load(line + c, mask) + value).store(line + c, mask);
                           });
        const bool full = x % pixels_of_line == pixels_of_line - 1 || x == p_.grad.width - 1;
        for (int64_t c = 0; c < channels && sums && full; ++c) sums[c] += line[c];
      }
    }
  }

  const EpilogueGradProblem<Stored>& p_;
  ClampGrad<T> clamp_;
};

template <class Stored>
void epilogue_grad(const EpilogueGradProblem<Stored>& problem) {
  EpilogueGrad<Stored>(problem).run();
}

}  // namespace
}  // namespace groupconv::cpu

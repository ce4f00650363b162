// Hopper's products of matrices by warp-groups, as the PTX ISA describes them: where a descriptor says that an
// element lies, which sums a thread has, and what is known about products that are under way.
//
// A product may read its factors at any time between its start and its end. So they are read at both, and must be
// the same bytes; the sums appear in the registers when the thread waits. What was
// written to shared memory and not shown to the asynchronous proxy by its writer must not be read.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

namespace cuda_on_cpu {

[[noreturn]] void fail(const char* what);

// "Matrix Descriptor Format": 14 bits each, without their last four, of three numbers of 18.
struct MatrixDescriptor {
  unsigned start, leading_offset, stride_offset, base_offset, mode;

  explicit MatrixDescriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading_offset((bits >> 16 & 0x3fff) << 4),
        stride_offset((bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7),
        mode(bits >> 62) {
    constexpr uint64_t reserved = ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62);
    if (bits & reserved) fail("a matrix descriptor has reserved bits set");
    if (base_offset != 0) fail("a matrix descriptor has a base offset, which is not modelled");
  }

  // Of how many units of sixteen bytes the swizzle changes the order: 1, 8, 4 and 2.
  unsigned swizzled_units() const { return mode == 0 ? 1 : 16u >> mode; }

  // "Canonical Layouts" and the swizzle on the bits of the address. `line` counts along M or N.
  unsigned address(unsigned line, unsigned k, bool k_major, unsigned element_bytes) const {
    const unsigned in_unit = 16 / element_bytes, units = swizzled_units();
    unsigned offset;
    if (k_major) {
      offset = line % 8 * units * 16 + line / 8 * stride_offset + k % in_unit * element_bytes;
      offset += k / in_unit * (mode == 0 ? leading_offset : 16);
    } else if (mode == 0) {
      offset = line % in_unit * element_bytes + line / in_unit * stride_offset;
      offset += k % 8 * 16 + k / 8 * leading_offset;
    } else {
      offset = line % in_unit * element_bytes + line / in_unit % units * 16;
      offset += line / (in_unit * units) * leading_offset;
      offset += k % 8 * units * 16 + k / 8 * stride_offset;
    }
    const unsigned plain = start + offset;
    return plain ^ (plain >> 7 & (units - 1)) << 4;
  }
};

// The register fragment of the accumulator of m64nNk16: the i-th sum of a thread of the group.
inline unsigned line_of_sum(unsigned thread, unsigned i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
inline unsigned column_of_sum(unsigned thread, unsigned i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// A thread's part of the products that are under way.
struct WarpGroupThread {
  struct Product {
    float* sums;
    std::function<void(std::vector<float>&)> add;
  };
  std::vector<std::vector<Product>> groups = {{}};  // the last is not committed yet
  std::map<float*, std::vector<float>> sums;        // what the registers will hold
  bool fenced = false;                              // since the registers were last used
  size_t started = 0;
  std::vector<size_t> written;  // units of shared memory that the thread has not shown yet
};

constexpr unsigned warp_group_size = 128;
using StartedProduct = std::array<uint64_t, 3>;  // both descriptors, and the rest

// By group, what its first thread to get there started: the others must start the same.
inline std::vector<std::vector<StartedProduct>> started_products;

// In the registers meanwhile: no NaN, which a kernel would compute again, and changed by adding one.
constexpr float under_way = 12345678;

inline void start_product(WarpGroupThread& me, unsigned thread, const StartedProduct& product, float* sums,
                          size_t count, std::function<void(std::vector<float>&)> add) {
  auto& started = started_products.at(thread / warp_group_size);
  if (me.started == started.size()) started.push_back(product);
  if (started[me.started++] != product) fail("the threads of a warp-group start different products");
  if (!me.sums.contains(sums)) {
    if (!me.fenced) fail("a product begins on registers without a fence");
    me.sums[sums].assign(sums, sums + count);
    std::fill_n(sums, count, under_way);
  } else if (std::any_of(sums, sums + count, [](float sum) { return sum != under_way; })) {
    fail("sums changed under a product");
  }
  me.groups.back().push_back({sums, std::move(add)});
}

inline void finish_products(WarpGroupThread& me, size_t left) {
  while (me.groups.size() > left + 1) {
    for (const auto& product : me.groups.front()) product.add(me.sums[product.sums]);
    me.groups.erase(me.groups.begin());
  }
  for (auto entry = me.sums.begin(); entry != me.sums.end();) {
    bool busy = false;
    for (const auto& group : me.groups) {
      for (const auto& product : group) busy |= product.sums == entry->first;
    }
    if (busy) {
      ++entry;
      continue;
    }
    std::memcpy(entry->first, entry->second.data(), entry->second.size() * sizeof(float));
    entry = me.sums.erase(entry);
    me.fenced = false;
  }
}

}  // namespace cuda_on_cpu

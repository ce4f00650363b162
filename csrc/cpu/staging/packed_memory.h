// Where a driver packs a weight: into memory that is kept for calls to come, where the caller keeps it and that pays,
// else into scratch.
#pragma once

#include "cpu/packed_weight.h"
#include "cpu/staging/sides.h"
#include "cpu/staging/workspace.h"

namespace groupconv::cpu {
namespace {

// Its address tells who has packed a weight, for which types and with which instruction set.
template <class Driver>
char packer;

template <class Operand>
class PackedMemory {
 public:
  // `packer`: null where it is not to be kept. `detail`: what packing depends on besides the partition, the window and
  // how many elements it makes.
  template <class Stored>
  void open(const Sides<Stored>& sides, const char* packer, int64_t count, int64_t detail = 0) {
    // Packing takes about as long as multiplying five pixels, and looking a weight up as packing 40 KiB.
    constexpr int64_t most_pixels = 1024, least_bytes = 64 << 10;
    const ConvolveProblem<Stored>& p = sides.problem;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Operand));
    count_ = count;
    if (!p.keeper || !packer || bytes < least_bytes) return;
    if (p.dest.batch * p.sweep->rows * p.sweep->cols > most_pixels) return;
    packed_.open(*p.keeper, {packer, detail, p.partition, p.sweep, p.window_area, p.transposed,
                             static_cast<size_t>(bytes)});
  }

  Operand* kept() const { return static_cast<Operand*>(packed_.memory()); }  // or null
  bool filled() const { return packed_.filled(); }                           // there is nothing to pack
  void keep() { packed_.keep(); }                                            // when all is packed

  // In a workspace, where it is not kept.
  void plan(Workspace& space) const { space.plan<Operand>(kept() ? 0 : count_); }
  Operand* take(Workspace& space) const {
    Operand* scratch = space.take<Operand>(kept() ? 0 : count_);
    return kept() ? kept() : scratch;
  }

 private:
  PackedWeight packed_;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace groupconv::cpu

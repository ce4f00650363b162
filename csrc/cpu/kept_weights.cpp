#include "cpu/kept_weights.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "cpu/scratch.h"

namespace groupconv::cpu {

// A weight packed by one recipe, and that recipe.
class Packing {
 public:
  explicit Packing(const Recipe& recipe)
      : packer_(recipe.packer),
        detail_(recipe.detail),
        table_(recipe.partition->table),
        phases_(recipe.sweep->phases),
        taps_(recipe.sweep->taps),
        step_h_(recipe.sweep->source_step_h),
        step_w_(recipe.sweep->source_step_w),
        window_area_(recipe.window_area),
        transposed_(recipe.transposed),
        packed_bytes_(recipe.bytes),
        memory_(recipe.bytes + read_beyond) {}

  bool is_by(const Recipe& recipe) const {
    const Sweep& sweep = *recipe.sweep;
    return packer_ == recipe.packer && detail_ == recipe.detail && same(table_, recipe.partition->table) &&
           same(phases_, sweep.phases) && same(taps_, sweep.taps) && step_h_ == sweep.source_step_h &&
           step_w_ == sweep.source_step_w && window_area_ == recipe.window_area &&
           transposed_ == recipe.transposed && packed_bytes_ == recipe.bytes;
  }
  void* memory() const { return memory_.memory(); }
  int64_t bytes() const {
    return static_cast<int64_t>(packed_bytes_ + read_beyond + table_.size() * sizeof(int32_t) +
                                phases_.size() * sizeof(Phase) + taps_.size() * sizeof(Tap));
  }

 private:
  static constexpr size_t read_beyond = 64;  // as of a Workspace's pieces

  template <class T>
  static bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
  }

  const void* packer_;
  int64_t detail_;
  std::vector<int32_t> table_;
  std::vector<Phase> phases_;
  std::vector<Tap> taps_;
  int64_t step_h_, step_w_, window_area_;
  bool transposed_;
  size_t packed_bytes_;
  SharedScratch memory_;
};

// All of them, by where they begin. Of a KeptWeight this is the only one to see or change what is packed.
class KeptWeights {
 public:
  using Weights = std::vector<std::shared_ptr<KeptWeight>>;

  // Never destroyed: when a process ends, what owns the memory of a weight may be gone before this.
  static KeptWeights& all() {
    static KeptWeights& kept = *new KeptWeights;
    return kept;
  }

  uint64_t generation() const { return generation_; }
  bool any() const { return most_bytes_.load(std::memory_order_relaxed) > 0; }

  // Whatever is dropped is returned, to be destroyed when others may enter: that can take the interpreter's lock.
  [[nodiscard]] Weights allow(int64_t most_bytes) {
    const std::lock_guard lock(mutex_);
    most_bytes_ = most_bytes;
    hits_ = misses_ = 0;
    Weights dropped;
    if (most_bytes == 0) ++generation_;
    make_room(0, nullptr, dropped);
    return dropped;
  }

  [[nodiscard]] Weights drop_all() {
    const std::lock_guard lock(mutex_);
    Weights dropped;
    ++generation_;
    while (!by_begin_.empty()) take_out(by_begin_.begin()->second, dropped);
    return dropped;
  }

  KeptCounts counts() {
    const std::lock_guard lock(mutex_);
    return {bytes_, hits_, misses_};
  }

  std::shared_ptr<KeptWeight> find(const void* begin) {
    const std::lock_guard lock(mutex_);
    const auto at = by_begin_.find(begin);
    if (at == by_begin_.end()) return nullptr;
    at->second->last_use_ = ++uses_;
    return at->second;
  }

  [[nodiscard]] Weights drop(const void* begin) {
    const std::lock_guard lock(mutex_);
    Weights dropped;
    const auto at = by_begin_.find(begin);
    if (at != by_begin_.end()) take_out(at->second, dropped);
    return dropped;
  }

  const Packing* find(const KeptWeight& weight, const Recipe& recipe) {
    const std::lock_guard lock(mutex_);
    for (const auto& packing : weight.packings_) {
      if (packing->is_by(recipe)) return ++hits_, packing.get();
    }
    ++misses_;
    return nullptr;
  }

  bool may_take(int64_t bytes) const { return bytes <= most_bytes_; }

  // Takes the packing, unless there is no room for it or another call was first.
  [[nodiscard]] Weights add(KeptWeight& weight, const Recipe& recipe, std::unique_ptr<Packing>& packing) {
    const std::lock_guard lock(mutex_);
    Weights dropped;
    const auto at = by_begin_.find(weight.begin_);
    const bool is_other = at != by_begin_.end() && at->second.get() != &weight;
    const auto is_same = [&](const auto& other) { return other->is_by(recipe); };
    if (weight.generation_ != generation_ || is_other || std::ranges::any_of(weight.packings_, is_same))
      return dropped;
    const int64_t bytes = packing->bytes();
    if (!may_take(weight.bytes_ + bytes) || !make_room(bytes, &weight, dropped)) return dropped;
    weight.packings_.push_back(std::move(packing));
    weight.bytes_ += bytes;
    weight.last_use_ = ++uses_;
    bytes_ += bytes;
    by_begin_[weight.begin_] = weight.shared_from_this();
    return dropped;
  }

 private:
  KeptWeights() {
    // A child forked while another thread is in here would find it locked for good.
    pthread_atfork([] { all().mutex_.lock(); }, [] { all().mutex_.unlock(); }, [] { all().mutex_.unlock(); });
  }

  bool make_room(int64_t bytes, const KeptWeight* but_for, Weights& dropped) {
    while (bytes_ + bytes > most_bytes_) {
      std::shared_ptr<KeptWeight> oldest;
      for (const auto& [begin, weight] : by_begin_) {
        if (weight.get() != but_for && (!oldest || weight->last_use_ < oldest->last_use_)) oldest = weight;
      }
      if (!oldest) return false;
      take_out(oldest, dropped);
    }
    return true;
  }

  void take_out(std::shared_ptr<KeptWeight> weight, Weights& dropped) {
    weight->generation_ = 0;
    bytes_ -= weight->bytes_;
    by_begin_.erase(weight->begin_);
    dropped.push_back(std::move(weight));
  }

  std::mutex mutex_;
  std::unordered_map<const void*, std::shared_ptr<KeptWeight>> by_begin_;
  std::atomic<int64_t> most_bytes_{0};
  std::atomic<uint64_t> generation_{1};  // what a call packed before all was dropped comes too late
  int64_t bytes_ = 0, hits_ = 0, misses_ = 0;
  uint64_t uses_ = 0;
};

KeptWeight::KeptWeight(const void* begin, std::shared_ptr<const void> owner, int64_t version)
    : begin_(begin),
      owner_(std::move(owner)),
      version_(version),
      generation_(KeptWeights::all().generation()) {}
KeptWeight::~KeptWeight() = default;

bool keeps_weights() { return KeptWeights::all().any(); }
void keep_weights(int64_t most_bytes) { (void)KeptWeights::all().allow(most_bytes); }
KeptCounts kept_counts() { return KeptWeights::all().counts(); }
std::shared_ptr<KeptWeight> find_kept(const void* begin) { return KeptWeights::all().find(begin); }
void drop_kept(const void* begin) { (void)KeptWeights::all().drop(begin); }
void drop_kept() { (void)KeptWeights::all().drop_all(); }

PackedWeight::~PackedWeight() { delete packing_; }

void PackedWeight::open(WeightKeeper& keeper, const Recipe& recipe) {
  weight_ = keeper.weight();
  if (!weight_) return;
  KeptWeights& all = KeptWeights::all();
  recipe_ = recipe;
  if (const Packing* packing = all.find(*weight_, recipe)) {
    memory_ = packing->memory();
    filled_ = true;
  } else if (all.may_take(static_cast<int64_t>(recipe.bytes))) {
    packing_ = new Packing(recipe);
    memory_ = packing_->memory();
  }
}

void PackedWeight::keep() {
  if (!packing_) return;
  std::unique_ptr<Packing> packing(std::exchange(packing_, nullptr));
  (void)KeptWeights::all().add(*weight_, recipe_, packing);
  packing_ = packing.release();
}

}  // namespace groupconv::cpu

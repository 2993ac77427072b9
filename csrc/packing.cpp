// packattn::pack_first_fit and pack_best_fit: bins of bounded size for lengths that come one after another.
//
// All limits of a bin (tokens, sequences, sum of squares) fold into one number, its room: the longest sequence that it
// can still take. packattn/data/fit.py has the same two walks in Python, and tests hold them to each other.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace packattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A limit of 0 is no limit.
struct Limits {
  int64_t capacity, max_per_bin, max_square;
};

struct Bin {
  int64_t tokens = 0, square = 0, sequences = 0;

  void add(int64_t length) {
    tokens += length;
    square += length * length;
    ++sequences;
  }

  int64_t room(const Limits& limits) const {
    if (limits.max_per_bin > 0 && sequences >= limits.max_per_bin) return 0;
    const int64_t left = limits.capacity - tokens;
    if (limits.max_square == 0) return left;
    const int64_t square_left = limits.max_square - square;
    int64_t root = static_cast<int64_t>(std::sqrt(static_cast<double>(square_left)));
    while (root * root > square_left) --root;
    while ((root + 1) * (root + 1) <= square_left) ++root;
    return std::min(left, root);
  }
};

// The largest room under every node of a binary tree over the bins; it doubles when the bins outgrow it.
class RoomTree {
 public:
  // The first bin with at least this much room, -1 if there is none.
  int64_t first_with(int64_t length) const {
    if (largest_[1] < length) return -1;
    int64_t node = 1;
    while (node < leaves_) node = 2 * node + (largest_[2 * node] < length);
    return node - leaves_;
  }

  void set(int64_t bin, int64_t room) {
    if (bin >= leaves_) grow();
    int64_t node = leaves_ + bin;
    largest_[node] = static_cast<int32_t>(room);
    while (node >>= 1) {
      const int32_t larger = std::max(largest_[2 * node], largest_[2 * node + 1]);
      if (largest_[node] == larger) break;
      largest_[node] = larger;
    }
  }

 private:
  void grow() {
    std::vector<int32_t> wider(4 * leaves_, 0);
    std::copy(largest_.begin() + leaves_, largest_.end(), wider.begin() + 2 * leaves_);
    leaves_ *= 2;
    for (int64_t node = leaves_ - 1; node > 0; --node) wider[node] = std::max(wider[2 * node], wider[2 * node + 1]);
    largest_ = std::move(wider);
  }

  int64_t leaves_ = 1024;
  std::vector<int32_t> largest_ = std::vector<int32_t>(2 * 1024, 0);
};

// The open bins by room, first in first out, and over them a bitmap of bitmaps that finds the next room in a few steps.
class OpenBins {
 public:
  explicit OpenBins(int64_t most) : head_(most + 1, -1), tail_(most + 1, -1) {
    for (int64_t size = most + 1; size > 1 || levels_.empty();) {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    }
  }

  int64_t count() const { return count_; }

  void push(int64_t bin, int64_t room) {
    if (bin >= static_cast<int64_t>(next_.size())) next_.resize(bin + 1, -1);
    next_[bin] = -1;
    if (head_[room] < 0) {
      head_[room] = bin;
      for (int64_t level = 0, at = room; level < static_cast<int64_t>(levels_.size()); ++level, at /= 64)
        levels_[level][at / 64] |= uint64_t{1} << (at % 64);
    } else {
      next_[tail_[room]] = bin;
    }
    tail_[room] = bin;
    ++count_;
  }

  // Takes out the oldest bin of the smallest room that is at least `room`; -1 if there is none.
  int64_t pop(int64_t room) {
    const int64_t found = smallest(room);
    if (found < 0) return -1;
    const int64_t bin = head_[found];
    head_[found] = next_[bin];
    if (head_[found] < 0) {
      for (int64_t level = 0, at = found; level < static_cast<int64_t>(levels_.size()); ++level, at /= 64) {
        uint64_t& word = levels_[level][at / 64];
        word &= ~(uint64_t{1} << (at % 64));
        if (word != 0) break;
      }
    }
    --count_;
    return bin;
  }

 private:
  int64_t smallest(int64_t room) const {
    int64_t at = room;
    for (int64_t level = 0; level < static_cast<int64_t>(levels_.size()); ++level) {
      if (at / 64 >= static_cast<int64_t>(levels_[level].size())) return -1;
      const uint64_t word = levels_[level][at / 64] >> (at % 64);
      if (word != 0) {
        at += std::countr_zero(word);
        while (level-- > 0) at = 64 * at + std::countr_zero(levels_[level][at]);
        return at;
      }
      at = at / 64 + 1;
    }
    return -1;
  }

  std::vector<int64_t> head_, tail_, next_;
  std::vector<std::vector<uint64_t>> levels_;
  int64_t count_ = 0;
};

struct Items {
  const int64_t* lengths;
  int64_t count;
  Tensor bins;
  int64_t* bin_of;
};

Items check(const Tensor& lengths, const Limits& limits) {
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.scalar_type() == ScalarType::Long && lengths.is_contiguous(),
                  "lengths must be a contiguous int64 tensor of shape (n,)");
  STD_TORCH_CHECK(limits.capacity > 0 && limits.capacity <= (1 << 24), "capacity must lie in [1, 2**24]");
  Items items{static_cast<const int64_t*>(lengths.const_data_ptr()), lengths.numel(), torch::stable::empty_like(lengths),
              nullptr};
  items.bin_of = static_cast<int64_t*>(items.bins.mutable_data_ptr());
  const int64_t most = Bin{}.room(limits);
  for (int64_t i = 0; i < items.count; ++i)
    STD_TORCH_CHECK(items.lengths[i] > 0 && items.lengths[i] <= most, "lengths must lie in [1, ", most, "], got ",
                    items.lengths[i], " at ", i);
  return items;
}

Tensor pack_first_fit(const Tensor& lengths, int64_t capacity, int64_t max_per_bin, int64_t max_square) {
  const Limits limits{capacity, max_per_bin, max_square};
  const Items items = check(lengths, limits);
  std::vector<Bin> bins;
  RoomTree tree;
  for (int64_t i = 0; i < items.count; ++i) {
    int64_t bin = tree.first_with(items.lengths[i]);
    if (bin < 0) {
      bin = static_cast<int64_t>(bins.size());
      bins.emplace_back();
    }
    bins[bin].add(items.lengths[i]);
    tree.set(bin, bins[bin].room(limits));
    items.bin_of[i] = bin;
  }
  return items.bins;
}

Tensor pack_best_fit(const Tensor& lengths, int64_t capacity, int64_t max_per_bin, int64_t max_square,
                     int64_t open_bins) {
  const Limits limits{capacity, max_per_bin, max_square};
  const Items items = check(lengths, limits);
  std::vector<Bin> bins;
  OpenBins open(capacity);
  for (int64_t i = 0; i < items.count; ++i) {
    int64_t bin = open.pop(items.lengths[i]);
    if (bin < 0) {
      if (open_bins > 0 && open.count() == open_bins) open.pop(1);  // the fullest is closed
      bin = static_cast<int64_t>(bins.size());
      bins.emplace_back();
    }
    bins[bin].add(items.lengths[i]);
    const int64_t room = bins[bin].room(limits);
    if (room > 0) open.push(bin, room);
    items.bin_of[i] = bin;
  }
  return items.bins;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packattn, CPU, m) {
  m.impl("pack_first_fit", TORCH_BOX(&pack_first_fit));
  m.impl("pack_best_fit", TORCH_BOX(&pack_best_fit));
}

}  // namespace packattn

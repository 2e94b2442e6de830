// The schedule buffer: one layout for host and device, relocatable (offsets, no pointers).
//
//   Header | len int32[max_batch] | q_begin int32[max_batch + 1] | cost_prefix int64[max_batch + 1] | slot_prefix int64[max_batch + 1]
//          | boundary Boundary[parts + 1]
//
// len and q_begin are clamped copies of the caller's tensors: decode reads these and never the originals, so one schedule always
// describes one consistent step. cost_prefix[r] is the begin of request r on the line of partition.h, slot_prefix[r] its first slot.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.h"
#include "schedule/partition.h"

namespace mla::schedule {

struct Header {
  uint32_t magic;  // kMagic once the schedule is complete
  int32_t batch;
  int32_t parts;
  int32_t plan_key;  // Config::plan_key of the plan that it was made with
  int64_t total_cost;
  int64_t q_tokens;
};
static_assert(sizeof(Header) == 32);

inline constexpr uint32_t kMagic = 0x6d6c6133;  // changes with the layout
inline constexpr size_t kAlignment = 256;
// In len: the request's length was outside [0, max_len], which only a device sees so late. Its rows come out as NaN.
inline constexpr int32_t kInvalidLen = -1;

// Where each array begins, in bytes. As numbers, because kernels that run for microseconds have no time to work them out.
struct Layout {
  size_t len = sizeof(Header), q_begin = 0, cost_prefix = 0, slot_prefix = 0, boundary = 0, end = 0;

  constexpr Layout() = default;
  constexpr Layout(int64_t max_batch, int32_t parts) {
    const size_t batch = static_cast<size_t>(max_batch);
    q_begin = align16(len + 4 * batch);
    cost_prefix = align16(q_begin + 4 * (batch + 1));
    slot_prefix = align16(cost_prefix + 8 * (batch + 1));
    boundary = align16(slot_prefix + 8 * (batch + 1));
    end = boundary + sizeof(Boundary) * (static_cast<size_t>(parts) + 1);
  }
  constexpr size_t bytes() const { return end; }

 private:
  static constexpr size_t align16(size_t n) { return (n + 15) / 16 * 16; }
};

// Byte is std::byte to write, const std::byte to read.
template <class Byte, class T>
struct CopyConst {
  using type = T;
};
template <class Byte, class T>
struct CopyConst<const Byte, T> {
  using type = const T;
};

template <class Byte>
class BasicView {
  template <class T>
  using Ptr = typename CopyConst<Byte, T>::type*;

 public:
  MLA_HD constexpr BasicView(Byte* base, const Layout& layout) : base_(base), layout_(layout) {}
  MLA_HD Ptr<Header> header() const { return at<Header>(0); }
  MLA_HD Ptr<int32_t> len() const { return at<int32_t>(layout_.len); }
  MLA_HD Ptr<int32_t> q_begin() const { return at<int32_t>(layout_.q_begin); }
  MLA_HD Ptr<int64_t> cost_prefix() const { return at<int64_t>(layout_.cost_prefix); }
  MLA_HD Ptr<int64_t> slot_prefix() const { return at<int64_t>(layout_.slot_prefix); }
  MLA_HD Ptr<Boundary> boundary() const { return at<Boundary>(layout_.boundary); }
  MLA_HD int32_t q_tokens(int32_t request) const { return q_begin()[request + 1] - q_begin()[request]; }

 private:
  template <class T>
  MLA_HD Ptr<T> at(size_t offset) const {
    return reinterpret_cast<Ptr<T>>(base_ + offset);
  }
  Byte* base_;
  Layout layout_;
};

using View = BasicView<std::byte>;
using ConstView = BasicView<const std::byte>;

}  // namespace mla::schedule

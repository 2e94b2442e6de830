// Who computes which keys: pure functions of the lengths, shared by the CPU backends, the CUDA kernels and the tests.
//
// An item is (request, row group, kv head): up to item_rows query rows that walk one request's keys together. The work of a batch is
// a line on which an item of a request with n blocks of keys is as long as n + overhead_blocks. Part p of P begins where position
// p * total / P falls; it ends where part p + 1 begins. Neighbours share a boundary, so every block is covered exactly once, and a
// part costs at most ceil(total / P) + overhead_blocks. But a balanced schedule cuts nothing where it can, or every item evenly: whole.h,
// even_split.h.
//
// A boundary is a cell (request, item, block). An item with keys owns cells 0 .. n-1; an item without keys owns cell 0, so that one
// part visits it and writes its empty rows. A position inside the overhead of an item maps to the item's cell 0.
//
// balanced     A part holds at most one item that began before it and one that goes on after it. Slot 2p takes the partial result of
//              the first kind, slot 2p + 1 of the second: 2 P slots, whatever the batch.
// fixed_chunk  Boundaries move up to the next multiple of chunk_blocks within the item, and an item longer than one chunk leaves one
//              partial a chunk, at slot_prefix[request] + item * chunks + chunk. Chunks depend on the request's own length only.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mla::schedule {

// Fixed by the plan.
struct Config {
  int32_t block_tokens;       // unit of keys
  int32_t item_rows;          // most rows of an item
  int32_t heads_per_kv_head;  // rows of one query token
  int32_t kv_heads;
  int32_t parts;
  int32_t overhead_blocks;     // what an item costs beside its keys, >= 1
  int32_t chunk_blocks;        // 0: balanced
  int32_t plan_key;            // set after the backend's plan(): ties a schedule to its plan
  int64_t slots;               // partial results that fit into scratch
  int32_t cut_blocks = 0;      // most of what its cuts cost a part, see whole.h
  bool splits_evenly = false;  // see even_split.h; not where the cuts of an item are found by cuts_of_item

  MLA_HD constexpr int32_t blocks(int64_t len_tokens) const {
    return static_cast<int32_t>((len_tokens + block_tokens - 1) / block_tokens);
  }
  // The same in 32 bits, which costs a kernel a few registers instead of many.
  MLA_HD constexpr int32_t blocks(int32_t len_tokens) const {
    return static_cast<int32_t>((static_cast<uint32_t>(len_tokens) + block_tokens - 1) /
                                static_cast<uint32_t>(block_tokens));
  }
  MLA_HD constexpr int64_t row_groups(int64_t q_tokens) const {
    return (q_tokens * heads_per_kv_head + item_rows - 1) / item_rows;
  }
  // Item i of a request is row group i / kv_heads of kv head i % kv_heads.
  MLA_HD constexpr int64_t items(int64_t q_tokens) const { return row_groups(q_tokens) * kv_heads; }
  // item < items(q_tokens), without its division in 64 bits.
  MLA_HD constexpr bool has_item(int32_t item, int64_t q_tokens) const {
    return int64_t{item / kv_heads} * item_rows < q_tokens * heads_per_kv_head;
  }
  MLA_HD constexpr int64_t item_cost(int64_t len_tokens) const { return blocks(len_tokens) + overhead_blocks; }
  MLA_HD constexpr int64_t request_cost(int64_t len_tokens, int64_t q_tokens) const {
    return items(q_tokens) * item_cost(len_tokens);
  }
  // Chunks, each with a slot, that an item leaves behind; 0 when it is computed whole. fixed_chunk only.
  MLA_HD constexpr int32_t chunks(int64_t len_tokens) const {
    const int32_t n = blocks(len_tokens);
    return n > chunk_blocks ? (n + chunk_blocks - 1) / chunk_blocks : 0;
  }
  MLA_HD constexpr int64_t request_slots(int64_t len_tokens, int64_t q_tokens) const {
    return chunk_blocks == 0 ? 0 : items(q_tokens) * chunks(len_tokens);
  }
};

// A cell; ordered by request, then item, then block. A part is the half-open range of cells between two boundaries.
struct Boundary {
  int32_t request;
  int32_t item;
  int32_t block;
  int32_t reserved;
};

MLA_HD constexpr bool is_before(const Boundary& a, const Boundary& b) {
  if (a.request != b.request) return a.request < b.request;
  if (a.item != b.item) return a.item < b.item;
  return a.block < b.block;
}

// Where part p begins on the line; p = parts gives total.
MLA_HD constexpr int64_t part_position(int64_t p, int64_t parts, int64_t total) { return p * total / parts; }

// The part that holds position x: the largest p with part_position(p) <= x, as p * total < (x + 1) * parts says.
MLA_HD constexpr int64_t part_at(int64_t x, int64_t parts, int64_t total) { return ((x + 1) * parts - 1) / total; }

// The cell of a position inside a request of len_tokens. offset is the position less the request's begin.
MLA_HD constexpr Boundary boundary_in_request(const Config& c, int32_t request, int64_t offset, int64_t len_tokens,
                                              int64_t item_count) {
  const int64_t cost = c.item_cost(len_tokens);
  int64_t item = item_count > 1 ? offset / cost : 0;
  int64_t block = offset - item * cost - c.overhead_blocks;
  if (block < 0) block = 0;
  if (c.chunk_blocks > 0) {
    block = (block + c.chunk_blocks - 1) / c.chunk_blocks * c.chunk_blocks;
    if (block > 0 && block >= c.blocks(len_tokens)) {
      item += 1;
      block = 0;
    }
  }
  if (item >= item_count) return {request + 1, 0, 0, 0};
  return {request, static_cast<int32_t>(item), static_cast<int32_t>(block), 0};
}

// The blocks [begin_block, end_block) of one item that one part computes, and the slot for the partial result (-1: the item is whole).
struct Piece {
  int32_t request;
  int32_t item;
  int32_t begin_block;
  int32_t end_block;
  int64_t slot;
};

// The piece that begins at `at` (a cell before `end`) in part p of a request with n blocks; slot_prefix is the request's.
MLA_HD constexpr Piece piece_at(const Config& c, int32_t p, const Boundary& at, const Boundary& end, int32_t n,
                                int64_t slot_prefix) {
  const bool ends_here = at.request == end.request && at.item == end.item;
  int32_t stop = ends_here ? end.block : n;
  int64_t slot = -1;
  if (c.chunk_blocks > 0) {
    if (stop > at.block + c.chunk_blocks) stop = at.block + c.chunk_blocks;
    if (n > c.chunk_blocks) {
      const uint32_t chunk_blocks = static_cast<uint32_t>(c.chunk_blocks);  // unsigned divisions are the shorter ones
      const uint32_t chunks = (static_cast<uint32_t>(n) + chunk_blocks - 1) / chunk_blocks;
      slot = slot_prefix + int64_t{at.item} * chunks + static_cast<uint32_t>(at.block) / chunk_blocks;
    }
  } else if (at.block > 0 || stop < n) {
    slot = 2 * static_cast<int64_t>(p) + (at.block > 0 ? 0 : 1);
  }
  return {at.request, at.item, at.block, stop, slot};
}

// The cell after a piece: the next block of the item, or the next item. The caller moves to the next request when items run out.
MLA_HD constexpr Boundary after(const Piece& piece, int32_t n) {
  if (piece.end_block < n) return {piece.request, piece.item, piece.end_block, 0};
  return {piece.request, piece.item + 1, 0, 0};
}

// The pieces an item was cut into, for the step that joins them. In balanced these are the parts [first, last] that may hold blocks of
// it, in fixed_chunk its chunks; begin/end of an index outside the item come out empty (begin >= end).
struct Cuts {
  int64_t first;
  int64_t last;  // inclusive
};

// item_begin: the item's begin on the line. Only for items with n > 0 blocks.
MLA_HD constexpr Cuts cuts_of_item(const Config& c, int64_t item_begin, int64_t total, int32_t n) {
  if (c.chunk_blocks > 0) return {0, (n - 1) / c.chunk_blocks};
  const int64_t first_block = item_begin + c.overhead_blocks;
  return {part_at(first_block, c.parts, total), part_at(first_block + n - 1, c.parts, total)};
}

// The piece of cut k of item (request, item). slot_prefix is the request's.
MLA_HD constexpr Piece piece_of_cut(const Config& c, int64_t k, int32_t request, int32_t item, int64_t item_begin,
                                    int64_t total, int32_t n, int64_t slot_prefix) {
  if (c.chunk_blocks > 0) {
    const int32_t begin = static_cast<int32_t>(k) * c.chunk_blocks;
    const int32_t end = begin + c.chunk_blocks < n ? begin + c.chunk_blocks : n;
    const int64_t chunks = (n + c.chunk_blocks - 1) / c.chunk_blocks;
    return {request, item, begin, end, n > c.chunk_blocks ? slot_prefix + item * chunks + k : -1};
  }
  const int64_t first_block = item_begin + c.overhead_blocks;
  int64_t begin = part_position(k, c.parts, total) - first_block;
  int64_t end = part_position(k + 1, c.parts, total) - first_block;
  if (begin < 0) begin = 0;
  if (end > n) end = n;
  if (end < begin) end = begin;
  const bool is_whole = begin == 0 && end == n;
  return {request, item, static_cast<int32_t>(begin), static_cast<int32_t>(end),
          is_whole ? -1 : 2 * k + (begin > 0 ? 0 : 1)};
}

}  // namespace mla::schedule

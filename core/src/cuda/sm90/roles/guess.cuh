// The first piece of a part, before the kernels that the schedule comes from are known to have ended.
#pragma once

#include "cuda/sm90/roles/role.cuh"
#include "schedule/walk.h"

namespace mla::cuda::sm90 {

// The part's first Work (but for its slot) as the schedule says now; request < 0: none that could be one. What is read may be old or half
// written, so it is checked here for what the loader relies on, and by the loader against the planner's before anybody computes with it.
// It is read from the second-level cache: nothing old stays in the first.
__device__ __forceinline__ void guess_work(const DecodeParams& p, int tile, int part, Work& guess) {
  const schedule::ConstView view(p.schedule, p.layout);
  const auto boundary = [&](int i) {
    const int4 b = __ldcg(reinterpret_cast<const int4*>(view.boundary() + i));
    return schedule::Boundary{b.x, b.y, b.z, b.w};
  };
  const uint32_t magic = __ldcg(&view.header()->magic);
  const schedule::Boundary at = boundary(part), end = boundary(part + 1);
  guess.request = -1;
  if (magic != schedule::kMagic || at.request < 0 || at.request >= p.batch || at.item < 0 || at.block < 0) return;
  const int32_t len = __ldcg(view.len() + at.request), q_begin = __ldcg(view.q_begin() + at.request),
                q_tokens = __ldcg(view.q_begin() + at.request + 1) - q_begin;
  const int32_t n = p.config.blocks(len);
  const schedule::Piece piece = schedule::piece_at(p.config, part, at, end, n, 0);
  if (len <= 0 || piece.begin_block >= piece.end_block || piece.end_block > n) return;
  const int32_t row_group = p.kv_heads.quotient(piece.item);
  guess.begin_block = piece.begin_block;
  guess.end_block = piece.end_block;
  guess.len_tokens = len;
  guess.q_tokens = q_tokens;
  guess.q_begin = q_begin;
  guess.first_row = row_group * p.config.item_rows + tile * kTileRows;
  guess.kv_head = p.kv_heads.remainder(piece.item, row_group);
  if (guess.first_row < 0 || q_tokens < 0 || tile_rows(p.config, guess) <= 0) return;
  guess.request = at.request;
}

}  // namespace mla::cuda::sm90

// One thread turns its part of the schedule into Work for all roles.
#pragma once

#include "cuda/sm90/ptx/pdl.cuh"
#include "cuda/sm90/roles/role.cuh"
#include "schedule/walk.h"

namespace mla::cuda::sm90 {

__device__ __forceinline__ void run_planner(const DecodeParams& p, const RoleContext& ctx, int tile, int part) {
  const schedule::ConstView view(p.schedule, p.layout);
  WorkCursor at;
  schedule::Boundary& end = ctx.control->part_end;  // read again for each piece
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();  // I4
  end = view.boundary()[part + 1];
  schedule::for_each_piece(p.config, view, part, end, [&](const schedule::Piece& piece, int32_t) {
    const int32_t first_row = first_row_of(p, p.kv_heads.quotient(piece.item), tile);
    if (piece.request >= p.batch || first_row >= view.q_tokens(piece.request) * p.config.heads_per_kv_head)
      return;  // I1: the tile has a row
    if (at.value == 0) {
      wait<Barrier::kGuessJudged>(ctx.barriers, 0, 0);
      if (ctx.control->is_guess_right) {  // told by the loader
        at.advance();
        return;
      }
    }
    wait_empty<Barrier::kWorkEmpty>(ctx.barriers, at);
    Work& work = ctx.control->work[at.stage()];
    write_rows(p, piece.request, piece.item, tile, view.q_begin()[piece.request], view.q_tokens(piece.request), work);
    write_keys(p, piece, view.len()[piece.request], work);
    arrive<Barrier::kWorkFull>(ctx.barriers, at.stage());
    at.advance();
  });
  if (at.value == 0) wait<Barrier::kGuessJudged>(ctx.barriers, 0, 0);
  wait_empty<Barrier::kWorkEmpty>(ctx.barriers, at);
  ctx.control->work[at.stage()].request = -1;
  arrive<Barrier::kWorkFull>(ctx.barriers, at.stage());
}

}  // namespace mla::cuda::sm90

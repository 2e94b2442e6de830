// One thread turns its part of the schedule into Work for all roles.
#pragma once

#include "cuda/sm90/ptx/pdl.cuh"
#include "cuda/sm90/roles/role.cuh"
#include "schedule/walk.h"

namespace mla::cuda::sm90 {

// The first Work goes to the loader, which tells the others.
__device__ __forceinline__ void publish(const RoleContext& ctx, WorkCursor at) {
  if (at.value == 0) {
    arrive<Barrier::kFirstWork>(ctx.barriers, 0);
  } else {
    arrive<Barrier::kWorkFull>(ctx.barriers, at.stage());
  }
}

// The fields are written one by one once the buffer is free: the planner has few registers.
__device__ __forceinline__ void run_planner(const DecodeParams& p, const RoleContext& ctx, int tile, int part) {
  const schedule::ConstView view(p.schedule, p.layout);
  WorkCursor at;
  schedule::Boundary& end = ctx.control->part_end;  // read again for each piece
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();  // I4
  end = view.boundary()[part + 1];
  schedule::for_each_piece(p.config, view, part, end, [&](const schedule::Piece& piece, int32_t) {
    const int32_t row_group = p.kv_heads.quotient(piece.item);
    const int32_t first_row = row_group * p.config.item_rows + tile * kTileRows;
    if (piece.request >= p.batch || first_row >= view.q_tokens(piece.request) * p.config.heads_per_kv_head)
      return;  // I1: the tile has a row
    const int32_t slot = piece.slot < 0                ? kWholeItem
                         : piece.slot < p.config.slots ? static_cast<int32_t>(piece.slot)
                                                       : kDropped;
    wait_empty<Barrier::kWorkEmpty>(ctx.barriers, at);
    Work& work = ctx.control->work[at.stage()];
    work.request = piece.request;
    work.begin_block = piece.begin_block;
    work.end_block = piece.end_block;
    work.slot = slot;
    work.first_row = first_row;
    work.kv_head = p.kv_heads.remainder(piece.item, row_group);
    work.len_tokens = view.len()[piece.request];
    work.q_begin = view.q_begin()[piece.request];
    work.q_tokens = view.q_tokens(piece.request);
    publish(ctx, at);
    at.advance();
  });
  wait_empty<Barrier::kWorkEmpty>(ctx.barriers, at);
  ctx.control->work[at.stage()].request = -1;
  publish(ctx, at);
}

}  // namespace mla::cuda::sm90

// Which keys of a request a context parallel rank holds.
//
// Static, so that every file has its own copy: it is included by files built for one instruction set.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mla {

// Keys of rank `rank` among the first n keys of a request that `world` ranks take in turns of `turn` keys: its key j is key
// (j / turn * world + rank) * turn + j % turn of the request.
static MLA_HD constexpr int64_t shard_tokens(int64_t n, int32_t world, int32_t rank, int32_t turn) {
  if (n <= 0) return 0;
  if (world == 1) return n;
  const int64_t round = int64_t{world} * turn;
  const int64_t rest = n % round - int64_t{rank} * turn;
  return n / round * turn + (rest < 0 ? 0 : rest < turn ? rest : turn);
}

// 10 keys, 3 ranks: one by one 0369 147 258; in turns of two 0167 2389 45.
static_assert(shard_tokens(10, 3, 0, 1) == 4 && shard_tokens(10, 3, 1, 1) == 3 && shard_tokens(10, 3, 2, 1) == 3);
static_assert(shard_tokens(10, 3, 0, 2) == 4 && shard_tokens(10, 3, 1, 2) == 4 && shard_tokens(10, 3, 2, 2) == 2);
static_assert(shard_tokens(5, 1, 0, 1) == 5 && shard_tokens(-3, 2, 0, 1) == 0 && shard_tokens(1, 2, 1, 1) == 0);

}  // namespace mla

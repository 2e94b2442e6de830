"""A schedule buffer read by an outsider: the layout of core/src/schedule/view.h, and the walk that partition.h describes.

Nothing here calls the library, so that the properties test its bytes and not its own reading of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

import abi

MAGIC = 0x6D6C6133


@dataclasses.dataclass(frozen=True)
class Piece:
    """Blocks [begin, end) of an item that a part computes; slot -1: the whole item."""

    part: int
    request: int
    item: int
    begin: int
    end: int
    slot: int


class Schedule:
    def __init__(self, plan: abi.Plan) -> None:
        self.info = plan.info
        self.problem = plan.problem
        memory, batch, parts = plan.schedule_buffer, plan.problem.max_batch, plan.info.parts
        at = 0

        def take(dtype: str, count: int) -> np.ndarray:
            nonlocal at
            begin = -(-at // 16) * 16
            at = begin + np.dtype(dtype).itemsize * count
            return memory[begin:at].view(dtype)

        header = take("int32", 4)
        self.magic, self.batch, self.parts = int(header[0]), int(header[1]), int(header[2])
        self.total_cost, self.q_tokens = (int(n) for n in take("int64", 2))
        self.len = take("int32", batch)[: self.batch]
        self.q_begin = take("int32", batch + 1)[: self.batch + 1]
        self.cost_prefix = take("int64", batch + 1)[: self.batch + 1]
        self.slot_prefix = take("int64", batch + 1)[: self.batch + 1]
        self.boundary = take("int32", 4 * (parts + 1)).reshape(parts + 1, 4)[:, :3]
        self.nbytes = at
        is_chunked = plan.problem.split_policy == 1 and plan.info.backend != b"reference"  # which never cuts
        self.chunk_blocks = (plan.problem.chunk_tokens or 2048) // self.info.block_tokens if is_chunked else 0

    def blocks(self, request: int) -> int:
        return -(-int(self.len[request]) // self.info.block_tokens)

    def items(self, request: int) -> int:
        rows = int(self.q_begin[request + 1] - self.q_begin[request]) * (self.problem.q_heads // self.problem.kv_heads)
        return -(-rows // self.info.item_rows) * self.problem.kv_heads

    def overhead(self) -> int:
        """Blocks that an item costs beside its keys, from the costs."""
        items = sum(self.items(r) for r in range(self.batch))
        keys = sum(self.items(r) * self.blocks(r) for r in range(self.batch))
        return (self.total_cost - keys) // items if items else 0

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every part: cells from its boundary up to the next, cut at items, and at chunks under fixed_chunk."""
        for part in range(self.parts):
            request, item, block = (int(n) for n in self.boundary[part])
            end = tuple(int(n) for n in self.boundary[part + 1])
            while (request, item, block) < end:
                if item >= self.items(request):
                    request, item, block = request + 1, 0, 0
                    continue
                n = self.blocks(request)
                stop = end[2] if end[:2] == (request, item) else n
                slot = -1
                if self.chunk_blocks:
                    stop = min(stop, block + self.chunk_blocks)
                    if n > self.chunk_blocks:
                        chunks = -(-n // self.chunk_blocks)
                        slot = int(self.slot_prefix[request]) + item * chunks + block // self.chunk_blocks
                elif block > 0 or stop < n:
                    slot = 2 * part + (0 if block > 0 else 1)
                yield Piece(part, request, item, block, stop, slot)
                request, item, block = (request, item, stop) if stop < n else (request, item + 1, 0)

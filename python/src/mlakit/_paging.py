"""Paged caches for people who have none: block tables, conversion from contiguous caches, and a cache that appends tokens."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence
from typing import Any


class _Maker:
    """Makes arrays of one framework, type and device; told by an example array, a dtype, or nothing (numpy)."""

    def __init__(self, example: Any = None, dtype: Any = None, device: Any = None) -> None:
        torch = sys.modules.get("torch")
        self._torch: Any = None
        if torch is not None and (isinstance(example, torch.Tensor) or isinstance(dtype, torch.dtype)):
            self._torch = torch
            self._device = device if example is None else example.device
        elif device not in (None, "cpu"):
            raise ValueError(f"device: numpy arrays live on the CPU, got {device!r}: pass a torch dtype")
        self._dtype = dtype if example is None else example.dtype

    def zeros(self, *shape: int) -> Any:
        if self._torch is not None:
            return self._torch.zeros(shape, dtype=self._dtype, device=self._device)
        import numpy as np

        return np.zeros(shape, self._dtype)

    def int32(self, values: Sequence[Any], *shape: int) -> Any:
        if self._torch is not None:
            return self._torch.tensor(values, dtype=self._torch.int32, device=self._device).reshape(shape)
        import numpy as np

        return np.array(values, np.int32).reshape(shape)

    def array(self, values: Any) -> Any:
        if self._torch is not None:
            return self._torch.as_tensor(values, device=self._device)
        import numpy as np

        return np.asarray(values)


def _ints(lengths: Any) -> list[int]:
    return [int(n) for n in (lengths.tolist() if hasattr(lengths, "tolist") else lengths)]


def _table(rows: Sequence[Sequence[int]], maker: _Maker) -> Any:
    width = max((len(row) for row in rows), default=0)
    return maker.int32([[*row, *[-1] * (width - len(row))] for row in rows], len(rows), width)


def make_block_table(lengths: Any, page_size: int = 64) -> Any:
    """A block table for requests that lie page after page, in order.

    Args:
        lengths: tokens of each request: a sequence of ints, or an array of any framework.
        page_size: tokens of a page.

    Returns:
        int32 [batch, most pages of a request], filled up with -1; of torch if lengths is a torch tensor, else of numpy.

    Raises:
        ValueError: a negative length, or a page size under 1.
    """
    if page_size < 1:
        raise ValueError(f"page_size: expected at least 1, got {page_size}")
    counts = _ints(lengths)
    if any(n < 0 for n in counts):
        raise ValueError(f"lengths: expected no negative length, got {min(counts)}")
    rows, first = [], 0
    for n in counts:
        pages = -(-n // page_size)
        rows.append(range(first, first + pages))
        first += pages
    return _table(rows, _Maker(lengths if hasattr(lengths, "dtype") else None))


def paged_from_contiguous(kv: Any, lengths: Any = None, page_size: int = 64) -> tuple[Any, Any, Any]:
    """Copies contiguous caches into a paged one.

    Args:
        kv: a sequence of [len, head_dim] or [len, kv_heads, head_dim] arrays, or one padded array [batch, max_len, head_dim] or
            [batch, max_len, kv_heads, head_dim].
        lengths: tokens of each request; None: all of them.
        page_size: tokens of a page.

    Returns:
        (kv_cache [pages, page_size, kv_heads, head_dim], block_table int32 [batch, width], cache_seqlens int32 [batch]), in kv's
        framework.

    Raises:
        ValueError: a length that a request has not, or requests of different shapes.
    """
    requests = list(kv)
    if not requests:
        raise ValueError("kv: expected at least one request, got none")
    requests = [r.reshape(r.shape[0], 1, r.shape[1]) if len(r.shape) == 2 else r for r in requests]
    counts = [r.shape[0] for r in requests] if lengths is None else _ints(lengths)
    kv_heads, head_dim = requests[0].shape[1:]
    if len(counts) != len(requests):
        raise ValueError(f"lengths: expected one for each of {len(requests)} requests, got {len(counts)}")
    for i, (r, n) in enumerate(zip(requests, counts, strict=True)):
        if tuple(r.shape[1:]) != (kv_heads, head_dim):
            raise ValueError(f"kv[{i}]: expected [len, {kv_heads}, {head_dim}] like the first, got {list(r.shape)}")
        if n > r.shape[0]:
            raise ValueError(f"lengths[{i}]: expected at most the request's {r.shape[0]} tokens, got {n}")
    maker = _Maker(requests[0])
    table = make_block_table(counts, page_size)
    pages = sum(-(-n // page_size) for n in counts)
    cache = maker.zeros(max(pages, 1), page_size, kv_heads, head_dim)
    tokens = cache.reshape(-1, kv_heads, head_dim)
    for row, r, n in zip(table, requests, counts, strict=True):
        if n > 0:
            begin = int(row[0]) * page_size
            tokens[begin : begin + n] = r[:n]
    return cache, maker.int32(table.tolist(), *table.shape), maker.int32(counts, len(counts))


class PagedCache:
    """A pool of cache pages that requests grow into and give back.

    Args:
        pages: how many pages the pool has.
        page_size: tokens of a page.
        head_dim: width of a cache row, in elements.
        kv_heads: cache rows of a token.
        dtype: of the cache; a torch dtype makes it a torch tensor, a numpy or ml_dtypes dtype a numpy array.
        device: of a torch cache.

    `pages` is the cache itself, [pages, page_size, kv_heads, head_dim], for `mla_decode`.
    """

    def __init__(
        self, pages: int, page_size: int = 64, *, head_dim: int = 576, kv_heads: int = 1, dtype: Any, device: Any = None
    ) -> None:
        self._maker = _Maker(dtype=dtype, device=device)
        self.pages = self._maker.zeros(pages, page_size, kv_heads, head_dim)
        self.page_size = page_size
        self._free = list(range(pages - 1, -1, -1))
        self._pages_of: dict[Hashable, list[int]] = {}
        self._length_of: dict[Hashable, int] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def __len__(self) -> int:
        """How many requests there are."""
        return len(self._length_of)

    def __contains__(self, request: Hashable) -> bool:
        return request in self._length_of

    def length(self, request: Hashable) -> int:
        """Cached tokens of a request."""
        return self._length_of[request]

    def add(self, request: Hashable) -> None:
        """Starts an empty request under any hashable name. Raises ValueError if it exists."""
        if request in self._length_of:
            raise ValueError(f"request: {request!r} exists already")
        self._pages_of[request] = []
        self._length_of[request] = 0

    def append(self, request: Hashable, rows: Any) -> None:
        """Appends tokens to a request, converting them to the cache's type.

        Args:
            request: a name given to add.
            rows: [tokens, head_dim] or [tokens, kv_heads, head_dim].

        Raises:
            KeyError: no such request. ValueError: rows of another shape. MemoryError: not enough free pages; nothing is appended.
        """
        length, owned = self._length_of[request], self._pages_of[request]
        rows = self._maker.array(rows)
        kv_heads, head_dim = self.pages.shape[2:]
        if len(rows.shape) == 2 and kv_heads == 1:
            rows = rows.reshape(rows.shape[0], 1, rows.shape[1])
        if len(rows.shape) != 3 or tuple(rows.shape[1:]) != (kv_heads, head_dim):
            raise ValueError(f"rows: expected [tokens, {kv_heads}, {head_dim}], got {list(rows.shape)}")
        count = rows.shape[0]
        missing = -(-(length + count) // self.page_size) - len(owned)
        if missing > len(self._free):
            raise MemoryError(
                f"{missing} more pages are needed and {len(self._free)} are free: free a request or make a larger cache"
            )
        owned.extend(self._free.pop() for _ in range(missing))
        done = 0
        while done < count:
            page, slot = divmod(length + done, self.page_size)
            step = min(self.page_size - slot, count - done)
            self.pages[owned[page], slot : slot + step] = rows[done : done + step]
            done += step
        self._length_of[request] = length + count

    def free(self, request: Hashable) -> None:
        """Ends a request and gives its pages back. Raises KeyError if there is none."""
        del self._length_of[request]
        self._free.extend(reversed(self._pages_of.pop(request)))

    def block_table(self, requests: Iterable[Hashable]) -> Any:
        """int32 [batch, width] of the requests, in this order, filled up with -1."""
        return _table([self._pages_of[r] for r in requests], self._maker)

    def cache_seqlens(self, requests: Iterable[Hashable]) -> Any:
        """int32 [batch], the requests' cached tokens, in this order."""
        counts = [self._length_of[r] for r in requests]
        return self._maker.int32(counts, len(counts))

"""torch as an array framework. Imported only once the caller brings a torch tensor."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "e4m3": torch.float8_e4m3fn, "int32": torch.int32}
_TELLS_STREAM = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


class Torch:
    def empty(self, like: torch.Tensor, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        # Sizes one by one: torch reads a tuple of them more slowly. new_empty costs still more.
        return torch.empty(*shape, dtype=DTYPES[dtype], device=like.device)

    def workspace(self, like: torch.Tensor, nbytes: int, stream: int | None) -> torch.Tensor:
        # From the caching allocator, so that reuse follows the stream and a graph capture owns what it used.
        if stream is None:
            return torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        external: Any = torch.cuda.ExternalStream
        with torch.cuda.stream(external(stream, device=like.device)):
            return torch.empty(nbytes, dtype=torch.uint8, device=like.device)

    def stream(self, like: torch.Tensor) -> int | None:
        return None if _TELLS_STREAM or not like.is_cuda else torch.cuda.current_stream(like.device).cuda_stream

    def finish(self, array: Any) -> Any:
        return array

    def logaddexp(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        torch.logaddexp(a, b, out=out)

    def refuse_gradients(self, *inputs: Any) -> None:
        for tensor in inputs:
            if getattr(tensor, "requires_grad", False) and torch.is_grad_enabled():
                raise RuntimeError(
                    "mlakit has no backward pass, and an input requires grad: call it under torch.no_grad() or detach the input"
                )

"""Context, Plan and Schedule: the handles of an engine's loop. Checks are the library's; here is only who owns which memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from . import _ext
from ._arrays import Framework, framework_of
from ._problem import Problem


class Context:
    """Which backend and how many CPU threads plans use. Immutable; share it between threads.

    Args:
        backend: force one by the name that `mlakit.backends()` lists. None: `MLAKIT_BACKEND` if set, else the first that takes
            the problem.
        num_threads: CPU threads. 0: `MLAKIT_NUM_THREADS` if set, else the CPUs that this process may use. Results do not depend
            on it.

    Raises:
        ValueError: an unknown backend name. NotImplementedError: a backend that this machine cannot run.
    """

    __slots__ = ("_native",)

    def __init__(self, backend: str | None = None, num_threads: int = 0) -> None:
        self._native = _ext.Context(backend, num_threads)


@functools.cache
def default_context() -> Context:
    """The context of every call that names none; reads the environment at its first use."""
    return Context()


@dataclasses.dataclass(frozen=True, slots=True)
class PlanInfo:
    """What a plan decided. Sizes in bytes; alignments are powers of two."""

    backend: str
    variant: str
    """The backend's own name for what it will run."""
    problem: str
    """The problem's one-line form, defaults filled in."""
    parts: int
    """Parallel parts of a call."""
    block_tokens: int
    """The unit in which keys are scheduled."""
    item_rows: int
    """Query rows that walk the keys together."""
    slots: int
    """Partial results that fit into scratch."""
    schedule_bytes: int
    schedule_alignment: int
    scratch_bytes: int
    scratch_alignment: int


class Schedule:
    """Who computes what, for one set of lengths. Made by `Plan.schedule`, read by any number of `Plan.decode` calls.

    `buffer` holds it, without pointers: it may be copied elsewhere on the same device, and rewritten in place by
    `plan.schedule(..., buffer=schedule.buffer)` (inside a CUDA graph, say).
    """

    __slots__ = ("buffer", "cache_seqlens")

    def __init__(self, buffer: Any, cache_seqlens: Any) -> None:
        self.buffer = buffer
        self.cache_seqlens = cache_seqlens


class Plan:
    """A validated problem and the backend chosen for it. Immutable; share it between threads.

    Args:
        problem: a Problem, or its one-line form.
        context: None: the process's default context.

    Raises:
        ValueError: the problem contradicts itself. NotImplementedError: no backend takes it; the message lists the reasons.
        RuntimeError: no usable CUDA driver for a CUDA problem.
    """

    def __init__(self, problem: Problem | str, context: Context | None = None) -> None:
        self.problem = Problem.parse(problem) if isinstance(problem, str) else problem
        self._native = _ext.Plan((context or default_context())._native, self.problem._native())
        self.info = PlanInfo(**self._native.info())
        self._is_cpu = self.problem.device == "cpu"
        self._out_dtype = self.problem.out_dtype or self.problem.q_dtype
        # Free scratch of a CPU plan. A call has finished when it returns: each concurrent one takes a buffer and puts it back.
        self._free: list[_ext.Buffer] = []

    def __repr__(self) -> str:
        return f"<mlakit.Plan {self.info.problem} on {self.info.backend}>"

    def schedule(
        self, cache_seqlens: Any, cu_seqlens_q: Any = None, *, buffer: Any = None, stream: int | None = None
    ) -> Schedule:
        """Turns lengths into a schedule: once for each change of the lengths, then reused by every layer.

        Args:
            cache_seqlens: int32 [batch], cached tokens of each request, 0 allowed.
            cu_seqlens_q: ragged q only: int32 [batch + 1], where each request's query tokens begin, and their sum.
            buffer: memory of info.schedule_bytes to write to; None: new memory.
            stream: CUDA: a cudaStream_t as an int; None: the current stream of the tensors' framework.

        Raises:
            ValueError: wrong shapes or types; on the CPU also negative lengths or lengths over the problem's maxima.
        """
        if not self._is_cpu or buffer is None:
            if self._is_cpu:
                buffer = _ext.Buffer(self.info.schedule_bytes, self.info.schedule_alignment)
            else:
                framework = framework_of(type(cache_seqlens))
                if buffer is None:
                    buffer = framework.workspace(cache_seqlens, self.info.schedule_bytes, stream)
                if stream is None:
                    stream = framework.stream(cache_seqlens)
        self._native.schedule(cache_seqlens, cu_seqlens_q, buffer, stream)
        return Schedule(buffer, cache_seqlens)

    def decode(
        self,
        q: Any,
        kv_cache: Any,
        block_table: Any,
        schedule: Schedule,
        *,
        q_rope: Any = None,
        kv_rope: Any = None,
        global_seqlens: Any = None,
        sink: Any = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = True,
        scratch: Any = None,
        stream: int | None = None,
    ) -> tuple[Any, Any]:
        """Attention of every query row over its request's cached tokens. See `mlakit.mla_decode` for the tensors.

        Args:
            schedule: of this plan and of this step's lengths. On the CPU one made before the lengths changed is refused.
            global_seqlens: int32 [batch], for a causal problem with cp_world > 1: cached tokens on all ranks together.
            out, lse: written in place and returned; None: new arrays in q's framework.
            return_lse: False: lse is not computed, and None is returned for it unless lse is given.
            scratch: memory of info.scratch_bytes; None: a CPU plan keeps its own, a CUDA plan takes it from q's framework.
            stream: CUDA: a cudaStream_t as an int; None: the current stream of q's framework.

        Returns:
            (out, lse).

        Raises:
            ValueError: a tensor that contradicts the problem; nothing is written then.
        """
        framework = framework_of(type(q))
        if out is None or (lse is None and return_lse):
            rows = tuple(q.shape)[:-1]
            if out is None:
                out = framework.empty(q, (*rows, self.problem.value_dim), self._out_dtype)
            if lse is None and return_lse:
                lse = framework.empty(q, rows, "fp32")
        self._run(framework, q, q_rope, kv_cache, kv_rope, block_table, schedule, global_seqlens, sink, out, lse, scratch, stream)
        return framework.finish(out), framework.finish(lse) if lse is not None else None

    def bind(
        self,
        q: Any,
        kv_cache: Any,
        block_table: Any,
        schedule: Schedule,
        *,
        out: Any,
        lse: Any = None,
        q_rope: Any = None,
        kv_rope: Any = None,
        global_seqlens: Any = None,
        sink: Any = None,
        scratch: Any = None,
        stream: int | None = None,
    ) -> Callable[[], None]:
        """decode with its tensors taken apart once: the result, called without arguments, decodes what they hold by then.

        For loops where tensors and their addresses stay and only their values change. It keeps references to the tensors, which
        must not be resized. One call of it at a time: it has one scratch. Arguments are those of decode; what decode would refuse
        is refused by the calls.
        """
        framework = framework_of(type(q))
        framework.refuse_gradients(q, q_rope, kv_cache)
        if scratch is None and self._is_cpu:
            scratch = _ext.Buffer(self.info.scratch_bytes, self.info.scratch_alignment)
        elif scratch is None and self.info.scratch_bytes:
            scratch = framework.workspace(q, self.info.scratch_bytes, stream)
        if stream is None and not self._is_cpu:
            stream = framework.stream(q)
        seqlens = schedule.cache_seqlens
        tensors = (q, q_rope, kv_cache, kv_rope, block_table, seqlens, global_seqlens, sink, out, lse, schedule.buffer, scratch)
        return _ext.Bound(self._native, tensors, stream)

    def _run(
        self,
        framework: Framework,
        q: Any,
        q_rope: Any,
        kv_cache: Any,
        kv_rope: Any,
        block_table: Any,
        schedule: Schedule,
        global_seqlens: Any,
        sink: Any,
        out: Any,
        lse: Any,
        scratch: Any,
        stream: int | None,
    ) -> None:
        framework.refuse_gradients(q, q_rope, kv_cache)
        borrowed = None
        if not self._is_cpu:
            if stream is None:
                stream = framework.stream(q)
        elif scratch is None:
            scratch = borrowed = self._take_scratch()
        tensors = (q, q_rope, kv_cache, kv_rope, block_table, schedule.cache_seqlens, global_seqlens, sink, out, lse)
        try:
            self._native.decode(*tensors, schedule.buffer, scratch, framework, stream)
        finally:
            if borrowed is not None:
                self._free.append(borrowed)

    def _take_scratch(self) -> _ext.Buffer:
        try:
            return self._free.pop()
        except IndexError:
            return _ext.Buffer(self.info.scratch_bytes, self.info.scratch_alignment)

"""A whole inference engine in one file: a small DeepSeek-style model, a paged latent cache, continuous batching, speculation.

    python tiny_engine.py            # CPU, or a Hopper GPU with CUDA graphs if torch sees one

It serves requests of mixed length three times: with attention in plain torch, with mlakit, and with mlakit checking two tokens
a step (q_len 2, speculative). Every generated token is compared with the same model computed densely, without a cache and without
weight absorption. Needs torch and mlakit.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

import mlakit

PAGE = 64
LATENT, ROPE = 512, 64  # what a cache row holds: 576 numbers a token and layer


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 2
    hidden: int = 256
    heads: int = 16
    nope: int = 32  # query and key width of a head besides the rope
    value: int = 32
    mlp: int = 512
    vocab: int = 512

    @property
    def scale(self) -> float:
        """Of the scores: the head's own width, not that of the cache row."""
        return (self.nope + ROPE) ** -0.5


# ------------------------------------------------------------------------------------------------------------- the model


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def rope(x: Tensor, position: Tensor) -> Tensor:
    """x [..., ROPE] turned by its position (broadcast over the axes before the last)."""
    frequency = 10000.0 ** (-torch.arange(0, ROPE, 2, device=x.device) / ROPE)
    angle = position.float()[..., None] * frequency
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).to(x.dtype)


class Layer:
    def __init__(self, c: Config, random: Callable[..., Tensor]) -> None:
        self.c = c
        self.q = random(c.hidden, c.heads * (c.nope + ROPE))
        self.kv_down = random(c.hidden, LATENT + ROPE)
        self.k_up = random(c.heads, c.nope, LATENT, fan_in=LATENT)
        self.v_up = random(c.heads, LATENT, c.value)
        self.out = random(c.heads * c.value, c.hidden)
        self.mlp_in, self.mlp_out = random(c.hidden, 2 * c.mlp), random(c.mlp, c.hidden)

    def queries(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        q = (x @ self.q).unflatten(-1, (self.c.heads, -1))
        return q[..., : self.c.nope], rope(q[..., self.c.nope :], position[..., None])

    def cache_rows(self, x: Tensor, position: Tensor) -> Tensor:
        row = x @ self.kv_down
        return torch.cat([rms_norm(row[..., :LATENT]), rope(row[..., LATENT:], position)], -1)

    def absorbed_query(self, x: Tensor, position: Tensor) -> Tensor:
        """[..., heads, 576]: q_nope . (k_up latent) = (q_nope k_up) . latent, so keys are never expanded."""
        q_nope, q_rope = self.queries(x, position)
        return torch.cat([torch.einsum("...hn,hnc->...hc", q_nope, self.k_up), q_rope], -1)

    def output(self, latent: Tensor) -> Tensor:
        """The sum over cache rows of a head, [..., heads, LATENT], through the value weights."""
        return torch.einsum("...hc,hcv->...hv", latent, self.v_up).flatten(-2) @ self.out

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = (x @ self.mlp_in).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ self.mlp_out

    def dense_attention(self, x: Tensor, position: Tensor) -> Tensor:
        """Of one whole sequence [tokens, hidden], as multi-head attention with keys and values of each head spelled out."""
        q_nope, q_rope = self.queries(x, position)
        row = self.cache_rows(x, position)
        keys = torch.einsum("tc,hnc->thn", row[:, :LATENT], self.k_up)
        values = torch.einsum("tc,hcv->thv", row[:, :LATENT], self.v_up)
        scores = torch.einsum("qhn,khn->hqk", q_nope, keys) + torch.einsum("qhr,kr->hqk", q_rope, row[:, LATENT:])
        hidden_keys = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = (scores * self.c.scale).masked_fill(hidden_keys, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khv->qhv", weights, values).flatten(-2) @ self.out


class Model:
    def __init__(self, c: Config, seed: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, fan_in: int = 0) -> Tensor:
            weights = torch.randn(shape, generator=generator) * (fan_in or shape[-2]) ** -0.5
            return weights.to(device, dtype)

        self.c = c
        self.embedding = random(c.vocab, c.hidden, fan_in=1)
        self.layers = [Layer(c, random) for _ in range(c.layers)]
        self.head = random(c.hidden, c.vocab)

    def forward(self, tokens: Tensor, position: Tensor, attend: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """Logits. attend(layer, x, position) gives the attention output of a layer for its normalised input."""
        x = self.embedding[tokens]
        for index, layer in enumerate(self.layers):
            x = x + attend(index, rms_norm(x), position)
            x = x + layer.mlp(rms_norm(x))
        return (rms_norm(x) @ self.head).float()

    def dense_logits(self, tokens: Tensor) -> Tensor:
        position = torch.arange(len(tokens), device=tokens.device)
        return self.forward(tokens, position, lambda i, x, p: self.layers[i].dense_attention(x, p))


# ------------------------------------------------------------------------------------------------------------- the cache


class Cache:
    """Pages that requests take as they grow and give back at their end; the same page ids in every layer. Page 0 is a bin for the
    rows of idle batch slots. New memory is NaN: whoever reads a row that was never written shows."""

    def __init__(self, c: Config, pages: int, device: str, dtype: torch.dtype) -> None:
        self.layers = torch.full((c.layers, pages, PAGE, 1, LATENT + ROPE), torch.nan, device=device, dtype=dtype)
        self.free_pages = list(range(1, pages))

    def grow(self, owned: list[int], tokens: int) -> bool:
        """Pages for so many tokens, or False if there are not enough."""
        missing = -(-tokens // PAGE) - len(owned)
        if missing > len(self.free_pages):
            return False
        owned += [self.free_pages.pop() for _ in range(missing)]
        return True

    def free(self, owned: list[int]) -> None:
        self.free_pages += owned
        owned.clear()

    def write(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        self.layers[layer].view(-1, LATENT + ROPE)[slots.flatten()] = rows.flatten(0, -2)


# --------------------------------------------------------------------------------------------------------- the attentions


class Attention(Protocol):
    """Attention of q [batch, q_len, heads, 576] over the paged cache."""

    name: str

    def begin_step(self, lengths: Tensor) -> None:
        """Once a step: cached tokens of each request, those of this step included; 0 for an idle slot."""

    def __call__(self, q: Tensor, cache: Tensor, table: Tensor) -> Tensor:
        """Once a layer: [batch, q_len, heads, LATENT]."""


class PlainTorch:
    """What an engine has without a kernel: gather each request's pages, two matrix products and a softmax."""

    name = "plain torch"

    def __init__(self, c: Config) -> None:
        self.c = c

    def begin_step(self, lengths: Tensor) -> None:
        self.lengths = lengths.tolist()

    def __call__(self, q: Tensor, cache: Tensor, table: Tensor) -> Tensor:
        out = torch.zeros_like(q[..., :LATENT])
        q_len = q.shape[1]
        for b, length in enumerate(self.lengths):
            if length == 0:
                continue
            rows = cache[table[b, : -(-length // PAGE)].long()].reshape(-1, LATENT + ROPE)[:length]
            scores = (q[b] @ rows.T).float() * self.c.scale  # [q_len, heads, length]
            if q_len > 1:
                scores = scores.masked_fill(
                    torch.ones(q_len, length, device=q.device).triu(length - q_len + 1).bool()[:, None], -torch.inf
                )
            out[b] = scores.softmax(-1).to(q.dtype) @ rows[:, :LATENT]
        return out


class Mlakit:
    name = "mlakit"

    def __init__(self, c: Config, batch: int, q_len: int, max_len: int, device: str, dtype: torch.dtype) -> None:
        self.plan = mlakit.Plan(
            mlakit.Problem(
                device=device,
                q_dtype={torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype],  # type: ignore[arg-type]
                max_batch=batch,
                q_len=q_len,
                max_len=max_len,
                q_heads=c.heads,
                page_size=PAGE,
                causal=True,
                softmax_scale=c.scale,
            ),
            mlakit.Context(num_threads=torch.get_num_threads()),
        )

    def begin_step(self, lengths: Tensor) -> None:
        self.schedule = self.plan.schedule(lengths)

    def __call__(self, q: Tensor, cache: Tensor, table: Tensor) -> Tensor:
        out: Tensor = self.plan.decode(q, cache, table, self.schedule, return_lse=False)[0]
        return out


# ------------------------------------------------------------------------------------------------------------- the engine


@dataclasses.dataclass
class Request:
    prompt: list[int]
    new_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)  # prompt and what was generated
    pages: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0  # tokens whose rows are in the cache and right

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= len(self.prompt) + self.new_tokens

    def draft(self) -> int:
        """A guess at the token after next: what followed the last token when it came before."""
        last = self.tokens[-1]
        for i in range(len(self.tokens) - 2, -1, -1):
            if self.tokens[i] == last:
                return self.tokens[i + 1]
        return last


class Step:
    """One forward pass of a fixed shape over buffers of its own, so that it can be a CUDA graph: [slots, q_len] tokens."""

    def __init__(self, model: Model, cache: Cache, attention: Attention, slots: int, q_len: int, max_len: int) -> None:
        self.model, self.cache, self.attention, self.q_len = model, cache, attention, q_len
        device = cache.layers.device
        self.tokens, self.position, self.slot = (torch.zeros(slots, q_len, dtype=torch.int64, device=device) for _ in range(3))
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self.table = torch.full((slots, -(-max_len // PAGE)), -1, dtype=torch.int32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.next: Tensor = torch.empty(0)

    def forward(self) -> Tensor:
        self.attention.begin_step(self.lengths)

        def attend(index: int, x: Tensor, position: Tensor) -> Tensor:
            layer = self.model.layers[index]
            self.cache.write(index, self.slot, layer.cache_rows(x, position))
            return layer.output(self.attention(layer.absorbed_query(x, position), self.cache.layers[index], self.table))

        return self.model.forward(self.tokens, self.position, attend).argmax(-1)

    def capture(self) -> None:
        """The whole step as one graph. Lengths, tables and tokens are read when it is replayed."""
        self.forward()  # plans, and what torch sets up at a first call
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.next = self.forward()

    def run(self, inputs: Sequence[tuple[Request, list[int]] | None]) -> list[list[int]]:
        """inputs: a request and its q_len tokens for each slot. Returns the greedy successor of each token."""
        tokens, position, slot, lengths, table = [], [], [], [], []
        for entry in inputs:
            request, new = entry or (None, [0] * self.q_len)
            begin = request.cached if request else 0
            places = range(begin, begin + self.q_len)
            pages = request.pages if request else []
            tokens.append(new)
            position.append(list(places))
            slot.append([pages[p // PAGE] * PAGE + p % PAGE if request else 0 for p in places])
            lengths.append(begin + self.q_len if request else 0)
            table.append(pages + [-1] * (self.table.shape[1] - len(pages)))
        for buffer, values in (
            (self.tokens, tokens),
            (self.position, position),
            (self.slot, slot),
            (self.table, table),
            (self.lengths, lengths),
        ):
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
        if self.graph is None:
            self.next = self.forward()
        else:
            self.graph.replay()
        successors: list[list[int]] = self.next.tolist()
        return successors


@dataclasses.dataclass
class Report:
    name: str
    seconds: float
    generated: int
    step_seconds: list[float]
    accepted: int

    def line(self) -> str:
        times = sorted(self.step_seconds)
        p50, p99 = (1e3 * times[min(int(share * len(times)), len(times) - 1)] for share in (0.50, 0.99))
        speculation = f"{self.accepted} drafts accepted" if self.accepted else ""
        speed = f"{self.generated / self.seconds:9.1f} tokens/s"
        return f"{self.name:<32}{speed}   p50 {p50:7.2f} ms   p99 {p99:7.2f} ms   {speculation}".rstrip()


class Engine:
    """Continuous batching: requests join as slots and pages become free, one prefill each, and leave when they are done."""

    def __init__(self, model: Model, *, slots: int, pages: int, max_len: int, q_len: int, use_mlakit: bool) -> None:
        device, dtype = str(model.head.device), model.head.dtype
        self.model, self.slots, self.q_len = model, slots, q_len
        self.cache = Cache(model.c, pages, device, dtype)
        attention: Attention = Mlakit(model.c, slots, q_len, max_len, device, dtype) if use_mlakit else PlainTorch(model.c)
        self.name = attention.name + (f", {q_len} tokens a step" if q_len > 1 else "")
        self.step = Step(model, self.cache, attention, slots, q_len, max_len)
        if use_mlakit and device.startswith("cuda"):
            self.step.capture()
            self.name += ", graph"

    def prefill(self, request: Request) -> None:
        """All of the prompt at once, densely: its rows go to the cache, its last logits give the first token."""
        tokens = torch.tensor(request.prompt, device=self.cache.layers.device)
        places = torch.arange(len(tokens), device=tokens.device)
        pages = torch.tensor(request.pages, device=tokens.device)
        slots = pages[places // PAGE] * PAGE + places % PAGE

        def attend(index: int, x: Tensor, position: Tensor) -> Tensor:
            layer = self.model.layers[index]
            self.cache.write(index, slots, layer.cache_rows(x, position))
            return layer.dense_attention(x, position)

        logits = self.model.forward(tokens, places, attend)
        request.tokens = [*request.prompt, int(logits[-1].argmax())]
        request.cached = len(request.prompt)

    def serve(self, requests: Sequence[Request]) -> Report:
        waiting, active = deque(requests), [None] * self.slots  # type: deque[Request], list[Request | None]
        steps: list[float] = []
        generated = accepted = 0
        decoding = 0.0
        while waiting or any(active):
            for i in range(self.slots):
                # Room for the whole answer is taken at once, so that no request has to be put back.
                if active[i] is None and waiting and self.cache.grow(waiting[0].pages, self._room(waiting[0])):
                    request = active[i] = waiting.popleft()
                    self.prefill(request)
            if not any(active):
                raise MemoryError(f"a request of {len(waiting[0].prompt)} tokens needs more pages than the cache has")
            begin = time.perf_counter()
            inputs = [(r, [r.tokens[-1], r.draft()][: self.q_len]) if r else None for r in active]
            successors = self.step.run(inputs)
            steps.append(time.perf_counter() - begin)
            decoding += steps[-1]
            for i, entry in enumerate(inputs):
                if entry is None:
                    continue
                request, new = entry
                taken = successors[i][:1]
                if self.q_len == 2 and taken[0] == new[1]:  # the draft was right, so the token after it is too
                    taken = successors[i]
                    accepted += 1
                request.cached += len(taken)  # the row of a wrong draft is written over by the next step
                room = len(request.prompt) + request.new_tokens - len(request.tokens)
                request.tokens += taken[:room]
                generated += min(len(taken), room)
                if request.is_done:
                    self.cache.free(request.pages)
                    active[i] = None
        return Report(self.name, decoding, generated, steps, accepted)

    def _room(self, request: Request) -> int:
        return len(request.prompt) + request.new_tokens + self.q_len


def check_against_dense(model: Model, requests: Sequence[Request], tolerance: float) -> None:
    """Every generated token is the dense model's greedy choice after the same tokens.

    tolerance: how far below the best logit a choice may be: 0 asks for the same token; 16-bit types need room for near ties.
    """
    for i, request in enumerate(requests):
        logits = model.dense_logits(torch.tensor(request.tokens[:-1], device=model.head.device))[len(request.prompt) - 1 :]
        chosen = torch.tensor(request.tokens[len(request.prompt) :], device=logits.device)
        behind = logits.max(-1).values - logits.gather(-1, chosen[:, None])[:, 0]
        wrong = (behind > tolerance) | (
            logits.argmax(-1) != chosen if tolerance == 0 else torch.zeros_like(behind, dtype=torch.bool)
        )
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise AssertionError(
                f"request {i}: token {at} is {int(chosen[at])}, the dense model's is {int(logits[at].argmax())}, "
                f"ahead by {behind[at]:.3g}"
            )


def cache_table(c: Config, itemsize: int) -> str:
    """Bytes a token of this model's cache, and of the same heads as multi-head and grouped-query attention."""
    head = c.nope + ROPE + c.value
    sizes = {"MLA": LATENT + ROPE, "MHA": c.heads * head, "GQA, 8 groups": min(8, c.heads) * head}
    return "KV cache, bytes a token:  " + "   ".join(f"{name} {c.layers * n * itemsize}" for name, n in sizes.items())


def make_requests(c: Config, count: int, longest: int, new_tokens: int, seed: int) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [Request(torch.randint(0, c.vocab, (n,), generator=generator).tolist(), new_tokens) for n in lengths]


def main(arguments: Sequence[str] | None = None) -> list[Report]:
    has_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="bf16" if has_gpu else "fp32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for torch and mlakit alike")
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--longest", type=int, default=1000, help="longest prompt, in tokens")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--slots", type=int, default=6, help="requests that decode at the same time")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(arguments)

    torch.set_num_threads(o.threads)
    c = Config()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[o.dtype]
    # 16-bit sums in another order move the logits, which are about 4, by up to 0.03: near ties may go either way.
    tolerance = 0.0 if o.dtype == "fp32" else 0.1
    reports = []
    with torch.inference_mode():
        model = Model(c, o.seed, o.device, dtype)
        max_len = o.longest + o.new_tokens + 2
        print(f"{o.requests} requests of up to {o.longest} tokens, {o.new_tokens} new each, {o.slots} at a time")
        print(f"{o.dtype} on {o.device}, {o.threads} CPU threads; times are of decoding steps")
        print(cache_table(c, dtype.itemsize))
        for use_mlakit, q_len in ((False, 1), (True, 1), (True, 2)):
            requests = make_requests(c, o.requests, o.longest, o.new_tokens, o.seed)
            engine = Engine(
                model, slots=o.slots, pages=1 + o.slots * -(-max_len // PAGE), max_len=max_len, q_len=q_len, use_mlakit=use_mlakit
            )
            reports.append(engine.serve(requests))
            check_against_dense(model, requests, tolerance)
            print(reports[-1].line())
    print(
        "every token is the dense model's greedy choice" + (f", or within {tolerance} of it in the logits" if tolerance else "")
    )
    return reports


if __name__ == "__main__":
    main()

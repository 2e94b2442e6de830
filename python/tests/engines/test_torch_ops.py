"""mlakit.torch_ops: torch.compile without graph breaks, mutation, fakes, autograd refused, CUDA-graph capture."""

from __future__ import annotations

import inspect
from typing import Any

import cases
import pytest
import torch

import mlakit
import mlakit.testing
from mlakit import torch_ops
from mlakit.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata

# torch.compile uses functions of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(bool(cases.no_gpu()), reason=cases.no_gpu() or "a GPU is there")
DEVICES = ["cpu", pytest.param("cuda", marks=(gpu, needs_gpu))]
CASE = cases.dense_case([130, 0, 65], q_len=2)
NO_BACKWARD = r"^mlakit has no backward pass, and an input requires grad: call it under torch.no_grad\(\) or detach the input$"
OPTIONS: dict[str, Any] = {"causal": True, "softmax_scale": cases.SCALE}


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_in_one_graph(device: str) -> None:
    inputs = cases.inputs_of(CASE, device=device)

    @torch.compile(fullgraph=True)
    def layer(q: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch_ops.mla_decode(q * 1, *rest, **OPTIONS)  # type: ignore[arg-type]
        return out * 1, lse * 1

    out, lse = layer(inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    cases.check(CASE, inputs, out, lse)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_code_sees_what_out_and_lse_become(device: str) -> None:
    """The reads after the call must not move before it, and the caller's tensors must be written."""
    inputs = cases.inputs_of(CASE, device=device)

    @torch.compile(fullgraph=True)
    def layer(out: torch.Tensor, lse: torch.Tensor, *call: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = out.sum()
        torch_ops.mla_decode(*call, out=out, lse=lse, **OPTIONS)  # type: ignore[arg-type]
        return before, out + 0

    buffer = torch.full((3, 2, 20, 512), float("nan"), dtype=torch.bfloat16, device=device)
    out = buffer[:, :, 2:18]
    lse = torch.full((3, 16, 2), float("nan"), device=device).transpose(1, 2)
    before, after = layer(out, lse, inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    assert torch.isnan(before)
    cases.check(CASE, inputs, out, lse)
    cases.check(CASE, inputs, after, lse)
    assert torch.isnan(buffer[:, :, :2]).all()
    assert torch.isnan(buffer[:, :, 18:]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_flash_mlas_call_compiles_in_one_graph(device: str) -> None:
    inputs = cases.inputs_of(CASE, device=device)

    @torch.compile(fullgraph=True)
    def layer(*call: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        metadata, _ = get_mla_metadata()
        return flash_mla_with_kvcache(*call, 512, metadata, None, cases.SCALE, True)

    out, lse = layer(inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    cases.check(CASE, inputs, out, lse.transpose(1, 2), empty_lse=float("inf"))


def test_dynamic_batch_compiles_once() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def layer(*call: torch.Tensor) -> torch.Tensor:
        return torch_ops.mla_decode(*call, **OPTIONS)[0]  # type: ignore[arg-type]

    for lengths in ([130, 0, 65], [7, 300], [64, 64, 64, 1]):
        case = cases.dense_case(lengths, q_len=2)
        inputs = cases.inputs_of(case)
        cases.check(case, inputs, layer(inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens), None)
    assert len(compiled) == 1


def test_ragged_two_view_and_merge_operators() -> None:
    case = mlakit.testing.mla_case([100, 0, 65], "ragged", q_len=3, q_lens=(1, 3, 2), is_split=True)
    inputs = cases.inputs_of(case)

    @torch.compile(fullgraph=True)
    def layer(
        q: torch.Tensor, rope: torch.Tensor, cu: torch.Tensor, latent: torch.Tensor, kv_rope: torch.Tensor, *rest: torch.Tensor
    ) -> Any:
        out, lse = torch_ops.mla_decode(q, (latent, kv_rope), *rest, q_rope=rope, cu_seqlens_q=cu)  # type: ignore[arg-type]
        return torch_ops.merge_states(torch.stack([out, out]), torch.stack([lse, lse]))

    out, lse = layer(
        *(inputs.q, inputs.q_rope, inputs.cu_seqlens_q, inputs.kv_cache, inputs.kv_rope, inputs.block_table, inputs.cache_seqlens)
    )
    cases.check(case, inputs, out, lse - torch.log(torch.tensor(2.0)))  # the same keys twice


def operands(inputs: Any) -> tuple[Any, ...]:
    call = (inputs.q, None, inputs.kv_cache, None, inputs.block_table, inputs.cache_seqlens, None, None, None)
    return (*call, 512, True, cases.SCALE, "e", "balanced", 0, 1, 0, 0)


def test_torchs_own_checks_of_the_operators() -> None:
    """Schema against what is really written, fakes against real results, autograd registration, AOT dispatch."""
    inputs = cases.inputs_of(cases.dense_case([130, 0, 65], q_len=2))
    torch.library.opcheck(torch.ops.mlakit.decode.default, operands(inputs))
    results = (torch.empty(3, 2, 16, 512, dtype=torch.bfloat16), torch.empty(3, 2, 16))
    torch.library.opcheck(torch.ops.mlakit.decode_into.default, (*results, *operands(inputs)))
    torch.library.opcheck(torch.ops.mlakit.merge_states.default, (torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4), "e"))


@pytest.mark.parametrize("name", ["q", "kv_cache"])
@pytest.mark.parametrize("function", [torch_ops.mla_decode, mlakit.mla_decode], ids=["operator", "plain"])
def test_autograd_is_refused_at_the_call(function: Any, name: str) -> None:
    """Rather than a result without a gradient."""
    inputs = cases.inputs_of(CASE)
    call = {"q": inputs.q, "kv_cache": inputs.kv_cache, "block_table": inputs.block_table, "cache_seqlens": inputs.cache_seqlens}
    call[name] = call[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=NO_BACKWARD):
        function(**call, **OPTIONS)
    with torch.no_grad():
        out, lse = function(**call, **OPTIONS)
    cases.check(CASE, inputs, out, lse)
    assert not out.requires_grad


def test_autograd_is_refused_by_plans_and_merges() -> None:
    inputs = cases.inputs_of(CASE)
    plan = mlakit.Plan(CASE.problem)
    call = (inputs.q.requires_grad_(), inputs.kv_cache, inputs.block_table, plan.schedule(inputs.cache_seqlens))
    parts = torch.zeros(2, 1, 1, 8, requires_grad=True)
    for refused in (
        lambda: plan.decode(*call),
        lambda: plan.bind(*call, out=inputs.out),
        lambda: mlakit.merge_states(parts, torch.zeros(2, 1, 1)),
        lambda: torch_ops.merge_states(parts, torch.zeros(2, 1, 1)),
    ):
        with pytest.raises(RuntimeError, match=NO_BACKWARD):
            refused()


def test_the_operator_and_the_plain_call_give_the_same_bits() -> None:
    inputs = cases.inputs_of(CASE)
    call = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    for a, b in zip(torch_ops.mla_decode(*call, **OPTIONS), mlakit.mla_decode(*call, **OPTIONS), strict=True):
        assert cases.has_same_bits(a, b)


@gpu
@needs_gpu
@pytest.mark.parametrize("side_stream", [False, True])
def test_work_goes_to_torchs_current_stream(side_stream: bool) -> None:
    """q is made by slow work on the current stream: a decode on any other stream would read it too early."""
    inputs = cases.inputs_of(CASE, device="cuda")
    call = (inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    with torch.cuda.stream(torch.cuda.Stream() if side_stream else torch.cuda.current_stream()):
        q = torch.full_like(inputs.q, float("nan"))
        torch.cuda._sleep(20_000_000)
        q.copy_(inputs.q)
        out, lse = mlakit.mla_decode(q, *call, **OPTIONS)
        torch.cuda.current_stream().synchronize()
    cases.check(CASE, inputs, out, lse)


@gpu
@needs_gpu
def test_the_operator_can_be_captured() -> None:
    inputs = cases.inputs_of(CASE, device="cuda")
    call = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    torch_ops.mla_decode(*call, **OPTIONS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = torch_ops.mla_decode(*call, **OPTIONS)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    cases.check(CASE, inputs, out, lse)


def test_the_operator_has_every_argument_of_the_plain_call() -> None:
    """But those of the host: a context, and a stream, which is torch's current one."""
    plain, operator = (inspect.signature(f).parameters for f in (mlakit.mla_decode, torch_ops.mla_decode))
    assert set(plain) - set(operator) == {"context", "stream"}
    assert all(operator[name].default == plain[name].default for name in operator)


def test_a_shard_by_the_operator() -> None:
    """Rank 0 of 2 of a request of 3 tokens has tokens 0 and 2."""
    whole = cases.inputs_of(cases.dense_case([3]))
    page = whole.kv_cache[int(whole.block_table[0, 0])]
    case = cases.dense_case([2])
    inputs = cases.inputs_of(case)
    inputs.q, inputs.kv_cache, inputs.block_table = (
        whole.q,
        page[[0, 2]].repeat(32, 1, 1)[None],
        torch.zeros(1, 1, dtype=torch.int32),
    )
    call = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    out, lse = torch_ops.mla_decode(*call, **OPTIONS, cp_world=2, cp_rank=0, global_seqlens=whole.cache_seqlens)
    cases.check(case, inputs, out, lse)

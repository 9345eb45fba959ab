"""8-bit Linears against plain integer arithmetic, and the undo: the same objects, the same bits, whatever happened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import vidaccel
from tests.rounding import assert_rounded, bound_of_case
from tests.zoo.wan import CASES
from vidaccel import LinearPlan, LinearRule
from vidaccel.linear import quantise as module
from vidaccel.linear.quantise import quantise_one

T2V = CASES[0]
QKV = ("blocks.*.attn1.to_q", "blocks.*.attn1.to_k", "blocks.*.attn1.to_v")


@pytest.fixture
def pipe() -> Any:
    return T2V.make()


def undo_later() -> tuple[list[Callable[[], Any]], Callable[[Callable[[], Any]], None]]:
    steps: list[Callable[[], Any]] = []
    return steps, steps.append


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -128 to 127 and a scale for each row: the largest entry of a row maps to 127.5.

    In float32, as an entry of -127.5 goes one way or the other by its last bit.
    """
    scale = (x.abs().amax(1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    return (x * (1.0 / scale)).round().clamp(-128, 127), scale.double()


def oracle(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """One token and one output channel after the other, sums in Python's integers."""
    (q, a), (w, b) = int8_rows(x.reshape(-1, x.shape[-1])), int8_rows(weight)
    out = torch.empty(len(q), len(w), dtype=torch.float64)
    rows, columns = q.int().tolist(), w.int().tolist()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            total = sum(left * right for left, right in zip(row, column, strict=True))
            out[i, j] = total * a[i, 0] * b[j, 0]
    return (out if bias is None else out + bias.double()).reshape(*x.shape[:-1], len(w))


@pytest.mark.parametrize("shape", [(48, 32), (33, 50), (16, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_int8_is_that_of_whole_numbers(shape: tuple[int, int], bias: bool) -> None:
    linear = nn.Linear(*shape, bias=bias).requires_grad_(False)
    x = torch.randn(2, shape[0], 5).transpose(1, 2) * torch.tensor([0.01, 1.0, 30.0, 1.0, 0.0])[:, None]
    assert not x.is_contiguous()
    expected, exact = oracle(x, linear.weight, linear.bias), linear(x).double()
    steps, on_close = undo_later()
    quantise_one(linear, "int8", "it", on_close)
    found = linear(x).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float((expected - exact).norm() / exact.norm()) > 1e-3
    steps.pop()()
    assert torch.equal(linear(x).double(), exact)


def test_the_largest_whole_numbers_do_not_overflow() -> None:
    """Processors without VNNI add pairs of int8 products in 16 bits, where 2 * 127 * 255 does not fit."""
    linear = nn.Linear(512, 8, bias=False).requires_grad_(False)
    linear.weight.fill_(2.0)
    x = torch.stack([torch.full((512,), sign) for sign in (3.0, -3.0)])
    exact = linear(x).double()
    quantise_one(linear, "int8", "it", undo_later()[1])
    assert (linear(x).double() / exact - 1).abs().max() < 0.01


@pytest.mark.parametrize("plan", ["dense", "sta"])
def test_unpatching_puts_the_same_objects_back(pipe: Any, plan: str) -> None:
    before = {name: (p, p.detach().clone()) for name, p in pipe.transformer.named_parameters()}
    exact = T2V.run(pipe)
    attributes = {name: set(part.__dict__) for name, part in pipe.transformer.named_modules()}
    session = vidaccel.patch(pipe, plan, linear="int8")
    found = T2V.run(pipe)
    assert 1e-5 < float((found - exact).norm() / exact.norm()) < 0.02
    changed = [n for n, p in pipe.transformer.named_parameters() if p is not before[n][0]]
    assert len(changed) == 20 and all("attn" in name or "ffn" in name for name in changed)
    assert session.plan.linear == LinearPlan.uniform("int8")
    assert "Linears in int8: 20" in str(session.report())
    vidaccel.unpatch(pipe)
    after = dict(pipe.transformer.named_parameters())
    assert list(after) == list(before)
    assert all(after[n] is p and torch.equal(after[n], bits) for n, (p, bits) in before.items())
    assert {name: set(part.__dict__) for name, part in pipe.transformer.named_modules()} == attributes
    assert torch.equal(T2V.run(pipe), exact)


def test_a_plan_says_which_linears() -> None:
    pipe = T2V.make()
    plan = LinearPlan((LinearRule("native", layers=(1,)), LinearRule("int8", QKV)))
    session = vidaccel.patch(pipe, vidaccel.Plan("some", linear=plan))
    rows = [row for row in session.report().linear if "precision" in row]
    assert sorted(row["module"] for row in rows) == sorted(QKV)
    assert all(row["layers"] == [0] and row["precision"] == "int8" for row in rows)
    vidaccel.unpatch(pipe)
    session = vidaccel.patch(pipe, vidaccel.Plan("some", linear=plan), linear="none")
    assert session.plan.linear is None and not session.report().linear


def test_only_one_of_two_transformers() -> None:
    from tests.tiny_wan import tiny_wan

    pipe = tiny_wan(dual=True, text=False)
    vidaccel.patch(pipe, "dense", linear=LinearPlan((LinearRule("int8", transformer="transformer_2"),)))
    assert type(pipe.transformer.blocks[0].attn1.to_q.weight) is nn.Parameter
    assert type(pipe.transformer_2.blocks[0].attn1.to_q.weight) is not nn.Parameter


def test_names_and_layers_that_are_not_there(pipe: Any) -> None:
    with pytest.raises(
        vidaccel.ConfigError, match=r"names blocks\.\*\.attn3\.to_q, which transformer lacks; it has blo"
    ):
        vidaccel.patch(pipe, "dense", linear=LinearPlan((LinearRule("int8", ("blocks.*.attn3.to_q",)),)))
    with pytest.raises(vidaccel.ConfigError, match="names layer 7, and the last one of transformer there is 1"):
        vidaccel.patch(pipe, "dense", linear=LinearPlan((LinearRule("int8", QKV, (7,)),)))
    with pytest.raises(vidaccel.ConfigError, match="linear is 'int4'; valid are int8, fp8, none, or a LinearPlan"):
        vidaccel.patch(pipe, "dense", linear="int4")
    assert vidaccel.session_of(pipe) is None


def test_half_of_it_is_never_left_behind(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(pipe.transformer.named_parameters())
    count, real = [0], module.config_of

    def third_fails(precision: str) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("no such kernel\nand a long story")
        return real(precision)

    monkeypatch.setattr(module, "config_of", third_fails)
    with pytest.raises(
        vidaccel.KernelError, match=r"cannot make transformer\.blocks.* int8: no such kernel; leave it out"
    ):
        vidaccel.patch(pipe, "dense", linear="int8")
    assert all(p is before[name] for name, p in pipe.transformer.named_parameters())
    assert vidaccel.session_of(pipe) is None


def test_what_is_quantised_already_is_left_and_told(pipe: Any) -> None:
    block = pipe.transformer.blocks[0]
    quantise_one(block.attn1.to_q, "int8", "it", undo_later()[1])
    block.ffn.net[2].weight.data = block.ffn.net[2].weight.data.to(torch.float8_e4m3fn)
    kept = block.attn1.to_q.weight
    session = vidaccel.patch(pipe, "dense", linear="int8")
    reasons = {row["module"]: row["reason"] for row in session.report().linear if "reason" in row}
    assert (
        reasons["blocks.*.attn1.to_q"].startswith("its weight is a ")
        and reasons["blocks.*.attn1.to_q"][-7:] == "already"
    )
    assert reasons["blocks.*.ffn.net.2"] == "its weight is stored as float8_e4m3fn already"
    assert "Linears left as they are: 1: its weight is stored" in str(session.report())
    vidaccel.unpatch(pipe)
    assert block.attn1.to_q.weight is kept
    with pytest.raises(
        vidaccel.StrictError, match="in layer 0 cannot be int8: its weight is a .* patch with strict=False"
    ):
        vidaccel.patch(pipe, "dense", linear="int8", strict=True)
    vidaccel.patch(pipe, "dense", linear="int8")
    with pytest.raises(vidaccel.AlreadyPatchedError):
        vidaccel.patch(pipe, "dense", linear="int8")


def test_a_model_with_nothing_left_to_quantise_is_refused(pipe: Any) -> None:
    pipe.transformer.to("meta")
    with pytest.raises(
        vidaccel.ConfigError, match=r"no Linear of transformer .* not in memory \(sequential offloading\)"
    ):
        vidaccel.patch(pipe.transformer, "dense", linear="int8")


# -- with other things ----------------------------------------------------------------------------------------------


def add_lora(model: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = ["to_q", "to_v", "proj"]
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear")
@pytest.mark.parametrize("first", ["lora", "patch"])
def test_lora_adds_to_the_quantised_linear(pipe: Any, first: str) -> None:
    other = T2V.make()
    add_lora(other.transformer)
    exact = T2V.run(other)
    plain = T2V.run(pipe)
    assert not torch.equal(exact, plain)
    if first == "lora":
        add_lora(pipe.transformer)
    session = vidaccel.patch(pipe, "dense", linear="int8")
    if first == "patch":
        add_lora(pipe.transformer)
    assert sum(len(row["layers"]) for row in session.report().linear if "precision" in row) == 20
    rows = session.report().linear
    assert all("lora_" not in row["module"] for row in rows if "precision" in row)
    assert all("base_layer" not in row["module"] for row in rows)
    found = T2V.run(pipe)
    assert float((found - exact).norm() / exact.norm()) < 0.02
    vidaccel.unpatch(pipe)
    assert torch.equal(T2V.run(pipe), exact)


def test_lora_is_not_fused_into_8_bits(pipe: Any) -> None:
    add_lora(pipe.transformer)
    exact = T2V.run(pipe)
    vidaccel.patch(pipe, "dense", linear="int8")
    with pytest.raises(
        vidaccel.PatchError, match=r"cannot be fused or unfused while its Linear is quantised; call vida"
    ):
        pipe.transformer.fuse_lora()
    vidaccel.unpatch(pipe)
    pipe.transformer.fuse_lora()
    fused = T2V.run(pipe)
    vidaccel.patch(pipe, "dense", linear="int8")
    with pytest.raises(vidaccel.PatchError, match="unfused"):
        pipe.transformer.unfuse_lora()
    vidaccel.unpatch(pipe)
    assert torch.equal(T2V.run(pipe), fused)
    pipe.transformer.unfuse_lora()
    assert_rounded(T2V.run(pipe), exact, bound_of_case(T2V))  # adding and taking off rounds the weights


def test_group_offloading_is_refused(pipe: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        pipe.transformer, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    with pytest.raises(vidaccel.PatchError, match="is under group offloading"):
        vidaccel.patch(pipe, "dense", linear="int8")


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_model_cpu_offload(pipe: Any, first: str) -> None:
    plain = T2V.run(T2V.make())
    reference = T2V.make()
    vidaccel.patch(reference, "dense", linear="int8")
    expected = T2V.run(reference)
    if first == "patch":
        vidaccel.patch(pipe, "dense", linear="int8")
    pipe.enable_model_cpu_offload(device="cpu")  # the only device here; the hooks are the same
    if first == "offload":
        vidaccel.patch(pipe, "dense", linear="int8")
    for _ in range(2):
        assert torch.equal(T2V.run(pipe), expected)
    vidaccel.unpatch(pipe)
    assert torch.equal(T2V.run(pipe), plain)


def test_moving_and_casting_while_patched(pipe: Any) -> None:
    weight = pipe.transformer.blocks[0].attn1.to_q.weight
    vidaccel.patch(pipe.transformer, "dense", linear="int8")
    pipe.transformer.to(torch.bfloat16)
    vidaccel.unpatch(pipe.transformer)
    assert pipe.transformer.blocks[0].attn1.to_q.weight is weight and weight.dtype == torch.bfloat16


@pytest.mark.parametrize("first", ["patch", "compile"])
def test_compiled_blocks(pipe: Any, first: str) -> None:
    torch._dynamo.reset()
    eager = T2V.make()
    vidaccel.patch(eager, "dense", linear="int8")
    expected = T2V.run(eager)
    counter = CompileCounterWithBackend("aot_eager")
    if first == "patch":
        vidaccel.patch(pipe, "dense", linear="int8")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    if first == "compile":
        vidaccel.patch(pipe, "dense", linear="int8")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = T2V.run(pipe)
        T2V.run(pipe, prompt="a green square")
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_on_a_gpu_weights_wait_on_the_cpu(precision: str) -> None:
    from vidaccel.linear.support import why_not

    reason = why_not(precision, "cuda")
    if reason is not None:
        pytest.skip(reason)
    linear = nn.Linear(1024, 2048, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 64, 1024, device="cuda", dtype=torch.bfloat16)
    weight, bits, exact = linear.weight, linear.weight.cpu().clone(), linear(x)
    before = torch.cuda.memory_allocated()
    steps, on_close = undo_later()
    quantise_one(linear, precision, "it", on_close)
    found = linear(x)
    assert weight.device.type == "cpu" and torch.cuda.memory_allocated() < before
    assert float((found - exact).float().norm() / exact.float().norm()) < (0.02 if precision == "int8" else 0.06)
    steps.pop()()
    assert linear.weight is weight and weight.device.type == "cuda" and torch.equal(weight.cpu(), bits)


@pytest.mark.parametrize("what", ["transformer", "pipeline"])
def test_saving_and_copying_are_refused_in_words(pipe: Any, what: str, tmp_path: Path) -> None:
    """The file would hold 8-bit weights that no ``from_pretrained`` reads, and a copy could not be undone."""
    session = vidaccel.patch(pipe, "dense", linear="int8")
    part = getattr(pipe, what, pipe)
    with pytest.raises(
        vidaccel.PatchError, match=r"cannot be saved while its Linears are quantized: .*unpatch\(pipe\)"
    ):
        part.save_pretrained(tmp_path / "out")
    with pytest.raises(vidaccel.PatchError, match="cannot be copied as it is, because it has quantized Linears"):
        copy.deepcopy(part)
    assert not session.closed
    vidaccel.unpatch(pipe)
    part.save_pretrained(tmp_path / "out")
    copy.deepcopy(part)

"""Other projects' kernels: what they are given, over stand-ins for them; none of them can run here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.helpers import assert_as_good_as_eager, eager, make_layout, random_mask
from tests.kernels.peers.stand_ins import STAND_INS, installed
from vidaccel.blockmask import BlockMask
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.errors import KernelError
from vidaccel.kernels import reference
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import kernels, select
from vidaccel.kernels.peers import limits, modules
from vidaccel.kernels.peers.pieces import pieces_of
from vidaccel.patterns.registry import build_static
from vidaccel.types import PRECISIONS

PEERS = {module.NAME: module for module in modules()}
CAPABILITY = {"flashinfer": (12, 0), "fastvideo": (9, 0), "flash-attention-4": (9, 0)}
LAYOUTS = {
    "uniform": make_layout((8, 8, 16), (4, 8, 4)),
    "uniform with text": make_layout((8, 8, 8), (4, 8, 4), text=256),
    "ragged": make_layout((5, 7, 9), (4, 6, 5)),
    "text": make_layout((3, 9, 11), (3, 5, 7), text=13),
    "text first": make_layout((3, 9, 11), (3, 5, 7), text=131, text_first=True),
    "small": make_layout((3, 5, 7), (2, 2, 3)),
}
WHOLE = ("uniform", "uniform with text")


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A peer whose stand-in is installed, on a GPU that it runs on. Its limits are looked at as they are elsewhere."""
    module = PEERS[request.param]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: CAPABILITY[request.param])
    monkeypatch.setattr(module, "why_not", lambda request: None)
    with installed(request.param, monkeypatch):
        yield module


def inputs(layout: Any, seed: int = 0, batch: int = 2) -> tuple[tuple[torch.Tensor, ...], BlockMask]:
    torch.manual_seed(seed)
    shape = (batch, layout.tokens, 3, 128)
    q, k, v = ((torch.randn(shape) + shift).bfloat16() for shift in (0.0, 0.7, 0.3))
    return (q, k, v), random_mask(layout, batch, [0.0, 0.4, 1.0])


def test_every_peer_has_a_stand_in() -> None:
    assert set(PEERS) == set(STAND_INS) == set(CAPABILITY)
    assert set(PEERS) <= {kernel.name for kernel in kernels()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_gets_the_same_blocks(peer: Any, name: str) -> None:
    layout = LAYOUTS[name]
    for seed in range(2):
        tensors, mask = inputs(layout, seed)
        if peer.NAME == "flash-attention-4" and name not in WHOLE:
            with pytest.raises(KernelError, match="blocks of 128 tokens without padding"):
                peer.block_sparse_attention(*tensors, layout, mask)
            continue
        exact = reference.block_sparse_attention(*tensors, layout, mask, out_dtype=torch.float64)
        out = peer.block_sparse_attention(*tensors, layout, mask)
        assert_as_good_as_eager(out, eager(*tensors, layout, mask), exact)


def test_one_mask_for_all_and_strided_inputs(peer: Any) -> None:
    layout = LAYOUTS["uniform"]
    _, mask = inputs(layout)
    shared = BlockMask.from_dense(mask.dense[:1, 1:2])
    joint = torch.randn(2, layout.tokens, 3, 3, 128).bfloat16()
    tensors = tuple(joint[:, :, i] for i in range(3))
    exact = reference.block_sparse_attention(*tensors, layout, shared, out_dtype=torch.float64)
    out = peer.block_sparse_attention(*tensors, layout, shared)
    assert_as_good_as_eager(out, eager(*tensors, layout, shared), exact)


def test_a_wrong_list_is_found(peer: Any) -> None:
    layout = LAYOUTS["uniform"]
    tensors, mask = inputs(layout)
    fewer = BlockMask((mask.kv_num_blocks - 1).clamp(min=1), mask.kv_indices)
    exact = reference.block_sparse_attention(*tensors, layout, mask, out_dtype=torch.float64)
    out = peer.block_sparse_attention(*tensors, layout, fewer)
    with pytest.raises(AssertionError):
        assert_as_good_as_eager(out, eager(*tensors, layout, mask), exact)


def test_a_rule_over_tokens_is_refused(peer: Any) -> None:
    layout = LAYOUTS["uniform"]
    tensors, _ = inputs(layout)
    mask = build_static(PatternSpec.make("neighborhood", window=[3, 3, 5], exact=True)).mask(layout)
    with pytest.raises(KernelError, match="a rule cuts some"):
        peer.block_sparse_attention(*tensors, layout, mask)


def test_another_scale(peer: Any) -> None:
    layout = LAYOUTS["uniform"]
    tensors, mask = inputs(layout, batch=2)
    if peer.NAME == "fastvideo":
        with pytest.raises(KernelError, match=r"its scale is 1/sqrt\(128\), and 0.2 is asked for"):
            peer.block_sparse_attention(*tensors, layout, mask, scale=0.2)
        return
    exact = reference.block_sparse_attention(*tensors, layout, mask, scale=0.2, out_dtype=torch.float64)
    out = peer.block_sparse_attention(*tensors, layout, mask, scale=0.2)
    larger = tuple(tensors[:1]) + tensors[1:]
    low = eager((larger[0] * (0.2 * 128**0.5)).bfloat16(), *larger[1:], layout, mask)
    assert_as_good_as_eager(out, low, exact)


@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_hold_every_token_once(name: str) -> None:
    layout = LAYOUTS[name]
    pieces = pieces_of(layout, 64, torch.device("cpu"))
    assert int(pieces.lengths.sum()) == layout.tokens and int(pieces.lengths.min()) >= 1
    x = torch.arange(layout.tokens).view(1, -1, 1, 1)
    padded = pieces.pad(x)
    assert padded.shape[1] == 64 * len(pieces.lengths) and torch.equal(pieces.unpad(padded), x)
    of_piece = layout.block_of_token[padded.flatten()].view(-1, 64)
    for row, length, block in zip(of_piece, pieces.lengths.tolist(), pieces.block.tolist(), strict=True):
        assert bool((row[:length] == block).all())


# -- when they run ----------------------------------------------------------------------------------------------------


def request(**changes: Any) -> KernelRequest:
    return replace(KernelRequest("cuda", torch.bfloat16, 128, PRECISIONS["native"]), **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device": "cpu"}, "runs on NVIDIA GPUs, not on cpu"),
        ({"precision": PRECISIONS["int8"]}, "'int8' is quantised"),
        ({"dtype": torch.float32}, "float32 is not supported"),
        ({"head_dim": 256}, "channels a head, not 256"),
        ({"tail": True}, "no pooled tail"),
        ({"return_lse": True}, "LSE"),
        ({"skip": True}, "cannot skip"),
        ({"variable": True}, "not of variable size"),
    ],
)
@pytest.mark.parametrize("name", PEERS)
def test_what_it_cannot_do_is_said(
    name: str, changes: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_is_there", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: CAPABILITY[name])
    (kernel,) = (one for one in kernels() if one.name == name)
    assert kernel.why_not(request()) is None
    assert text in str(kernel.why_not(request(**changes)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "not on 7.5" in str(kernel.why_not(request()))


@pytest.mark.parametrize("name", PEERS)
def test_what_is_not_installed_is_said(name: str) -> None:
    (kernel,) = (one for one in kernels() if one.name == name)
    assert "is not installed; pip install " in str(kernel.why_not(request()))


def test_they_run_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_is_there", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    failed = {"triton": "no", "flex": "no", "torch-sparse": "no"}
    with pytest.raises(KernelError, match=r"no kernel runs precision 'native' for torch.bfloat16 on cuda \(triton: "):
        select(request(), failed=failed)
    assert select(request(), prefer="fastvideo").name == "fastvideo"


def test_a_module_is_looked_up_without_running_its_parents() -> None:
    assert limits._is_there("vidaccel.kernels.peers.limits") and limits._is_there("torch")
    assert not limits._is_there("vidaccel.kernels.peers.nothing") and not limits._is_there("nothing.at.all")


def test_nothing_of_theirs_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, vidaccel; from vidaccel.kernels.dispatch import kernels, why_not_table;"
        "from vidaccel.kernels.contract import KernelRequest; from vidaccel.types import PRECISIONS; import torch;"
        "why_not_table(KernelRequest('cuda', torch.bfloat16, 128, PRECISIONS['native']));"
        "print([m for m in sys.modules if m.split('.')[0] in ('flashinfer', 'flash_attn', 'fastvideo_kernel')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

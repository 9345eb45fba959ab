"""The GPU benchmark's rows, with kernels, peers and clocks that a CPU has."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention, cuda_attention, cuda_run
from benchmarks.cuda_attention import HEADER, Deadline, Row, format_row, measure_shape
from benchmarks.peers import Bound, FastVideo, Flex, Peer, Sage, Sdpa, flex_lists, padded_pieces
from benchmarks.shapes import Shape
from benchmarks.timing import Ceilings, WallClock, interleaved
from tests.kernels.helpers import make_layout, random_mask, random_qkv
from tests.rounding import assert_rounded, rounding
from vidaccel.blockmask import BlockMask
from vidaccel.kernels.reference import block_sparse_attention as oracle
from vidaccel.layout import TokenLayout
from vidaccel.types import VideoGrid

SHAPE = Shape("small", VideoGrid(5, 7, 9), 2, 16, text=13)
CEILINGS = Ceilings(bf16=1e12, fp8=2e12, int8=None, bytes_per_second=1e12, missing=("int8: no",))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StandIn:
    """A peer that runs on a CPU, dense and right unless told otherwise."""

    name: str = "stand-in"
    sparse: bool = False
    tolerance: float = 0.0157
    factor: float = 1.0
    fails: bool = False
    reason: str | None = None

    def why_not(self, q: torch.Tensor) -> str | None:
        return self.reason

    def bind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask) -> Bound:
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")
        inputs = [x.transpose(1, 2) for x in (q, k, v)]
        return Bound(
            lambda: torch.nn.functional.scaled_dot_product_attention(*inputs) * self.factor,
            lambda out: out.transpose(1, 2),
        )


def rows_of(*peers: Peer, seconds: float = 600.0, **options: object) -> list[Row]:
    settings = {"densities": (1.0, 0.5), "masks": ("random", "sta"), "kernel": "torch-sparse", **options}
    return list(
        measure_shape(
            SHAPE,
            device=CPU,
            clock=WallClock(),
            ceilings=CEILINGS,
            peers=peers,
            deadline=Deadline(seconds),
            seconds_per_mask=0.0,
            **settings,
        )
    )


def test_rows_and_their_arithmetic() -> None:
    rows = rows_of(StandIn())
    ours = [row for row in rows if row.kernel == "torch-sparse" and row.precision == "native"]
    # dense once, and each kind of mask without and with the tail
    assert [(row.mask, row.tail) for row in ours] == [
        ("dense", False),
        ("random", False),
        ("random", True),
        ("sta", False),
        ("sta", True),
    ]
    for row in ours:
        assert row.status == "ok" and row.seconds and row.rounds == 3 and row.error is not None
        assert row.tflops == pytest.approx(4 * 2 * 328**2 * 16 * row.density / row.seconds / 1e12)
        assert row.of_ceiling == pytest.approx(row.tflops * 1e12 / CEILINGS.bf16)
        assert row.of_bytes == pytest.approx(4 * 2 * 328 * 16 * 2 / 1e12 / row.seconds)
        assert row.of_ideal and row.of_ideal > 0
        assert len(format_row(row)) == len(HEADER)
    layouts = [row for row in rows if row.kernel == "layout"]
    assert len(layouts) == 3 and all(row.status == "ok" and row.tflops is None for row in layouts)
    dense = [row for row in rows if row.kernel == "stand-in"]
    assert [row.of_ideal for row in dense] == [pytest.approx(1.0)] * 3 and {row.density for row in dense} == {1.0}
    # this kernel has no 8-bit precisions: rows with the reason, not gaps
    missing = [row for row in rows if row.precision == "int8"]
    assert missing and all(row.status == "skipped" and "quantised" in str(row.reason) for row in missing)


def test_failures_and_errors_are_rows() -> None:
    rows = rows_of(
        StandIn("broken", fails=True), StandIn("off", factor=1.05), StandIn("absent", reason="not installed")
    )
    told = {row.kernel: row for row in rows if row.mask == "dense"}
    assert told["broken"].status == "failed" and told["broken"].reason == (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    )
    assert told["off"].status == "wrong" and told["off"].seconds is None and "allowed" in str(told["off"].reason)
    assert told["absent"].status == "skipped" and "not installed" in format_row(told["absent"])
    # no dense kernel was right, so nothing is said about the ideal
    assert told["torch-sparse"].of_ideal is None


def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda_attention.kernel_of("torch-sparse")

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        out = right(*args, **kwargs)  # type: ignore[arg-type]
        assert isinstance(out, torch.Tensor)
        out[:, :, -1] *= 1.5
        return out

    replaced = replace(right, function=wrong)  # type: ignore[type-var]
    monkeypatch.setattr(cuda_attention, "kernel_of", lambda name: replaced)
    rows = [row for row in rows_of(StandIn()) if row.kernel == "torch-sparse" and row.precision == "native"]
    assert rows and all(row.status == "wrong" and row.seconds is None for row in rows)


def test_masks_after_the_deadline_are_rows() -> None:
    rows = rows_of(StandIn(), seconds=-1.0)
    assert len(rows) == 3 and all(row.status == "skipped" and "time" in str(row.reason) for row in rows)


def test_calls_take_turns() -> None:
    seen: list[str] = []
    times = interleaved(
        [lambda: seen.append("a"), lambda: seen.append("b")], WallClock(), seconds=0.0, least=3, warmups=2
    )
    assert "".join(seen) == "ab" * 5 and [len(t) for t in times] == [3, 3]


def test_ceilings_mix_the_formats() -> None:
    both = Ceilings(bf16=1.0, fp8=2.0, int8=2.0, bytes_per_second=1.0)
    assert both.of("native") == 1.0 and both.of("fp8-tile") == 2.0
    assert both.of("int8") == pytest.approx(4 / 3)  # half of the work at one, half at two
    assert CEILINGS.of("int8") is None and CEILINGS.of("native") == 1e12


@pytest.mark.parametrize(
    "peer", [Sdpa("x", torch.nn.attention.SDPBackend.MATH), Flex(), Sage(), FastVideo()], ids=lambda p: p.name
)
def test_peers_say_why_not_on_a_cpu(peer: Peer) -> None:
    reason = peer.why_not(torch.zeros(1, 4, 1, 64))
    assert reason and ("CUDA" in reason)


def test_flex_lists_say_the_same_as_the_mask() -> None:
    """Full blocks hold only kept pairs, blocks on neither list none, so with the mask function it is the same mask."""
    layout = make_layout((5, 7, 9), (2, 4, 4), text=13)
    mask = random_mask(layout, 1, [0.1, 0.6, 1.0])
    pairs = mask.token_mask(layout)
    partial, full = flex_lists(mask.dense, layout, size=32)
    starts = range(0, layout.tokens, 32)
    for head in range(3):
        for i, row in enumerate(starts):
            listed = {
                name: set(x.kv_indices[0, head, i, : int(x.kv_num_blocks[0, head, i])].tolist())
                for name, x in (("partial", partial), ("full", full))
            }
            for j, column in enumerate(starts):
                cell = pairs[0, head, row : row + 32, column : column + 32]
                assert (j in listed["full"]) == (bool(cell.all()) and cell.shape == (32, 32))
                assert (j in listed["partial"] or j in listed["full"]) == bool(cell.any())
                assert not (j in listed["partial"] and j in listed["full"])
    assert full.kv_num_blocks[0, 2].sum() > 0 and partial.kv_num_blocks[0, 0].sum() > 0


def from_indices(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, count: torch.Tensor, sizes: torch.Tensor
) -> tuple[torch.Tensor, None]:
    """What fastvideo-kernel's function of that name computes on [B,H,N*64,D], from its documentation."""
    keep = BlockMask(count, index).dense.repeat_interleave(64, -1).repeat_interleave(64, -2)
    real = (torch.arange(64) < sizes[:, None]).flatten()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep & real), None


def test_fastvideo_gets_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding tokens are no keys, and every token comes back to its place."""
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", SimpleNamespace(block_sparse_attn_from_indices=from_indices))
    layout = make_layout((5, 10, 9), (4, 8, 4), text=13)
    place, _, lengths = padded_pieces(layout, 64)
    assert len(place.unique()) == layout.tokens and lengths.max() == 64 and int(lengths.sum()) == layout.tokens
    mask = random_mask(layout, 1, [0.4, 0.9])
    q, k, v = random_qkv(layout, heads=2)
    bound = FastVideo().bind(q, k, v, layout, mask)
    exact = oracle(q, k, v, layout, mask, out_dtype=torch.float64)
    assert_rounded(bound.rows(bound.run()), exact, rounding(q, k, v).out)


def test_sage_is_called_heads_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def sageattn(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str, is_causal: bool
    ) -> torch.Tensor:
        assert tensor_layout == "HND" and not is_causal and q.shape[1] == 2
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    layout = make_layout()
    q, k, v = random_qkv(layout)
    bound = Sage().bind(q, k, v, layout, BlockMask.full(layout))
    exact = oracle(q, k, v, layout, BlockMask.full(layout), out_dtype=torch.float64)
    assert_rounded(bound.rows(bound.run()), exact, rounding(q, k, v).out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_cuda_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(["--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no CUDA device") and error.count("\n") == 1


def test_record_has_the_environment(tmp_path: Path) -> None:
    rows = rows_of(StandIn(), densities=(1.0,))
    cuda_run.write_record(tmp_path / "new" / "x.json", rows, CEILINGS, CPU)
    record = json.loads((tmp_path / "new" / "x.json").read_text())
    assert record["date"] and record["environment"]["packages"]["torch"] and record["ceilings"]["int8"] is None
    assert len(record["rows"]) == len(rows) and record["rows"][0]["status"] == "ok"
    assert "no int8: no" in cuda_run.ceilings_line(CEILINGS)


def test_options() -> None:
    parser = argparse.ArgumentParser()
    cuda_run.add_arguments(parser)
    args = parser.parse_args(["--shapes", "hunyuan", "--peers", "--minutes", "1"])
    assert args.shapes == ["hunyuan"] and args.peers == [] and args.densities == [1.0, 0.5, 0.2, 0.1, 0.05]

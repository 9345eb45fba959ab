"""``vidaccel doctor --test``: every kernel that runs here against float64, and what a CUDA machine would test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .console import show

if TYPE_CHECKING:
    import torch

    from ..kernels.contract import KernelRequest

__all__ = ["all_right", "on_cuda", "run_self_tests", "show_self_tests"]

#: Of Wan, HunyuanVideo and most others, and of CogVideoX and LTX-Video.
_HEAD_DIMS = (128, 64)
#: Blocks of 128 tokens, and of 64.
_TILES = ((4, 8, 4), (4, 4, 4))
#: What compute capability a precision first needs is found by asking for these.
_CAPABILITIES = ((8, 0), (8, 9), (10, 0), (12, 0))


def run_self_tests(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each kernel and kind of call that it can run here, with what was found."""
    import torch

    from ..errors import KernelError
    from ..kernels.dispatch import kernels
    from ..kernels.selftest import check_kernel
    from ..types import TileShape

    here, rows = torch.device(device), []
    for kernel in kernels()[:-1]:  # the last one is the oracle itself
        tiles = _TILES if kernel.compiled else _TILES[:1]
        for request in (one for one in _requests(here.type, dtype) if kernel.why_not(one) is None):
            for tile in (TileShape(*sizes) for sizes in tiles):
                row: dict[str, Any] = {"kernel": kernel.name, "call": _words(request), "block_tokens": tile.tokens}
                rows.append(row)
                try:
                    found = check_kernel(kernel, request, here, tile)
                except KernelError as error:  # the device answers nobody any more
                    row.update(outcome="wrong", told=str(error), seconds=0.0, fresh=True)
                    return rows
                verdict = found.verdict
                row.update(
                    outcome=verdict.outcome, told=str(verdict), seconds=round(found.seconds, 2), fresh=found.fresh
                )
    return rows


def _requests(device: str, dtype: torch.dtype) -> Iterator[KernelRequest]:
    """Every precision with head sizes of today's models, and in the model's own dtype what else plans ask for."""
    from ..kernels.contract import KernelRequest
    from ..types import PRECISIONS

    for precision in PRECISIONS.values():
        for head_dim in _HEAD_DIMS:
            request = KernelRequest(device, dtype, head_dim, precision, tail=True)
            yield request
            if not precision.quantised:
                yield replace(request, tail=False, skip=True)
                yield replace(request, variable=True)


def _words(request: KernelRequest) -> str:
    kind = "skipping" if request.skip else "blocks of any size, with the pooled tail" if request.variable else ""
    return f"{request.precision.name}, {request.head_dim} channels" + (f", {kind}" if kind else "")


def on_cuda() -> list[dict[str, str]]:
    """What the same command tests on a CUDA GPU, a row for each kernel that is made there, and from which GPU on."""
    from ..kernels.selftest import CASES
    from ..kernels.triton import lacks
    from ..types import PRECISIONS

    rows = []
    for name, precision in PRECISIONS.items():
        least = next((found for found in _CAPABILITIES if lacks(found, precision) is None), None)
        if least is not None:
            calls = f"{name}, {' and '.join(map(str, _HEAD_DIMS))} channels, blocks of 128 and 64 tokens, pooled tail"
            rows.append({"kernel": "triton", "calls": calls, "capability": ".".join(map(str, least))})
    rows.append({"kernel": "triton", "calls": "skipping, and blocks of any size", "capability": "8.0"})
    own = f"{len(CASES)} cases of the kernel for Hopper, in a process of its own"
    return [*rows, {"kernel": "triton", "calls": own, "capability": "9.0 alone"}]


def all_right(rows: list[dict[str, Any]]) -> bool:
    """Whether every kernel that could be tested is right, and one was."""
    return bool(rows) and all(row["outcome"] == "right" for row in rows)


def show_self_tests(rows: list[dict[str, Any]], device: str, dtype: torch.dtype) -> None:
    """Prints both as tables."""
    from rich.table import Table

    table = Table(title=f"self-tests on {device}, {str(dtype).removeprefix('torch.')}, against float64")
    for heading in ("kernel", "call", "blocks", "found", "seconds"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        seconds = f"{row['seconds']:.1f}" if row["fresh"] else "known"
        table.add_row(row["kernel"], row["call"], str(row["block_tokens"]), row["told"], seconds)
    table.caption = "Verdicts are kept until the device, its driver, torch, Triton or a kernel changes."
    show(table)
    if device.startswith("cuda"):
        return
    others = Table(title="what this command tests on a machine with a CUDA GPU")
    for heading in ("kernel", "calls", "compute capability, from"):
        others.add_column(heading, overflow="fold")
    for told in on_cuda():
        others.add_row(told["kernel"], told["calls"], told["capability"])
    show(others)

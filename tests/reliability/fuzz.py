"""Random attention calls through plan, pattern, kernel and compensation, against float64: ``make fuzz``.

::

    python -m tests.reliability.fuzz --cases 10000 --seed 0      one line for each case that fails, with its number
    python -m tests.reliability.fuzz --seed 0 --only 123         that case again

What is checked of every case:

* each kernel call against the oracle: output and log-sum-exp, uninitialised memory poisoned with NaN. The tolerance
  comes from the same computation done plainly in the inputs' dtype (:mod:`tests.kernels.helpers`), and for few-bit
  precisions from what the rounding itself costs;
* the layer's output, where nothing compensates, against a softmax over the kept token pairs in the order in which the
  tokens came, which knows nothing of layouts, blocks and token orders;
* skipping inside the kernel against loops over blocks;
* kernels that say that they cannot run a request refuse it, and only with a KernelError.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from tests.kernels.helpers import eager
from tests.kernels.variables import eager_variable
from tests.reliability.calls import Case, draw_case
from vidaccel.blockmask import BlockMask
from vidaccel.compensation import build_compensation
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.configs.plan import LayerPolicy
from vidaccel.engine.prepare import HeadGroup, prepare
from vidaccel.engine.run import run_heads
from vidaccel.errors import KernelError
from vidaccel.kernels import reference, variable
from vidaccel.kernels.contract import Kernel, Skips
from vidaccel.kernels.dispatch import kernels
from vidaccel.layout import TokenLayout
from vidaccel.patterns.dynamic import HeadOrder, Heads
from vidaccel.types import PRECISIONS, Precision
from vidaccel.variablemask import VariableBlockMask

__all__ = ["main", "run_case"]

Mask = BlockMask | VariableBlockMask
_NONE = build_compensation(CompensationSpec("none"))


@dataclass(eq=False)
class Recorder:
    """A kernel that notes its calls and compares each with the oracle."""

    kernel: Kernel
    calls: int = 0
    masks: list[Mask] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.name

    def why_not(self, request: Any) -> str | None:
        """The kernel's."""
        return self.kernel.why_not(request)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        mask: Mask,
        *,
        scale: float | None = None,
        precision: Precision = PRECISIONS["native"],
        tail: bool = False,
        return_lse: bool = False,
        skips: Skips | None = None,
    ) -> Any:
        """The kernel's result; with the log-sum-exp compared as well where no skipping counts twice."""
        self.calls += 1
        self.masks.append(mask)
        result = self.kernel(
            q, k, v, layout, mask, scale=scale, precision=precision, tail=tail, return_lse=True, skips=skips
        )
        assert isinstance(result, tuple)
        out, lse = result
        assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32
        if skips is None:
            compare(out, lse, q, k, v, layout, mask, scale, precision, tail)
            alone = self.kernel(q, k, v, layout, mask, scale=scale, precision=precision, tail=tail)
            assert isinstance(alone, torch.Tensor) and torch.equal(alone, out), "the LSE changes the output"
        return (out, lse) if return_lse else out


def compare(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: Mask,
    scale: float | None,
    precision: Precision,
    tail: bool,
) -> None:
    """A kernel's output and LSE against the oracle's."""
    assert torch.isfinite(out).all() and torch.isfinite(lse).all(), "not finite"

    def oracle(how: Precision) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"scale": scale, "precision": how, "tail": tail, "return_lse": True, "out_dtype": torch.float64}
        if isinstance(mask, BlockMask):
            return reference.block_sparse_attention(q, k, v, layout, mask, **options)  # type: ignore[return-value]
        return variable.oracle(q, k, v, mask, **options)  # type: ignore[return-value, arg-type]

    exact, exact_lse = oracle(PRECISIONS["native"])
    own = isinstance(mask, VariableBlockMask)
    plain = eager_variable(q, k, v, mask, tail=tail) if own else eager(q, k, v, layout, mask, tail)
    # the LSE is a sum of products of this size, each rounded to float32; 16-bit kernels may take a faster exp
    used = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    reach = float(torch.einsum("bihd,bjhd->bhij", q.double().abs(), k.double().abs()).max()) * used
    slack = 8 * torch.finfo(torch.float32).eps * (1 + reach) + torch.finfo(q.dtype).eps / 8 * (q.dtype != torch.float32)
    if not precision.quantised:
        as_good(out, plain, exact, v)
        error = float((lse.double() - exact_lse).abs().max())
        assert error <= slack, f"LSE off by {error:.2e}, allowed {slack:.2e}"
        return
    rounded, rounded_lse = oracle(precision)
    cost, error = (rounded - exact).abs(), (out.double() - rounded).abs()
    allowed = (plain.double() - exact).abs()
    unit = torch.finfo(out.dtype).eps * float(torch.maximum(exact.abs().max(), v.double().abs().max()))
    # a value near the middle of two steps may go either way, which costs one step of one value, not more than all cost
    assert error.max() <= cost.max() + 2 * allowed.max() + 2 * unit, (
        f"{error.max():.2e}, rounding costs {cost.max():.2e}"
    )
    assert error.mean() <= cost.mean() / 4 + 2 * allowed.mean() + unit, f"mean {error.mean():.2e} of {cost.mean():.2e}"
    lse_cost = float((rounded_lse - exact_lse).abs().max())
    off = float((lse.double() - rounded_lse).abs().max())
    assert off <= slack + lse_cost / 4, f"LSE off by {off:.2e}, rounding costs {lse_cost:.2e}"


def as_good(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, v: torch.Tensor) -> None:
    """Errors against float64 are at most twice those of plain arithmetic, and the rounding of a sum over the keys.

    The latter is there for tokens that are all alike: plain sums of them may be exact by luck, and every output is off
    by the same.
    """
    error, allowed = (got.double() - exact).abs(), (plain.double() - exact).abs()
    sums = torch.finfo(torch.float32).eps * (2 + math.log2(v.shape[1])) * float(v.double().abs().max())
    unit = torch.finfo(got.dtype).eps * float(exact.abs().max()) + sums
    most, mean = 2 * allowed.max() + 2 * unit, 2 * allowed.mean() + (unit - sums) / 4 + sums
    assert error.max() <= most, f"error {error.max():.2e}, allowed {most:.2e}"
    assert error.mean() <= mean, f"mean error {error.mean():.2e}, allowed {mean:.2e}"


def run_case(case: Case) -> int:
    """Runs one case; returns how many kernel calls were compared.

    Raises:
        AssertionError: if something is not as it should be; any other exception is a finding as well.
    """
    layout = case.layout
    memories: dict[int, dict[str, Any]] = {}
    calls = 0
    for step in range(case.steps):
        q, k, v = case.tensors(step)
        heads = Heads(q, k, v, layout, noise_level=1 - step / 4, step=step)
        for number, group in enumerate(prepare(LayerPolicy(case.policies), case.heads, layout)):
            mine = heads if group.heads is None else heads.only(group.heads)
            with poisoned():
                calls += _run_group(case, group, mine, memories.setdefault(number, {}))
    return calls


def _run_group(case: Case, group: HeadGroup, heads: Heads, memory: dict[str, Any]) -> int:
    request = group.request(heads.q)
    # not what runs by name alone: FlexAttention is compiled for each shape
    able = [k for k in kernels()[:-1] if k.why_not(request) is None and request.device not in k.by_name]
    for kernel in kernels():
        if kernel.why_not(request) is not None:
            _refuses(kernel, group, heads)
    calls = 0
    # the oracle alone skips inside on a CPU; what remembers is run by one kernel only, or it would remember twice
    for kernel in able[:1] if able else [k for k in kernels() if k.name == "reference"]:
        recorder = Recorder(kernel)
        orders: list[HeadOrder | None] = []
        with _noted_order(group, orders):
            out, density = run_heads(recorder, group, heads, memory)
        assert out.shape == heads.q.shape and out.dtype == heads.q.dtype
        assert torch.isfinite(out).all(), "the output is not finite"
        assert 0 <= density <= 4, f"density {density}"
        calls += recorder.calls
        if group.compensation == _NONE and not group.precision.quantised and not group.skip:
            _in_the_order_they_came(heads, out, recorder.masks[0], orders[0] if orders else None)
        if group.skip:
            _skips_as_loops_do(heads, recorder.masks[0], group, orders[0] if orders else None)
    return calls


def _refuses(kernel: Kernel, group: HeadGroup, heads: Heads) -> None:
    skips = Skips.of(-1.0, heads.q) if group.skip else None
    mask: BlockMask | VariableBlockMask = BlockMask.full(heads.layout)
    if group.pattern is not None and group.pattern.variable:
        b, s, h, _ = heads.q.shape
        sizes = torch.full((b, h, 1), s)
        mask = VariableBlockMask(torch.ones(b, h, 1, 1, dtype=torch.bool), sizes, sizes)
    try:
        kernel(
            heads.q, heads.k, heads.v, heads.layout, mask, precision=group.precision,
            tail=group.compensation.tail, return_lse=group.compensation.lse, skips=skips,
        )  # fmt: skip
    except KernelError:
        return
    raise AssertionError(f"{kernel.name} says that it cannot run this, and runs it")


def _in_the_order_they_came(heads: Heads, out: torch.Tensor, mask: Mask, order: HeadOrder | None) -> None:
    """Kept pairs of tokens taken back to the order of q and k; then a softmax over them, nothing else."""
    b, s, h, _ = heads.q.shape
    keep = mask.token_mask(heads.layout).expand(b, h, s, s)
    if order is not None:
        rows, columns = (torch.argsort(x.expand(b, h, s), -1) for x in (order.q, order.k))
        keep = keep.gather(2, rows[..., None].expand(b, h, s, s)).gather(3, columns[:, :, None].expand(b, h, s, s))
    # text is seen by all and sees all, whatever the pattern
    text = torch.ones(s, dtype=torch.bool)
    text[heads.layout.video_start : heads.layout.video_start + heads.layout.grid.tokens] = False
    assert keep[:, :, text].all() and keep[..., text].all(), "text is not attended by all, or does not attend all"

    def softmax(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in tensors)
        return ((q @ k.mT * heads.scale).masked_fill(~keep, -math.inf).softmax(-1) @ v).transpose(1, 2)

    exact = softmax(heads.q.double(), heads.k.double(), heads.v.double())
    as_good(out, softmax(heads.q, heads.k, heads.v), exact, heads.v)


def _skips_as_loops_do(heads: Heads, mask: BlockMask, group: HeadGroup, order: HeadOrder | None) -> None:
    """The oracle's skipping, written out: one query block and one key block at a time."""
    given, layout = heads if order is None else heads.reordered(order), heads.layout
    limit = math.log(min(1.0, group.skip / layout.tokens))
    skips = Skips.of(limit, given.q)
    found = reference.block_sparse_attention(
        given.q, given.k, given.v, layout, mask, precision=group.precision, skips=skips, out_dtype=torch.float64
    )
    if group.precision.quantised:
        assert isinstance(found, torch.Tensor) and torch.isfinite(found).all()
        return
    offsets = layout.block_offsets.tolist()
    blocks = [range(a, b) for a, b in itertools.pairwise(offsets)]
    tokens = mask.token_mask(layout)
    for b in range(given.q.shape[0]):
        for h in range(given.q.shape[2]):
            q, k, v = (x[b, :, h].double() for x in (given.q, given.k, given.v))
            kept = tokens[b % len(tokens), h % tokens.shape[1]]
            scores = (q @ k.T * given.scale).masked_fill(~kept, -math.inf)
            listed = mask.dense[b % mask.shape[0], h % mask.shape[1]]
            passed = 0
            for i, rows in enumerate(blocks):
                top = torch.full((len(rows),), -math.inf, dtype=torch.float64)
                for j in listed[i].nonzero().flatten().tolist():
                    part = scores[rows.start : rows.stop, blocks[j].start : blocks[j].stop]
                    top = torch.maximum(top, part.amax(-1))
                    near = (part.amax(-1) - top.masked_fill(top.isneginf(), 0.0)).max()
                    if near < float(skips.threshold[h]):
                        part.fill_(-math.inf)
                        passed += part.numel()
            wanted = scores.softmax(-1) @ v
            assert int(skips.skipped[b, h]) == passed, (
                f"{int(skips.skipped[b, h])} pairs passed over, loops say {passed}"
            )
            torch.testing.assert_close(found[b, :, h], wanted, rtol=1e-9, atol=1e-9)


@contextmanager
def _noted_order(group: HeadGroup, orders: list[HeadOrder | None]) -> Iterator[None]:
    """Notes what a dynamic pattern orders."""
    if group.pattern is None:
        yield
        return
    cls = type(group.pattern)
    original: Callable[..., Any] = cls.order

    def order(self: Any, heads: Heads) -> HeadOrder | None:
        found = original(self, heads)
        if self is group.pattern:
            orders.append(found)
        return found  # type: ignore[no-any-return]

    with mock.patch.object(cls, "order", order):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills uninitialised memory with NaN, so that a row nobody wrote is not, by luck, right."""

    def nan(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return make

    with (
        mock.patch.object(torch, "empty", nan(torch.empty)),
        mock.patch.object(torch, "empty_like", nan(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", nan(torch.Tensor.new_empty)),
    ):
        yield


def failure(seed: int, number: int) -> str | None:
    """Why a case fails, in one line, or ``None``."""
    case: Case | None = None
    try:
        case = draw_case(seed, number)
        run_case(case)
        return None
    except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
        told = " ".join(str(error).split())[:300]
        kind = "" if type(error) is AssertionError else f"{type(error).__name__}: "
        return f"seed {seed} case {number}: {kind}{told} [{case}]"


def main() -> None:
    """Runs the cases that the command line asks for; exits with 1 if one fails."""
    parser = argparse.ArgumentParser(description="Random attention calls against float64.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="number of the one case to run, with its traceback")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only is not None:
        case = draw_case(given.seed, given.only)
        print(case, flush=True)
        try:
            print(f"{run_case(case)} kernel calls compared")
        except Exception:  # noqa: BLE001 - shown, and the exit code says so
            traceback.print_exc()
            sys.exit(1)
        return
    failed, began = 0, time.monotonic()
    for number in range(given.first, given.first + given.cases):
        found = failure(given.seed, number)
        if found is not None:
            failed += 1
            print(f"{found}\n  again: python -m tests.reliability.fuzz --seed {given.seed} --only {number}", flush=True)
        done = number - given.first + 1
        if done % 500 == 0:
            print(f"{done} cases of seed {given.seed}, {failed} failed, {time.monotonic() - began:.0f} s", flush=True)
    print(f"seed {given.seed}: {given.cases} cases from {given.first} on, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

"""What ``test_parallel.py`` runs: small models on one process, or on two that share each sequence.

    python -m tests.reliability.ranks FOLDER RANK     # one of two; both must run

Every scene gives the same inputs to the same weights, so what differs is who computes which heads.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from diffusers import ContextParallelConfig, LTXVideoTransformer3DModel

import vidaccel
from tests.tiny_wan import tiny_transformer
from vidaccel import CompensationSpec, Guard, HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape

__all__ = ["HEADS", "SCENES", "WORLD", "plan", "wan"]

WORLD = 2
TILE = TileShape(2, 4, 4)
EACH = 54  # tokens of a frame
EVEN, ODD = (5, 6, 9), (5, 7, 9)  # ragged in these tiles; 270 tokens are even, 315 are not

ULYSSES, RING = {"ulysses_degree": WORLD}, {"ring_degree": WORLD}
ANYTHING = {**ULYSSES, "ulysses_anything": True}

Found = dict[str, Any]
Scene = Callable[[bool], Found]


def window(*size: int) -> PatternSpec:
    return PatternSpec.make("sliding_tile", window=list(size))


#: A window for each head, blocks chosen in each call, plain attention, and means of what is skipped.
HEADS = (
    HeadPolicy(window(1, 1, 1)),
    HeadPolicy(PatternSpec.make("pooled_top_k", density=0.3)),
    HeadPolicy(),
    HeadPolicy(window(3, 1, 1), compensation="pooled_tail"),
)
#: Remembers blocks, and outputs, of earlier steps in each guidance branch; knows the head's number; works by clusters.
STATEFUL = (
    HeadPolicy(PatternSpec.make("reuse", drift=0.0, pattern=PatternSpec.make("pooled_top_k", density=0.3))),
    HeadPolicy(PatternSpec.make("shards", stride=4)),
    HeadPolicy(window(1, 1, 1), compensation=CompensationSpec.make("delta")),
    HeadPolicy(PatternSpec.make("clustered", pattern=PatternSpec.make("pooled_top_k", density=0.3), queries=4, keys=6)),
)


def plan(heads: Iterable[HeadPolicy], *, layers: tuple[int, ...] | None = None, low: float = 0.0) -> Plan:
    return Plan("test", (Rule(LayerPolicy(tuple(heads)), noise=(low, 1.0), layers=layers),), tile=TILE)


def wan(heads: int = 4) -> Any:
    torch.manual_seed(0)
    return tiny_transformer(num_attention_heads=heads)


def ltx() -> Any:
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64,
        num_layers=2, caption_channels=32,
    ).eval()  # fmt: skip


def wan_inputs(grid: tuple[int, int, int]) -> Found:
    """Two samples, with strides that are not those of a new tensor."""
    frames, rows, columns = grid
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(frames, 2 * rows, 2, 2 * columns, 16, generator=draw)
    return {
        "hidden_states": latents.permute(2, 4, 0, 1, 3),
        "encoder_hidden_states": torch.randn(2, 16, 32, generator=draw),
    }


def ltx_inputs(grid: tuple[int, int, int]) -> Found:
    frames, rows, columns = grid
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, frames * rows * columns, 8, generator=draw),
        "encoder_hidden_states": torch.randn(2, 16, 32, generator=draw),
        "encoder_attention_mask": None,  # diffusers splits it over heads twice, and fails
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }


@torch.no_grad()
def steps(model: Any, inputs: Found, noise: Iterable[int], of_tokens: int = 0) -> torch.Tensor:
    """The outputs of a schedule, with a conditional and an unconditional pass in each step.

    Args:
        of_tokens: how many tokens have timesteps of their own, the first frame's lower ones; 0 for one a sample.
    """
    found = []
    for level in noise:
        timestep = torch.full((2, of_tokens) if of_tokens else (2,), level)
        if of_tokens:
            timestep[:, :EACH] = level // 2
        for branch, sign in (("cond", 1), ("uncond", -1)):
            given = {**inputs, "hidden_states": sign * level / 1000 * inputs["hidden_states"]}
            with model.cache_context(branch):
                found.append(model(**given, timestep=timestep, return_dict=False)[0])
    return torch.stack(found)


def run(
    config: ContextParallelConfig | None,
    heads: Plan | None,
    *,
    make: Callable[[], Any] = wan,
    inputs: Found,
    patch_first: bool = True,
    spoil: Callable[[Any], None] | None = None,
    undo: bool = True,
    noise: Iterable[int] = (900, 600, 200),
    of_tokens: int = 0,
    **settings: Any,
) -> Found:
    """A short schedule: patched (unless there is no plan) and split over the ranks (if there is a configuration)."""
    model = make()
    if spoil is not None:
        spoil(model)
    if config is not None and not patch_first:
        model.enable_parallelism(config=config)
    session = None if heads is None else vidaccel.patch(model, heads, **settings)
    if config is not None and patch_first:
        model.enable_parallelism(config=config)
    try:
        out: Any = steps(model, inputs, noise, of_tokens)
        error = None
    except vidaccel.VidaccelError as refused:
        out, error = None, str(refused)
    found = {"out": out, "error": error, "report": None if session is None else session.report().to_dict()}
    if session is not None and error is None and undo:
        vidaccel.unpatch(model)
        found["unpatched"] = steps(model, inputs, [900], of_tokens)
    return found


def gates() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    shapes = {"weight": (64, 64), "bias": (64,)}
    return {
        f"blocks.{i}.to_gate_compress.{name}": torch.randn(*shape, generator=draw)
        for i in range(2)
        for name, shape in shapes.items()
    }


@torch.no_grad()
def spoil(model: Any) -> None:
    """Head 3 of layer 1 is not a number."""
    model.blocks[1].attn1.to_v.bias[3 * 16 :] = float("nan")


def scene(heads: Plan | None, inputs: Found, *, split: Found = ULYSSES, **named: Any) -> Scene:
    """A scene, as a function of whether two ranks share the sequence."""
    return lambda shared: run(ContextParallelConfig(**split) if shared else None, heads, inputs=inputs, **named)


_EVEN, _ODD, _LTX = wan_inputs(EVEN), wan_inputs(ODD), ltx_inputs(EVEN)
#: By name.
SCENES: dict[str, Scene] = {
    "heads": scene(plan(HEADS), _EVEN),
    "heads, split before": scene(plan(HEADS), _EVEN, patch_first=False),
    "heads, below half the noise dense": scene(plan(HEADS, low=0.5, layers=(1,)), _EVEN),
    "memories": scene(plan(STATEFUL), _EVEN),
    "gates": scene(plan([HeadPolicy(HEADS[1].pattern, compensation="coarse")]), _EVEN, weights=gates()),
    "any length": scene(plan(HEADS[:3]), _ODD, split=ANYTHING, make=partial(wan, 3)),
    # without the dense calls after unpatching: torch's attention gives no log-sum-exp, which diffusers' ring needs
    "ring": scene(plan(HEADS[:3]), _EVEN, split=RING, make=partial(wan, 3), undo=False),
    "ltx": scene(plan(HEADS), _LTX, make=ltx),
    "guard": scene(plan(HEADS), _EVEN, spoil=spoil, noise=[900]),
    "sampled guard": scene(plan(HEADS), _EVEN, guard=Guard(every=1, limit=1e-4), noise=[900]),
    "a timestep for each token": scene(plan(HEADS), _EVEN, of_tokens=5 * EACH),
    "dense": scene(Plan.dense(), _EVEN),
    "unpatched": scene(None, _EVEN),
    "three heads": scene(plan(HEADS[:3]), _EVEN, make=partial(wan, 3), noise=[900]),
}


def unequal_gather(into: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
    """What diffusers needs for sequences of any length: NCCL gathers parts of unequal size, and gloo does not."""
    for rank, part in enumerate(into):
        if rank == torch.distributed.get_rank(group):
            part.copy_(tensor)
        torch.distributed.broadcast(part, rank, group=group)


def main(folder: Path, rank: int) -> None:
    """Runs every scene as one of two ranks; what it found goes to a file."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers numbers the ranks' devices by it, and a CPU counts as none
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD
    )
    torch.distributed.all_gather = unequal_gather
    found: dict[str, Found] = {}
    for name, run_scene in SCENES.items():
        try:
            found[name] = run_scene(True)
        except Exception:  # noqa: BLE001 - told by the test; the other rank has it too
            found[name] = {"error": traceback.format_exc(), "out": None}
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Memory: nothing of the size of all token pairs exists, and what saves memory elsewhere works when patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import vidaccel
from benchmarks.live_bytes import LiveBytes
from benchmarks.memory import Call, Row, measure_call, measure_step, moments, table
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape, VideoGrid
from vidaccel.configs.presets import load_preset, preset_names
from vidaccel.engine.prepare import is_stateful
from vidaccel.kernels import torch_sparse
from vidaccel.layout import TokenLayout

pytestmark = pytest.mark.full

CPU = torch.device("cpu")
#: 1024, 2048 and 4096 tokens; one head, so that an L x L matrix cannot hide behind the heads.
GRIDS = (VideoGrid(8, 4, 32), VideoGrid(8, 8, 32), VideoGrid(8, 16, 32))
DIM = 32


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_names())
def test_memory_grows_with_the_tokens_and_not_with_their_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # where the gathered keys fill a whole chunk on the small grid already, as they do on real ones
    monkeypatch.setitem(torch_sparse._CHUNK_BYTES, "cpu", 1 << 18)
    plan = load_preset(name)
    remembers = any(is_stateful(head) for rule in plan.rules for head in rule.policy.heads)
    sizes = {"heads": 1, "dim": DIM, "visits": 2 if remembers else 1}
    # SVG2 has too few clusters of 1024 tokens to leave any of them out
    *_, half, grid = GRIDS if name == "svg2" else GRIDS[:2]
    small, large = (measure_call(plan, size, CPU, **sizes) for size in (half, grid))
    q_bytes = grid.tokens * DIM * 4
    # all tables over pairs of blocks together
    blocks = 128 * TokenLayout.of(grid, plan.tile).num_blocks ** 2
    assert large.largest is not None and large.largest.entries < grid.tokens**2 / 8, large.largest
    assert large.peak <= 2.3 * small.peak + blocks
    assert large.peak <= 32 * q_bytes + blocks
    assert large.kept <= 4 * q_bytes + blocks


# -- the measure itself -----------------------------------------------------------------------------------------------


def test_live_bytes_counts_what_is_alive() -> None:
    given = torch.ones(1000)
    with LiveBytes() as live:
        view = given.view(10, 100)[2:]  # no memory of its own
        first = view * 2
        again = first.transpose(0, 1).contiguous()
        del first
        assert (live.now, live.peak) == (3200, 6400)
        second = torch.zeros(50, dtype=torch.float64)
        assert (live.now, live.peak) == (3600, 6400)
        given.mul_(2)
    assert live.now == 3600 and live.largest.bytes == 3200 and live.largest.entries == 800
    del again, second
    assert live.now == 0


def test_live_bytes_sees_into_our_operator() -> None:
    plan = Plan("window", (Rule(LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1])),))),))
    grid = VideoGrid(4, 8, 8)
    step = measure_step(plan, grid, CPU)
    dense = measure_step(load_preset("dense"), grid, CPU)
    assert step is not None and dense is not None and step.peak > dense.peak  # gathered keys are seen


def test_an_attention_matrix_would_be_seen() -> None:
    q = torch.randn(1, 1, 512, 8)
    with LiveBytes() as live:
        out = (q @ q.mT).softmax(-1) @ q
    assert live.largest.entries == 512**2 and live.peak >= 2 * 512**2 * 4 and out.shape == q.shape


def test_moments_are_two_in_each_bin() -> None:
    found = list(moments(load_preset("sta")))
    assert found == sorted(found, reverse=True) and [level > 0.943 for level in found] == [True, True, False, False]


def test_the_table_names_the_largest_buffer() -> None:
    call = measure_call(load_preset("sta"), VideoGrid(2, 8, 8), CPU, heads=1, dim=8)
    row = Row("sta", "2x8x8", 128, 2, 4096, Call(8192, 0, call.largest), call, None, call)
    assert table([row]).splitlines()[-1].startswith("| sta | 2.0 |  | ")


# -- what saves memory elsewhere --------------------------------------------------------------------------------------

T2V = CASES[0]
TOP_K = PatternSpec.make("pooled_top_k", density=0.3)
WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])
SPARSE = Plan(
    "sparse",
    (
        Rule(LayerPolicy((HeadPolicy(WINDOW, compensation="pooled_tail"),)), layers=(0,)),
        Rule(LayerPolicy((HeadPolicy(TOP_K, compensation="coarse"),))),
    ),
    tile=TileShape(2, 2, 2),
)
GATES = {"blocks.1.to_gate_compress.weight": 0.1 * torch.ones(48, 48), "blocks.1.to_gate_compress.bias": torch.ones(48)}

Feature = Callable[[Any], None]


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")  # the only device here; the hooks are the same


def sequential_offload(pipe: Any) -> None:
    cpu_offload(pipe.transformer, execution_device="cpu")  # what enable_sequential_cpu_offload does to each part


def group_offload(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def leaf_offload(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


FEATURES = [model_offload, sequential_offload, group_offload, leaf_offload, layerwise_casting]


def patched(pipe: Any) -> vidaccel.Session:
    return vidaccel.patch(pipe, SPARSE, strict=True, weights=GATES)


@pytest.mark.parametrize("feature", FEATURES)
def test_offloading_and_casting(feature: Feature) -> None:
    """Before and after patching alike; bit for bit what it is without, where the feature itself changes no number."""
    plain = T2V.make()
    feature(plain)
    unpatched = T2V.run(plain)
    session = patched(plain)
    after = T2V.run(plain)
    report = session.report()
    assert report.sparse_calls == report.calls == 12 and not torch.equal(after, unpatched)
    vidaccel.unpatch(plain)
    vidaccel.patch(plain, "dense", strict=True)
    assert torch.equal(T2V.run(plain), unpatched)
    vidaccel.unpatch(plain)
    assert torch.equal(T2V.run(plain), unpatched)

    pipe = T2V.make()
    session = patched(pipe)
    without = T2V.run(pipe)
    feature(pipe)
    before = T2V.run(pipe)
    assert torch.equal(before, after)
    assert torch.equal(before, without) == (feature is not layerwise_casting)
    assert torch.equal(T2V.run(pipe), before) and session.report().sparse_calls == 36


@pytest.mark.parametrize("first", ["patch", "feature"])
def test_vae_tiling_and_slicing(first: str) -> None:
    """The VAE has attention of its own, which is not the transformer's."""
    assert T2V.two is not None
    two = {**T2V.two(), "output_type": "pt"}
    pipe = T2V.make()
    session = patched(pipe) if first == "patch" else None
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
    )
    session = session or patched(pipe)
    found = T2V.run(pipe, **two)
    assert session.report().sparse_calls == 12
    latents = T2V.run(pipe, **{**two, "output_type": "latent"})
    vidaccel.unpatch(pipe)
    assert not torch.equal(T2V.run(pipe, **{**two, "output_type": "latent"}), latents)
    mean, deviation = (
        torch.tensor(getattr(pipe.vae.config, name)).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        frames = pipe.vae.decode(latents * deviation + mean, return_dict=False)[0]
    video = pipe.video_processor.postprocess_video(frames, output_type="pt")
    torch.testing.assert_close(found, video, rtol=1e-4, atol=1e-4)

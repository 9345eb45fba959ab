"""torch.compile with every preset: one graph over layers, steps, guidance branches, prompts, plans and generations.

All presets share one compiled pipeline. That is not only cheap: the graph that the first plan has made must serve the
others too, in two resolutions, so nothing of a plan can be in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import vidaccel
from tests.tiny_wan import tiny_wan
from tests.zoo import hunyuan_video, ltx
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.configs.presets import preset_names
from vidaccel.engine import gate, ops
from vidaccel.engine.capture import OPERATOR_TAGS, refuse_capture
from vidaccel.errors import PatchError

pytestmark = pytest.mark.full

SIZES = ((96, 128), (64, 224))  # token grids 7x6x8 and 7x4x14
WIDTH, HEADS, STEPS = 32, 2, 3
LAYERS = 3  # some presets keep the first two dense
WINDOW = LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1])),))
#: Its budget follows the outputs of the transformer, which a hook looks at.
CURVED = LayerPolicy((HeadPolicy(PatternSpec.make("pasa", density=0.3)),))
CHANGING = Plan(
    "changing", (Rule(CURVED, branch="uncond"), Rule(WINDOW, layers=(1,)), Rule(CURVED)), tile=TileShape(2, 2, 2)
)


def _embeds(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 8, 32, generator=draw) for name in names}


def generate(pipe: Any, size: tuple[int, int] = SIZES[0], prompt: int = 0) -> torch.Tensor:
    """Latents of a seeded run of both guidance branches."""
    height, width = size
    out = pipe(
        **_embeds(prompt), height=height, width=width, num_frames=25, num_inference_steps=STEPS, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1), output_type="latent",
    )  # fmt: skip
    found: torch.Tensor = out.frames
    return found


def seer_gates(layers: int) -> dict[str, torch.Tensor]:
    """Random gates of SeerAttention, which does not go without."""
    draw = torch.Generator().manual_seed(7)
    key = "model.layers.{}.self_attn.attn_gate.attngate_linear_{}.weight"
    shapes = {"q": (HEADS, 1, 16, 8), "k": (HEADS, 48, 8)}
    return {key.format(i, x): torch.randn(s, generator=draw) for i in range(layers) for x, s in shapes.items()}


def gates(layers: int) -> dict[str, torch.Tensor]:
    """Random gates of VSA, whose layers hand their input over."""
    draw = torch.Generator().manual_seed(7)
    shapes = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}
    return {
        f"blocks.{i}.to_gate_compress.{x}": torch.randn(s, generator=draw)
        for i in range(layers)
        for x, s in shapes.items()
    }


def compile_blocks(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)


def compile_whole(pipe: Any, backend: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)


@dataclass
class Compiled:
    """A pipeline as it is, and the same one compiled for some sizes while patched with some plan."""

    plain: Any
    pipe: Any
    layers: int
    sizes: tuple[tuple[int, int], ...]


@pytest.fixture(scope="module")
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(how: Callable[[Any, Any], None], layers: int, sizes: tuple[tuple[int, int], ...]) -> Compiled:
    pipe = tiny_wan(text=False, num_layers=layers)
    how(pipe, "eager")
    vidaccel.patch(pipe, "sta")
    for size in sizes:
        generate(pipe, size)
    vidaccel.unpatch(pipe)
    return Compiled(tiny_wan(text=False, num_layers=layers), pipe, layers, sizes)


@pytest.fixture(scope="module")
def blocks(fresh: None) -> Compiled:
    return _compiled(compile_blocks, LAYERS, SIZES)


@pytest.fixture(scope="module")
def whole(fresh: None) -> Compiled:
    return _compiled(compile_whole, 2, SIZES[:1])  # a second size costs most of the time


def check(compiled: Compiled, name: str, weights: Any = None, *, new: bool = False) -> None:
    """A run equals the uncompiled pipeline's, and none of its sizes needs a graph but those that are there.

    Args:
        new: the plan adds a hook, so the first run in each size may compile; after that none does.
    """
    vidaccel.patch(compiled.plain, name, strict=True, weights=weights)
    expected = generate(compiled.plain)
    vidaccel.unpatch(compiled.plain)
    counters.clear()
    session = vidaccel.patch(compiled.pipe, name, strict=True, weights=weights)
    try:
        if new:
            for size in compiled.sizes:
                generate(compiled.pipe, size)
            session.reset_stats()
        with torch.compiler.set_stance("fail_on_recompile"):
            other = generate(compiled.pipe, compiled.sizes[-1], prompt=1)
            found = generate(compiled.pipe)
    finally:
        vidaccel.unpatch(compiled.pipe)
    assert not counters["graph_break"]
    assert torch.equal(found, expected) and bool(other.isfinite().all())
    report = session.report()
    assert report.calls == 2 * compiled.layers * STEPS * 2 and not report.fallbacks
    assert (report.sparse_calls > 0) == (name != "dense")


@pytest.mark.parametrize("name", preset_names())
def test_one_graph_of_the_blocks_serves_every_preset(blocks: Compiled, name: str) -> None:
    # graphs know which kinds of hooks there are: a dense plan has none, and PASA one more
    check(blocks, name, seer_gates(LAYERS) if name == "seer" else None, new=name in ("dense", "pasa"))


def test_a_gate_in_the_compiled_blocks(blocks: Compiled) -> None:
    """The hook that hands over the layer's input is part of the graph, so there is one more."""
    check(blocks, "vsa", gates(LAYERS), new=True)


@pytest.mark.parametrize("name", ["gna", "seer", "svg2"])
def test_one_graph_of_the_whole_transformer_serves_presets(whole: Compiled, name: str) -> None:
    check(whole, name, seer_gates(2) if name == "seer" else None)


@pytest.mark.parametrize("name", ["dense", "pasa", "vsa"])
def test_presets_with_other_hooks_in_the_whole_transformer(whole: Compiled, name: str) -> None:
    """A dense plan reorders nothing, PASA watches the output, and VSA's gates take what the layers take."""
    check(whole, name, gates(2) if name == "vsa" else None, new=True)


@pytest.fixture
def alone() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("how", "first"), [(compile_blocks, "patch"), (compile_blocks, "compile"), (compile_whole, "compile")]
)
def test_either_order_and_back(alone: None, how: Any, first: str) -> None:
    """A change of size compiles each graph once more, a third one none. After unpatching, the model is as it was."""
    pipe, counter = tiny_wan(text=False, num_layers=1), CompileCounterWithBackend("eager")
    plain = generate(pipe)
    if first == "patch":
        vidaccel.patch(pipe, CHANGING, strict=True)
    how(pipe, counter)
    if first == "compile":
        session = vidaccel.patch(pipe, CHANGING, strict=True)
        assert vidaccel.session_of(pipe) is session
    sparse = generate(pipe)
    graphs = counter.frame_count
    assert not torch.equal(sparse, plain)
    generate(pipe, SIZES[1])
    assert counter.frame_count == 2 * graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        generate(pipe, (64, 128))
        assert torch.equal(generate(pipe), sparse)
    vidaccel.unpatch(pipe)
    assert torch.equal(generate(pipe), plain)
    assert not counters["graph_break"]


def test_a_call_of_the_transformer_inside_a_compiled_function(alone: None) -> None:
    """Hooks and blocks are one graph here, and only the token keeps the order of what they do."""
    pipe, counter = tiny_wan(text=False, num_layers=1), CompileCounterWithBackend("aot_eager")
    session = vidaccel.patch(pipe, CHANGING, strict=True)
    expected, transformer = generate(pipe), pipe.transformer
    session.reset_stats()

    class Wrapped(torch.nn.Module):
        """Takes calls in the transformer's place."""

        config, dtype, device = transformer.config, transformer.dtype, transformer.device
        cache_context = staticmethod(transformer.cache_context)

        def __init__(self) -> None:
            super().__init__()
            self.inside = transformer

        @torch.compile(fullgraph=True, backend=counter)
        def forward(self, **call: Any) -> Any:
            return self.inside(**call)

    pipe.transformer = Wrapped()
    assert torch.equal(generate(pipe), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        generate(pipe, prompt=1)
    assert counter.frame_count == 1
    report = session.report()
    assert report.sparse_calls == report.calls == 2 * STEPS * 2


def test_a_family_without_hooks_that_reorder(alone: None) -> None:
    """LTX: the pipeline flattens the video and names its size, and each layer reorders for itself."""
    case, plan = ltx.CASES[0], Plan("changing", (Rule(WINDOW, layers=(1,)), Rule(CURVED)), tile=TileShape(2, 2, 2))
    pipe, counter = case.make(), CompileCounterWithBackend("eager")
    session = vidaccel.patch(pipe, plan, strict=True)
    expected = case.run(pipe)
    session.reset_stats()
    compile_whole(pipe, counter)
    assert torch.equal(case.run(pipe), expected)
    assert not counters["graph_break"]
    report = session.report()
    assert report.sparse_calls == report.calls > 0


def test_padded_text_in_the_compiled_blocks(alone: None) -> None:
    """HunyuanVideo: the patch embedding repeats, so the hook that reorders behind it is compiled as well."""
    case, plan = hunyuan_video.CASES[0], Plan("window", (Rule(WINDOW),), tile=TileShape(2, 2, 2))
    pipe, counter = case.make(), CompileCounterWithBackend("eager")
    session = vidaccel.patch(pipe, plan, strict=True)
    expected = case.run(pipe)
    compile_blocks(pipe, counter)
    assert torch.equal(case.run(pipe), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(case.run(pipe), expected)
    assert not counters["graph_break"]
    report = session.report()
    assert report.sparse_calls == report.calls > 0


def test_a_plan_after_a_dense_one(alone: None) -> None:
    """A compiled graph notices no new hook: without a word of ours, tokens would stay in raster order."""
    pipe = tiny_wan(text=False, num_layers=1)
    vidaccel.patch(pipe, CHANGING)
    expected = generate(pipe)
    vidaccel.unpatch(pipe)
    compile_whole(pipe, "eager")
    vidaccel.patch(pipe, "dense")
    generate(pipe)
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, CHANGING)
    assert torch.equal(generate(pipe), expected)


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_inductor_is_told_to_leave_the_operators_out_of_cuda_graphs() -> None:
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        assert not OPERATOR_TAGS
        return
    for name in ("attention", "enter", "leave", "reorder"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.vidaccel, name).default.tags


def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    on_cuda: Any = SimpleNamespace(is_cuda=True)
    refuse_capture(torch.zeros(1))
    with pytest.raises(PatchError, match=r"a CUDA graph is being captured .* call it outside torch\.cuda\.graph"):
        refuse_capture(on_cuda)
    capturing[0] = False
    refuse_capture(on_cuda)


def test_a_capture_is_asked_for_in_every_pass_and_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Size] = []
    for module in (ops, gate):
        monkeypatch.setattr(module, "refuse_capture", lambda x: asked.append(x.shape))
    pipe = tiny_wan(text=False)
    vidaccel.patch(pipe, "sta")
    generate(pipe)
    assert [len(shape) for shape in asked] == [1, 4, 4] * STEPS * 2

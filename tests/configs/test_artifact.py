"""Plan files: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import os
import random
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from safetensors import safe_open
from safetensors.numpy import save

from tests.configs.strategies import plans
from vidaccel.configs import artifact
from vidaccel.configs.artifact import load_plan, save_plan
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.errors import ConfigError, OutputError, PlanFileError
from vidaccel.types import TileShape, VideoGrid

STA = HeadPolicy(PatternSpec.make("sliding_tile", window=(1, 1.0, 0.5)), compensation="pooled_tail")
PLAN = Plan(
    "example",
    (
        Rule(LayerPolicy(), noise=(0.943, 1.0)),
        Rule(LayerPolicy((STA, HeadPolicy(), STA)), layers=(0, 2, 5), branch="uncond"),
        Rule(LayerPolicy((STA,)), noise=(0.1, 0.9), transformer="transformer_2"),
    ),
    tile=TileShape(4, 4, 4),
    fingerprint=Fingerprint.make({"patch_size": [1, 2, 2]}, model_class="Wan", heads=3, grid=VideoGrid(16, 12, 12)),
    provenance=(("command", "vidaccel calibrate"),),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.safetensors"
    save_plan(PLAN, path)
    return path


def parts(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata and the tensors of a plan file."""
    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()["vidaccel"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def attempt(path: Path) -> Plan | str:
    """The plan in a file, or the message that says why there is none."""
    try:
        return load_plan(path)
    except PlanFileError as error:
        return str(error)


def rewrite(path: Path, meta: dict[str, Any], tensors: dict[str, np.ndarray], *, sign: bool = True) -> None:
    """Writes a file of these parts with a right checksum, as a malicious writer would."""
    if sign and set(tensors) == set(artifact._FILE.tensors):
        meta = {key: value for key, value in meta.items() if key != "sha256"}
        meta["sha256"] = artifact._FILE._digest(meta, tensors)
    path.write_bytes(save(tensors, {"vidaccel": json.dumps(meta)}))


@given(plans)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    save_plan(plan, path)
    again = load_plan(path)
    assert again == plan
    assert repr(again) == repr(plan)  # == holds 1 and 1.0 equal in configurations


def test_file_is_one_safetensors_file_with_versioned_metadata(saved: Path) -> None:
    assert load_plan(saved) == PLAN
    meta, tensors = parts(saved)
    assert meta["format"] == artifact.FORMAT_VERSION == 1
    assert len(meta["palette"]) == 2
    assert tensors["heads"].tolist() == [0, 1, 0, 1, 1]
    assert sorted(os.listdir(saved.parent)) == [saved.name]


def test_a_plan_with_every_head_its_own_fits(tmp_path: Path) -> None:
    """10 phases x 2 branches x 2 experts x 40 layers x 40 heads, 100 distinct policies."""
    draw = random.Random(0)
    palette = [HeadPolicy(PatternSpec.make("sliding_tile", window=(1, 2, i / 100))) for i in range(1, 101)]
    rules = tuple(
        Rule(LayerPolicy(tuple(draw.choices(palette, k=40))), (i / 10, (i + 1) / 10), expert, (layer,), branch)
        for i in range(10)
        for branch in ("cond", "uncond")
        for expert in ("transformer", "transformer_2")
        for layer in range(40)
    )
    plan = Plan("large", rules)
    path = tmp_path / "large.safetensors"
    save_plan(plan, path)
    assert path.stat().st_size < 500_000
    assert load_plan(path) == plan


def test_a_damaged_file_is_an_error_or_the_same_plan(saved: Path) -> None:
    """Bit flips, cuts, insertions, swaps and noise: nothing may load as a different plan or fail in another way."""
    good, draw, refused = saved.read_bytes(), random.Random(1), 0
    header = 8 + int.from_bytes(good[:8], "little")
    for number in range(600):
        raw = bytearray(good)
        kind = number % 6
        if kind == 0:  # one bit in the header
            raw[draw.randrange(header)] ^= 1 << draw.randrange(8)
        elif kind == 1:  # one bit in the tensors
            raw[draw.randrange(header, len(raw))] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del raw[draw.randrange(len(raw)) :]
        elif kind == 3:  # bytes come or go in the middle
            begin = draw.randrange(len(raw))
            raw[begin : begin + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        elif kind == 4:  # a digit for a digit: offsets, shapes and numbers stay well formed
            digits = [i for i, byte in enumerate(raw[:header]) if chr(byte).isdigit()]
            raw[draw.choice(digits)] = ord(draw.choice("0123456789"))
        else:  # two stretches change places
            a, b = sorted(draw.sample(range(len(raw) - 16), 2))
            raw[a : a + 8], raw[b : b + 8] = raw[b : b + 8], raw[a : a + 8]
        saved.write_bytes(raw)
        found = attempt(saved)
        if isinstance(found, Plan):
            assert found == PLAN
        else:
            refused += 1
            assert str(saved) in found
            assert "\n" not in found
    assert refused > 540  # the others drew the byte that was there


def test_noise_is_no_plan(tmp_path: Path) -> None:
    draw, path = random.Random(2), tmp_path / "noise.safetensors"
    for size in range(200):
        start = draw.choice([b"", size.to_bytes(8, "little"), max(0, size - 8).to_bytes(8, "little") + b"{"])
        path.write_bytes((start + draw.randbytes(size))[:size])
        with pytest.raises(PlanFileError):
            load_plan(path)


def meta_with(**changes: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    """A change of the metadata."""
    return lambda meta, tensors: meta.update(changes)


def tensor_with(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict, dict], None]:
    """A change of one tensor."""
    return lambda meta, tensors: tensors.update({name: change(tensors[name])})


HOSTILE = {
    "another version": (meta_with(format=2), "format version is 2, this vidaccel reads 1"),
    "version as text": (meta_with(format="1" * 999), "format version is 1111"),
    "another kind": (meta_with(kind="statistics"), "it is no plan"),
    "unknown key": (meta_with(extra=1), "unknown keys extra"),
    "missing key": (lambda meta, tensors: meta.pop("palette"), "lacks palette"),
    "palette of numbers": (meta_with(palette=[1, 2]), "palette entry 0 is 1"),
    "palette is no list": (meta_with(palette={}), "palette is no list"),
    "unknown precision": (meta_with(palette=[{"pattern": "dense", "precision": "int3"}] * 2), "valid are native"),
    "precision is a list": (meta_with(palette=[{"pattern": "dense", "precision": []}] * 2), "precision is []"),
    "palette too short": (meta_with(palette=[{"pattern": "dense"}]), "points outside its 1 policies"),
    "NaN": (meta_with(palette=[{"pattern": {"name": "p", "a": float("nan")}}]), "holds NaN"),
    "huge number": (meta_with(name="p", tile=[10**400, 1, 1.5]), "TileShape.width is 1.5"),
    "deep pattern": (meta_with(palette=[{"pattern": {"name": "p", "a": [[[[[[[[1]]]]]]]]}}] * 2), "nested deeper"),
    "name": (meta_with(name=""), "give a non-empty text"),
    "tile": (meta_with(tile=[0, 1, 1]), "TileShape.frames is 0"),
    "fingerprint": (meta_with(fingerprint=[]), "a fingerprint is []"),
    "provenance": (meta_with(provenance={"a": 1}), "must be text"),
    "step cache": (meta_with(cache="fbcache"), "is not known"),
    "step cache with a file": (meta_with(cache="mag:/etc/passwd"), "cannot hold the cache mag"),
    "step cache is a list": (meta_with(cache=["pab:2"]), "Plan.cache is a list"),
    "provenance is a list": (meta_with(provenance=[]), "provenance no mapping"),
    "noise NaN": (tensor_with("noise", lambda x: x * np.nan), "give two numbers"),
    "noise above 1": (tensor_with("noise", lambda x: x * 2), "valid is 0 <= low < high <= 1"),
    "noise transposed": (tensor_with("noise", lambda x: np.ascontiguousarray(x.T)), "tensor noise has shape (2, 3)"),
    "noise of 3 axes": (tensor_with("noise", lambda x: x[None]), "tensor noise has shape (1, 3, 2)"),
    "noise scalar": (tensor_with("noise", lambda x: np.array(0.5)), "tensor noise has shape ()"),
    "noise float32": (tensor_with("noise", lambda x: x.astype(np.float32)), "tensor noise has type F32"),
    "heads int64": (tensor_with("heads", lambda x: x.astype(np.int64)), "tensor heads has type I64"),
    "heads of 2 axes": (tensor_with("heads", lambda x: x[None]), "tensors heads and heads_offsets do not fit"),
    "head below 0": (tensor_with("heads", lambda x: x - 1), "points outside its 2 policies"),
    "head above": (tensor_with("heads", lambda x: x + 1), "points outside its 2 policies"),
    "rule without heads": (tensor_with("heads_offsets", lambda x: x * 0 + np.int32([0, 0, 4, 5])), "heads is empty"),
    "offsets back": (tensor_with("heads_offsets", lambda x: np.int32([0, 4, 1, 5])), "do not fit together"),
    "offsets too far": (tensor_with("layers_offsets", lambda x: x + np.int32([0, 0, 0, 9])), "do not fit together"),
    "offsets too few": (tensor_with("layers_offsets", lambda x: x[1:]), "do not fit together"),
    "layer below 0": (tensor_with("layers", lambda x: -x - 1), "layers are whole numbers"),
    "branch code": (tensor_with("branch", lambda x: x + 5), "is not 3 codes from -1 to 1"),
    "transformer code": (tensor_with("transformer", lambda x: x - 5), "is not 3 codes from -1 to 1"),
    "too few codes": (tensor_with("transformer", lambda x: x[1:]), "is not 3 codes"),
    "tensor missing": (lambda meta, tensors: tensors.pop("noise"), "its tensors are not noise"),
    "tensor too many": (lambda meta, tensors: tensors.update(more=np.zeros(1)), "its tensors are not noise"),
}


@pytest.mark.parametrize(("change", "says"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_with_a_right_checksum(saved: Path, change: Callable[..., Any], says: str) -> None:
    meta, tensors = parts(saved)
    change(meta, tensors)
    rewrite(saved, meta, tensors)
    with pytest.raises(PlanFileError) as caught:
        load_plan(saved)
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(saved))
    assert "\n" not in str(caught.value)


def test_rewriting_alone_changes_nothing(saved: Path) -> None:
    """The control of the tests above: the same file, written by their hand, loads."""
    rewrite(saved, *parts(saved))
    assert load_plan(saved) == PLAN


def test_checksum(saved: Path) -> None:
    meta, tensors = parts(saved)
    tensors["layers"] = tensors["layers"] + np.int32(1)
    rewrite(saved, meta, tensors, sign=False)
    with pytest.raises(PlanFileError, match="does not match its checksum"):
        load_plan(saved)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("[" * 100_000, "nested too deep", id="deep"),
        pytest.param("[1]", "format version is None", id="a list"),
        pytest.param("{", "is not a usable plan", id="no JSON"),
        pytest.param('{"format": ' + "1" * 100_000 + "}", "is not a usable plan", id="endless number"),
        pytest.param('{"format": 1, "name": "\\ud800"}', "it is no plan", id="half a character"),
    ],
)
def test_hostile_json(saved: Path, text: str, says: str) -> None:
    _, tensors = parts(saved)
    saved.write_bytes(save(tensors, {"vidaccel": text}))
    with pytest.raises(PlanFileError, match=says):
        load_plan(saved)


def test_other_files(saved: Path, tmp_path: Path) -> None:
    cases = {
        "there is no plan file": tmp_path / "none.safetensors",
        "cannot be read": tmp_path,
        "has no vidaccel metadata": tmp_path / "model.safetensors",
        "has 3 bytes and is truncated": tmp_path / "short.safetensors",
        "bytes and is truncated": tmp_path / "half.safetensors",
    }
    (tmp_path / "model.safetensors").write_bytes(save({"weight": np.zeros(3)}))
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    (tmp_path / "half.safetensors").write_bytes(saved.read_bytes()[:200])
    for says, path in cases.items():
        with pytest.raises(PlanFileError, match=says):
            load_plan(path)


def test_sizes_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    """A file of 1 TB or a header of 50 MB costs nothing, and neither do tensors that claim to be vast."""
    vast, header, claim = (tmp_path / f"{name}.safetensors" for name in ("vast", "header", "claim"))
    with vast.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with header.open("wb") as file:
        file.write((15 << 20).to_bytes(8, "little"))
        file.truncate(16 << 20)
    lie = json.dumps({"noise": {"dtype": "F64", "shape": [1 << 40, 2], "data_offsets": [0, 1 << 44]}}).encode()
    claim.write_bytes(len(lie).to_bytes(8, "little") + lie)
    tracemalloc.start()
    try:
        for path, says in ((vast, "more than the"), (header, "more than the"), (claim, "truncated, damaged")):
            with pytest.raises(PlanFileError, match=says):
                load_plan(path)
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


def test_greedy_json_stays_small(saved: Path) -> None:
    """The most memory per byte of JSON that a header may hold."""
    _, tensors = parts(saved)
    text = '{"format": 1, "name": [' + "[]," * 300_000 + "0]}"
    saved.write_bytes(save(tensors, {"vidaccel": text}))
    tracemalloc.start()
    try:
        with pytest.raises(PlanFileError):
            load_plan(saved)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_writing_is_whole_or_not_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        save_plan(Plan.dense(), saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
    monkeypatch.undo()
    save_plan(Plan.dense(), saved)
    assert load_plan(saved) == Plan.dense()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~umask


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "plan.safetensors", tmp_path):
        with pytest.raises(OutputError):
            save_plan(PLAN, path)


def test_a_plan_too_large_for_a_file(tmp_path: Path) -> None:
    plan = Plan("p", provenance=(("log", "x" * (2 << 20)),))
    with pytest.raises(ConfigError, match="too large for a plan file"):
        save_plan(plan, tmp_path / "plan.safetensors")
    assert os.listdir(tmp_path) == []

"""Tuning with a stand-in timer: what is tried, what wins, where it is kept, and that it is found again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.helpers import make_layout
from vidaccel.blockmask import BlockMask
from vidaccel.device import cache_dir
from vidaccel.errors import KernelError
from vidaccel.kernels.triton import configs
from vidaccel.kernels.triton import tuned as stored
from vidaccel.kernels.triton.autotune import Workload, candidates, sweep, tune
from vidaccel.kernels.triton.configs import Config, choose
from vidaccel.kernels.triton.tuned import Bucket, config_for, tuned
from vidaccel.types import PRECISIONS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NATIVE = PRECISIONS["native"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU 9000 (SXM)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    stored._stored.cache_clear()
    yield
    stored._stored.cache_clear()


def workload(head_dim: int = 128) -> Workload:
    layout = make_layout((8, 16, 16), (2, 8, 8))
    return Workload(layout, BlockMask.full(layout), heads=2, head_dim=head_dim)


def seconds(config: Config) -> float:
    """A machine that likes 64 keys a step and few stages, and cannot run eight warps."""
    if config.warps == 8:
        raise RuntimeError("out of resource: registers\nmore")
    return 1.0 + abs(config.block_n - 64) + config.stages / 10 - config.block_m / 500


def test_the_shipped_choice_is_tried_first_and_neighbours_follow() -> None:
    found = candidates(90, "native16", 128, 128)
    assert found[0] == choose(90, "native16", 128, 128) and len(set(found)) == len(found)
    shipped = {e.config for e in configs.table() if (e.arch, e.kind, e.head_dim) == (90, "native16", 128)}
    assert shipped < set(found)
    assert any(not config.warp_specialize for config in found)
    # with eight warps Triton does not specialise them
    assert all(config.warps == 4 for config in found if config.warp_specialize)
    assert all(config.stages >= 1 and config.block_n >= 32 for config in found)
    with pytest.raises(KernelError, match="head dims"):
        candidates(90, "native32", 256, 128)


def test_the_fastest_wins_and_is_found_again() -> None:
    work = workload()
    assert tuned(torch.bfloat16, NATIVE, 128, work.layout, CUDA) is None
    best = tune(work, NATIVE, CUDA, timer=seconds)
    assert (best.block_m, best.block_n, best.stages, best.warps) == (128, 64, 2, 4)
    assert best != choose(90, "native16", 128, 128)
    assert tuned(torch.bfloat16, NATIVE, 128, work.layout, CUDA) == best
    # another kind, head dim or length is another bucket
    assert tuned(torch.bfloat16, PRECISIONS["int8"], 128, work.layout, CUDA) is None
    assert tuned(torch.bfloat16, NATIVE, 64, work.layout, CUDA) is None
    assert tuned(torch.bfloat16, NATIVE, 128, make_layout((2, 8, 8), (2, 8, 8)), CUDA) is None


def test_launches_take_the_tuned_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload()
    best = tune(work, NATIVE, CUDA, timer=seconds)
    q = torch.empty(1, work.layout.tokens, 2, 128, dtype=torch.bfloat16)
    table = choose(90, "native16", 128, 128)
    assert config_for(q, work.layout, NATIVE) == table  # a CPU has the interpreter's own
    found = tuned(q.dtype, NATIVE, 128, work.layout, CUDA)
    monkeypatch.setattr(stored, "tuned", lambda *args: found)
    assert config_for(q, work.layout, NATIVE) == best
    assert not config_for(q, work.layout, NATIVE, skip=True).warp_specialize


def test_the_file_says_what_was_measured_where(tmp_path: Path) -> None:
    work = workload()
    tune(work, NATIVE, CUDA, timer=seconds)
    tune(work, PRECISIONS["fp8-tile"], CUDA, timer=seconds)
    (path,) = (tmp_path / "vidaccel" / "tuning").iterdir()
    assert path.name.startswith("test-gpu-9000-sxm-")
    content = json.loads(path.read_text())
    assert content["device"] == "Test GPU 9000 (SXM)" and content["versions"]["torch"] == torch.__version__
    assert set(content["entries"]) == {
        Bucket.of(torch.bfloat16, PRECISIONS[name], 128, work.layout).key for name in ("native", "fp8-tile")
    }
    assert all(entry["seconds"] > 0 and entry["date"] for entry in content["entries"].values())


def test_other_versions_start_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload()
    tune(work, NATIVE, CUDA, timer=seconds)
    stored._file_name.cache_clear()
    monkeypatch.setattr(stored, "_versions", lambda: {"torch": "99"})
    try:
        assert tuned(torch.bfloat16, NATIVE, 128, work.layout, CUDA) is None
    finally:
        stored._file_name.cache_clear()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    work = workload()
    tune(work, NATIVE, CUDA, timer=seconds)
    (path,) = (tmp_path / "vidaccel" / "tuning").iterdir()
    path.write_text("{")
    stored._stored.cache_clear()
    with pytest.raises(KernelError, match="delete it and tune again"):
        tuned(torch.bfloat16, NATIVE, 128, work.layout, CUDA)


def test_candidates_that_fail_have_a_reason_and_do_not_win() -> None:
    trials = list(sweep(workload(), NATIVE, CUDA, timer=seconds))
    failed = [trial for trial in trials if trial.seconds is None]
    assert failed and all(t.config.warps == 8 and t.reason == "out of resource: registers" for t in failed)

    def never(config: Config) -> float:
        raise RuntimeError("no")

    with pytest.raises(KernelError, match="no configuration"):
        tune(workload(), NATIVE, CUDA, timer=never)


def test_nothing_is_timed_without_being_asked_for() -> None:
    with pytest.raises(KernelError, match="cannot be timed on cpu"):
        tune(workload(), NATIVE, CPU)


def test_cache_dir_follows_the_xdg_rules() -> None:
    assert cache_dir({"XDG_CACHE_HOME": "/somewhere"}) == Path("/somewhere/vidaccel")
    home = Path.home() / ".cache" / "vidaccel"
    assert cache_dir({}) == cache_dir({"XDG_CACHE_HOME": ""}) == cache_dir({"XDG_CACHE_HOME": "relative"}) == home

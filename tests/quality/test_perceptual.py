"""LPIPS: measured only with what is on the machine; nothing is fetched."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vidaccel.errors import ConfigError
from vidaccel.quality import lpips, perceptual, why_no_lpips

VIDEO = np.zeros((10, 64, 64, 3), np.uint8)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torchvision that is installed, with an empty folder of weights; returns where the weights belong."""
    models = ModuleType("torchvision.models")
    default = SimpleNamespace(url="https://weights.invalid/models/alexnet-1.pth")
    models.AlexNet_Weights = SimpleNamespace(DEFAULT=default)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "torchvision" else known(name))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "alexnet-1.pth"


def test_without_torchvision_the_way_to_get_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install torchvision" in str(why_no_lpips())
    with pytest.raises(ConfigError, match="pip install torchvision"):
        lpips(VIDEO, VIDEO)


def test_a_broken_torchvision_is_no_crash(torchvision: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One made for another torch raises RuntimeError when it registers its operators."""

    def broken() -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(perceptual, "_weights", broken)
    assert "nms does not exist" in str(why_no_lpips()) and "fits this torch" in str(why_no_lpips())


def test_without_weights_where_to_put_them_is_said(torchvision: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def downloaded() -> None:
        raise AssertionError("the network was built, which downloads its weights")

    monkeypatch.setattr(perceptual, "_network", downloaded)
    reason = str(why_no_lpips())
    assert "https://weights.invalid/models/alexnet-1.pth" in reason and str(torchvision) in reason
    with pytest.raises(ConfigError, match="not on this machine"):
        lpips(VIDEO, VIDEO)


def test_small_frames_are_refused(torchvision: Path) -> None:
    torchvision.touch()
    assert why_no_lpips() is None and why_no_lpips(64, 64) is None
    assert "not 100x32" in str(why_no_lpips(32, 100))


def test_frames_are_given_in_the_networks_range(torchvision: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[-1, 1], channels first, all frames, and nothing left from the call before."""
    torchvision.touch()

    class Network:
        def reset(self) -> None:
            self.seen: list[Any] = []

        def update(self, a: torch.Tensor, b: torch.Tensor) -> None:
            assert a.shape[1:] == (3, 64, 64)
            self.seen += [(x.min().item(), y.max().item()) for x, y in zip(a, b, strict=True)]

        def compute(self) -> torch.Tensor:
            assert self.seen == [(-1.0, 1.0)] * 10
            return torch.tensor(0.25)

    network = Network()
    monkeypatch.setattr(perceptual, "_network", lambda: network)
    for _ in range(2):
        assert lpips(VIDEO, VIDEO + 255) == 0.25

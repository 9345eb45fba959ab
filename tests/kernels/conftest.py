"""Uninitialised memory is poisoned in every kernel test, so that a row nobody wrote is NaN and not, by luck, right."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch


def _poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = function(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    return make


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))

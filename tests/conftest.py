"""What all tests share: fixed seeds, one thread per worker, no network."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

# before anything imports the hub client, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import arithmetic

# the same examples in every run, so that a failure is seen again; slow machines are no failure
settings.register_profile(
    "vidaccel", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("vidaccel")


def pytest_configure(config: pytest.Config) -> None:
    """One thread a process: the tensors are tiny, and threads that wait for each other are far slower than one."""
    arithmetic.apply()


def pytest_report_header() -> str:
    """What the numbers of this run come from."""
    return f"arithmetic: {arithmetic.described()}"


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that use the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _attention_backend() -> Iterator[None]:
    """``set_attention_backend`` of one model changes the default of all models in the process, so it is put back."""
    yield
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        registry = dispatch._AttentionBackendRegistry
        registry._active_backend = dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

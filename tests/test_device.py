"""What the machine is said to be."""

from __future__ import annotations

import json
import os
from importlib import metadata

import pytest
import torch

from vidaccel import device
from vidaccel.errors import ConfigError


def test_device_info_says_what_is_here() -> None:
    found = device.device_info({"HF_HOME": "here", "UNRELATED": "1"})
    packages = dict(found.packages)
    assert set(packages) == set(device.PACKAGES)
    assert packages["torch"] == metadata.version("torch")
    assert found.environment == (("HF_HOME", "here"),)
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert len(found.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert found.default_device == ("cuda" if found.gpus else "cpu")
    assert json.loads(json.dumps(found.to_dict()))["packages"]["torch"] == packages["torch"]


def test_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PACKAGES", ("torch", "no-such-package-anywhere"))
    assert dict(device.device_info().packages)["no-such-package-anywhere"] is None


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        pytest.param("fpu avx2 avx512f", False, id="AVX-512 without bf16"),
        pytest.param("fpu avx512_bf16", True, id="AVX-512 with bf16"),
        pytest.param("fpu amx_bf16 amx_tile", True, id="AMX"),
        pytest.param("fp asimd bf16", True, id="ARM"),
        pytest.param("", False, id="unknown"),
    ],
)
def test_cpu_dtype_follows_its_instructions(monkeypatch: pytest.MonkeyPatch, flags: str, fast: bool) -> None:
    monkeypatch.setattr(device, "_cpu_fields", lambda: {"flags": flags})
    device.cpu_bf16_is_fast.cache_clear()
    try:
        assert device.cpu_bf16_is_fast() is fast
        assert device.default_dtype("cpu") == (torch.bfloat16 if fast else torch.float32)
    finally:
        device.cpu_bf16_is_fast.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_cuda_dtype_follows_the_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.default_dtype("cuda:0") == dtype


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no CUDA device; give cpu"):
        device.default_dtype("cuda")
    with pytest.raises(ConfigError, match="there is no device 'gpu'"):
        device.default_dtype("gpu")

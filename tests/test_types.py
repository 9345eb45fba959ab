"""Precisions: which options go together, and which of them a GPU kernel computes."""

from __future__ import annotations

from typing import Any

import pytest

from vidaccel.errors import ConfigError
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS, Precision


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"qk": "int3"}, "Precision.qk is 'int3'; valid are native, int8, fp8, int4, nvfp4, binary"),
        ({"qk": "fp8", "pv": "int4"}, "Precision.pv is 'int4'; valid are native, fp8, int8, nvfp4"),
        ({"granularity": "row"}, "Precision.granularity is 'row'"),
        ({"qk": "int8", "scale_channels": "all"}, "Precision.scale_channels is 'all'"),
        ({"smooth_k": True}, "smooths Q or K but does not quantise them"),
        ({"qk": "int8", "smooth_v": True}, "smooths V but does not quantise it"),
        ({"pv": "fp8"}, "quantises PV but not QK"),
        ({"qk": "nvfp4"}, "nvfp4 goes with channels16"),
        ({"qk": "int8", "granularity": "channels16"}, "nvfp4 goes with channels16"),
        ({"scale_channels": "pairs"}, "changes nothing with qk='native'"),
        ({"qk": "binary", "scale_channels": "channels"}, "changes nothing with qk='binary'"),
        ({"qk": "int8", "v_range": 2.25}, "v_range=2.25; valid is"),
        ({"qk": "int8", "pv": "fp8", "v_range": 449.0}, "v_range=449.0; valid is"),
        ({"qk": "int8", "pv": "fp8", "v_range": float("nan")}, "v_range=nan; valid is"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Precision("x", **options)
    assert says in str(caught.value)


def test_what_kernels_compute() -> None:
    assert list(KERNEL_PRECISIONS) == ["native", "int8", "int8-fp8", "fp8-tile", "fp8-tensor", "fp8-rows32"]
    for name, precision in PRECISIONS.items():
        assert precision.name == name and precision.emulated == (name not in KERNEL_PRECISIONS)
        assert precision.quantised == (name != "native")

"""Launch configurations for partial blocks, compiled for each architecture."""

from __future__ import annotations

import pytest

from tests.kernels.triton.gate.forward_code import compiled
from tests.kernels.triton.gate.test_forward import entry_id, expect_spills, findings, representative
from vidaccel.kernels.triton.configs import Entry, for_rule, table
from vidaccel.kernels.triton.counting import multiplications

# what calls with a rule run: the branch rules out specialised warps
ENTRIES = [pytest.param(e, marks=[pytest.mark.representative] * representative(e), id=entry_id(e)) for e in table()]
#: float32 with a rule spills 12 and 36 bytes there, whatever tile and warps.
SPILLS = {"3.6": {"120-native32-64-128x32", "120-native32-64-64x32"}}


@pytest.mark.parametrize("entry", ENTRIES)
def test_partial_blocks(entry: Entry, request: pytest.FixtureRequest) -> None:
    """No spills, and the tensor cores' products, with the pooled tail and the LSE on."""
    expect_spills(request, entry, SPILLS)
    plain = for_rule(entry.config, entry.head_dim, entry.arch)
    code = compiled(entry.arch, entry.kind, entry.head_dim, plain, rule=True)
    assert findings(code, entry.kind, plain) == []
    assert any(multiplications(name) for name in code.main_loop) or entry.arch in (100, 103)

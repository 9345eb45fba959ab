"""The preparation kernels: the interpreter's cases, executed as PTX, against the same preparation in torch."""

import pytest
import torch

from tests.kernels.helpers import make_layout
from tests.kernels.triton.interpreter.test_quantise import (
    _poisoned,
    test_appended_means,
    test_batches_heads_and_dtypes,
    test_equals_the_torch_version,
    test_long_blocks_and_many_means,
    test_ties_round_as_the_oracle_does,
)
from tests.kernels.triton.rounding import rounds_twice
from vidaccel.kernels.triton.means import block_offsets
from vidaccel.kernels.triton.quantise import round_rows

ARCHES = (89, 90, 120)
REPRESENTATIVE = (89, 90)


@pytest.mark.representative
@pytest.mark.parametrize("arch", [89, 90, 120])
def test_just_above_a_tie(arch: int) -> None:
    """What shows a conversion by way of fp16: numbers that are ties there go to the even neighbour."""
    layout = make_layout((1, 4, 8), (1, 4, 8))
    low = torch.arange(8, 16).repeat(4)[None, :, None, None]
    x = torch.cat([(low + 0.5 + 2**-11).expand(-1, -1, -1, 8), torch.full((1, layout.tokens, 1, 8), 448.0)], dim=-1)
    out, scale = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(1, 1, layout.tokens)
    round_rows(x, block_offsets(layout, x.device), out, scale, "block")
    assert (scale == 1).all()
    rounded = torch.where(low % 2 == 0, low, low + 1) if rounds_twice(arch) else low + 1
    assert torch.equal(out[..., :8].float(), rounded.expand(-1, -1, -1, 8).float())

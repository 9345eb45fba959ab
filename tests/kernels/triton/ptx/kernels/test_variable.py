"""Blocks of variable size: the interpreter's cases, executed as PTX."""

from tests.kernels.triton.interpreter.test_variable import (
    test_a_full_mask_has_an_empty_tail,
    test_blocks_longer_and_shorter_than_a_piece,
    test_channels_that_rows_have_to_be_padded_for,
    test_every_dtype,
    test_heads_that_lie_behind_each_other_are_read_in_place,
    test_more_blocks_than_tokens_and_twelve_heads,
)

ARCHES = (90,)
REPRESENTATIVE = (90,)
ONLY_FULL = ("test_blocks_longer_and_shorter_than_a_piece",)

"""The plain forward kernel in the inputs' own dtypes: the interpreter's cases, executed as PTX."""

from tests.kernels.triton.interpreter.test_forward import (
    test_a_full_mask_is_dense_attention,
    test_every_dtype,
    test_every_head_dim,
    test_few_channels,
    test_heads_of_different_density_batch_and_text,
    test_long_blocks_are_skipped_piece_by_piece,
    test_long_text_and_twelve_heads,
    test_one_mask_for_all_heads,
    test_skipping_is_what_the_oracle_says,
    test_strided_and_unaligned_inputs,
    test_tile_sizes_are_free,
)

ARCHES = (80, 90)
REPRESENTATIVE = (90,)
ONLY_FULL = ("test_one_mask_for_all_heads", "test_long_blocks_are_skipped_piece_by_piece")

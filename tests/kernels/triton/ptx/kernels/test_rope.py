"""Norm, rotation and gather: the interpreter's cases, executed as PTX."""

from tests.kernels.triton.interpreter.test_rope import (
    test_gather_with_holes,
    test_means_from_the_same_pass,
    test_order_per_head_with_norm_and_source_tables,
    test_rotate_and_gather,
    test_rounded_to_eight_bits,
    test_tables_of_pairs,
    test_wan_layout_of_tables_and_norm,
    test_without_an_order_rows_stay,
)

ARCHES = (80, 90, 120)
REPRESENTATIVE = (90,)

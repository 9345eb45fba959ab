"""The merge kernel's cases of the interpreter, executed as PTX."""

from tests.kernels.triton.interpreter.test_merge import (
    test_a_part_without_keys_counts_for_nothing,
    test_any_number_of_parts,
    test_large_scores_do_not_overflow,
    test_merging_in_steps_is_merging_at_once,
    test_rows_without_any_keys_are_zeros,
    test_two_parts_are_the_torch_version,
)

ARCHES = (80, 90, 120)
REPRESENTATIVE = (80, 90)

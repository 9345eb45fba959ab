"""Rules over tokens in the plain forward kernel: the interpreter's cases, executed as PTX."""

from tests.kernels.triton.interpreter.test_partial import (
    test_8_bit_precisions,
    test_a_rule_for_each_head,
    test_int8_by_groups_of_heads,
    test_long_words,
    test_one_rule_for_all_heads,
    test_skipping,
    test_tile_sizes_are_free,
)

ARCHES = (90,)
REPRESENTATIVE = (90,)
ONLY_FULL = ("test_a_rule_for_each_head", "test_skipping")

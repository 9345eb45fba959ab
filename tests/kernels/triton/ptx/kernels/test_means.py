"""Block statistics: the interpreter's cases, executed as PTX."""

from tests.kernels.triton.interpreter.test_means import (
    test_means_behind_a_copy,
    test_ranges,
    test_statistics,
    test_zeros_and_tokens_alike,
)

ARCHES = (80, 90, 120)
REPRESENTATIVE = (80, 90)

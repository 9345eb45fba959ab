"""The plain forward kernel in 8-bit precisions: the interpreter's cases, executed as PTX."""

from tests.kernels.triton.interpreter.test_quantised import (
    test_16_bit_values_may_be_strided_and_unaligned,
    test_bf16_inputs_with_head_dim_96,
    test_equals_the_oracle_with_the_same_roundings,
    test_pieces_keep_their_scales,
    test_q_smoothing_by_groups_of_heads,
    test_tail_costs_no_accuracy,
)

ARCHES = (89, 90)
REPRESENTATIVE = (90,)
ONLY_FULL = ("-int8]", "-int8-fp8]", "-fp8-tile]", "-fp8-tensor]", "-fp8-rows32]")  # which test_configs.py has

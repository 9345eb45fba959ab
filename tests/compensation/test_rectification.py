"""Rectified SpaAttn's compensation against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.compensation.calls import LAYOUTS, Array, Head, call_of, keeps_its_promises, random_blocks, sparse_row
from tests.patterns.calls import make_call, softmax
from vidaccel.compensation import Rectification, build_compensation
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.errors import ConfigError


def _oracle(head: Head, kept: Array, gain_aware: bool) -> Array:
    out = np.zeros_like(head.q)
    deviation = [
        (np.abs(head.q[b] - head.q[b].mean(0)).mean(0), np.abs(head.k[b] - head.k[b].mean(0)).mean(0))
        for b in head.blocks
    ]
    text = [t for j in head.text for t in head.blocks[j]]
    for i, tokens in enumerate(head.blocks):
        if i in head.text:
            for t in tokens:
                out[t] = sparse_row(head, t, kept[i])
            continue
        q = head.mean(head.q, i)
        logits = [head.scale * float(q @ head.k_means[j]) + math.log(len(head.blocks[j])) for j in head.video]
        logits += [head.scale * float(q @ head.k[t]) for t in text]
        probability = softmax(np.array(logits))
        share, rest = float(probability[len(head.video) :].sum()), np.zeros(head.v.shape[1])
        for place, j in enumerate(head.video):
            gain = abs(float(q @ head.k_means[j]))
            error = abs(float(deviation[i][0] @ head.k_means[j])) + abs(float(q @ deviation[j][1]))
            if kept[i, j] or (gain_aware and gain <= error):
                share += probability[place]
            else:
                rest = rest + probability[place] * head.mean(head.v, j)
        for t in tokens:
            out[t] = sparse_row(head, t, kept[i]) * share + rest
    return out


@pytest.mark.parametrize("gain_aware", [True, False])
def test_it_is_its_formula(gain_aware: bool) -> None:
    keeps_its_promises(Rectification(gain_aware=gain_aware), lambda head, kept: _oracle(head, kept, gain_aware))


def test_the_gain_test_leaves_some_means_out() -> None:
    heads, blocks = make_call(LAYOUTS[1]), random_blocks(LAYOUTS[1])
    with_test, without = (Rectification(gain_aware=flag).attend(call_of(heads, blocks)) for flag in (True, False))
    assert not torch.allclose(with_test, without, atol=1e-3)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="gain_aware is 'yes'; give true or false"):
        build_compensation(CompensationSpec.make("rectification", gain_aware="yes"))

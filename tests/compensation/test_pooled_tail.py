"""The pooled tail against its formula: each skipped block is one key, its mean, as often as it has tokens."""

from __future__ import annotations

import math

import numpy as np

from tests.compensation.calls import Array, Head, keeps_its_promises, sparse_row
from vidaccel.compensation import PooledTail


def _oracle(head: Head, kept: Array) -> Array:
    out = np.zeros_like(head.q)
    for i, tokens in enumerate(head.blocks):
        skipped = [j for j in range(len(head.blocks)) if not kept[i, j]]
        for t in tokens:
            extra = [
                (head.scale * float(head.q[t] @ head.k_means[j]) + math.log(len(head.blocks[j])), head.mean(head.v, j))
                for j in skipped
            ]
            out[t] = sparse_row(head, t, kept[i], extra)
    return out


def test_it_is_its_formula() -> None:
    keeps_its_promises(PooledTail(), _oracle)

"""What timings cannot mean, in words: figures that one machine, left alone, would not have given.

A figure is shown as it was measured. Where it contradicts another one of the same command, a sentence says so.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["most_by_attention", "on_dense", "on_gain", "on_prediction"]

#: Runs of one and the same generation, of which the slowest takes this many times the fastest, were disturbed.
_RESTLESS = 1.1


def most_by_attention(attention: float | None, total: float) -> float | None:
    """The speed-up if self-attention took no time at all (Amdahl), ``None`` if it is not known or all there is.

    Args:
        attention, total: seconds of self-attention in a dense generation, and of all of it.
    """
    return None if attention is None or attention >= total else total / (total - attention)


def on_dense(seconds: Sequence[float]) -> list[str]:
    """Says so if dense runs that should take the same time do not.

    Args:
        seconds: of each dense run at these settings.
    """
    if len(seconds) < 2 or max(seconds) <= _RESTLESS * min(seconds):
        return []
    return [
        f"This machine was busy: dense took {min(seconds):.3g} to {max(seconds):.3g} s in this command, so seconds and"
        " speed-ups are worth no more than that; run it again on an idle machine, or with more repeats."
    ]


def on_gain(speedup: float, most: float | None, *, others: Sequence[str] = ()) -> list[str]:
    """Says so if a plan gained more than attention can give.

    Args:
        speedup: measured.
        most: see :func:`most_by_attention`.
        others: what else the plan makes faster.
    """
    if most is None or round(speedup, 2) <= round(most, 2):
        return []
    if others:
        return [f"The plan gains more than attention alone can, by {' and '.join(others)}."]
    return [
        "No plan can gain that much from attention: the dense runs were disturbed, or something else was warmed up."
    ]


def on_prediction(predicted: float, measured: float, dense: float) -> list[str]:
    """Says so if a prediction is further off than what it was to tell: what a plan gains.

    Args:
        predicted, measured: seconds of a generation by the plan.
        dense: of a dense one, to which the prediction refers.
    """
    if abs(measured - predicted) <= max(abs(dense - predicted), (_RESTLESS - 1) * dense):
        return []
    return [
        f"{predicted:.3g} s were predicted and {measured:.3g} s measured, further apart than what the plan was to gain"
        f" of {dense:.3g} s: the candidates were timed while the machine did something else. Calibrate again for a plan"
        " chosen by seconds."
    ]

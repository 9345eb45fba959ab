"""CUDA graphs and traces: why a patched model is not captured into one."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..errors import PatchError

__all__ = ["OPERATOR_TAGS", "refuse_capture", "refuse_tracing"]


def _tags() -> dict[str, Any]:
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    takes_tags = "tags" in inspect.signature(torch.library.custom_op).parameters
    return {} if tag is None or not takes_tags else {"tags": (tag,)}


#: Arguments of ``custom_op`` by which inductor runs our operators between CUDA graphs, where it knows the tag. Older
#: releases put no graph that holds a CPU tensor into CUDA graphs at all, and the handle of a layer is one.
OPERATOR_TAGS = _tags()


def refuse_capture(x: torch.Tensor) -> None:
    """Raises :class:`PatchError` while the stream of a CUDA tensor is being captured into a CUDA graph.

    A replay repeats kernels only. The noise level, the blocks chosen for these queries, and what a pattern remembers
    would all stay those of the captured step.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise PatchError(
            "a CUDA graph is being captured around a patched transformer, and its replay would repeat the blocks of one"
            " step in all others; call it outside torch.cuda.graph, and for less launch overhead use torch.compile,"
            " which keeps this attention out of its CUDA graphs"
        )


def refuse_tracing() -> None:
    """Raises :class:`PatchError` while the model is traced or exported: that would keep the choices of one step."""
    # what a graph under construction asks is constant in it
    if torch.compiler.is_exporting() if torch.compiler.is_compiling() else torch._C._get_tracing_state() is not None:
        raise PatchError(
            "torch.jit.trace and torch.export would freeze what a patched transformer chooses in one step; call"
            " vidaccel.unpatch(pipe) first, or use torch.compile"
        )

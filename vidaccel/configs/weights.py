"""Trained tensors of systems that have trained parts: what checkpoints call them, and what shape they have.

A system's tensors form a group: VSA's gate, SLA's projection, SLA2's alpha, SeerAttention's gates. One table says
which names of a checkpoint mean which of them; a checkpoint of a whole model holds thousands of other tensors, which
are never read. Only safetensors files are read, because loading one executes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..errors import ConfigError

__all__ = ["GROUPS", "TENSORS", "TrainedTensor", "WeightSource", "by_layer", "check_layer", "read_weights"]

#: A .safetensors file, a folder of them, or a state dict.
WeightSource: TypeAlias = "str | Path | Mapping[str, torch.Tensor]"
#: Layers as checkpoints number them: (name of the list of blocks, number in it) -> short name -> tensor.
Found: TypeAlias = "dict[tuple[str, int], dict[str, torch.Tensor]]"


@dataclass(frozen=True)
class TrainedTensor:
    """One tensor of a layer.

    Args:
        name: ``group.part``, as ``Heads.weights`` has it.
        suffix: regular expression of its name in checkpoints, behind the number of the block.
        axes: its shape: ``heads``; ``dim`` of a head; ``inner``, both multiplied; ``channels`` of the hidden states;
            ``3*dim``; any other name is free, but the same in all tensors of the group. ``heads?`` may be 1 too.
        optional: whether the group is complete without it.
        float32: whether it is kept in float32, whatever the model's dtype.
    """

    name: str
    suffix: str
    axes: tuple[str, ...]
    optional: bool = False
    float32: bool = True

    @property
    def group(self) -> str:
        """The system's part it belongs to."""
        return self.name.split(".")[0]


_LAYER = r"(?:attn1?|self_attn)\."
_GATE = rf"(?:{_LAYER})?to_gate_compress\."
_SLA = rf"{_LAYER}(?:attn_op\.local_attn\.|attn_impl\.)?"
_SEER = rf"{_LAYER}attn_gate\."

#: Everything that is read. Names as in FastVideo (VSA, SLA), TurboDiffusion (SLA) and SeerAttention.
TENSORS = (
    TrainedTensor("gate.weight", rf"{_GATE}weight", ("inner", "channels"), float32=False),
    TrainedTensor("gate.bias", rf"{_GATE}bias", ("inner",), optional=True, float32=False),
    TrainedTensor("projection.weight", rf"{_SLA}proj_l\.weight", ("dim", "dim")),
    TrainedTensor("projection.bias", rf"{_SLA}proj_l\.bias", ("dim",), optional=True),
    TrainedTensor("alpha.logits", rf"{_SLA}alpha", ("heads?", "blocks")),
    TrainedTensor("seer.q", rf"{_SEER}(?:attngate|mask)_linear_q\.weight", ("heads", "dim", "gate")),
    TrainedTensor("seer.k", rf"{_SEER}(?:attngate|mask)_linear_k\.weight", ("heads", "3*dim", "gate")),
    TrainedTensor("seer.q_norm", rf"{_SEER}attngate_qnorm\.weight", ("gate",), optional=True),
    TrainedTensor("seer.k_norm", rf"{_SEER}attngate_knorm\.weight", ("gate",), optional=True),
)
#: Groups, and what messages call them.
GROUPS = {
    "gate": "VSA gates (to_gate_compress)",
    "projection": "SLA projections (proj_l)",
    "alpha": "SLA2 mixing weights (alpha)",
    "seer": "SeerAttention gates (attn_gate)",
}
_BY_NAME = {tensor.name: tensor for tensor in TENSORS}
_NAMES = tuple(
    (tensor.name, re.compile(rf"(?:.*\.)?(?P<stack>[A-Za-z_]\w*)\.(?P<number>\d{{1,5}})\.{tensor.suffix}"))
    for tensor in TENSORS
)
_WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_weights(source: WeightSource) -> Found:
    """The tensors of a checkpoint that the table knows, by layer.

    Raises:
        ConfigError: if the source is no safetensors file, folder of them or state dict, cannot be read, holds none of
            these tensors, or two of the same meaning.
    """
    found: Found = {}
    others = 0
    with _opened(source) as (where, entries):
        for key, load in entries:
            meaning = _meaning(key)
            if meaning is None:
                others += 1
                continue
            stack, number, name = meaning
            layer = found.setdefault((stack, number), {})
            if name in layer:
                raise ConfigError(f"{where} has two tensors for {name} of {stack}.{number}; leave out {key}")
            layer[name] = load()
    if not found:
        raise ConfigError(
            f"{where} holds none of the trained tensors that vidaccel knows, among {others}; known are"
            f" {', '.join(GROUPS.values())}, with the number of the block before them"
        )
    return found


def by_layer(found: Found, modules: Sequence[str]) -> dict[int, dict[str, torch.Tensor]]:
    """The same by number of the layer.

    Args:
        modules: qualified names of the model's attention layers in order, such as ``blocks.0.attn1``. If all are in one
            list of blocks, the checkpoint may call that list otherwise.

    Raises:
        ConfigError: if a tensor is for a block that the model does not have.
    """
    places = {tuple(module.split(".")[:2]): layer for layer, module in enumerate(modules)}
    stacks = {stack for stack, _ in places}
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for (stack, number), tensors in found.items():
        known = stack in stacks or len(stacks) > 1
        layer = places.get((stack if known else next(iter(stacks)), str(number)))
        if layer is None:
            raise ConfigError(
                f"the weights hold {', '.join(sorted(tensors))} of {stack}.{number}, and the model's attention is in"
                f" {modules[0]} to {modules[-1]}; give weights that were trained for this model"
            )
        layers.setdefault(layer, {}).update(tensors)
    return layers


def check_layer(
    tensors: Mapping[str, torch.Tensor], where: str, *, heads: int, dim: int, channels: int
) -> dict[str, torch.Tensor]:
    """A layer's tensors, if each group is complete and of the layer's shape; an axis of length 1 too many is dropped.

    Args:
        where: names the layer in messages.
        heads, dim: heads of the layer and channels of each.
        channels: channels of its hidden states.

    Raises:
        ConfigError: naming the first tensor that is missing, of the wrong shape or dtype, or not finite.
    """
    lengths = {"heads": heads, "dim": dim, "inner": heads * dim, "channels": channels, "3*dim": 3 * dim}
    checked = {}
    for name, tensor in tensors.items():
        kind = _BY_NAME[name]
        if tensor.dtype not in _DTYPES:
            raise ConfigError(
                f"{name} of {where} is {str(tensor.dtype).removeprefix('torch.')}; give weights in float32, bfloat16 or"
                " float16"
            )
        if tensor.dim() == len(kind.axes) + 1 and tensor.shape[1] == 1:
            tensor = tensor.squeeze(1)  # queries of one head a group, SeerAttention
        if not _fits(tensor, kind, lengths):
            wanted = " x ".join(_spelt(axis, lengths) for axis in kind.axes)
            raise ConfigError(
                f"{name} of {where} has shape {list(tensor.shape)}, and the layer needs {wanted}; give weights that"
                " were trained for this model"
            )
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{name} of {where} holds numbers that are not finite; the checkpoint is damaged")
        checked[name] = tensor.detach()
    for kind in TENSORS:
        begun = any(_BY_NAME[name].group == kind.group for name in tensors)
        if begun and not kind.optional and kind.name not in tensors:
            raise ConfigError(f"the weights of {where} have a {kind.group} without {kind.name}; give both")
    return checked


def _fits(tensor: torch.Tensor, kind: TrainedTensor, lengths: dict[str, int]) -> bool:
    """Whether the shape is that of the table; free axes are fixed by the first tensor that has them."""
    if tensor.dim() != len(kind.axes):
        return False
    for length, axis in zip(tensor.shape, kind.axes, strict=True):
        if axis.endswith("?"):
            fits = length in (1, lengths[axis[:-1]])
        else:
            fits = 0 < length == lengths.setdefault(axis, length)
        if not fits:
            return False
    return True


def _spelt(axis: str, lengths: dict[str, int]) -> str:
    if axis.endswith("?"):
        return f"{lengths[axis[:-1]]} or 1"
    return str(lengths.get(axis, f"any {axis}"))


def _meaning(key: str) -> tuple[str, int, str] | None:
    """(list of blocks, number, short name) of a checkpoint's tensor, or ``None`` if it is none of ours."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    for name, pattern in _NAMES:
        match = pattern.fullmatch(key)
        if match is not None:
            return match["stack"], int(match["number"]), name
    return None


@contextmanager
def _opened(source: WeightSource) -> Iterator[tuple[str, Iterator[tuple[str, Any]]]]:
    """What the source is called, and its tensors: (name, function that loads it)."""
    if isinstance(source, Mapping):
        for key, tensor in source.items():
            if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
                raise ConfigError(
                    f"the weights hold {key!r}: a {type(tensor).__name__}; give names and tensors, as in a state dict"
                )
        yield "the state dict", ((key, lambda tensor=tensor: tensor) for key, tensor in source.items())
        return
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"the weights are a {type(source).__name__}; give a .safetensors file, a folder of them or a state dict"
        )
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"the folder {path} holds no .safetensors file; name the folder of the trained weights")
    if not files[0].exists():
        raise ConfigError(f"there is no file or folder {path} with trained weights; correct the path")
    if files[0].suffix.lower() != ".safetensors":
        raise ConfigError(
            f"the weights {path} are no .safetensors file, and other forms can run code when they are read; write the"
            " state dict with safetensors.torch.save_file"
        )
    yield str(path), _entries(files)


def _entries(files: list[Path]) -> Iterator[tuple[str, Any]]:
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no mapping
                    yield key, lambda key=key, opened=opened: opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"the weights {file} cannot be read: {error}; download them again") from error

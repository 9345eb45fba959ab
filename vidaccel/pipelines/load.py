"""Load a diffusers pipeline from a folder or the hub, with errors a person can act on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, did_you_mean

__all__ = ["DTYPES", "check_model", "compile_transformers", "load_pipeline", "parse_dtype", "pipeline_class"]

#: What a dtype may be called.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


_INDEX = "model_index.json"
_MODULAR = "modular_model_index.json"  # of a ModularPipeline, whose folder has no other


#: VAEs that diffusers can only run in tiles, and by default does not; a generation would fail at its very end.
_ONLY_TILED = ("AutoencoderKLAllegro",)
#: Checkpoints in one file. Which model they hold is a guess of diffusers, so it is left to the user.
_SINGLE_FILES = (".gguf", ".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; valid are {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def check_model(model: str | os.PathLike[str]) -> str:
    """``model`` as text, if it is a pipeline's folder or looks like a hub id; touches neither weights nor network.

    Raises:
        ConfigError: a folder that is missing or holds no pipeline, or a pipeline that this diffusers does not know.
    """
    text = os.fspath(model)
    folder = Path(text)
    if folder.suffix.lower() in _SINGLE_FILES and not folder.is_dir():
        raise ConfigError(
            f"{text} is a single file, and vidaccel loads pipelines' folders; load it in Python,"
            " transformer = WanTransformer3DModel.from_single_file(path) with your model's class (a .gguf also takes"
            " quantization_config=GGUFQuantizationConfig()), give it to from_pretrained, and call vidaccel.patch(pipe)"
        )
    if not folder.exists():
        parts = text.split("/")
        if len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts):
            return text
        raise ConfigError(
            f"there is no model folder {text}; give a folder written by save_pretrained, or a hub id of the form"
            " owner/name"
        )
    index = next((folder / name for name in (_INDEX, _MODULAR) if (folder / name).is_file()), None)
    if index is None:
        part = (folder / "config.json").is_file()
        advice = "it is a part of one, so give the folder above it" if part else "give a pipeline's folder"
        raise ConfigError(f"{text} is not a diffusers pipeline: it has no model_index.json; {advice}")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
        name = listed["_class_name"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{index} cannot be read as a pipeline's index ({error}); save the pipeline again") from error
    import diffusers

    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ConfigError(
            f"{text} holds a {name}, which diffusers {diffusers.__version__} does not know; update diffusers"
        )
    missing = [part for part in _parts(listed) if not (folder / part).is_dir()]
    if missing:
        raise ConfigError(
            f"{text} lacks {', '.join(f'{part}/' for part in missing)}, which its model_index.json names; download or"
            " save the whole pipeline"
        )
    return text


def _parts(listed: Mapping[str, Any]) -> list[str]:
    """The components of a pipeline's index that have a folder: those that are [library, class] and not null."""
    return [
        name
        for name, what in listed.items()
        if not name.startswith("_") and isinstance(what, list) and len(what) == 2 and None not in what
    ]


def pipeline_class(model: str | os.PathLike[str]) -> type | None:
    """The class of a pipeline in a folder, which is known before it is loaded; ``None`` for one of the hub.

    ``None`` for a modular one, too: what it takes is known from its blocks.

    Raises:
        ConfigError: see :func:`check_model`.
    """
    index = Path(check_model(model)) / _INDEX
    if not index.is_file():
        return None
    import diffusers

    found = getattr(diffusers, json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    return found if isinstance(found, type) else None


def load_pipeline(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    loras: Sequence[str] = (),
    cpu_offload: bool = False,
) -> Any:
    """The pipeline of ``model``, on ``device``. Weights are read from safetensors files only: no code is executed.

    Args:
        model: folder written by ``save_pretrained``, or a hub id.
        loras: LoRA weights to load, files or hub ids; all are active with weight 1.
        cpu_offload: keep each part on ``device`` only while it computes.

    Raises:
        ConfigError: the model or a LoRA cannot be loaded, or ``cpu_offload`` has no accelerator to offload from.
    """
    from diffusers.pipelines import pipeline_utils

    name = check_model(model)
    if cpu_offload and device.type == "cpu":
        raise ConfigError("cpu offload keeps weights off an accelerator, and the device is the CPU; leave it out")
    for lora in loras:
        _check_lora(lora)
    # newer diffusers call the argument dtype and warn about its old name, older ones know only that
    keyword = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
    try:
        if (Path(name) / _MODULAR).is_file() and not (Path(name) / _INDEX).is_file():
            pipe = _load_modular(name, **{keyword: dtype})
        else:
            pipe = pipeline_utils.DiffusionPipeline.from_pretrained(name, use_safetensors=True, **{keyword: dtype})
    except _LOADING_ERRORS as error:
        raise ConfigError(f"{name} could not be loaded: {_first_line(error)}") from error
    vae = getattr(pipe, "vae", None)
    if vae is not None and type(vae).__name__ in _ONLY_TILED:
        vae.enable_tiling()
    for number, lora in enumerate(loras):
        _load_lora(pipe, lora, f"lora_{number}")
    if len(loras) > 1:
        pipe.set_adapters([f"lora_{number}" for number in range(len(loras))])
    if cpu_offload and not hasattr(pipe, "enable_model_cpu_offload"):
        raise ConfigError(
            f"{type(pipe).__name__} is modular and cannot be offloaded as a whole; leave out --cpu-offload"
        )
    if cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def _load_modular(name: str, **options: Any) -> Any:
    import diffusers

    pipe = diffusers.ModularPipeline.from_pretrained(name)
    pipe.load_components(use_safetensors=True, **options)
    # what could not be loaded is only logged by diffusers, and missed in the middle of a run
    missing = [part for part in pipe.pretrained_component_names if getattr(pipe, part, None) is None]
    if missing:
        raise ConfigError(
            f"{name} could not be loaded: {', '.join(missing)} could not be read; save the pipeline again"
        )
    return pipe


def compile_transformers(pipe: Any) -> None:
    """``torch.compile`` the repeated blocks of every transformer, each as one full graph; compiled at first use.

    Raises:
        ConfigError: a transformer does not say which of its blocks repeat.
    """
    for name, part in pipe.components.items():
        if not name.startswith("transformer") or part is None:
            continue
        if not getattr(part, "_repeated_blocks", None):
            raise ConfigError(f"diffusers does not say which blocks of {type(part).__name__} repeat; leave out compile")
        part.compile_repeated_blocks(fullgraph=True)


# What a missing, truncated or foreign checkpoint raises: OSError (hub, files), ValueError (index), and of safetensors
# and torch a RuntimeError or their own exceptions.
def _loading_errors() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (OSError, ValueError, RuntimeError, AttributeError, ImportError, KeyError, SafetensorError)


_LOADING_ERRORS = _loading_errors()


def _check_lora(lora: str) -> None:
    """Refuses, before the model is loaded, a file that is missing or none of weights."""
    from safetensors import SafetensorError, safe_open

    looks_local = lora.endswith(".safetensors") or lora.startswith((".", "/", "~")) or lora.count("/") != 1
    if looks_local and not Path(lora).exists():
        raise ConfigError(f"there is no LoRA {lora}; give a .safetensors file or a hub id of the form owner/name")
    if not Path(lora).is_file():
        return
    try:
        with safe_open(lora, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"the LoRA {lora} is no .safetensors file ({_first_line(error)}); give one of LoRA weights"
        ) from error


def _load_lora(pipe: Any, lora: str, adapter: str) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise ConfigError(f"{type(pipe).__name__} cannot take LoRA weights; leave out --lora")
    try:
        pipe.load_lora_weights(lora, adapter_name=adapter, use_safetensors=True)
    except Exception as error:
        if _is_of_the_network(error):
            raise ConfigError(
                f"the LoRA {lora} is not here, and the hub cannot be reached ({_first_line(error)}); give a"
                " .safetensors file"
            ) from error
        if not isinstance(error, _LOADING_ERRORS):
            raise
        raise ConfigError(f"the LoRA {lora} could not be loaded: {_first_line(error)}") from error


def _is_of_the_network(error: Exception) -> bool:
    """Whether it is of the hub's HTTP library, which is another one in each release; they name their errors alike."""
    return any(cls.__name__ in ("HTTPError", "TransportError") for cls in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

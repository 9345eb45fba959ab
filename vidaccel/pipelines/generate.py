"""Run a pipeline once for one prompt: frames, seconds by stage, and the settings that reproduce them."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .call_check import GIVEN, check_call, check_seed
from .call_signature import arguments_of
from .complaints import own_complaints
from .outputs import Video, read_output
from .video import Frames

__all__ = [
    "STAGES",
    "Generation",
    "Request",
    "accepted_arguments",
    "execution_device",
    "generate",
    "num_steps",
    "unknown_words",
]

#: What the seconds of a run are divided into: ``text`` encoding, ``denoise`` (transformer and scheduler), ``decode``
#: (VAE), and ``other`` (everything between and around them).
STAGES = ("text", "denoise", "decode", "other")


@dataclass(frozen=True)
class Request:
    """What to generate.

    Args:
        prompt: the text.
        seed: of the starting noise; it is drawn on the CPU, so it is the same on every device.
        arguments: everything else for the pipeline's call, under its own names.
    """

    prompt: str
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def fingerprint(self) -> str:
        """The same for equal prompts, seeds and arguments, pictures and tensors included, in every process."""
        arguments = {name: _content(value) for name, value in self.arguments.items()}
        text = json.dumps([self.prompt, self.seed, arguments], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Generation:
    """What came out.

    Args:
        videos: all clips of the prompt.
        seconds: wall clock by `STAGES`, and ``total``.
        settings: everything that reproduces the run, JSON-able.
        latents: what the VAE decoded, on the CPU; ``None`` for a pipeline that decodes piece by piece or not at all.
        notes: what is to be said about what came out.
    """

    videos: tuple[Video, ...]
    seconds: dict[str, float]
    settings: dict[str, Any]
    latents: torch.Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def frames(self) -> Frames:
        """Those of the first clip, [T, H, W, 3] uint8."""
        return self.videos[0].frames


def generate(pipe: Any, request: Request, *, several: bool = False) -> Generation:
    """Run ``pipe`` for one request; nothing of the pipeline is changed afterwards.

    Args:
        several: whether the caller takes more than one clip of a prompt; else they are refused.

    Raises:
        ConfigError: the pipeline does not accept an argument or its value, or does not return a video, or makes more
            clips than wanted, or there is too little memory.
    """
    arguments = dict(request.arguments)
    check_call(pipe, arguments, several=several)
    clock = _StageClock(execution_device(pipe))
    decoded: list[Any] = []
    with _watched(pipe, clock, decoded), own_complaints(pipe, arguments), _without_rounding_by_one():
        output = pipe(prompt=request.prompt, **_given(pipe, request), **arguments)
    seconds = clock.stop()
    videos, notes = read_output(pipe, output)
    if len(videos) > 1 and not several:
        raise ConfigError(f"{type(pipe).__name__} returned {len(videos)} clips where one was wanted; ask for one")
    settings = {
        "pipeline": type(pipe).__name__,
        "device": str(execution_device(pipe)),
        "dtype": _dtype(pipe),
        "prompt": request.prompt,
        "seed": request.seed,
        "arguments": {name: _jsonable(value) for name, value in arguments.items()},
        "frames": dict(zip(("count", "height", "width"), videos[0].frames.shape[:3], strict=True)),
    }
    sound = videos[0].sound
    if sound is not None:
        count, channels = sound.samples.shape
        settings["sound"] = {"sample_rate": sound.rate, "channels": channels, "samples": count}
    whole = decoded[0] if len(decoded) == 1 and isinstance(decoded[0], torch.Tensor) else None
    return Generation(videos, seconds, settings, None if whole is None else whole.detach().cpu(), notes)


def _given(pipe: Any, request: Request) -> dict[str, Any]:
    """What `generate` gives itself beside the prompt: frames as numbers are wanted, from this seed."""
    known = arguments_of(pipe)
    given = {"generator": torch.Generator("cpu").manual_seed(request.seed)}
    return given | ({"output_type": "np"} if "output_type" in known else {})


def accepted_arguments(pipe: Any) -> dict[str, Any]:
    """Names and defaults of what the pipeline's call takes beyond what `generate` gives itself."""
    return {name: known.default for name, known in arguments_of(pipe).items() if name not in GIVEN}


def num_steps(pipe: Any, request: Request) -> int | None:
    """Denoising steps of a request, or ``None`` for a pipeline that does not say."""
    steps = request.arguments.get("num_inference_steps", accepted_arguments(pipe).get("num_inference_steps"))
    return steps if isinstance(steps, int) else None


def unknown_words(pipe: Any, prompt: str) -> list[str]:
    """A sentence that names the words the tokenizer does not know, if there are any (small vocabularies)."""
    tokenizer = getattr(pipe, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is None or unknown is None:
        return []
    words = [word for word in prompt.split() if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]
    return [f"the model does not know the words: {', '.join(words)}"] if words else []


class _StageClock:
    """Divides wall clock time among stages; waits for the device only where the stage changes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._stage = "other"
        self._since = self._now()

    def _now(self) -> float:
        if self._device.type in ("cuda", "mps", "xpu"):
            getattr(torch, self._device.type).synchronize()
        return time.perf_counter()

    def enter(self, stage: str) -> None:
        """From now on time belongs to ``stage``."""
        if stage != self._stage:
            now = self._now()
            self._seconds[self._stage] += now - self._since
            self._stage, self._since = stage, now

    def stop(self) -> dict[str, float]:
        """Seconds by stage and in total."""
        self._seconds[self._stage] += self._now() - self._since
        return {**self._seconds, "total": sum(self._seconds.values())}


@contextmanager
def _watched(pipe: Any, clock: _StageClock, decoded: list[Any]) -> Iterator[None]:
    """Tells ``clock`` the stages: hooks on text encoders and transformers, and a wrapped ``vae.decode``.

    Denoising lasts from a transformer's first call to the decoding, so the scheduler between the calls is in it. What
    is decoded is added to ``decoded``.
    """
    with ExitStack() as undo:
        for name, module in getattr(pipe, "components", {}).items():
            if not isinstance(module, nn.Module):
                continue
            if name.startswith("text_encoder"):
                undo.callback(module.register_forward_pre_hook(lambda *_: clock.enter("text")).remove)
                undo.callback(module.register_forward_hook(lambda *_: clock.enter("other")).remove)
            elif name.startswith("transformer"):
                undo.callback(module.register_forward_pre_hook(lambda *_: clock.enter("denoise")).remove)
        vae = getattr(pipe, "vae", None)
        if vae is not None:
            undo.enter_context(_around(vae, "decode", lambda run: _decoding(clock, run, decoded)))
        yield


def _decoding(clock: _StageClock, run: Callable[..., Any], decoded: list[Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        clock.enter("decode")
        decoded.append(args[0] if args else kwargs.get("z"))
        try:
            return run(*args, **kwargs)
        finally:
            clock.enter("other")

    return timed


@contextmanager
def _around(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replaces the method ``name`` of this one object while the block runs, and puts back exactly what was there."""
    own = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def _without_rounding_by_one() -> Iterator[None]:
    """Keeps back a warning of diffusers that is never true: that frames must be "divisible by 1"."""

    def true(record: logging.LogRecord) -> bool:
        return "has to be divisible by 1." not in record.getMessage()

    logger = logging.getLogger("diffusers.pipelines.wan.pipeline_wan")
    logger.addFilter(true)
    try:
        yield
    finally:
        logger.removeFilter(true)


def execution_device(pipe: Any) -> torch.device:
    """Where the pipeline computes, offloaded or not."""
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


def _dtype(pipe: Any) -> str:
    part = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    return str(getattr(part, "dtype", getattr(pipe, "dtype", "unknown"))).removeprefix("torch.")


def _content(value: Any) -> str:
    value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return "[" + ", ".join(map(_content, value)) + "]" if isinstance(value, list | tuple) else str(value)


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return f"<{type(value).__name__}>"

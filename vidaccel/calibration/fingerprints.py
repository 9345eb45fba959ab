"""What a calibration run is known by: its settings and its weights, in texts that hold no prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..configs.codec import policy_to_data
from ..pipelines.generate import Request
from ..pipelines.patch import find_transformers
from .candidates import CandidateSet

__all__ = ["run_settings", "text_fingerprint", "weights_digest"]


def run_settings(pipe: Any, request: Request, candidates: CandidateSet, bins: int) -> dict[str, Any]:
    """All that must be the same for a run to go on with what another has seen, JSON-able, known before anything runs.

    Prompts do not belong to it, and neither do pictures. Texts in arguments about prompts become fingerprints.
    """
    part = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    return {
        "pipeline": type(pipe).__name__,
        "device": str(getattr(pipe, "_execution_device", None) or pipe.device),
        "dtype": str(getattr(part, "dtype", "unknown")).removeprefix("torch."),
        "arguments": {name: _plain(name, value) for name, value in request.arguments.items()},
        "weights": weights_digest(pipe),
        "candidates": _candidates_digest(candidates),
        "bins": bins,
    }


def weights_digest(pipe: Any) -> str:
    """A fingerprint of some attention weights and the adapters, so that another checkpoint or LoRA is noticed."""
    digest = hashlib.sha256()
    for name, model, family in find_transformers(pipe):
        digest.update(f"{name} {sorted(getattr(model, 'peft_config', None) or {})}".encode())
        for layer, (_, module) in enumerate(family.attention_layers(model)):
            for key, weight in module.named_parameters():
                if not weight.is_meta and weight.is_floating_point():
                    digest.update(f"{layer} {key} {weight.detach().flatten()[:8].tolist()}".encode())
    return digest.hexdigest()[:16]


def text_fingerprint(text: str) -> str:
    """What stands for a prompt where the prompt itself is not to be stored."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _candidates_digest(candidates: CandidateSet) -> str:
    policies = [policy_to_data(policy) for policy in candidates.policies]
    tile = None if candidates.tile is None else list(candidates.tile)
    return hashlib.sha256(json.dumps([policies, tile], sort_keys=True).encode()).hexdigest()[:16]


def _plain(name: str, value: Any) -> Any:
    """The value as JSON has it; of what JSON cannot hold, its kind."""
    if isinstance(value, str):
        return text_fingerprint(value) if value and "prompt" in name else value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    return f"<{type(value).__name__}>"

"""Cosmos 1, 2 and 2.5: one stream of video tokens, text in cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..types import VideoGrid
from .base import PROMPT, Family, grid_of

__all__ = ["CosmosFamily"]


class CosmosFamily(Family):
    """Cosmos Predict 1, 2 and 2.5, Transfer 2.5."""

    name = "cosmos"
    transformers = ("CosmosTransformer3DModel",)
    pipelines = (
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Cosmos2_5_TransferPipeline",
    )
    layers = ("transformer_blocks.*.attn1",)
    processors = ("CosmosAttnProcessor2_0",)
    dense = (("transformer_blocks.*.attn2", PROMPT),)
    separate_guidance = True
    fps = 30.0
    fps_of: ClassVar[Mapping[str, float]] = {
        "Cosmos2VideoToWorldPipeline": 16.0,
        "Cosmos2_5_PredictBasePipeline": 16.0,
    }
    needs: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {
        "CosmosVideoToWorldPipeline": (("image", "video"),),
        "Cosmos2VideoToWorldPipeline": (("image", "video"),),
    }

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return grid_of(call["hidden_states"], model.config.patch_size)

    def timestep(self, call: Mapping[str, Any], scheduler: Any) -> torch.Tensor | float:
        level: torch.Tensor = call["timestep"]
        if type(scheduler).__name__.startswith("EDM"):  # Cosmos 1 passes the scheduler's timestep, log(sigma) / 4
            return level
        # later ones pass the noise level itself: sigma, or sigma / (1 + sigma) of a schedule that begins at 80
        return level * (getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000)

"""LTX-Video and LTX-2: one stream of video tokens, flattened by the pipeline; the audio of LTX-2 is not touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..types import VideoGrid
from .base import AUDIO, PROMPT, Family

__all__ = ["LTX2Family", "LTXFamily"]


_COORDINATES = "it gives coordinates of tokens instead of the size of the latents"


def _told_grid(call: Mapping[str, Any], *, others: bool) -> VideoGrid | str:
    """The grid by the call's arguments, because the pipeline cuts the latents into patches before the model."""
    sizes = [call.get(name) for name in ("num_frames", "height", "width")]
    if any(size is None for size in sizes):
        return "the pipeline gives coordinates of tokens instead of the size of the latents"
    grid = VideoGrid(*(int(size) for size in sizes if size is not None))
    tokens = call["hidden_states"].shape[1]
    if tokens < grid.tokens or (tokens > grid.tokens and not others):
        return f"the pipeline names a {grid} grid for {tokens} tokens"
    return grid


class LTXFamily(Family):
    """LTX-Video: T2V, I2V, conditions, long videos."""

    name = "ltx"
    transformers = ("LTXVideoTransformer3DModel",)
    pipelines = (
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
        "LTXI2VLongMultiPromptPipeline",
    )
    layers = ("transformer_blocks.*.attn1",)
    processors = ("LTXVideoAttnProcessor",)
    dense = (("transformer_blocks.*.attn2", PROMPT),)
    dense_pipelines = (
        ("LTXConditionPipeline", _COORDINATES),
        ("LTXI2VLongMultiPromptPipeline", f"{_COORDINATES}, and 1 for each size"),
    )
    separate_guidance = False
    fps = 25.0
    needs: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {
        "LTXImageToVideoPipeline": (("image",),),
    }

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return _told_grid(call, others=False)


class LTX2Family(Family):
    """LTX-2: the video stream's self-attention. Tokens appended as references are other tokens, always attended."""

    name = "ltx2"
    transformers = ("LTX2VideoTransformer3DModel",)
    pipelines = (
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2InContextPipeline",
        "LTX2HDRPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
    )
    layers = ("transformer_blocks.*.attn1",)
    processors = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
    token_order = "video, then reference tokens; audio apart"
    joint = True
    dense = (
        ("transformer_blocks.*.attn2", PROMPT),
        ("transformer_blocks.*.audio_*", AUDIO),
        ("transformer_blocks.*_to_*_attn", "audio and video attend each other"),
    )
    dense_pipelines = (("LTX2DFRPipeline", _COORDINATES), ("LTX2DFRTemporalRefinePipeline", _COORDINATES))
    separate_guidance = False
    fps = 24.0
    needs: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {
        "LTX2ImageToVideoPipeline": (("image",),),
        "LTX2DFRTemporalRefinePipeline": (
            ("latents",),
            ("keyframes_latents",),
            ("keyframe_positions",),
            ("audio_latents",),
        ),
    }
    # it puts a frame between every two
    times_frame_rate: ClassVar[Mapping[str, float]] = {"LTX2DFRTemporalRefinePipeline": 2.0}

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        grid = _told_grid(call, others=True)
        if isinstance(grid, VideoGrid) and call["hidden_states"].shape[1] > grid.tokens:
            coordinates = call.get("video_coords")  # [B, 3, S, start and end]
            # Echo puts its memory before the video, at a later time; the video itself starts at 0
            if coordinates is None or float(coordinates[0, 0, 0, 0]) != 0:
                return "other tokens precede the video, and the call does not tell how many"
        return grid

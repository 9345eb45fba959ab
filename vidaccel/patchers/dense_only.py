"""Video models that vidaccel knows and leaves dense, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DENSE_ONLY", "DenseOnly"]


@dataclass(frozen=True)
class DenseOnly:
    """A kind of video model without attention that block-sparse kernels could speed up.

    Args:
        name: short name for tables.
        models: class names of its denoisers.
        pipelines: class names of the pipelines that use them.
        reason: why it stays dense, in one sentence.
        fps: frames per second its videos are meant to be played at; ``None`` if nobody knows.
        fps_of: the same of those of ``pipelines`` that have another rate.
    """

    name: str
    models: tuple[str, ...]
    pipelines: tuple[str, ...]
    reason: str
    fps: float | None = None
    fps_of: Mapping[str, float] = field(default_factory=dict)

    def matches(self, model: object) -> bool:
        """Whether ``model`` is one of this kind."""
        return any(cls.__name__ in self.models for cls in type(model).__mro__)

    def frame_rate(self, pipe: Any) -> float | None:
        """Frames per second that a pipeline of this kind makes videos for, where its call does not say."""
        return next((self.fps_of[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in self.fps_of), self.fps)


_FACTORISED = "it attends within frames and along time apart, in sequences too short to gain"
_CAUSAL = (
    "it generates chunk after chunk with masks or key-value caches of its own, which block masks here do not express"
)

DENSE_ONLY: tuple[DenseOnly, ...] = (
    DenseOnly("latte", ("LatteTransformer3DModel",), ("LattePipeline",), _FACTORISED, fps=8.0),
    DenseOnly(
        "animatediff",
        ("UNetMotionModel",),
        (
            "AnimateDiffControlNetPipeline",
            "AnimateDiffPAGPipeline",
            "AnimateDiffPipeline",
            "AnimateDiffSDXLPipeline",
            "AnimateDiffSparseControlNetPipeline",
            "AnimateDiffVideoToVideoControlNetPipeline",
            "AnimateDiffVideoToVideoPipeline",
            "PIAPipeline",
        ),
        _FACTORISED,
        fps=8.0,
    ),
    DenseOnly(
        "video-unet",
        ("UNetSpatioTemporalConditionModel", "UNet3DConditionModel", "I2VGenXLUNet"),
        ("StableVideoDiffusionPipeline", "TextToVideoSDPipeline", "VideoToVideoSDPipeline", "I2VGenXLPipeline"),
        _FACTORISED,
        fps=8.0,
        fps_of={"StableVideoDiffusionPipeline": 7.0, "I2VGenXLPipeline": 16.0},
    ),
    DenseOnly(
        "text-to-video-zero",
        (),  # an image UNet, told apart only by the pipeline
        ("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"),
        "it runs an image model in which every frame attends the first one",
        fps=4.0,
    ),
    DenseOnly(
        "sana-video",
        ("SanaVideoTransformer3DModel", "SanaWMTransformer3DModel"),
        ("SanaVideoPipeline", "SanaImageToVideoPipeline", "SanaWMPipeline"),
        "its attention is linear: there are no pairs of tokens to skip",
        fps=16.0,
    ),
    DenseOnly("sana-wm-refiner", ("SanaWMLTX2RefinerTransformer3DModel",), ("SanaWMLTX2Refiner",), _CAUSAL, fps=16.0),
    DenseOnly("anyflow-far", ("AnyFlowFARTransformer3DModel",), ("AnyFlowFARPipeline",), _CAUSAL, fps=16.0),
    DenseOnly("wan-animate-2", ("WanAnimate2Transformer3DModel",), (), _CAUSAL, fps=24.0),
    DenseOnly("cosmos3", ("Cosmos3OmniTransformer",), ("Cosmos3OmniPipeline",), _CAUSAL, fps=24.0),
    DenseOnly("cosmos-controlnet", ("CosmosControlNetModel",), (), "its residuals are computed by dense attention"),
    DenseOnly(
        "kandinsky6-sr",
        ("Kandinsky6SRTransformer3DModel",),
        ("Kandinsky6SRPipeline",),
        "it attends by block masks of its own through flex_attention",
        fps=24.0,
    ),
    DenseOnly(
        "minimax-h3",
        ("MiniMaxH3Transformer3DModel",),
        (),
        "it packs text, video and audio of all samples into one sequence without a grid",
        fps=24.0,
    ),
    DenseOnly(
        "ltx2-decoders",
        (),
        ("LTX2LatentUpsamplePipeline", "LTX2VideoDiffusionDecodePipeline", "LTXLatentUpsamplePipeline"),
        "it turns latents into larger latents or pixels by convolutions",
        fps=24.0,
        fps_of={"LTXLatentUpsamplePipeline": 25.0},
    ),
)

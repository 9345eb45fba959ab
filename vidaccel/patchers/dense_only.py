"""Video models that vidaccel knows and leaves dense, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DENSE_ONLY", "DenseOnly"]


@dataclass(frozen=True)
class DenseOnly:
    """A kind of video model without attention that block-sparse kernels could speed up.

    Args:
        name: short name for tables.
        models: class names of its denoisers.
        pipelines: class names of the pipelines that use them.
        reason: why it stays dense, in one sentence.
    """

    name: str
    models: tuple[str, ...]
    pipelines: tuple[str, ...]
    reason: str

    def matches(self, model: object) -> bool:
        """Whether ``model`` is one of this kind."""
        return any(cls.__name__ in self.models for cls in type(model).__mro__)


_FACTORISED = "it attends within frames and along time apart, in sequences too short to gain"
_CAUSAL = (
    "it generates chunk after chunk with masks or key-value caches of its own, which block masks here do not express"
)

DENSE_ONLY: tuple[DenseOnly, ...] = (
    DenseOnly("latte", ("LatteTransformer3DModel",), ("LattePipeline",), _FACTORISED),
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
    ),
    DenseOnly(
        "video-unet",
        ("UNetSpatioTemporalConditionModel", "UNet3DConditionModel", "I2VGenXLUNet"),
        ("StableVideoDiffusionPipeline", "TextToVideoSDPipeline", "VideoToVideoSDPipeline", "I2VGenXLPipeline"),
        _FACTORISED,
    ),
    DenseOnly(
        "text-to-video-zero",
        (),  # an image UNet, told apart only by the pipeline
        ("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"),
        "it runs an image model in which every frame attends the first one",
    ),
    DenseOnly(
        "sana-video",
        ("SanaVideoTransformer3DModel", "SanaWMTransformer3DModel"),
        ("SanaVideoPipeline", "SanaImageToVideoPipeline", "SanaWMPipeline"),
        "its attention is linear: there are no pairs of tokens to skip",
    ),
    DenseOnly("sana-wm-refiner", ("SanaWMLTX2RefinerTransformer3DModel",), ("SanaWMLTX2Refiner",), _CAUSAL),
    DenseOnly("anyflow-far", ("AnyFlowFARTransformer3DModel",), ("AnyFlowFARPipeline",), _CAUSAL),
    DenseOnly("wan-animate-2", ("WanAnimate2Transformer3DModel",), (), _CAUSAL),
    DenseOnly("cosmos3", ("Cosmos3OmniTransformer",), ("Cosmos3OmniPipeline",), _CAUSAL),
    DenseOnly("cosmos-controlnet", ("CosmosControlNetModel",), (), "its residuals are computed by dense attention"),
    DenseOnly(
        "kandinsky6-sr",
        ("Kandinsky6SRTransformer3DModel",),
        ("Kandinsky6SRPipeline",),
        "it attends by block masks of its own through flex_attention",
    ),
    DenseOnly(
        "minimax-h3",
        ("MiniMaxH3Transformer3DModel",),
        (),
        "it packs text, video and audio of all samples into one sequence without a grid",
    ),
    DenseOnly(
        "ltx2-decoders",
        (),
        ("LTX2LatentUpsamplePipeline", "LTX2VideoDiffusionDecodePipeline", "LTXLatentUpsamplePipeline"),
        "it turns latents into larger latents or pixels by convolutions",
    ),
)

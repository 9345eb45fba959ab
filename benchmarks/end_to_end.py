"""One denoising step of a Wan transformer with random weights, dense against a plan, on a GPU.

The shape is that of the 1.3B model with fewer layers: 12 heads of 128 channels, 81 frames at 480 x 832. Random weights
say nothing about quality; what is measured is how much of the kernel's gain a whole step keeps. The dense step is
timed before the patch, and a plan of the preset alone decides what is sparse; its dense warm-up is over at this noise
level.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from .cuda_attention import Deadline
from .timing import Clock, CudaClock, WallClock, interleaved

__all__ = ["LATENTS", "PLANS", "TRANSFORMER", "measure_plans", "plan", "run"]

LAYERS = 4
#: The configuration of Wan 2.1 1.3B (its ``config.json``), with fewer layers.
TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": LAYERS,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
#: Channels, frames, height and width of the latents of 81 frames at 480 x 832.
LATENTS = (16, 21, 60, 104)
TEXT_TOKENS = 512
#: The middle of the schedule: every preset is past its warm-up there.
TIMESTEP = 500.0
PLANS = ("sta", "radial")


def plan() -> list[str]:
    """What :func:`run` does, a line each."""
    return [f"dense against {', '.join(PLANS)}: a Wan step of {LAYERS} layers at 21x30x52 tokens, if diffusers imports"]


def run(device: torch.device, deadline: Deadline) -> dict[str, Any]:
    """Seconds of the step, dense and by each plan; without diffusers only the reason why not."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        return {"skipped": True, "reason": f"diffusers cannot be imported ({error}); put it on PYTHONPATH"}
    return measure_plans(TRANSFORMER, LATENTS, device, CudaClock(device), deadline)


def measure_plans(
    config: dict[str, Any],
    latents: tuple[int, int, int, int],
    device: torch.device,
    clock: Clock | None,
    deadline: Deadline,
    *,
    kernel: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    strict: bool = True,
) -> dict[str, Any]:
    """The same for any transformer configuration and latents (channels, frames, height, width).

    Args:
        clock: times one step, ``None`` for the wall clock.
        kernel: name of the kernel, ``None`` for the best one.
        strict: whether a layer that cannot run sparse is an error.
    """
    from diffusers import WanTransformer3DModel

    from vidaccel import patch, unpatch

    clock = clock or WallClock()
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(**config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator(device=device).manual_seed(0)
    noisy = torch.randn((1, *latents), generator=generator, device=device).to(dtype)
    text = torch.randn((1, TEXT_TOKENS, config["text_dim"]), generator=generator, device=device).to(dtype)
    timestep = torch.full((1,), TIMESTEP, device=device)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(noisy, timestep, text, return_dict=False)[0]

    rows: list[dict[str, Any]] = []

    def timed(name: str, seconds: float) -> tuple[float, torch.Tensor]:
        out = step()
        (times,) = interleaved([step], clock, seconds=seconds, least=3, most=10)
        rows.append({"plan": name, "seconds": statistics.median(times), "rounds": len(times)})
        return statistics.median(times), out

    budget = max(1.0, deadline.left() / (2 * len(PLANS) + 2))
    timed("dense", budget)
    for name in PLANS:
        if deadline.passed():
            rows.append({"plan": name, "seconds": None, "reason": "the time given was over"})
            continue
        session = patch(model, name, kernel=kernel, strict=strict)
        try:
            seconds, out = timed(name, budget)
            rows[-1]["finite"] = bool(out.isfinite().all())
            rows[-1]["report"] = str(session.report())
        finally:
            unpatch(model)
        again, _ = timed("dense", budget)  # beside the plan, so that a drifting clock is seen
        rows[-2]["speedup"] = again / seconds
        print(f"{name}: {seconds:.4f} s, dense {again:.4f} s, {again / seconds:.2f}x", flush=True)
    return {"ok": all(row.get("finite", True) for row in rows), "layers": config["num_layers"], "rows": rows}

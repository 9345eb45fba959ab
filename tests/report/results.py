"""A comparison and a calibration with made-up figures, as the page gets them."""

from __future__ import annotations

from typing import Any

import numpy as np

from vidaccel import quality

__all__ = ["calibration", "comparison", "moving"]


def moving(seed: int, *, frames: int = 16, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square that moves to the right over a dim ground; [T, H, W, 3] uint8."""
    video = np.full((frames, height, width, 3), 40, np.uint8)
    for index in range(frames):
        left = (index * 3 + 5 * seed) % (width - 16)
        video[index, 12:28, left : left + 16] = (220, 60 + 20 * seed, 30)
    return video


def comparison(
    prompts: tuple[str, ...] = ("a red ball", "a <b>cat</b> & 5 $ more$"), *, layers: int = 4
) -> dict[str, Any]:
    """What ``vidaccel compare`` hands to the page, for these prompts."""
    generator = np.random.default_rng(0)
    rows = [_row(prompt, place, generator, layers) for place, prompt in enumerate(prompts)]
    settings = {
        "pipeline": "WanPipeline", "device": "cpu", "dtype": "float32", "arguments": {"negative_prompt": ""},
        "frames": {"count": 16, "height": 48, "width": 64},
    }  # fmt: skip
    machine = {
        "vidaccel": "0", "python": "3.11", "packages": {"torch": "2", "triton": None}, "cpu": "a cpu", "cores": 2,
        "gpus": [{"name": "a gpu", "capability": [9, 0], "memory_gib": 80.0}],
    }  # fmt: skip
    return {
        "model": "demo",
        "machine": machine,
        "command": "vidaccel compare --prompt 'a red ball'",
        "created": "2026-01-31 12:00 UTC",
        **quality.summarise("sta", settings, rows),
        "notes": ["LPIPS is not measured: no weights."],
    }


def _row(prompt: str, place: int, generator: Any, layers: int) -> dict[str, Any]:
    dense = {"text": 0.1, "denoise": 8.0, "decode": 1.0, "other": 0.1, "total": 9.2, "attention": 5.0}
    plan = {**dense, "denoise": 5.0, "total": 6.2, "attention": 2.0 + 0.1 * place}
    far = float(generator.normal(0, 1))
    figures = {"psnr": 24.0 + far, "ssim": 0.9, "flicker": 1.5, "latent_error": 0.2, "lpips": None}
    again = {"psnr": float("inf"), "ssim": 1.0, "flicker": 0.0, "latent_error": 0.0, "lpips": None}
    fewer = {"psnr": 30.0, "ssim": 0.97, "flicker": 1.0, "latent_error": 0.05, "lpips": None}
    another = {"psnr": 12.0, "ssim": 0.4, "flicker": 6.0, "latent_error": 1.4, "lpips": None}
    controls = {quality.DENSE_AGAIN: again, quality.ONE_STEP_FEWER: fewer} if place == 0 else {}
    if place:
        controls[quality.ANOTHER_PROMPT] = another
    return {
        "prompt": prompt,
        "seed": 0,
        **figures,
        "density": 0.3,
        "sparse_density": 0.2,
        "speedup": {"total": dense["total"] / plan["total"], "denoise": dense["denoise"] / plan["denoise"]},
        "seconds": {"dense": dense, "plan": plan},
        "dense_runs": [9.2, 9.5],
        "controls": controls,
        "report": _report(layers),
    }


def _report(layers: int) -> dict[str, Any]:
    rows = [
        {
            "transformer": "transformer", "layer": layer, "module": f"blocks.{layer}.attn1", "calls": 10,
            "sparse_calls": 8, "density": 0.3, "seconds": 0.5, "kernels": {"torch-sparse": 8, "dense": 2},
            "fallbacks": {"a mask the plan cannot hold": 1} if layer == 0 else {},
        }
        for layer in range(layers)
    ]  # fmt: skip
    left = [{"module": "blocks.*.attn2", "reason": "cross-attention"}]
    return {"layers": rows, "not_patched": left, "events": ["tokens are in tile order"]}


def calibration(layers: int = 4, heads: int = 6) -> dict[str, Any]:
    """Every section a calibration may have."""
    generator = np.random.default_rng(1)
    predicted = generator.lognormal(-3, 1, (layers, heads))
    measured = predicted * generator.lognormal(0, 0.2, (layers, heads))
    bins = ("noise 0.5 to 1", "noise $x$ <i>")
    front = [{"density": d, "seconds": 10 * d + 2, "error": 0.02 / d} for d in (0.15, 0.2, 0.3, 0.4, 0.6, 1.0)]
    candidates = ["sta 3x3x3", "neighborhood 5x5x5", "radial", "top-k 10%", "svg-static spatial"]
    mass = sorted(generator.uniform(0.4, 0.95, len(candidates)))
    precisions = np.array(["bf16", "int8-fp16", "int8-fp8"])
    return {
        "predicted": {"error": 0.66, "seconds": 5.0, "density": 0.3},
        "measured": {"psnr": quality.mean_interval([24.0, 26.0]).to_dict(), "seconds": 5.2, "density": 0.3},
        "prediction": [
            {
                "transformer": "transformer",
                "layer": i,
                "head": j,
                "predicted": predicted[i, j],
                "measured": measured[i, j],
            }
            for i in range(layers)
            for j in range(heads)
        ],
        "rank_correlation": 0.93,
        "front": front,
        "chosen": front[2],
        "heatmaps": {
            "density": [{"title": t, "values": generator.uniform(0, 1, (layers, heads)).tolist()} for t in bins],
            "error": [{"title": t, "values": (predicted * k).tolist()} for k, t in enumerate(bins, start=1)],
            "precision": [
                {"title": t, "values": precisions[generator.integers(0, 3, (layers, heads))].tolist()} for t in bins
            ],
        },
        "mass": [
            {
                "title": t,
                "candidates": candidates,
                "mean": mass,
                "low": [m - 0.1 for m in mass],
                "high": [m + 0.04 for m in mass],
            }
            for t in bins[:2]
        ],
        "notes": ["Eight prompts were watched; more would narrow the intervals."],
    }

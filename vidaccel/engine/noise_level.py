"""How much noise a timestep means, on one scale for all schedulers: 1 is pure noise, 0 is clean.

The scale is the sigma of flow matching, x = (1 - sigma) data + sigma noise. A schedule of another kind is put on it by
its ratio of noise to signal, sigma = 1 / (1 + sqrt(SNR)), because that is what a model has to undo:

- flow matching: timestep / num_train_timesteps, whatever the shift;
- variance preserving (DDIM, DPM, Euler and their kin): sqrt(1 - abar) / (sqrt(abar) + sqrt(1 - abar)) by the
  scheduler's own table abar, with rescaled betas, zero terminal SNR and CogVideoX's SNR shift in it;
- EDM, whose timestep is log(sigma) / 4: sigma / (1 + sigma).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

__all__ = ["noise_level", "why_doubtful"]

_Scale = Literal["flow", "backward", "alphas", "log", "unknown"]

#: Classes, and with them their subclasses, whose timesteps are sigma * num_train_timesteps.
_FLOW = frozenset(
    {
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeliosDMDScheduler",
        "HeliosScheduler",
        "LTXEulerAncestralRFScheduler",
        "PiflowScheduler",
    }
)
#: Flow matching too, with timesteps 1 - sigma.
_BACKWARD = frozenset({"MiniMaxH3Scheduler"})
_LOG = frozenset({"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"})


def noise_level(timestep: torch.Tensor | float, scheduler: Any = None) -> float:
    """The noise level of a forward pass, in [0, 1].

    Args:
        timestep: as the scheduler counts it, any shape; where frames or tokens have their own, the noisiest counts,
            because those that condition the video are clean.
        scheduler: the pipeline's. ``None`` counts as flow matching with 1000 timesteps. So does, with its own number of
            timesteps, a scheduler of a kind that is not known here, about which :func:`why_doubtful` has a sentence.

    At most one number is read from the device.
    """
    scale = _scale(scheduler)
    if scale == "alphas":
        return _by_alphas(timestep, scheduler.alphas_cumprod)
    value = float(_noisiest(timestep, backward=scale == "backward"))
    if scale == "log":
        level = 1 / (1 + math.exp(-4 * value))
    elif scale == "backward":
        level = 1 - value / _length(scheduler, 1)
    else:
        level = value / _length(scheduler)
    return min(1.0, max(0.0, level))


def why_doubtful(scheduler: Any) -> str | None:
    """One sentence for a report where :func:`noise_level` may be off with this scheduler, else ``None``."""
    name = type(scheduler).__name__
    stages = _config(scheduler, "stages")
    if _scale(scheduler) == "unknown":
        return (
            f"the noise levels of {name} are not known, so a timestep counts as its share of"
            f" {_length(scheduler)}: the plan's rules may begin and end at other steps than meant"
        )
    if isinstance(stages, int) and stages > 1:
        return (
            f"{name} runs in {stages} stages that each add noise again; the noise level is taken as the timestep's"
            " share, which falls through all of them"
        )
    return None


def _scale(scheduler: Any) -> _Scale:
    """What the timesteps of a scheduler are."""
    classes = {cls.__name__ for cls in type(scheduler).__mro__}
    if _config(scheduler, "use_flow_sigmas") or _config(scheduler, "prediction_type") == "flow_prediction":
        return "flow"
    if scheduler is None or classes & _FLOW:
        return "backward" if _config(scheduler, "invert_sigmas") else "flow"
    if classes & _BACKWARD:
        return "backward"
    continuous = _config(scheduler, "timestep_type") == "continuous"
    if classes & _LOG or (continuous and _config(scheduler, "prediction_type") == "v_prediction"):
        return "log"
    return "alphas" if isinstance(getattr(scheduler, "alphas_cumprod", None), torch.Tensor) else "unknown"


def _config(scheduler: Any, key: str) -> Any:
    return getattr(getattr(scheduler, "config", None), key, None)


def _length(scheduler: Any, default: int = 1000) -> int:
    return _config(scheduler, "num_train_timesteps") or default


def _noisiest(timestep: torch.Tensor | float, *, backward: bool = False) -> torch.Tensor:
    """The noisiest of the timesteps, still on its device."""
    if not isinstance(timestep, torch.Tensor):
        return torch.tensor(timestep, dtype=torch.float64)
    return timestep.min() if backward else timestep.max()


def _by_alphas(timestep: torch.Tensor | float, alphas: torch.Tensor) -> float:
    """The level by a table of signal variances abar, between two entries on a straight line.

    It is computed where the table is: schedulers move it to the device in the course of a run, and reading it back
    would be a thousand numbers.
    """
    dtype = torch.float32 if alphas.device.type == "mps" else torch.float64
    place = _noisiest(timestep).to(device=alphas.device, dtype=dtype).clamp(0, len(alphas) - 1)
    around = torch.stack((place.floor(), place.ceil())).long()
    signal = alphas.index_select(0, around).to(dtype).clamp(0, 1)
    noise = (1 - signal).sqrt()
    low, high = noise / (noise + signal.sqrt())
    return float(torch.lerp(low, high, place.frac()))

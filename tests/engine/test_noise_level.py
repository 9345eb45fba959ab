"""Noise levels against the schedulers' own sigmas and alphas, for every scheduler that a video pipeline may have."""

from __future__ import annotations

import inspect
import math
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vidaccel
from tests.patchers.test_zoo import CASES, OLDER
from tests.zoo.case import Case
from vidaccel.engine import gate as gate_module
from vidaccel.engine.noise_level import noise_level, why_doubtful
from vidaccel.patchers.catalogue import catalogue, video_pipelines

#: A few units in the last place of sigmas that schedulers keep in float32, for a level between 0 and 1.
ROUNDING = 4 * 2.0**-24
STEPS = (4, 20, 50)


@cache
def named() -> frozenset[str]:
    """Schedulers that video pipelines name in type hints or docs, and those of the zoo; that can be imported here."""
    known = {name for row in catalogue() if row.patched for name in row.pipelines}
    found = {type(case.make().scheduler).__name__ for case in CASES}
    for name in known | {*video_pipelines()}:
        cls = getattr(diffusers, name, None)
        if cls is None:  # an older diffusers
            continue
        hint = inspect.signature(cls.__init__).parameters.get("scheduler")
        words = "" if hint is None else str(hint.annotation)
        module = inspect.getmodule(cls)
        assert module is not None
        found |= {*re.findall(r"\b\w+Scheduler\b", words + inspect.getsource(module))}
        if "KarrasDiffusionSchedulers" in words:
            found |= {member.name for member in diffusers.schedulers.KarrasDiffusionSchedulers}
    return frozenset(name for name in found if make(name) is not None)


def make(name: str, **config: Any) -> Any:
    """A scheduler, or ``None`` where it needs a library that is not here or arguments that have no default."""
    try:
        return getattr(diffusers, name)(**config)
    except (AttributeError, ImportError, NotImplementedError, TypeError):
        return None


def configs(name: str) -> list[dict[str, Any]]:
    """Its defaults, and each way of spacing and shifting that it has."""
    params = inspect.signature(getattr(diffusers, name).__init__).parameters
    found: list[dict[str, Any]] = [{}]
    found += [
        {"timestep_spacing": kind} for kind in ("linspace", "leading", "trailing") if "timestep_spacing" in params
    ]
    flags = ("use_karras_sigmas", "use_exponential_sigmas", "rescale_betas_zero_snr", "invert_sigmas")
    found += [{flag: True} for flag in flags if flag in params]
    found += [{"shift": 5.0}] if "shift" in params else []
    found += [{"snr_shift_scale": 1.0, "rescale_betas_zero_snr": True}] if "snr_shift_scale" in params else []
    found += [{"stages": 1, "stage_range": [0, 1]}] if "stages" in params else []
    if "use_flow_sigmas" in params and "flow_shift" in params:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        found += [{**flow, "flow_shift": shift} for shift in (1.0, 5.0)]
        if name == "UniPCMultistepScheduler":  # as Cosmos has it; others spread sigmas that are not those of a flow
            found.append({**flow, "use_karras_sigmas": True})
    if {"use_dynamic_shifting", "time_shift_type"} <= params.keys():
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "use_flow_sigmas" in params else {}
        if "stages" not in params:
            found.append({**flow, "use_dynamic_shifting": True, "time_shift_type": "exponential"})
    return found


def own(made: Any, step: int) -> float:
    """The level by what the scheduler itself mixes in that step, without its timestep where it keeps sigmas."""
    sigmas = getattr(made, "sigmas", None)
    if sigmas is None or len(sigmas) < len(made.timesteps) or "CogVideoX" in type(made).__name__:
        signal = float(made.alphas_cumprod[int(made.timesteps[step])])
        return math.sqrt(1 - signal) / (math.sqrt(1 - signal) + math.sqrt(signal))
    if hasattr(made, "sigmas_interpol") and step % 2:  # second-order steps look between two sigmas
        step -= "Ancestral" in type(made).__name__
        sigmas = made.sigmas_interpol
    sigma = float(sigmas[step])
    mixes = hasattr(made, "alphas_cumprod") and not made.config.get("use_flow_sigmas")
    if mixes or "EDM" in type(made).__name__:
        return sigma / (1 + sigma) if math.isfinite(sigma) else 1.0
    return 1 - sigma if made.config.get("invert_sigmas") else sigma


def slack(made: Any, timestep: float) -> float:
    """How far a level may be from the scheduler's own: what its timestep does not say."""
    if not hasattr(made, "alphas_cumprod") or "EDM" in type(made).__name__:
        return ROUNDING
    if made.config.get("use_flow_sigmas"):  # whole timesteps
        return 1 / made.config.num_train_timesteps
    respaced = any(made.config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
    respaced |= hasattr(made, "sigmas_interpol")  # its timesteps come from sigmas by logarithms
    if not respaced and timestep == int(timestep):
        return ROUNDING
    # rounded to the nearest timestep, or a straight line in another quantity than ours between the two around it
    table = np.clip(made.alphas_cumprod.double().numpy(), 0, 1)
    levels = np.sqrt(1 - table) / (np.sqrt(1 - table) + np.sqrt(table))
    at = min(max(round(timestep), 1), len(levels) - 2)
    return float(np.diff(levels[at - 1 : at + 2]).max())


@pytest.mark.full
def test_the_schedulers_of_video_pipelines_are_found() -> None:
    usual = {"UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "DDIMScheduler"}
    usual |= {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "EulerAncestralDiscreteScheduler"}
    assert usual <= named() and len(named()) >= (18 if OLDER else 22)


@pytest.mark.parametrize("name", sorted(name for name in dir(diffusers) if name.endswith("Scheduler")))
def test_levels_are_the_schedulers_own(name: str) -> None:
    """Those of video pipelines in all their ways; of the others each is right as well, or a report can name it."""
    for config in configs(name) if name in named() else [{}]:
        made = make(name, **config)
        if name not in named() and (made is None or why_doubtful(made) is not None):
            assert made is None or name in str(why_doubtful(made))
            return
        if made.config.get("stages", 1) > 1:
            assert "stages that each add noise" in str(why_doubtful(made))
            continue
        assert why_doubtful(made) is None, config
        for steps in STEPS:
            made.set_timesteps(steps, **({"mu": 1.1} if config.get("use_dynamic_shifting") else {}))
            for step, timestep in enumerate(made.timesteps):
                found, expected = noise_level(timestep, made), own(made, step)
                assert abs(found - expected) <= slack(made, float(timestep)), (config, steps, step, found, expected)
                assert noise_level(float(timestep), made) == pytest.approx(found, abs=ROUNDING)


def test_zero_terminal_snr_is_pure_noise() -> None:
    made = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    made.set_timesteps(50)
    assert float(made.alphas_cumprod[-1]) == 0.0
    assert noise_level(made.timesteps[0], made) == 1.0
    assert noise_level(5000.0, made) == 1.0 and noise_level(-1.0, made) == noise_level(0, made) > 0


def test_the_shift_of_the_snr_counts() -> None:
    """CogVideoX-2B shifts it by 3, CogVideoX-5B not: the same timestep is another noise level."""
    two, five = (diffusers.CogVideoXDDIMScheduler(snr_shift_scale=scale) for scale in (3.0, 1.0))
    assert noise_level(500, two) - noise_level(500, five) > 0.1


def test_the_noisiest_of_many_timesteps_counts() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert noise_level(torch.tensor([[0.0, 0.0, 900.0, 875.0]]), flow) == pytest.approx(0.9)
    alphas = diffusers.CogVideoXDDIMScheduler()
    assert noise_level(torch.tensor([0, 700, 20]), alphas) == noise_level(700, alphas)
    inverted = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert noise_level(torch.tensor([1000.0, 125.0]), inverted) == 0.875
    assert noise_level(torch.tensor([0.1, -0.2]), diffusers.EDMEulerScheduler()) == pytest.approx(
        1 / (1 + math.exp(-0.4))
    )


def test_without_a_scheduler_a_number_is_not_rounded() -> None:
    """A level at the edge of a rule stays on its side of it."""
    assert noise_level(1000.0 * 0.943) == 0.943
    assert noise_level(torch.tensor([250])) == 0.25
    assert noise_level(2000.0) == 1.0 and noise_level(-3.0) == 0.0
    assert why_doubtful(None) is None


def test_an_unknown_scheduler_counts_by_its_timesteps_and_says_so() -> None:
    class Mine:
        config = SimpleNamespace(num_train_timesteps=500)

    assert noise_level(torch.tensor([250]), Mine()) == 0.5
    assert re.fullmatch(r"the noise levels of Mine are not known, .* share of 500: .*", str(why_doubtful(Mine())))

    class Tuned(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        pass

    assert why_doubtful(Tuned()) is None


def test_a_flow_without_flow_sigmas_in_its_config_is_one() -> None:
    made = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")
    assert noise_level(500, made) == 0.5


def test_the_continuous_timesteps_of_stable_video_diffusion() -> None:
    made = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    made.set_timesteps(20)
    for sigma, timestep in zip(made.sigmas.tolist(), made.timesteps, strict=False):
        assert noise_level(timestep, made) == pytest.approx(sigma / (1 + sigma), abs=ROUNDING)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors into Python, or copied out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_one_number_is_read_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_, name=method: pytest.fail(f"a copy by {name}"))
    made = getattr(diffusers, name)()
    with Reads() as reads:
        noise_level(torch.full((2, 3), 0.5), made)
    assert reads.count == 1


def kinds() -> list[Case]:
    """One pipeline of each family and kind of scheduler; of the pyramid of Helios only a report can tell."""
    family = {name: row.family for row in catalogue() for name in row.pipelines}
    found: dict[tuple[str, str], Case] = {}
    for case in CASES:
        cls = case.pipeline.split("-")[0]
        hint = inspect.signature(getattr(diffusers, cls).__init__).parameters["scheduler"].annotation
        if cls != "HeliosPyramidPipeline":
            found.setdefault((family[cls], str(hint)), case)
    return list(found.values())


@pytest.mark.parametrize("case", kinds(), ids=str)
def test_models_are_told_the_same_by_their_pipelines(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a model's arguments is the level that the scheduler has in that step."""
    seen: list[float] = []

    def watched(timestep: torch.Tensor | float, scheduler: Any) -> float:
        seen.append(noise_level(timestep, scheduler))
        return seen[-1]

    monkeypatch.setattr(gate_module, "noise_level", watched)
    pipe = case.make()
    vidaccel.patch(pipe, "dense")
    case.run(pipe)
    made = pipe.scheduler
    if case.pipeline.startswith("Cosmos2Video"):  # its sigmas go up to 80, and the model gets sigma / (1 + sigma)
        expected = [float(sigma / (1 + sigma)) for sigma in made.sigmas]
    else:
        expected = [own(made, step) for step in range(len(made.timesteps))]
    steps = dict.fromkeys(seen)
    nearest = [min(range(len(expected)), key=lambda i: abs(expected[i] - found)) for found in steps]
    assert len(steps) >= 2 and nearest == list(range(len(steps)))
    for step, found in zip(nearest, steps, strict=True):
        whole = 1e-3 if made.config.get("use_flow_sigmas") else 0.0  # UniPC has whole timesteps of a thousand
        assert abs(found - expected[step]) <= max(whole, 1e-6)

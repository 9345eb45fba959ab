"""Trains the demo model: ``python -m vidaccel.pipelines.demo.train --minutes 60 --output runs/demo``.

Flow matching on procedural clips. The output folder is at all times a loadable ``WanPipeline`` with the averaged
weights; beside it lie ``training-log.csv`` and ``training-state.pt``, from which ``--resume`` goes on. ``--weights``
begins a new run at the weights of an existing folder. With ``torchrun --nproc-per-node N -m ...``, N processes share
the work; that is also the way to use the cores of a busy machine, where threads wait for each other all the time.

What makes it work within CPU hours:

- *Noise levels.* Where the object is and how it moves is decided while the clip is almost all noise, so half of the
  samples are drawn there (see :func:`draw_noise_levels`).
- *Frame subsets*, many at first and fewer towards the end (see :class:`~.shortcuts.FrameSubset`).
- *Muon* for the matrices of the blocks, AdamW for the rest.
"""

import argparse
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import WanPipeline
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from vidaccel.pipelines.demo.analytic_vae import encode_patches
from vidaccel.pipelines.demo.build import build_pipeline, embed_captions, load_pipeline, save_pipeline
from vidaccel.pipelines.demo.card import (
    LOG_FILE,
    LogRow,
    Run,
    append_log,
    read_history,
    read_log,
    write_card,
    write_history,
)
from vidaccel.pipelines.demo.clips import draw_specs, render, training_specs
from vidaccel.pipelines.demo.muon import Muon
from vidaccel.pipelines.demo.shortcuts import CollapsedPadding, FrameSubset

STATE_FILE = "training-state.pt"
FRAMES = 16
CAPTION_LENGTH = 11  # tokens of the longest caption, end mark included, and one to spare
# Sequence lengths to imitate: mostly the one that the defaults pin, now and then those of other pipelines.
PADDED_LENGTHS = (32, 32, 32, 32, 64, 128, 226, 512)
EMA_DECAY = 0.995


@dataclass(frozen=True)
class Recipe:
    """How to train. Either ``steps`` or ``minutes`` ends the run, and its progress sets the learning rate."""

    minutes: float = 60.0
    steps: int | None = None
    learning_rate: float = 1.5e-3
    warmup: int = 20  # steps
    decay: float = 0.5  # the share of the run, at its end, over which the learning rate falls
    size: int = 96  # side of the frame, pixels
    batch: int = 48  # frames in a batch of one process, over all its clips
    seed: int = 0
    precision: str = "no"  # of accelerate: "no" (float32) or "bf16"
    compile: bool = False
    focus: str | None = None  # motions to draw four times as often, separated by commas
    # Shares of steps with 4, 8 and 16 frames, at the beginning and at the end of the run.
    shares_first: tuple[float, float, float] = (0.8, 0.15, 0.05)
    shares_last: tuple[float, float, float] = (0.1, 0.2, 0.7)

    def __post_init__(self) -> None:
        if self.size % 8:
            raise ValueError(f"size must be a multiple of 8 pixels (VAE 4 x patch 2), got {self.size}")
        if self.steps is None and self.minutes <= 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")


def draw_noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1), 1 being pure noise: (``count``,).

    Logit-normal and then shifted towards noise, strongly (7) for half of the samples, where the layout is decided,
    and mildly (2) for the others, where edges are; one in twelve is almost pure noise, the first thing that sampling
    meets.
    """
    level = torch.sigmoid(1.1 * torch.randn(count, generator=generator))
    shift = torch.where(torch.rand(count, generator=generator) < 0.55, 7.0, 2.0)
    level = shift * level / (1 + (shift - 1) * level)
    almost = 1 - 0.03 * torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.08, almost, level)


class Trainer:
    """One training run: the model, its optimizers, its average, its random numbers and its clock."""

    def __init__(self, recipe: Recipe, pipeline: WanPipeline) -> None:
        self.recipe = recipe
        self.pipeline = pipeline
        self.accelerator = Accelerator(mixed_precision=recipe.precision, cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.steps = self.samples = 0
        self.seconds = 0.0
        self.generator = torch.Generator()
        self.common = torch.Generator().manual_seed(recipe.seed)  # for what all processes must agree on
        self._seed()

        focus = (recipe.focus or "").split(",")
        self.specs = [spec for spec in training_specs() for _ in range(4 if spec.motion in focus else 1)]
        captions = [""] + [text for spec in training_specs() for text in (spec.caption, spec.short_caption)]
        embeddings = embed_captions(pipeline, captions, CAPTION_LENGTH)
        embeddings = torch.nn.functional.pad(embeddings, (0, 0, 0, 1)).to(self.device)  # one token for the padding
        self.text = dict(zip(captions, embeddings, strict=True))

        transformer = pipeline.transformer.to(self.device).train()
        self.average = {name: p.detach().clone() for name, p in transformer.named_parameters()}
        self.padding = CollapsedPadding(CAPTION_LENGTH, self.device)
        self.padding.install(transformer)
        self.subset = FrameSubset(transformer, FRAMES)
        if recipe.compile:
            for block in transformer.blocks:
                block.compile(dynamic=False)
        matrices = [p for name, p in transformer.named_parameters() if name.startswith("blocks") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in transformer.parameters() if id(p) not in chosen]
        self.model, *self.optimizers = self.accelerator.prepare(
            transformer,
            Muon(matrices, lr=recipe.learning_rate),
            torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def _seed(self) -> None:
        # Each process draws its own samples, and others after resuming than before.
        self.generator.manual_seed(hash((self.recipe.seed, self.accelerator.process_index, self.steps)))

    @property
    def progress(self) -> float:
        """How much of the run is over, 0 to 1."""
        if self.recipe.steps is not None:
            return min(1.0, self.steps / max(self.recipe.steps, 1))
        return min(1.0, self.seconds / (60 * self.recipe.minutes))

    @property
    def learning_rate(self) -> float:
        """Warm up, stay, then fall linearly to 2% of the peak."""
        recipe = self.recipe
        warm = min(1.0, (self.steps + 1) / recipe.warmup)
        fall = min(1.0, (1 - self.progress) / max(recipe.decay, 1e-9))
        return recipe.learning_rate * warm * (0.02 + 0.98 * fall)

    def step(self) -> tuple[float, Tensor, Tensor]:
        """Train on one batch. Returns the learning rate, and the loss and noise level of each sample."""
        began = time.monotonic()
        rate = self.learning_rate
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        losses, levels = self._losses()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.accelerator.backward(losses.mean())
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        self.samples += len(losses) * self.accelerator.num_processes
        # A young average follows closely, or it would remember the beginning for ever.
        keep = min(EMA_DECAY, self.steps / (20 + self.steps))
        with torch.no_grad():
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
                self.average[name].lerp_(parameter, 1 - keep)
        # The slowest process sets the clock, so that all have the same progress and stop together.
        took = torch.tensor(time.monotonic() - began, device=self.device)
        self.seconds += float(self.accelerator.gather(took[None]).max())
        return rate, losses.detach().cpu(), levels.cpu()

    def _losses(self) -> tuple[Tensor, Tensor]:
        """Flow-matching loss of each sample of one batch, and the samples' noise levels."""
        first, last = (torch.tensor(shares) for shares in (self.recipe.shares_first, self.recipe.shares_last))
        shares = torch.lerp(first, last, self.progress)
        frames = (4, 8, 16)[int(torch.multinomial(shares, 1, generator=self.common))]
        count = max(1, round(self.recipe.batch / frames))
        self.subset.choose(frames, self.generator)
        specs = draw_specs(count, self.generator, self.specs)
        clips = render(specs, self.generator, frames=FRAMES, size=self.recipe.size, device=self.device)
        clean = encode_patches(self.pipeline.vae, clips[:, :, self.subset.frames]).detach()

        chance = torch.rand(count, generator=self.generator).tolist()
        captions = [
            "" if luck < 0.1 else spec.short_caption if luck < 0.2 else spec.caption
            for luck, spec in zip(chance, specs, strict=True)
        ]
        text = torch.stack([self.text[caption] for caption in captions])
        self.padding.pad_to(PADDED_LENGTHS[int(torch.randint(len(PADDED_LENGTHS), (1,), generator=self.generator))])

        levels = draw_noise_levels(count, self.generator).to(self.device)
        noise = torch.randn(clean.shape, generator=self.generator).to(self.device)
        noisy = torch.lerp(clean, noise, levels.view(-1, 1, 1, 1, 1))
        with self.accelerator.autocast():
            flow = self.model(noisy, levels * 1000, text, return_dict=False)[0]
        return (flow.float() - (noise - clean)).square().mean((1, 2, 3, 4)), levels

    def save(self, folder: Path) -> None:
        """Write the pipeline with the averaged weights, and the state of the run; each file whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        transformer = self.accelerator.unwrap_model(self.model)
        current = {name: p.detach().clone() for name, p in transformer.named_parameters()}
        state = {
            "recipe": asdict(self.recipe),
            "model": current,
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generators": (self.generator.get_state(), self.common.get_state()),
            "clock": (self.steps, self.samples, self.seconds),
        }
        torch.save(state, folder / f"{STATE_FILE}.part")
        os.replace(folder / f"{STATE_FILE}.part", folder / STATE_FILE)
        self._put(self.average)
        try:
            save_pipeline(self.pipeline, folder)
        finally:
            self._put(current)

    def resume(self, folder: Path) -> None:
        """Go on where :meth:`save` left off. The recipe may differ: it is that of this trainer."""
        path = folder / STATE_FILE
        if not path.exists():
            raise FileNotFoundError(f"nothing to resume: {path} does not exist; leave out --resume to begin a new run")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._put(state["model"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.samples, self.seconds = state["clock"]
        self._seed()
        own, common = state["generators"]
        self.common.set_state(common)
        if self.accelerator.is_main_process:
            self.generator.set_state(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            parameter.copy_(weights[name])


def train(trainer: Trainer, folder: Path, *, save_every: float = 240.0, log_every: int = 20) -> None:
    """Run ``trainer`` to its end, saving to ``folder`` every ``save_every`` seconds and logging every few steps."""
    main = trainer.accelerator.is_main_process
    saved = trainer.seconds
    losses: list[Tensor] = []
    levels: list[Tensor] = []
    folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not main) as bar:
        task = bar.add_task("training", total=1000, completed=round(1000 * trainer.progress))
        while trainer.progress < 1:
            rate, loss, level = trainer.step()
            losses.append(loss)
            levels.append(level)
            bar.update(task, completed=round(1000 * trainer.progress))
            if main and (trainer.steps % log_every == 0 or trainer.progress >= 1):
                now = (trainer.steps, trainer.samples, trainer.seconds)
                row = LogRow.of(*now, rate, torch.cat(losses), torch.cat(levels))
                append_log(folder / LOG_FILE, row)
                text = f"step {row.step}, {row.samples} samples, loss {row.loss:.4f}"
                bar.update(task, description=text)
                if not bar.console.is_terminal:
                    bar.console.print(text)
                losses, levels = [], []
            if trainer.seconds - saved > save_every:
                saved = trainer.seconds
                trainer.save(folder)
    trainer.save(folder)


def parse(arguments: list[str] | None = None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe and the rest of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline, the log and the state")
    parser.add_argument("--weights", type=Path, help="pipeline folder to start from (default: a new, untrained one)")
    parser.add_argument("--resume", action="store_true", help="go on with the run whose state is in --output")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="length of the run")
    parser.add_argument("--steps", type=int, help="length of the run in steps, instead of --minutes")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--decay", type=float, default=Recipe.decay, help="share of the run in which the rate falls")
    parser.add_argument("--size", type=int, default=Recipe.size, help="side of the frame in pixels")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="frames in a batch of one process")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--precision", choices=("no", "bf16"), default=Recipe.precision)
    parser.add_argument("--focus", help="motions to draw four times as often, separated by commas")
    parser.add_argument("--shares-last", type=float, nargs=3, default=Recipe.shares_last, help="see Recipe")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    options = parser.parse_args(arguments)
    names = {field.name for field in fields(Recipe)}
    return Recipe(**{k: v for k, v in vars(options).items() if k in names}), options


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m vidaccel.pipelines.demo.train``."""
    recipe, options = parse(arguments)
    start = options.output if options.resume else options.weights
    trainer = Trainer(recipe, build_pipeline(recipe.seed) if start is None else load_pipeline(start))
    if options.resume:
        trainer.resume(options.output)
    train(trainer, options.output)
    if trainer.accelerator.is_main_process:
        rows = read_log(options.output / LOG_FILE)
        run = Run(
            command=command_text(recipe, options),
            device=str(trainer.device),
            steps=trainer.steps,
            samples=trainer.samples,
            minutes=trainer.seconds / 60,
            first_loss=rows[0].loss if rows else None,
            last_loss=rows[-1].loss if rows else None,
        )
        write_history(options.output, [*(read_history(options.weights) if options.weights else []), run])
        write_card(options.output)


def command_text(recipe: Recipe, options: argparse.Namespace) -> str:
    """The command that repeats this run, with the settings that differ from the defaults."""
    words = ["python -m vidaccel.pipelines.demo.train", f"--output {options.output}"]
    words += [f"--weights {options.weights}"] if options.weights else []
    for field in fields(Recipe):
        value = getattr(recipe, field.name)
        if value != field.default and hasattr(options, field.name):
            text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words.append(f"--{field.name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    return " ".join(words)


if __name__ == "__main__":
    main()

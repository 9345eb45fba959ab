"""The model card and what it is written from: the log of the last run and the history of all runs."""

import csv
import itertools
import json
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from torch import Tensor

LOG_FILE = "training-log.csv"
HISTORY_FILE = "training-history.json"
CURVE_FILE = "loss.png"
SHEET_FILE = "sheet.png"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class LogRow:
    """Means over the steps since the row before. The four bands are of the noise level; NaN where none was drawn."""

    step: int
    samples: int
    seconds: float
    learning_rate: float
    loss: float
    loss_to_50: float
    loss_to_80: float
    loss_to_95: float
    loss_to_100: float

    @classmethod
    def of(
        cls, step: int, samples: int, seconds: float, learning_rate: float, losses: Tensor, levels: Tensor
    ) -> "LogRow":
        """Sum up ``losses`` of samples with noise ``levels``."""
        edges = (0.0, 0.5, 0.8, 0.95, 1.01)
        bands = [losses[(levels >= low) & (levels < high)].mean().item() for low, high in itertools.pairwise(edges)]
        return cls(step, samples, seconds, learning_rate, losses.mean().item(), *bands)


@dataclass(frozen=True)
class Run:
    """One run of training, as the history keeps it."""

    command: str
    device: str
    steps: int | None
    samples: int
    minutes: float
    first_loss: float | None = None
    last_loss: float | None = None
    note: str = ""


def append_log(path: Path, row: LogRow) -> None:
    """Append ``row`` to the log, with a heading if the log is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(field.name for field in fields(LogRow))
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row))


def read_log(path: Path) -> list[LogRow]:
    """All rows of a log; none if there is no log."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            LogRow(int(r["step"]), int(r["samples"]), *(float(r[f.name]) for f in fields(LogRow)[2:]))
            for r in csv.DictReader(file)
        ]


def read_history(folder: Path) -> list[Run]:
    """The runs that made the weights in ``folder``, first to last; none if it has no history."""
    path = folder / HISTORY_FILE
    return [Run(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def write_history(folder: Path, runs: list[Run]) -> None:
    """Replace the history in ``folder``."""
    (folder / HISTORY_FILE).write_text(json.dumps([asdict(run) for run in runs], indent=2) + "\n")


def draw_curve(rows: list[LogRow], path: Path) -> None:
    """Draw the loss of one run over its samples, whole and by noise level."""
    from matplotlib.figure import Figure  # here, because only a finished run needs it

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    samples = [row.samples for row in rows]
    axes.plot(samples, [row.loss for row in rows], color="black", label="all noise levels")
    bands = {"to_50": "below 0.5", "to_80": "0.5 to 0.8", "to_95": "0.8 to 0.95", "to_100": "above 0.95"}
    for name, label in bands.items():
        losses = [getattr(row, f"loss_{name}") for row in rows]
        axes.plot(samples, losses, alpha=0.6, linewidth=1, label=f"noise {label}")
    axes.set(xlabel="samples", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def write_card(folder: Path, findings: str = "") -> None:
    """Write the card (README.md) from the history and the log in ``folder``.

    ``findings`` is Markdown about how well the weights do; it is kept in the card as it is.
    """
    runs, rows = read_history(folder), read_log(folder / LOG_FILE)
    parts = [_HEAD]
    if findings:
        parts.append(f"## How well it does\n\n{findings.strip()}\n")
    if (folder / SHEET_FILE).exists():
        parts.append(
            f"![Every second frame of the twelve prompts that were held out]({SHEET_FILE})\n\n"
            "Every second frame for the twelve held-out prompts, seeds 0 to 11, with the settings in `defaults.json`.\n"
        )
    if runs:
        parts.append(_history_table(runs))
    if rows:
        draw_curve(rows, folder / CURVE_FILE)
        parts.append(f"![Loss of the last run]({CURVE_FILE})\n\n{_log_table(rows)}")
    parts.append(_LIMITS)
    (folder / CARD_FILE).write_text("\n".join(parts))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _history_table(runs: list[Run]) -> str:
    lines = [
        "## Training, all of it",
        "",
        "Each run starts at the averaged weights of the one before; paths are shortened. The losses of different runs"
        " cannot be compared: they depend on the clips and on the mix of noise levels, which differ."
        " A dash is something that was not recorded.",
        "",
        "| Run | Device | Steps | Samples | Minutes | Loss, first and last logged |",
        "|---|---|---|---|---|---|",
    ]
    for i, run in enumerate(runs, 1):
        losses = f"{_number(run.first_loss)}, {_number(run.last_loss)}"
        steps = "-" if run.steps is None else run.steps
        lines.append(f"| {i} | {run.device} | {steps} | {run.samples} | {run.minutes:.0f} | {losses} |")
    lines.append("")
    lines += [f"{i}. `{run.command}`" + (f" {run.note}" if run.note else "") for i, run in enumerate(runs, 1)]
    return "\n".join(lines) + "\n"


def _log_table(rows: list[LogRow], count: int = 8) -> str:
    """About ``count`` rows of the log, evenly spaced, the last one always."""
    last = len(rows) - 1
    chosen = [rows[round(i * last / (count - 1))] for i in range(count)] if last >= count else rows
    lines = [
        "| Step | Samples | Loss | noise < .5 | .5 to .8 | .8 to .95 | > .95 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in chosen:
        values = (r.loss, r.loss_to_50, r.loss_to_80, r.loss_to_95, r.loss_to_100)
        lines.append(f"| {r.step} | {r.samples} | " + " | ".join(_number(value) for value in values) + " |")
    return "\n".join(lines) + "\n"


_HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# vidaccel demo model

A tiny but real `WanPipeline` that ships with vidaccel, so that everything runs anywhere and offline, and so that
the effect of sparsity and quantisation is measured on attention that was really trained. It makes clips of 16 frames
of 96 x 96 pixels: one coloured shape, in motion, on a background. It is not a small version of any other model and
contains no weights of one.

```python
import json
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained(folder)
defaults = json.load(open(f"{folder}/defaults.json"))
frames = pipe("a red circle moving left on a striped background", **defaults).frames[0]
```

`num_frames` is 15 in `defaults.json` and gives 16 frames: the VAE does not compress time, and `WanPipeline` rounds
every number up by one in that case, with a warning. Keep `max_sequence_length` at its default there: the transformer
attends to the padding of the prompt, so its length changes the clip.

| Part | What |
|---|---|
| Transformer | `WanTransformer3DModel`, 6 layers, 3 heads of 64, 3.34 million parameters; the only trained part |
| Tokens | 2304, a grid of 16 x 12 x 12 |
| VAE | `AutoencoderKLWan` with computed weights: a principal component analysis of 4 x 4 patches, 48 to 16 |
| Text encoder | `UMT5EncoderModel`, one layer, random weights |
| Tokenizer | one token a word |
| Scheduler | `UniPCMultistepScheduler` |

Prompts have the form `a {colour} {shape} {motion} on a {background} background`; the background may be left out.
Colours: red, green, blue, yellow, white, purple. Shapes: circle (or ball), square, triangle. Motions: moving left,
right, up or down, bouncing, circling, growing, shrinking. Backgrounds: plain, striped, checkered.
"""

_LIMITS = """## Data

All clips are computed while training, by `vidaccel/pipelines/demo/clips.py`; there is no data set, and no picture
or video made by a person. 420 of the 432 combinations are trained on; 12 are held out and are the prompts
above.

## Limits

It knows the words above and nothing else; an unknown word is ignored at best. It was trained on 16 frames of 96 x 96:
other sizes run, but were hardly or never seen. It serves to demonstrate and to test acceleration, and quality figures
measured on it say little about large models.

## Licence

Apache-2.0, as vidaccel.
"""

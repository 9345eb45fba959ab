"""Wrong inputs of every command: exit code 2, a sentence or two, nothing written, and no model loaded for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import typer

from vidaccel.cli.main import app
from vidaccel.configs.artifact import save_plan
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.plan import Plan
from vidaccel.configs.presets import load_preset
from vidaccel.pipelines.demo import DEMO_DIR
from vidaccel.types import VideoGrid

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OBSERVATIONS = Path(DEMO_DIR).parent / "calibrated.observations.safetensors"

#: Commands with all that they need, but what the row adds.
WHOLE = {
    "generate": "generate cat",
    "compare": "compare --prompt cat",
    "calibrate": "calibrate --prompt cat --density .5",
    "check": "check sta --prompt cat",
    "solve": f"solve {OBSERVATIONS}",
    "inspect": "inspect sta",
    "demo": "demo -o out.mp4",
    "models": "models",
    "doctor": "doctor",
}

# Command line -> what the sentence must say. Paths are those of the fixture `folder`.
TABLE = """
no-such-command => No such command
generate => there is no prompt
generate '' => there is no prompt
generate ' ' => there is no prompt
generate cat --prompt dog => given twice
generate cat dog => unexpected extra argument
generate cat --prompts prompts.txt => prompt beside --prompts
generate cat --num-farmes 3 => No such option: --num-farmes
generate cat --width 100000 => width is 100000; H.264
generate cat --width 0 => --width
generate cat --height -16 => --height
generate cat --width 4.5 => --width
generate cat --num-frames 0 => --num-frames
generate cat --num-frames many => --num-frames
generate cat --num-inference-steps 99999999999 => --num-inference-steps
generate cat --num-inference-steps 0 => --num-inference-steps
generate cat --guidance-scale nan => not a finite number
generate cat --guidance-scale inf => not a finite number
generate cat --guidance-scale strong => --guidance-scale
generate cat --seed 99999999999999999999 => --seed
generate cat --seed 1.5 => --seed
generate cat --fps 0 => --fps
generate cat --fps nan => --fps
generate cat --fps inf => --fps
generate cat --arg latents=x => latents
generate cat --arg steps => NAME=VALUE
generate cat --arg =3 => NAME=VALUE
generate cat --arg no_such_argument=3 => takes no argument no_such_argument
generate cat --arg prompt=dog => prompt is not yours to give
generate cat --arg height=48 --height 48 => height is given twice
generate cat --arg video=@gone.mp4 => gone.mp4
generate cat --arg video=@junk.mp4 => junk.mp4
generate cat --arg video=@hollow => hollow
generate cat --image gone.png => gone.png
generate cat --image junk.png => junk.png
generate cat --image empty.png => empty.png
generate cat --image hollow => hollow
generate cat --image picture.png => takes no argument image
generate cat -m i2v => --image FILE
generate cat -m '' => --model is empty
generate cat -m gone => there is no model folder gone
generate cat -m hollow => no model_index.json
generate cat -m prompts.txt => prompts.txt
generate cat -m bad_index => model_index.json cannot be read
generate cat -m strange => NoSuchPipeline
generate cat -m half => half lacks vae/, transformer/
generate cat -m wan.gguf => single file
generate cat -m junk.safetensors => single file
generate cat --plan stta => did you mean sta?
generate cat --plan '' => presets are
generate cat --plan gone.safetensors => gone.safetensors
generate cat --plan junk.safetensors => junk.safetensors
generate cat --plan empty.safetensors => empty.safetensors
generate cat --plan cut.safetensors => cut.safetensors
generate cat --plan folder.safetensors => folder.safetensors
generate cat --plan gone.yaml => gone.yaml
generate cat --plan junk.yaml => junk.yaml
generate cat --plan empty.yaml => empty.yaml
generate cat --plan folder.yaml => folder.yaml
generate cat --plan {observations} => not a usable plan
generate cat --device mps => cpu
generate cat --device cuda:99 => cpu
generate cat --device meta => cpu
generate cat --device banana => there is no device 'banana'
generate cat --device '' => there is no device
generate cat --dtype int3 => dtype is 'int3'
generate cat --lora gone.safetensors => there is no LoRA gone.safetensors
generate cat --lora junk.safetensors => junk.safetensors
generate cat --cpu-offload --device cpu => cpu offload
generate cat --weights gone.safetensors => gone.safetensors
generate cat --weights prompts.txt --weights prompts.txt => --weights is given 2 times
generate cat --cache no-such => no-such
generate cat --cache first-block:nan => first-block
generate cat --cache first-block:-1 => first-block
generate cat --cache mag:gone.json => gone.json
generate cat --linear int3 => int3
generate cat -o out.avi => .mp4
generate cat -o hollow => hollow
generate cat -o gone/out.mp4 => create it first
generate cat -o prompts.txt/out.mp4 => prompts.txt is not a folder
generate cat -o /proc/out.mp4 => cannot write /proc/out.mp4
generate --prompts gone.txt => gone.txt
generate --prompts empty.txt => there are no prompts
generate --prompts junk.safetensors => not text in UTF-8
generate --prompts hollow => Is a directory
generate --prompts prompts.txt -o prompts.txt => names a file
generate --prompts prompts.txt -o clips.mp4 => names a file
generate --prompts prompts.txt --seed 18446744073709551615 => the seed is 18446744073709551616
compare => there are no prompts
compare --prompt '' => there are no prompts
compare --prompts gone.txt => gone.txt
compare --prompts empty.txt => there are no prompts
compare --prompt cat --plan stta => did you mean sta?
compare --prompt cat --limit 0 => --limit
compare --prompt cat --controls -1 => --controls
compare --prompt cat --repeats 0 => --repeats
compare --prompt cat --html-videos -1 => --html-videos
compare --prompt cat --html page.txt => does not end in .html
compare --prompt cat --sheet sheet.jpg => does not end in .png
compare --prompt cat --json hollow => hollow
compare --prompt cat --json gone/a.json => create it first
compare --prompt cat --json a.html --html a.html => named for two files
compare --prompt cat --seed 99999999999999999999 => --seed
compare --prompt cat --guidance-scale nan => not a finite number
compare --prompt cat --width 100000 => width is 100000
compare --prompt cat --arg latents=x => latents
compare --prompt cat -m i2v => --image FILE
compare --prompt cat --image junk.png => junk.png
compare --prompt cat --device mps => cpu
calibrate => no budget is given
calibrate --prompt cat => no budget is given
calibrate --prompt cat --density .5 --speedup 2 => several budgets are given
calibrate --density .5 => there are no prompts
calibrate --prompt cat --density 2 => --density
calibrate --prompt cat --density nan => --density
calibrate --prompt cat --speedup .5 => --speedup
calibrate --prompt cat --speedup inf => --speedup
calibrate --prompt cat --psnr -3 => --psnr
calibrate --prompt cat --psnr 30 --validate 0 => --validate is 0
calibrate --prompt cat --density .5 --max-minutes 0 => --max-minutes
calibrate --prompt cat --density .5 --max-minutes nan => --max-minutes
calibrate --prompt cat --density .5 --bins 0 => --bins
calibrate --prompt cat --density .5 --probes 0 => --probes
calibrate --prompt cat --density .5 -o plan.yaml => does not end in .safetensors
calibrate --prompt cat --density .5 -o gone/plan.safetensors => create it first
calibrate --prompt cat --density .5 --candidates no-such => no-such
calibrate --prompt cat --density .5 --candidates gone.yaml => gone.yaml
calibrate --prompt cat --density .5 --candidates junk.yaml => junk.yaml
calibrate --prompt cat --density .5 --target-gpu abacus => nothing is known about a GPU 'abacus'
calibrate --prompt cat --density .5 --linear int8 => --density does not count Linears
calibrate --prompt cat --speedup 2 --linear int8 --caches auto => not chosen together
calibrate --prompt cat --speedup 2 --linear int8 --target-gpu H200 => leave out --linear
calibrate --prompt cat --density .5 --state hollow => hollow
calibrate --prompt cat --density .5 --state gone/seen.safetensors => create it first
calibrate --prompt cat --density .5 --state junk.safetensors => junk.safetensors
calibrate --prompt cat --density .5 --state plan.safetensors -o plan.safetensors => named for two files
calibrate --prompt cat --density .5 --seed 18446744073709551615 => the seed is
calibrate --prompt cat --density .5 --html page.txt => does not end in .html
calibrate --prompt cat --density .5 -m i2v => --image FILE
solve => Missing argument
solve gone.safetensors => there is no observations file
solve junk.safetensors => junk.safetensors
solve empty.safetensors => empty.safetensors
solve hollow => hollow
solve plan.safetensors => not a usable observations
solve {observations} --density nan => --density
solve {observations} --density -1 => --density
solve {observations} --density .5 --seconds 3 => several budgets are given
solve {observations} -o new.safetensors => no budget is given
solve {observations} --density .5 -o new.yaml => does not end in .safetensors
solve {observations} --density .5 -o {observations} => is the observations themselves
solve {observations} --density .5 --json {observations} => is the observations themselves
solve {observations} --density .5 -o a.safetensors --json a.safetensors => named for two files
solve {observations} --density .5 --gpu abacus => nothing is known about a GPU 'abacus'
solve {observations} --speedup 1000 => no plan takes
solve {observations} --speedup 2 --caches no-such => no-such
check => Missing argument
check sta => there are no prompts
check stta --prompt cat => did you mean sta?
check junk.safetensors --prompt cat => junk.safetensors
check sta --prompt cat --state gone.safetensors => there is no observations file gone.safetensors
check sta --prompt cat --state junk.safetensors => junk.safetensors
check sta --prompt cat --state hollow => hollow
check sta --prompt cat --limit 0 => --limit
check sta --prompt cat --json hollow => hollow
check sta --prompt cat -m half => half lacks vae/, transformer/
inspect => Missing argument
inspect stta => did you mean sta?
inspect STA => did you mean sta?
inspect gone.safetensors => gone.safetensors
inspect hollow => neither a preset nor a plan file
inspect sta --grid 5000x5000x5000 => more than
inspect sta --grid 99999999999999999999x1x1 => --grid
inspect sta --grid 21x30 => for example
inspect sta --grid 0x2x2 => at least 1
inspect sta --grid -1x2x2 => --grid
inspect huge.safetensors => more than
inspect sta --layers 0 => --layers
inspect sta --layers 99999999 => --layers
inspect sta --heads 99999999 => --heads
inspect sta -o map.jpg => does not end in .png
inspect sta -o gone/map.png => create it first
demo -o demo.avi => .mp4
demo -o prompts.txt/demo.mp4 => prompts.txt
demo -o out.mp4 --repeats 0 => --repeats
demo -o out.mp4 --plan stta => did you mean sta?
demo -o out.mp4 --seed 99999999999999999999 => --seed
demo -o new/out.mp4 --plan stta => did you mean sta?
generate --prompts prompts.txt -o new/folder --plan stta => did you mean sta?
generate --prompts prompts.txt -o /proc/new => /proc/new
demo -o out.mp4 --prompt '' => there is no prompt
models --json --markdown => give one of them
models --markdown --count => give one of them
models wan => unexpected extra argument
doctor cuda => unexpected extra argument
"""


def _rows() -> list[tuple[str, str]]:
    found = []
    for line in TABLE.strip().splitlines():
        words, told = line.split(" => ")
        found.append((words, told))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of broken files of every kind, and a few good ones."""
    path = tmp_path_factory.mktemp("wrong")
    junk = np.random.default_rng(0).integers(0, 256, 4096, np.uint8).tobytes()
    for name in ("junk.safetensors", "junk.png", "junk.yaml", "junk.mp4", "wan.gguf"):
        (path / name).write_bytes(junk)
    for name in ("empty.safetensors", "empty.png", "empty.yaml", "empty.txt"):
        (path / name).touch()
    for name in ("hollow", "folder.safetensors", "folder.yaml"):
        (path / name).mkdir()
    (path / "prompts.txt").write_text("a cat\na dog\n")
    assert cv2.imwrite(str(path / "picture.png"), np.zeros((32, 32, 3), np.uint8))
    save_plan(load_preset("sta"), path / "plan.safetensors")
    (path / "cut.safetensors").write_bytes((path / "plan.safetensors").read_bytes()[:100])
    made_for = Fingerprint(model_class="WanTransformer3DModel", heads=2, layers=4, grid=VideoGrid(200, 200, 200))
    save_plan(Plan("huge", load_preset("sta").rules, fingerprint=made_for), path / "huge.safetensors")
    parts = {"vae": ["diffusers", "AutoencoderKLWan"], "transformer": ["diffusers", "WanTransformer3DModel"]}
    _model(path / "i2v", "WanImageToVideoPipeline", {})
    _model(path / "half", "WanPipeline", {**parts, "image_encoder": [None, None]})
    _model(path / "strange", "NoSuchPipeline", {})
    _model(path / "bad_index", "WanPipeline", {})
    (path / "bad_index" / "model_index.json").write_text("[1, 2")
    return path


def _model(path: Path, name: str, parts: dict[str, Any]) -> None:
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps({"_class_name": name, **parts}))


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Works in the folder, and finds it afterwards as it was."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = _content(folder)
    yield folder
    assert _content(folder) == before


def _content(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _split(words: str) -> list[str]:
    import shlex

    return shlex.split(words.format(observations=OBSERVATIONS))


def _one_or_two_sentences(told: str) -> bool:
    return 0 < len(told) < 1500 and "\n" not in told and "Traceback" not in told


def test_the_table_covers_every_command() -> None:
    rows = _rows()
    assert len(rows) >= 100 and len(set(rows)) == len(rows)
    assert {words.split()[0] for words, _ in rows} >= {*COMMANDS}


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here is refused before the weights are read."""
    from diffusers.pipelines import pipeline_utils

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(pipeline_utils.DiffusionPipeline, "from_pretrained", loaded)


@pytest.mark.parametrize(("words", "told"), _rows())
def test_wrong_input_is_refused_in_a_sentence(
    refused: Callable[..., str], here: Path, no_loading: None, words: str, told: str
) -> None:
    found = refused(*_split(words))
    assert told in found and _one_or_two_sentences(found), found


def test_a_hub_is_not_asked_for_long(refused: Callable[..., str], here: Path) -> None:
    """Offline, of a model and of a LoRA that are not here."""
    told = refused("generate", "cat", "-m", "owner/name")
    assert "owner/name" in told and _one_or_two_sentences(told)
    told = refused("generate", "cat", "--lora", "owner/name")
    assert "owner/name" in told and _one_or_two_sentences(told)


def _numbers() -> list[tuple[str, str, type]]:
    """(command, option, kind) of every numeric option."""
    found = []
    for name, command in COMMANDS.items():
        for param in command.params:
            kind = type(param.type).__name__.lower() if hasattr(param, "type") else param.type_descriptor.annotation
            for number in (int, float):
                if kind is number or (isinstance(kind, str) and kind.startswith(number.__name__)):
                    found.append((name, param.opts[0], number))
    return found


def test_numeric_options_are_found() -> None:
    found = _numbers()
    assert {("generate", "--seed", int), ("solve", "--density", float), ("inspect", "--layers", int)} <= {*found}
    assert len(found) > 40


@pytest.mark.full
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e30", "-1e30", "1" + 400 * "0", "-1", "", "0x10", "one"])
@pytest.mark.parametrize(("command", "option", "kind"), _numbers())
def test_no_number_breaks_a_command(
    vidaccel: Callable[..., Any], here: Path, no_loading: None, command: str, option: str, kind: type, text: str
) -> None:
    """What no option takes is refused by its name."""
    words = WHOLE[command].split()
    if option in words:
        at = words.index(option)
        del words[at : at + 2]
    if text == "-1" and option in ("--seed", "--guidance-scale"):  # both are taken below 0, too
        return
    if command == "calibrate" and option in ("--speedup", "--seconds", "--max-error", "--psnr"):
        words = [word for word in words if word not in ("--density", ".5")]
    told = vidaccel(*words, f"{option}={text}", code=2).stderr
    assert option in told and _one_or_two_sentences(told.strip()), told


@pytest.mark.parametrize(
    "words",
    [
        "generate cat --plan stta",
        "generate --prompts prompts.txt -o new/folder --plan stta",
        "inspect sta --grid 5000x5000x5000",
        "demo -o new/out.mp4 --plan stta",
        "solve junk.safetensors",
    ],
)
def test_the_real_command_ends_the_same(here: Path, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vidaccel", *_split(words)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stdout == ""
    assert _one_or_two_sentences(done.stderr.strip())

"""Whatever is typed wrongly: exit code 2, one or two sentences, no traceback, and nothing written."""

from __future__ import annotations

import shlex
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.wrong_inputs import ELSEWHERE, WRONG
from tests.tiny_wan import tiny_wan
from vidaccel.cli.main import app
from vidaccel.configs.artifact import save_plan
from vidaccel.configs.presets import load_preset
from vidaccel.pipelines.demo import DEMO_DIR

#: The most that an answer may have, paths left out.
LONGEST = 700


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files and folders that wrong inputs name, by name."""
    import json
    import shutil

    from PIL import Image

    root = tmp_path_factory.mktemp("places")
    model, kept = root / "model", next(DEMO_DIR.parent.glob("*.observations.safetensors"))
    tiny_wan(model)
    save_plan(load_preset("sta"), root / "plan.safetensors")
    Image.new("RGB", (64, 48)).save(root / "image.png")
    index = json.loads((model / "model_index.json").read_text())

    def folder_of(name: str, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
        made = root / name
        for part, where in {**index, **changes}.items():
            if isinstance(where, list) and where[0] and part not in without:
                (made / part).mkdir(parents=True)
        (made / "model_index.json").write_text(json.dumps({**index, **changes}))
        return made

    contents = {
        "junk.safetensors": bytes(range(256)) * 8,
        "empty.safetensors": b"",
        "notes.txt": b"a cat",
        "prompts.txt": b"a cat\na dog\n",
        "half-plan.safetensors": (root / "plan.safetensors").read_bytes()[:-40],
        "half-kept.safetensors": kept.read_bytes()[:-4000],
        "ratios.json": b"[1.0, 0.9]",
        "bad.yaml": b"name: [unfinished",
        "empty.yaml": b"",
        "binary.yaml": bytes(range(256)),
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
    for name in ("some", "folder.yaml", "broken"):
        (root / name).mkdir()
    (root / "broken" / "model_index.json").write_text("[1, 2")
    shutil.copy(kept, root / "kept.safetensors")
    return {
        "model": model,
        "no_vae": folder_of("no-vae", {}, without=("vae",)),
        "i2v": folder_of("i2v", {"_class_name": "WanImageToVideoPipeline"}),
        "foreign": folder_of("foreign", {"_class_name": "TomorrowPipeline"}),
        "broken_index": root / "broken",
        "gone": root / "gone",
        "folder": root / "some",
        "folder_yaml": root / "folder.yaml",
        "junk": root / "junk.safetensors",
        "empty": root / "empty.safetensors",
        "text": root / "notes.txt",
        "prompts": root / "prompts.txt",
        "image": root / "image.png",
        "plan": root / "plan.safetensors",
        "half_plan": root / "half-plan.safetensors",
        "kept": root / "kept.safetensors",
        "half_kept": root / "half-kept.safetensors",
        "weights": next((model / "transformer").glob("*.safetensors")),
        "ratios": root / "ratios",
        "bad_yaml": root / "bad.yaml",
        "empty_yaml": root / "empty.yaml",
        "binary_yaml": root / "binary.yaml",
    }


def _names(*roots: Path) -> dict[str, tuple[int, int]]:
    """All that lies there, with size and time of the last change of files: folders change where a probe is made."""
    found = {str(path): path.stat() for root in roots for path in root.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) if S_ISREG(stat.st_mode) else (0, 0) for name, stat in found.items()}


class Loaded(Exception):
    """A model was about to be loaded."""


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder to work in, where loading a model is a failure."""

    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)


def _check_answer(told: str, places: dict[str, Path]) -> None:
    """One line that begins with "error: ", of one or two sentences and no more words than can be read."""
    lines = told.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), told
    for path in sorted(places.values(), key=lambda path: -len(str(path))):
        lines[0] = lines[0].replace(str(path), "PATH")
    assert len(lines[0]) <= LONGEST and "Errno" not in told and "Traceback" not in told, told


ROWS = [*WRONG, *(pytest.param(*row, marks=pytest.mark.full) for row in ELSEWHERE)]


@pytest.mark.parametrize(("typed", "says"), ROWS, ids=[typed for typed, _ in [*WRONG, *ELSEWHERE]])
def test_wrong_input(typed: str, says: str, places: dict[str, Path], unloaded: None, tmp_path: Path) -> None:
    root = places["model"].parent
    before = _names(tmp_path, root)
    result = CliRunner().invoke(app, [word.format(**places) for word in shlex.split(typed)])
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    _check_answer(result.stderr, places)
    assert says in result.stderr and not result.stdout
    assert _names(tmp_path, root) == before


def test_the_table_is_large_and_reaches_every_command() -> None:
    typed = [row for row, _ in [*WRONG, *ELSEWHERE]]
    assert len(set(typed)) == len(typed) >= 100
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names <= {row.split()[0] for row in typed if row}


@pytest.mark.parametrize("typed", ["generate", "inspect sta --grid 5000x5000x5000", "solve {junk}", "demo --plan stta"])
def test_as_a_process(typed: str, places: dict[str, Path], tmp_path: Path) -> None:
    words = [word.format(**places) for word in shlex.split(typed)]
    done = subprocess.run(
        [sys.executable, "-m", "vidaccel", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not done.stdout
    _check_answer(done.stderr, places)
    assert not list(tmp_path.iterdir())


def _numeric(callback: Callable[..., Any]) -> Iterator[str]:
    """The options of a command that take a number, found by their types."""
    for name, hint in typing.get_type_hints(callback, include_extras=True).items():
        for extra in getattr(hint, "__metadata__", ()):
            base = typing.get_args(hint)[0]
            if {int, float} & set(typing.get_args(base) or (base,)):
                declared = [word for word in extra.param_decls or () if word.startswith("--")]
                yield declared[0] if declared else "--" + name.replace("_", "-")


NUMERIC = [
    (command.callback.__name__, option)
    for command in app.registered_commands
    if command.callback
    for option in _numeric(command.callback)
]
#: What each command needs beside the number.
NEEDED = {
    "generate": "'a cat' -m {model}",
    "compare": "-m {model} --prompt 'a cat'",
    "calibrate": "-m {model} --prompt 'a cat'",
    "check": "{plan} -m {model} --prompt 'a cat'",
    "solve": "{kept}",
    "inspect": "sta --grid 4x4x4",
    "demo": "",
}
BUDGETS = {"--speedup", "--seconds", "--density", "--max-error", "--psnr"}


def test_every_number_is_found() -> None:
    assert {"--guidance-scale", "--seed", "--max-minutes", "--layers", "--repeats", *BUDGETS} <= {o for _, o in NUMERIC}
    assert {name for name, _ in NUMERIC} == set(NEEDED)


@pytest.mark.full
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e30", "99999999999999999999", ""])
@pytest.mark.parametrize(("name", "option"), NUMERIC)
def test_no_number_ends_in_a_traceback(
    name: str, option: str, value: str, places: dict[str, Path], unloaded: None, tmp_path: Path
) -> None:
    """Refused in a sentence, or taken: a model is then about to be loaded, or the command ends well."""
    words = [word.format(**places) for word in shlex.split(NEEDED[name])]
    if name == "calibrate" and option not in BUDGETS:
        words += ["--density", "0.5"]
    result = CliRunner().invoke(app, [name, *words, f"{option}={value}"])
    if result.exit_code == 2:
        _check_answer(result.stderr, places)
        named = option[2:].replace("-", "_"), option
        assert any(word in result.stderr for word in named) and not list(tmp_path.iterdir())
    else:
        assert result.exit_code == 0 or isinstance(result.exception, Loaded), result.exception
        assert value not in ("nan", "inf", "-inf", "")

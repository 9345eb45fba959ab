"""``vidaccel generate --prompts``: many clips into one folder, by one process or several."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ConfigError, OutputError, StrictError
from ..files import check_folder
from .command import command_line
from .interrupt import resumable

if TYPE_CHECKING:
    from ..configs.plan import Plan
    from ..pipelines.batch import Clip

__all__ = ["Team", "about", "folder_for", "make_all"]


#: Counter in the processes' common store: how many have come to their end.
_THROUGH = "vidaccel/through"
_LOOK_SECONDS = 0.5


class Team:
    """The processes that share the prompts: what ``accelerate launch`` or ``torchrun`` started, or this one alone.

    Args:
        asked: the device the user named; otherwise each process of several takes its own.
    """

    def __init__(self, asked: str | None) -> None:
        from accelerate import PartialState

        from ..device import device_info
        from ..pipelines.batch import Share

        # without it accelerate takes several processes on a machine without an accelerator for strangers
        self._state = PartialState(cpu=(asked or device_info().default_device) == "cpu")
        self.share = Share(self._state.process_index, self._state.num_processes)
        self.device = asked if asked is not None or self.share.count == 1 else str(self._state.device)

    def wait(self) -> None:
        """Returns when every process has come here: where one ends with an error, launchers end the others at once."""
        if self.share.count == 1:
            return
        from torch import distributed

        # collectives give up after minutes, and the others may need hours; the launcher's own store has no such limit
        store = distributed.distributed_c10d._get_default_store()
        try:
            there = store.add(_THROUGH, 1)
            while there < self.share.count:
                time.sleep(_LOOK_SECONDS)
                there = store.add(_THROUGH, 0)
        except distributed.DistError:
            return  # who kept the store is gone, and does not wait either

    def close(self) -> None:
        """Leaves the process group."""
        self._state.destroy_process_group()


def folder_for(output: Path) -> Path:
    """The folder of many clips; :func:`make_all` makes it if it is not there.

    Raises:
        OutputError: if the path names a file, or a folder that cannot be made.
    """
    if output.suffix or (output.exists() and not output.is_dir()):
        raise OutputError(f"the output {output} names a file, but many prompts make many files; name a folder")
    return check_folder(output)


def make_all(clips: Sequence[Clip], team: Team, folder: Path, make: Any) -> None:
    """Makes this process's clips and writes one JSON line for each, to stdout and to a file in the folder.

    Args:
        make: see :func:`vidaccel.pipelines.batch.make_clips`.

    Raises:
        ConfigError: at the end, if a clip failed.
    """
    from ..pipelines.batch import make_clips

    folder.mkdir(parents=True, exist_ok=True)
    mine = team.share.of(clips)
    name = "clips.jsonl" if team.share.count == 1 else f"clips.{team.share.index}.jsonl"
    counts: dict[str, int] = {"made": 0, "found": 0, "failed": 0}

    def kept() -> str:
        there = counts["made"] + counts["found"]
        return f"{there} of {len(mine)} clips are in {folder}; the others are made by: {command_line()}"

    try:
        with resumable(kept), (folder / name).open("a", encoding="utf-8") as log:
            # a plan that cannot run as the user demands would fail for every prompt alike
            for line in make_clips(mine, make, fatal=(StrictError,)):
                counts[line["state"]] += 1
                text = json.dumps(line, ensure_ascii=False)
                typer.echo(text)
                log.write(text + "\n")
                log.flush()
    except Exception:  # but not a user's interrupt
        team.wait()
        raise
    typer.echo(
        f"{len(mine)} of {len(clips)} prompts were for this process: {counts['made']} made, {counts['found']} there"
        f" before, {counts['failed']} failed; {folder / name}",
        err=True,
    )
    team.wait()
    if counts["failed"]:
        raise ConfigError(
            f"{counts['failed']} of {len(mine)} clips failed, as {folder / name} says; run the same command again to"
            " try only those"
        )


def about(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what is in a video beside prompt, seed and arguments: the plan's content, model, dtype, LoRAs."""
    from ..configs.codec import plan_to_data

    return {"plan": plan_to_data(plan), **settings}

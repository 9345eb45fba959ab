"""The command line of benchmarks that measure rows in one go and print them as a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vidaccel.device import device_info
from vidaccel.files import check_writable, write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Row = TypeVar("Row", bound=DataclassInstance)

__all__ = ["run"]


def run(
    described: str | None,
    measure: Callable[[], Sequence[Row]],
    table: Callable[[Sequence[Row]], str],
    arguments: list[str] | None = None,
) -> None:
    """Measures, prints the table, and with ``--json PATH`` writes all figures and the environment.

    Args:
        described: the module's docstring; its first line is the help's.
        arguments: of the command line, that of the process by default.
    """
    parser = argparse.ArgumentParser(description=(described or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures and the environment there")
    options = parser.parse_args(arguments)
    if options.json:
        check_writable(options.json)  # before the minutes of measuring, not after
    rows = measure()
    print(table(rows))
    if options.json:
        write_json(options.json, {"device": asdict(device_info()), "rows": [asdict(row) for row in rows]})

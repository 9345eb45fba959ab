"""Whatever a registry finds has a test: the registries are asked, and no list here has to be kept."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from vidaccel.compensation import compensation_names
from vidaccel.compensation.registry import compensation_class
from vidaccel.configs.pattern_spec import CompensationSpec, PatternSpec
from vidaccel.discovery import modules_of
from vidaccel.patchers.registry import families
from vidaccel.patterns import pattern_names
from vidaccel.patterns.registry import pattern_class

TESTS = Path(__file__).parent
PATTERNS = [pattern_class(PatternSpec(name)) for name in pattern_names()]
COMPENSATIONS = [compensation_class(CompensationSpec(name)) for name in compensation_names()]


@cache
def _tests_of(folder: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((TESTS / folder).rglob("*.py")))


def missing(cls: type, folder: str, *words: str) -> str | None:
    """The file to write if no test in the folder names the class, or one of the words in quotes."""
    said = "|".join([rf"\b{cls.__name__}\b", *(f'"{re.escape(word)}"' for word in words)])
    if re.search(said, _tests_of(folder)):
        return None
    return f"no test names {cls.__name__}; write tests/{folder}/test_{cls.__module__.rpartition('.')[2]}.py"


@pytest.mark.parametrize("cls", PATTERNS, ids=lambda cls: cls.name)
def test_patterns_are_tested(cls: type) -> None:
    assert not (says := missing(cls, "patterns", cls.name)), says  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", COMPENSATIONS, ids=lambda cls: cls.name)
def test_compensations_are_tested(cls: type) -> None:
    assert not (says := missing(cls, "compensation", cls.name)), says  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_families_are_tested(family: object) -> None:
    """By a pipeline of theirs in the zoo, or, where they have none, by a file of their own."""
    cls = type(family)
    if not cls.pipelines:  # type: ignore[attr-defined]
        assert not (says := missing(cls, "patchers")), says
        return
    named = any(f'"{name}' in _tests_of("zoo") for name in cls.pipelines)  # type: ignore[attr-defined]
    assert named, f"no case of {cls.__name__}; write tests/zoo/{cls.__module__.rpartition('.')[2]}.py"


def test_what_has_no_test_is_named() -> None:
    class Untested:
        pass

    assert missing(Untested, "patterns") == "no test names Untested; write tests/patterns/test_test_own_files.py"


def test_the_folders_are_read_in_one_order() -> None:
    found = [module.__name__ for module in modules_of("vidaccel.patterns")]
    assert found == sorted(found) and "vidaccel.patterns.sliding_tile" in found

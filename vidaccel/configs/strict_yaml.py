"""YAML as our files may have it: plain values, no key twice, no references, and no more than a few kB."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import ConfigError

__all__ = ["parse_yaml", "read_yaml"]

_MAX_BYTES = 1 << 20
_T = TypeVar("_T")


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML without repeated keys, which would silently overwrite each other, and without references."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "references (*name) are not used", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # none of our files has such keys; the base class names them
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse_yaml(
    text: str, where: str, what: str, build: Callable[[object], _T], error: type[ConfigError] = ConfigError
) -> _T:
    """What ``build`` makes of the data in ``text``.

    Args:
        where: what messages call the text, such as its path.
        what: what it should be, such as "a plan".
        build: raises :class:`ConfigError` or another ``ValueError`` for data that is no such thing.
        error: class of what is raised.

    Raises:
        ConfigError: of the class ``error``, in one sentence, if the text is not YAML or not what it should be.
    """
    try:
        return build(yaml.load(text, Loader=_StrictLoader))  # a subclass of the safe loader
    except yaml.MarkedYAMLError as found:
        mark = found.problem_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise error(f"{where} is not valid YAML{line}: {found.problem}") from None
    except RecursionError:
        raise error(f"{where} is not {what}: it is nested too deep") from None
    except (yaml.YAMLError, ValueError) as found:  # ConfigError is a ValueError
        raise error(f"{where} is not {what}: {str(found).splitlines()[0]}") from None


def read_yaml(path: str | Path, what: str, build: Callable[[object], _T], error: type[ConfigError] = ConfigError) -> _T:
    """What ``build`` makes of the file's data; arguments as :func:`parse_yaml` has them.

    Raises:
        ConfigError: of the class ``error``, if the file is missing, too large, not UTF-8, or not what it should be.
    """
    path = Path(path)
    noun = what.removeprefix("a ")
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise error(f"{path} is larger than {_MAX_BYTES} bytes; {what} in YAML is a few kB")
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise error(f"there is no {noun} file {path}; check the path") from None
    except OSError as found:
        raise error(f"{path} cannot be read: {found.strerror or found}; give a file that can be") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not text in UTF-8; save it as UTF-8") from None
    return parse_yaml(text, str(path), what, build, error)

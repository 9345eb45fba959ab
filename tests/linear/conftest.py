"""These tests need torchao, which is beside the environment: make test-linear."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("torchao") is None:
        for item in items:
            if item.path.parent.name == "linear":
                item.add_marker(pytest.mark.skip(reason="needs torchao; make test-linear has it"))

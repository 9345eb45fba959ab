"""These suites need Triton, which the plain test environment does not have: ``make test-kernels`` runs them."""

from __future__ import annotations

from importlib import util

collect_ignore_glob = [] if util.find_spec("triton") else ["*"]

"""What another project's kernel takes, as data, and the sentence for a call that it does not take."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from dataclasses import dataclass

import torch

from ..contract import KernelRequest

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """The constraints that a project declares.

    Args:
        module: what is imported, by its full name.
        install: how a user gets it.
        capabilities: major compute capabilities of the GPUs that it runs on.
        dtypes: of q, k and v.
        head_dims: channels of a head.
    """

    module: str
    install: str
    capabilities: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]

    def why_not(self, request: KernelRequest) -> str | None:
        """Why the kernel cannot run the request, or ``None``. Nothing of the project is imported."""
        if request.device != "cuda" or torch.version.hip is not None:
            return f"runs on NVIDIA GPUs, not on {request.device}"
        if not _is_there(self.module):
            return f"{self.module} is not installed; {self.install}"
        major, minor = torch.cuda.get_device_capability()
        if major not in self.capabilities:
            known = " and ".join(f"{one}.x" for one in self.capabilities)
            return f"runs on compute capability {known}, not on {major}.{minor}"
        if request.precision.quantised:
            return f"computes in the input's dtype only; precision {request.precision.name!r} is quantised"
        if request.dtype not in self.dtypes:
            return f"{request.dtype} is not supported; valid are {', '.join(map(str, self.dtypes))}"
        if request.head_dim not in self.head_dims:
            valid = " and ".join(map(str, self.head_dims))
            return f"takes {valid} channels a head, not {request.head_dim}"
        if request.tail:
            return "knows no pooled tail"
        if request.return_lse:
            return "the units of its LSE are not documented, so it is not used"
        if request.skip:
            return "takes its list of blocks as given, so it cannot skip blocks on the way"
        return None


def _is_there(module: str) -> bool:
    """Whether a module could be imported; its parents' packages are looked up, not run."""
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    if found is None:
        return False
    for name in rest:  # find_spec("a.b") would import a
        places = [] if found.submodule_search_locations is None else list(found.submodule_search_locations)
        found = next((spec for place in places if (spec := _in_folder(place, name)) is not None), None)
        if found is None:
            return False
    return True


def _in_folder(folder: str, name: str) -> importlib.machinery.ModuleSpec | None:
    finder = importlib.machinery.FileFinder(
        folder,
        (importlib.machinery.SourceFileLoader, importlib.machinery.SOURCE_SUFFIXES),
        (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
    )
    return finder.find_spec(name)

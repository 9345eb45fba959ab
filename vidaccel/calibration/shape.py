"""The shape of one attention call, kept with the observations so that costs can be told for another device later."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..configs.codec import take
from ..errors import ConfigError
from ..layout import TokenLayout
from ..types import TileShape, VideoGrid

__all__ = ["Shape"]

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """What q, k and v of a layer look like, beside the token grid.

    Args:
        batch, heads, head_dim: B, H and D of [B,S,H,D].
        dtype: name of their dtype.
        text_tokens: tokens around the video.
        text_first: whether they come before it.

    Raises:
        ConfigError: if a number is out of range or the dtype unknown.
    """

    batch: int
    heads: int
    head_dim: int
    dtype: str
    text_tokens: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        counts = (self.batch, self.heads, self.head_dim, self.text_tokens + 1)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in counts):
            raise ConfigError(f"{self} is no shape; batch, heads and head_dim are at least 1, text_tokens at least 0")
        if self.dtype not in _DTYPES or not isinstance(self.text_first, bool):
            raise ConfigError(f"{self} is no shape; its dtype is one of {', '.join(_DTYPES)}, text_first true or false")

    @staticmethod
    def of(layout: TokenLayout, batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> Shape:
        """The shape of a call on tokens in this layout."""
        name = str(dtype).removeprefix("torch.")
        return Shape(batch, heads, head_dim, name, layout.text_tokens, layout.text_first)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return _DTYPES[self.dtype]

    def layout(self, grid: VideoGrid, tile: TileShape | None) -> TokenLayout:
        """Order and blocks of the tokens, on the CPU."""
        return TokenLayout.of(grid, tile, text_tokens=self.text_tokens, text_first=self.text_first)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: object) -> Shape:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: if the data has another form.
        """
        names = ("batch", "heads", "head_dim", "dtype", "text_tokens", "text_first")
        given = take(data, names, "the shape")
        if set(given) != set(names):
            raise ConfigError(f"the shape lacks one of {', '.join(names)}; calibrate again")
        return Shape(**given)

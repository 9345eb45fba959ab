"""The small model that ships with the package: a real ``WanPipeline`` that runs anywhere, offline.

:data:`DEMO_DIR` is its folder, :data:`DEFAULTS` the settings to call it with and :data:`PROMPTS` twelve prompts that
it never saw in training. :data:`DEMO_PLAN` is a plan calibrated for it, made by ``vidaccel solve`` of the observations
beside it. Importing this module is cheap: nothing is loaded.
"""

import json
from pathlib import Path
from typing import Any

DEMO_DIR: Path = Path(__file__).parent / "model"
DEMO_PLAN: Path = Path(__file__).parent / "calibrated.safetensors"

# ``num_frames`` is one less than the 16 frames that come out: the VAE does not compress time, and ``WanPipeline``
# then rounds the number up by one (and logs a warning). ``max_sequence_length`` is pinned because the transformer
# attends to the padding of the prompt: another length is another clip.
DEFAULTS: dict[str, Any] = json.loads((DEMO_DIR / "defaults.json").read_text())

PROMPTS: tuple[str, ...] = (
    "a red circle moving left on a striped background",
    "a blue square moving up on a checkered background",
    "a yellow triangle circling on a plain background",
    "a green circle growing on a checkered background",
    "a white square bouncing on a plain background",
    "a purple triangle moving right on a striped background",
    "a red square circling on a checkered background",
    "a blue triangle shrinking on a striped background",
    "a yellow circle moving down on a checkered background",
    "a green triangle bouncing on a striped background",
    "a white circle moving right on a plain background",
    "a purple square growing on a plain background",
)

__all__ = ["DEFAULTS", "DEMO_DIR", "DEMO_PLAN", "PROMPTS"]

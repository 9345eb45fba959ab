"""Trained tensors from checkpoints: names as published, shapes, and mistakes that are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vidaccel.configs.weights import GROUPS, TENSORS, by_layer, check_layer, read_weights
from vidaccel.errors import ConfigError

MODULES = [f"blocks.{i}.attn1" for i in range(3)]
SIZES: dict[str, int] = {"heads": 2, "dim": 4, "channels": 10}

#: Names in checkpoints that exist, and what they are.
PUBLISHED = {
    "blocks.2.to_gate_compress.weight": "gate.weight",  # FastVideo, its own names
    "blocks.2.attn1.to_gate_compress.bias": "gate.bias",
    "transformer.blocks.2.attn.to_gate_compress.weight": "gate.weight",
    "net.blocks.2.self_attn.attn_op.local_attn.proj_l.weight": "projection.weight",  # TurboDiffusion
    "blocks.2.attn1.attn_impl.proj_l.bias": "projection.bias",  # FastVideo
    "blocks.2._checkpoint_wrapped_module.self_attn.attn_op.local_attn.proj_l.bias": "projection.bias",
    "blocks.2.self_attn.proj_l.weight": "projection.weight",
    "blocks.2.attn1.attn_impl.alpha": "alpha.logits",
    "model.layers.2.self_attn.attn_gate.attngate_linear_q.weight": "seer.q",  # SeerAttention
    "model.layers.2.self_attn.attn_gate.mask_linear_k.weight": "seer.k",
    "model.layers.2.self_attn.attn_gate.attngate_qnorm.weight": "seer.q_norm",
    "model.layers.2.self_attn.attn_gate.attngate_knorm.weight": "seer.k_norm",
}
#: Names of whole checkpoints that are none of ours.
OTHERS = (
    "blocks.2.attn1.to_q.weight",
    "blocks.2.attn2.to_gate_compress_other.weight",
    "blocks.2.cross_attn.proj_l.weight",
    "to_gate_compress.weight",
    "blocks.x.to_gate_compress.weight",
    "blocks.2.self_attn.q.alpha",
    "proj_l.weight",
    "model.layers.2.self_attn.attn_gate.attngate_linear_q.weight_scale",
)


def _good() -> dict[str, torch.Tensor]:
    """A complete layer."""
    return {
        "gate.weight": torch.randn(8, 10),
        "gate.bias": torch.randn(8),
        "projection.weight": torch.randn(4, 4),
        "alpha.logits": torch.randn(2, 7),
        "seer.q": torch.randn(2, 4, 6),
        "seer.k": torch.randn(2, 12, 6),
        "seer.k_norm": torch.randn(6),
    }


@pytest.mark.parametrize(("key", "name"), PUBLISHED.items())
def test_published_names(key: str, name: str) -> None:
    tensor = torch.randn(3)
    others = {other: torch.randn(1) for other in OTHERS}
    (found,) = by_layer(read_weights({**others, key: tensor}), MODULES).items()
    assert found == (2, {name: tensor})


@pytest.mark.parametrize("key", OTHERS)
def test_other_names_are_not_taken(key: str) -> None:
    with pytest.raises(
        ConfigError, match="holds none of the trained tensors that vidaccel knows, among 1; known are VSA"
    ):
        read_weights({key: torch.randn(3)})


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    tensors = {key: torch.randn(3) for key in ("blocks.0.to_gate_compress.weight", "blocks.1.to_gate_compress.weight")}
    for number, (key, tensor) in enumerate(tensors.items()):
        save_file({key: tensor, "blocks.0.attn1.to_q.weight": torch.randn(2)}, tmp_path / f"part{number}.safetensors")
    found = read_weights(tmp_path)
    assert set(found) == {("blocks", 0), ("blocks", 1)}
    assert torch.equal(found["blocks", 1]["gate.weight"], tensors["blocks.1.to_gate_compress.weight"])
    assert set(read_weights(str(tmp_path / "part0.safetensors"))) == {("blocks", 0)}


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file or folder .*none\.safetensors"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match=r"holds no \.safetensors file"):
        read_weights(tmp_path)
    pickled = tmp_path / "gates.pth"
    torch.save({"blocks.0.to_gate_compress.weight": torch.randn(3)}, pickled)
    with pytest.raises(ConfigError, match=r"no \.safetensors file, and other forms can run code .*save_file"):
        read_weights(pickled)
    pickled.rename(tmp_path / "gates.safetensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_weights(tmp_path / "gates.safetensors")
    wrong: Any = 3
    with pytest.raises(ConfigError, match=r"the weights are a int; give a \.safetensors file"):
        read_weights(wrong)
    with pytest.raises(ConfigError, match="'blocks': a dict; give names and tensors"):
        read_weights({"blocks": {}})  # type: ignore[dict-item]


def test_two_tensors_of_one_meaning() -> None:
    both = {"blocks.1.attn1.attn_impl.proj_l.weight": torch.ones(1), "blocks.1.attn1.proj_l.weight": torch.ones(1)}
    with pytest.raises(ConfigError, match=r"two tensors for projection\.weight of blocks\.1; leave out blocks\.1"):
        read_weights(both)


def test_blocks_that_the_model_lacks() -> None:
    found = read_weights({"blocks.3.to_gate_compress.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"hold gate\.weight of blocks\.3, and the model's attention is in blocks\.0"):
        by_layer(found, MODULES)
    two = [*MODULES, "vace_blocks.0.attn1"]
    assert set(by_layer(read_weights({"vace_blocks.0.to_gate_compress.weight": torch.ones(1)}), two)) == {3}
    with pytest.raises(ConfigError, match=r"of layers\.0"):  # which of the two lists is meant?
        by_layer(read_weights({"layers.0.to_gate_compress.weight": torch.ones(1)}), two)


def test_a_good_layer() -> None:
    good = _good()
    assert check_layer(good, "blocks.0", **SIZES).keys() == good.keys()
    assert set(GROUPS) == {tensor.group for tensor in TENSORS}
    squeezed = check_layer({**good, "seer.q": good["seer.q"][:, None]}, "blocks.0", **SIZES)
    assert torch.equal(squeezed["seer.q"], good["seer.q"])
    check_layer({"alpha.logits": torch.randn(1, 1)}, "blocks.0", **SIZES)
    check_layer({"gate.weight": torch.randn(8, 10)}, "blocks.0", **SIZES)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("gate.weight", torch.ones(8, 8), r"has shape \[8, 8\], and the layer needs 8 x 10; give weights that were"),
        ("gate.bias", torch.ones(1), r"has shape \[1\], and the layer needs 8"),
        ("projection.weight", torch.ones(8, 8), "needs 4 x 4"),
        ("alpha.logits", torch.ones(3, 7), "needs 2 or 1 x any blocks"),
        ("seer.q", torch.ones(1, 4, 6), "needs 2 x 4 x any gate"),
        ("seer.k", torch.ones(2, 12, 5), "needs 2 x 12 x 6"),
        ("seer.k_norm", torch.ones(5), "needs 6"),
        ("gate.weight", torch.ones(8, 10, dtype=torch.int8), "is int8; give weights in float32"),
        ("gate.weight", torch.ones(8, 10).to(torch.float8_e4m3fn), "is float8_e4m3fn; give weights"),
        ("gate.weight", torch.full((8, 10), float("nan")), "holds numbers that are not finite"),
        ("seer.k", None, r"have a seer without seer\.k; give both"),
        ("gate.weight", None, r"have a gate without gate\.weight"),
    ],
)
def test_layers_that_do_not_fit(name: str, wrong: torch.Tensor | None, says: str) -> None:
    layer = {key: tensor for key, tensor in {**_good(), name: wrong}.items() if tensor is not None}
    with pytest.raises(ConfigError, match=rf"blocks\.0.* {says}"):
        check_layer(layer, "blocks.0", **SIZES)

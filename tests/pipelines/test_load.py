"""Loading pipelines: the real format, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_wan import tiny_wan
from vidaccel.errors import ConfigError
from vidaccel.pipelines.load import check_model, compile_transformers, load_pipeline, parse_dtype

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_wan(path, dual=True)
    return path


def copied(folder: Path, to: Path) -> Path:
    """A copy of the model with links in place of files, for tests that spoil one of them."""
    for file in folder.rglob("*.*"):
        if file.is_file():
            (to / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to / file.relative_to(folder)).symlink_to(file)
    return to


def test_loads_what_save_pretrained_wrote(folder: Path) -> None:
    pipe = load_pipeline(folder, dtype=torch.bfloat16, device=CPU)
    assert type(pipe).__name__ == "WanPipeline"
    assert pipe.transformer_2 is not None and pipe.text_encoder is not None
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    original = tiny_wan(dual=True).transformer.blocks[0].attn1.to_q.weight
    assert torch.equal(pipe.transformer.blocks[0].attn1.to_q.weight, original.bfloat16())


def test_loading_gives_no_deprecation_warning(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    load_pipeline(folder, dtype=torch.float32, device=CPU)
    assert [str(w.message) for w in recwarn if "dtype" in str(w.message)] == []


def test_hub_ids_are_left_to_the_hub() -> None:
    assert check_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "/missing", "missing", "~/model"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no model folder {name}; give a folder"):
        check_model(name)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a diffusers pipeline: it has no model_index\.json"):
        check_model(tmp_path)
    (tmp_path / "model_index.json").write_text("[1, 2")
    with pytest.raises(ConfigError, match="cannot be read as a pipeline's index"):
        check_model(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "TomorrowPipeline"}))
    with pytest.raises(ConfigError, match="holds a TomorrowPipeline, which diffusers .* does not know"):
        check_model(tmp_path)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_truncated_weights_are_one_sentence(folder: Path, tmp_path: Path, part: str) -> None:
    model = copied(folder, tmp_path)
    (weights,) = (model / part).glob("*.safetensors")
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"could not be loaded: .") as caught:
        load_pipeline(model, dtype=torch.float32, device=CPU)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    model = copied(folder, tmp_path)
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, model / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"could not be loaded: .*safetensors"):
        load_pipeline(model, dtype=torch.float32, device=CPU)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config")
def test_a_lora_is_loaded_and_active(folder: Path, tmp_path: Path) -> None:
    files = [save_lora(tmp_path / f"{name}", seed) for name, seed in (("one", 1), ("two", 2))]
    pipe = load_pipeline(folder, dtype=torch.float32, device=CPU, loras=[str(file) for file in files])
    assert pipe.get_active_adapters() == ["lora_0", "lora_1"]
    plain = load_pipeline(folder, dtype=torch.float32, device=CPU)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    changed, before = (p.transformer.blocks[0].attn1.to_q(x) for p in (pipe, plain))
    assert not torch.allclose(changed, before)


def save_lora(folder: Path, seed: int) -> Path:
    """Random LoRA weights for the query projections, in the file diffusers writes."""
    from diffusers import WanPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(seed)
    transformer = tiny_wan(text=False).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))
    (file,) = folder.glob("*.safetensors")
    return file


def test_a_bad_lora_is_named(folder: Path, tmp_path: Path) -> None:
    for lora, words in {
        str(tmp_path / "no.safetensors"): "there is no LoRA",
        "missing": "there is no LoRA missing",
        str(spoilt(tmp_path / "bad.safetensors")): "is no .safetensors file",
    }.items():
        with pytest.raises(ConfigError, match=words):
            load_pipeline(folder, dtype=torch.float32, device=CPU, loras=[lora])


def spoilt(path: Path) -> Path:
    """A file that is no safetensors file."""
    path.write_bytes(b"not weights at all")
    return path


def test_offloading_needs_an_accelerator(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the device is the CPU; leave it out"):
        load_pipeline(folder, dtype=torch.float32, device=CPU, cpu_offload=True)


def test_compiling_marks_the_blocks_of_both_transformers(folder: Path) -> None:
    pipe = load_pipeline(folder, dtype=torch.float32, device=CPU)
    compile_transformers(pipe)
    for part in (pipe.transformer, pipe.transformer_2):
        assert all(block._compiled_call_impl is not None for block in part.blocks)


def test_compiling_what_diffusers_does_not_know_to_compile_is_an_error() -> None:
    pipe: Any = type("Pipe", (), {"components": {"transformer": torch.nn.Linear(1, 1)}})()
    with pytest.raises(ConfigError, match="which blocks of Linear repeat"):
        compile_transformers(pipe)


def test_dtypes_go_by_their_usual_names() -> None:
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="dtype is 'int8'; valid are float32"):
        parse_dtype("int8")


def test_every_missing_component_is_named(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    shutil.rmtree(half / "vae")
    shutil.rmtree(half / "tokenizer")
    with pytest.raises(ConfigError, match="half lacks .*, which its model_index.json names") as told:
        check_model(half)
    assert "vae/" in str(told.value) and "tokenizer/" in str(told.value) and "transformer/" not in str(told.value)


@pytest.mark.parametrize("name", ["wan.gguf", "wan.safetensors", "Wan.GGUF"])
def test_single_files_point_to_the_python_way(tmp_path: Path, name: str) -> None:
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    with pytest.raises(ConfigError, match="single file") as told:
        check_model(tmp_path / name)
    # the names in the sentence are those of diffusers
    assert f"{WanTransformer3DModel.__name__}.{WanTransformer3DModel.from_single_file.__name__}" in str(told.value)
    assert GGUFQuantizationConfig.__name__ in str(told.value)

"""Training of the demo model: exact shortcuts, a run that resumes as if it had not stopped, and its card."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tests.rounding import assert_rounded, bound_of
from vidaccel.pipelines.demo import DEMO_DIR
from vidaccel.pipelines.demo.build import embed_captions, load_pipeline, save_pipeline
from vidaccel.pipelines.demo.card import LOG_FILE, LogRow, Run, append_log, read_history, read_log, write_history
from vidaccel.pipelines.demo.muon import Muon, orthogonalise
from vidaccel.pipelines.demo.shortcuts import CollapsedPadding, FrameSubset
from vidaccel.pipelines.demo.train import CAPTION_LENGTH, Recipe, Trainer, draw_noise_levels, main, parse, train

TINY = Recipe(steps=2, size=64, batch=4, warmup=1, shares_first=(1.0, 0.0, 0.0), shares_last=(1.0, 0.0, 0.0))


@pytest.fixture
def pipeline() -> WanPipeline:
    return load_pipeline(DEMO_DIR)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.pipeline.transformer.named_parameters()}


# --- the shortcuts --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_collapsed_padding_is_exact(pipeline: WanPipeline) -> None:
    """Eleven tokens and one that stands for 21 more give what 32 tokens give."""
    transformer = pipeline.transformer
    latents = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([700.0])
    text = embed_captions(pipeline, ["a red circle moving left on a striped background"], CAPTION_LENGTH)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 32 - CAPTION_LENGTH))
    expected = transformer(latents, time, padded, return_dict=False)[0]
    bound = bound_of(lambda: transformer(latents, time, padded, return_dict=False)[0], expected)
    processor = CollapsedPadding(CAPTION_LENGTH)
    processor.install(transformer)
    processor.pad_to(32)
    collapsed = torch.nn.functional.pad(text, (0, 0, 0, 1))
    assert_rounded(transformer(latents, time, collapsed, return_dict=False)[0], expected, bound)
    with pytest.raises(ValueError, match="captions alone take 11"):
        processor.pad_to(11)


@torch.no_grad()
def test_captions_are_embedded_as_the_pipeline_does(pipeline: WanPipeline) -> None:
    caption = "a white square growing on a plain background"
    ours = embed_captions(pipeline, [caption], 32)
    theirs, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=32)
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="more than 3"):
        embed_captions(pipeline, [caption], 3)


@torch.no_grad()
def test_frame_subset_keeps_true_positions(pipeline: WanPipeline) -> None:
    transformer = pipeline.transformer
    latents = torch.randn(1, 16, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = transformer.rope(latents)
    subset = FrameSubset(transformer, 16)
    whole = transformer.rope(latents)
    torch.testing.assert_close(whole[0], expected[0].float())
    subset.choose(4, torch.Generator().manual_seed(1))
    frames = subset.frames
    assert len(frames) == 4 and frames[0] == 0 and frames[-1] == 15 and bool((frames.diff() > 0).all())
    for part, table in zip(transformer.rope(latents[:, :, frames]), expected, strict=True):
        torch.testing.assert_close(part, table.unflatten(1, (16, -1))[:, frames].flatten(1, 2).float())
    with pytest.raises(ValueError, match="do not divide"):
        subset.choose(5, torch.Generator())
    subset.remove()
    assert transformer.rope(latents[:, :, :4])[0].shape[1] == 4 * 16


# --- optimizer and noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 24, 24), (2, 16, 40), (2, 40, 16)], ids=str)
def test_orthogonalise_flattens_singular_values(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(x))
    # Five steps do not lift the very smallest singular values of a square matrix all the way.
    assert values.max() < 1.3 and float((values > 0.6).float().mean()) > 0.9


def test_muon_descends_and_takes_matrices_only() -> None:
    goal = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    matrix = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([matrix], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        (matrix - goal).square().sum().backward()
        optimizer.step()
    assert (matrix - goal).square().mean() < 0.05 * goal.square().mean()
    with pytest.raises(ValueError, match="AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_noise_levels_favour_noise() -> None:
    levels = draw_noise_levels(4000, torch.Generator().manual_seed(0))
    assert levels.min() > 0 and levels.max() <= 1
    assert 0.25 < float((levels > 0.9).float().mean()) < 0.6
    assert 0.1 < float((levels < 0.5).float().mean()) < 0.4


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    straight = Trainer(TINY, load_pipeline(DEMO_DIR))
    before = weights(straight)
    train(straight, tmp_path / "straight", log_every=1)
    assert any(not torch.equal(before[name], value) for name, value in weights(straight).items())

    stopped = Trainer(TINY, load_pipeline(DEMO_DIR))
    stopped.step()
    stopped.save(tmp_path / "stopped")
    resumed = Trainer(TINY, load_pipeline(tmp_path / "stopped"))
    resumed.resume(tmp_path / "stopped")
    train(resumed, tmp_path / "stopped", log_every=1)
    assert (resumed.steps, resumed.samples) == (straight.steps, straight.samples) == (2, 2)
    for name, value in weights(straight).items():
        torch.testing.assert_close(weights(resumed)[name], value, msg=name)

    # What is saved are the averaged weights, in a folder that loads like any other.
    loaded = load_pipeline(tmp_path / "straight")
    for name, parameter in loaded.transformer.named_parameters():
        torch.testing.assert_close(parameter.detach(), straight.average[name])
    rows = read_log(tmp_path / "straight" / LOG_FILE)
    assert [row.step for row in rows] == [1, 2] and all(math.isfinite(row.loss) for row in rows)


@pytest.mark.slow
def test_the_command_writes_a_loadable_folder_with_card_and_history(tmp_path: Path) -> None:
    first = tmp_path / "first"
    save_pipeline(load_pipeline(DEMO_DIR), first)
    write_history(first, [Run("an earlier command", "cpu", 5, 20, 1.0)])
    output = tmp_path / "second"
    main(["--weights", str(first), "--output", str(output), "--steps", "1", "--size", "64", "--batch", "4"])
    history = read_history(output)
    assert len(history) == 2 and history[0].command == "an earlier command"
    assert history[1].steps == 1 and "--steps 1 --size 64" in history[1].command.replace(f"--output {output} ", "")
    card = (output / "README.md").read_text()
    assert history[1].command in card and "an earlier command" in card
    assert json.loads((output / "model_index.json").read_text())["_class_name"] == "WanPipeline"


def test_resuming_nothing_says_so(pipeline: WanPipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="leave out --resume"):
        Trainer(TINY, pipeline).resume(tmp_path)


def test_bad_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        Recipe(size=60)
    with pytest.raises(ValueError, match="positive"):
        Recipe(minutes=0)
    recipe, options = parse(["--output", "x", "--minutes", "3", "--compile"])
    assert recipe.minutes == 3 and recipe.compile and options.output == Path("x")


def test_log_survives_a_round_trip(tmp_path: Path) -> None:
    losses, levels = torch.tensor([1.0, 3.0]), torch.tensor([0.2, 0.99])
    row = LogRow.of(7, 28, 12.5, 1e-3, losses, levels)
    assert (row.loss, row.loss_to_50, row.loss_to_100) == (2.0, 1.0, 3.0) and math.isnan(row.loss_to_80)
    append_log(tmp_path / "log.csv", row)
    append_log(tmp_path / "log.csv", row)
    again = read_log(tmp_path / "log.csv")
    assert len(again) == 2 and again[0].samples == 28 and again[0].loss == 2.0

"""The shipped model against its bar: a person can name colour, shape and motion of all twelve held-out prompts.

The person is played by :mod:`vidaccel.pipelines.demo.recognise`, which is itself tested on rendered clips first: it
must be right on those and must disagree with the captions of other clips.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from vidaccel.pipelines.demo import DEFAULTS, DEMO_DIR, PROMPTS
from vidaccel.pipelines.demo.analytic_vae import PatchBasis, build_vae, encode_patches, fold
from vidaccel.pipelines.demo.build import build_tokenizer, build_transformer, load_pipeline
from vidaccel.pipelines.demo.clips import HELD_OUT, ClipSpec, all_specs, draw_specs, render, training_specs
from vidaccel.pipelines.demo.recognise import Reading, read_clip
from vidaccel.pipelines.demo.sheet import contact_sheet
from vidaccel.pipelines.demo.ship import describe, generate_clips


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return load_pipeline(DEMO_DIR)


# --- the clips ------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_clips() -> None:
    specs = draw_specs(4, generator(1))
    assert specs == draw_specs(4, generator(1))
    first, again, other = (render(specs, generator(seed), size=64) for seed in (5, 5, 6))
    assert first.shape == (4, 3, 16, 64, 64) and first.abs().max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_clip_does_not_depend_on_its_batch() -> None:
    specs = list(HELD_OUT[:3])
    whole = render(specs, generator(3), size=64)
    assert torch.equal(render(specs[:1], generator(3), size=64), whole[:1])


def test_held_out_combinations_are_not_trained_on() -> None:
    assert len(all_specs()) == 432 and len(training_specs()) == 420
    assert not set(HELD_OUT) & set(training_specs())
    assert tuple(spec.caption for spec in HELD_OUT) == PROMPTS


def test_an_unknown_word_is_named() -> None:
    with pytest.raises(ValueError, match="'pink'; the clips know red, green"):
        ClipSpec("pink", "circle", "circling", "plain")


# --- the reader -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ground_truth() -> list[tuple[ClipSpec, Reading]]:
    draw = generator(9)
    specs = draw_specs(96, draw, all_specs())
    return [(spec, read_clip(clip)) for spec, clip in zip(specs, render(specs, draw), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("word", ["colour", "shape", "motion"])
def test_reader_is_right_on_rendered_clips(ground_truth: list[tuple[ClipSpec, Reading]], word: str) -> None:
    right = [reading.agrees(spec)[word] for spec, reading in ground_truth]
    assert sum(right) >= 0.95 * len(right)


@pytest.mark.slow
@pytest.mark.parametrize(("word", "choices"), [("colour", 6), ("shape", 3), ("motion", 8)])
def test_reader_disagrees_with_other_captions(
    ground_truth: list[tuple[ClipSpec, Reading]], word: str, choices: int
) -> None:
    """With shuffled labels it agrees no more often than chance, so agreement is worth something."""
    specs = [spec for spec, _ in ground_truth]
    shuffled = [specs[i] for i in torch.randperm(len(specs), generator=generator(2)).tolist()]
    right = [reading.agrees(spec)[word] for spec, (_, reading) in zip(shuffled, ground_truth, strict=True)]
    assert sum(right) / len(right) <= 1 / choices + 0.15


def test_reader_sees_nothing_in_noise_or_an_empty_frame() -> None:
    spec = ClipSpec("red", "square", "moving left", "plain")
    for clip in (torch.full((3, 16, 96, 96), -0.5), torch.rand(3, 16, 96, 96, generator=generator(0)) * 2 - 1):
        agreement = read_clip(clip).agrees(spec)
        assert not agreement["shape"] and not agreement["motion"]


def test_reader_notices_an_object_that_appears_twice() -> None:
    spec = ClipSpec("red", "circle", "moving left", "plain")
    one = render([spec], generator(0))[0]
    two = torch.where(one[:1] > 0.5, one, one.flip(-1))  # the object and its mirror image
    two = torch.maximum(one, one.flip(-1))
    assert read_clip(one).wholeness > 0.99
    assert read_clip(two).wholeness < 0.8
    assert read_clip(two).motion != "moving left"


# --- the promise ----------------------------------------------------------------------------------------------------

# Measured with the shipped weights: all twelve of twelve in colour, shape and motion. To save time the test makes the
# first eight. The floors leave one clip for the rounding of another machine; never lower them.
TESTED = 8
REACHED = {"colour": 8, "shape": 7, "motion": 7}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_colour_shape_and_motion_of_held_out_prompts_can_be_named(pipeline: WanPipeline) -> None:
    specs = HELD_OUT[:TESTED]
    clips = generate_clips(pipeline, PROMPTS[:TESTED], DEFAULTS)
    assert clips.shape == (TESTED, 3, 16, 96, 96)
    readings = [read_clip(clip) for clip in clips]
    agreements = [reading.agrees(spec) for spec, reading in zip(specs, readings, strict=True)]
    counts = {word: sum(agreement[word] for agreement in agreements) for word in REACHED}
    assert all(counts[word] >= floor for word, floor in REACHED.items()), describe(specs, readings)
    assert sum(reading.wholeness for reading in readings) / TESTED > 0.9  # one object, not two


# --- the parts ------------------------------------------------------------------------------------------------------


def test_the_folder_is_in_the_real_format(pipeline: WanPipeline) -> None:
    assert type(pipeline) is WanPipeline
    index = json.loads((DEMO_DIR / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]  # both of transformers 4 and 5 know it
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    assert sum(path.stat().st_size for path in DEMO_DIR.rglob("*") if path.is_file()) <= 24e6
    assert json.loads((DEMO_DIR / "defaults.json").read_text()) == DEFAULTS


def test_tokenizer_knows_every_caption_and_the_synonyms(pipeline: WanPipeline) -> None:
    tokenizer = pipeline.tokenizer
    captions = [spec.caption for spec in all_specs()]
    assert tokenizer.unk_token_id not in {i for ids in tokenizer(captions).input_ids for i in ids}
    assert tokenizer("A red ball, bouncing!").input_ids == tokenizer("a red circle bouncing").input_ids
    assert build_tokenizer()(captions).input_ids == tokenizer(captions).input_ids


def test_transformer_has_the_architecture_that_build_makes(pipeline: WanPipeline) -> None:
    fresh = build_transformer()
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in pipeline.transformer.state_dict().items()
    }


def decibel(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of clips in [-1, 1]."""
    return float(-10 * torch.log10(((a - b) / 2).square().mean()))


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    scale = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return vae.decode(encode_patches(vae, clips) * scale).sample


def test_vae_reconstructs_unseen_clips(pipeline: WanPipeline) -> None:
    draw = generator(77)
    clips = render(draw_specs(6, draw), draw)
    assert decibel(reconstruct(pipeline.vae, clips), clips) >= 38


def test_a_fresh_vae_is_what_its_algebra_says() -> None:
    """The network equals one matrix product, both ways, though it is made of norms, SiLUs and convolutions."""
    draw = generator(4)
    basis = PatchBasis.fit(render(draw_specs(24, draw), draw, size=64))
    vae = build_vae(basis)
    clips = render(draw_specs(2, draw), draw, size=64)[:, :, :13]  # ``encode`` drops frames beyond 4k + 1
    latents = encode_patches(vae, clips)
    with torch.no_grad():
        encoded = vae.encode(clips).latent_dist.mode() / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(encoded, latents, atol=1e-3, rtol=0)
    centred = fold(clips).movedim(1, -1) - basis.mean
    projected = (centred @ basis.axes.T @ basis.axes + basis.mean).movedim(-1, 1).clamp(-1, 1)
    torch.testing.assert_close(fold(reconstruct(vae, clips)), projected, atol=1e-3, rtol=0)


def test_contact_sheet_has_a_row_for_each_clip() -> None:
    clips = render(list(HELD_OUT[:3]), generator(0), size=32)
    sheet = contact_sheet(list(clips), list(PROMPTS[:3]), every=4, columns=2)
    assert sheet.shape == (2 * (16 + 32 + 2), 2 * 4 * (32 + 2), 3)
    with pytest.raises(ValueError, match="3 clips, but 2 captions"):
        contact_sheet(list(clips), list(PROMPTS[:2]))


def test_the_card_tells_the_settings_and_the_history() -> None:
    card = (Path(DEMO_DIR) / "README.md").read_text()
    history = json.loads((DEMO_DIR / "training-history.json").read_text())
    assert "license: apache-2.0" in card
    assert all(run["command"] in card for run in history)

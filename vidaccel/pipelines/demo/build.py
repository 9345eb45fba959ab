"""Builds the demo pipeline, a real ``WanPipeline``, from nothing: no download, no pretrained part.

- tokenizer: one token a word, about thirty words;
- text encoder: a one-layer UMT5 that keeps its random initial weights. Random embeddings of thirty words are nearly
  orthogonal, which is all the transformer needs to tell the words apart;
- VAE: computed, see :mod:`vidaccel.pipelines.demo.analytic_vae`;
- transformer: the only part that is trained, see :mod:`vidaccel.pipelines.demo.train`.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vidaccel.pipelines.demo.analytic_vae import LATENTS, PatchBasis, build_vae
from vidaccel.pipelines.demo.clips import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, draw_specs, render

TEXT_WIDTH = 64  # width of the text encoder
VOCABULARY_SIZE = 64  # rows of its embedding; more than there are words
FLOW_SHIFT = 3.0  # shift of the noise levels towards noise while sampling

_SPECIAL = ("<pad>", "</s>", "<unk>")
_FILLERS = ("a", "an", "the", "on", "and", "background")
# The order of the words fixes their ids, hence their embeddings: append, never reorder.
_WORDS = (
    *_FILLERS,
    *("moving", "left", "right", "up", "down"),
    *(motion for motion in MOTIONS if " " not in motion),
    *BACKGROUNDS,
    *COLOURS,
    *SHAPES,
)
# Words people use for the same things.
_SYNONYMS = {
    "ball|disc|disk": "circle",
    "box": "square",
    "jumping|hopping": "bouncing",
    "orbiting|revolving": "circling",
    "checkerboard|chequered": "checkered",
    "stripy": "striped",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows the words of the captions and a few synonyms."""
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    replace = [normalizers.Replace(Regex(rf"\b({words})\b"), name) for words, name in _SYNONYMS.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *replace])
    # Punctuation is dropped: "a red circle." must not end in an unknown word.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\w<>/]+"), behavior="removed"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def build_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    """A one-layer UMT5 with random weights, frozen."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=VOCABULARY_SIZE,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    encoder = UMT5EncoderModel(config).eval()
    encoder.requires_grad_(False)
    return encoder


def build_transformer(seed: int = 0) -> WanTransformer3DModel:
    """An untrained Wan transformer of 3.34 million parameters: 6 layers of 3 heads of 64."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=LATENTS,
        out_channels=LATENTS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )
    # Training starts at "predict zero", the best guess of a model that knows nothing yet.
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_scheduler(flow_shift: float = FLOW_SHIFT) -> UniPCMultistepScheduler:
    """The scheduler that Wan checkpoints use."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=flow_shift,
    )


def build_pipeline(seed: int = 0) -> WanPipeline:
    """A whole pipeline with an untrained transformer, ready for training."""
    generator = torch.Generator().manual_seed(seed)
    basis = PatchBasis.fit(render(draw_specs(96, generator), generator))
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(seed),
        vae=build_vae(basis),
        transformer=build_transformer(seed),
        scheduler=build_scheduler(),
    )


def load_pipeline(folder: Path) -> WanPipeline:
    """The pipeline in ``folder``, in float32 whatever precision it is stored in."""
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: WanPipeline, folder: Path) -> None:
    """Write ``pipeline`` to ``folder`` in its own precision, readable by transformers 4 and 5.

    transformers 5 writes its new name of the fast tokenizer class, which transformers 4 does not know; both know
    the old one, so that is what the files say.
    """
    pipeline.save_pretrained(folder)
    for path in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        config = json.loads((folder / name).read_text())
        config.pop("_name_or_path", None)  # where a part was loaded from is nobody's business
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def embed_captions(pipeline: WanPipeline, captions: list[str], length: int) -> Tensor:
    """Text embeddings of ``captions`` as ``WanPipeline`` makes them, zero behind the last token.

    Returns (caption, ``length``, 64). A caption longer than ``length`` tokens raises.
    """
    tokens = pipeline.tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
    if tokens.input_ids.shape[1] > length:
        raise ValueError(f"a caption has {tokens.input_ids.shape[1]} tokens, more than {length}")
    device = pipeline.text_encoder.device
    mask = tokens.attention_mask.to(device)
    hidden = pipeline.text_encoder(tokens.input_ids.to(device), mask).last_hidden_state
    return hidden * mask[..., None]


def parameter_count(vae: AutoencoderKLWan, transformer: WanTransformer3DModel) -> dict[str, int]:
    """Number of parameters of the two parts that matter, by name."""
    return {
        "vae": sum(p.numel() for p in vae.parameters()),
        "transformer": sum(p.numel() for p in transformer.parameters()),
    }

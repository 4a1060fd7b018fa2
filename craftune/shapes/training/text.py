"""Stages `tokenizer` and `text`: an own BPE, and a text encoder that knows what captions say.

The encoder learns to tell from its last token which things a caption names, where, and in which
style. Learning this beside the denoiser would take most of the training; here it takes minutes.
"""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from craftune.shapes.captions import long_caption, short_caption
from craftune.shapes.training.common import Pace, Trainer
from craftune.shapes.world import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    Spec,
    Style,
    random_spec,
    random_style,
    specs_by_category,
)

MAX_TOKENS = 32
WIDTH = 96
BATCH = 256
_CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(captions: list[str], out: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer whose merges make every word of the world one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    words = list(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        str(out / "vocab.json"), str(out / "merges.txt"), model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(out)
    return CLIPTokenizer.from_pretrained(out)


def new_text_encoder(
    tokenizer: CLIPTokenizer, layers: int = 2, width: int = WIDTH
) -> CLIPTextModel:
    """A CLIP text model of 2 layers, 96 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Padded and cut to `MAX_TOKENS`: int64 `[b, 32]`."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def sample_captions(count: int, seed: int) -> list[str]:
    """Captions as the training data has them, short and long in turn."""
    rng, groups = random.Random(seed), specs_by_category()
    return [_caption(random_spec(groups, rng), random_style(rng), i % 2, rng) for i in range(count)]


def train_text(tokenizer: CLIPTokenizer, folder: Path, pace: Pace, seed: int) -> None:
    """Train the encoder to name what captions say, and write `folder/text_encoder`."""
    encoder = new_text_encoder(tokenizer)
    heads = nn.Linear(WIDTH, sum(_SIZES))
    trainer = Trainer({"encoder": encoder, "heads": heads}, pace, folder)
    rng, groups = random.Random(seed + trainer.step), specs_by_category()

    def loss() -> Tensor:
        pairs = [(random_spec(groups, rng), random_style(rng)) for _ in range(BATCH)]
        forms = [rng.randrange(2) for _ in pairs]
        texts = [_caption(*pair, form, rng) for pair, form in zip(pairs, forms, strict=True)]
        labels = [_labels(*pair, text) for pair, text in zip(pairs, texts, strict=True)]
        pooled = encoder(token_ids(tokenizer, texts)).pooler_output
        parts = heads(pooled).split(_SIZES, dim=1)
        target = torch.tensor(labels).unbind(1)
        losses = [F.cross_entropy(part, t) for part, t in zip(parts, target, strict=True)]
        return torch.stack(losses).sum()

    trainer.run(loss)
    encoder.save_pretrained(folder / "text_encoder")


_SIZES = [len(COLORS) + 1, len(SHAPES)] + [len(COLORS) + 1, len(SHAPES) + 1] + [4, 3, 4] + [3] * 3
"""Classes per question: colour and shape of the first and second thing, count, relation,
background and three words of style (0 is "not said")."""
_LOOKS = (("sharp", "blurry"), ("vivid", "dull"), ("bright", "shadowy"))


def _labels(spec: Spec, style: Style, text: str) -> list[int]:
    colors, shapes = ["", *COLORS], ["", *SHAPES]
    first, second = spec.things[0], spec.things[1] if len(spec.things) > 1 else None
    background = list(BACKGROUNDS).index(style.background) + 1 if "background" in text else 0
    return [
        colors.index(first.color or ""),
        shapes.index(first.shape) - 1,
        colors.index(second.color or "") if second else 0,
        shapes.index(second.shape) if second else 0,
        spec.count - 1,
        RELATIONS.index(spec.relation) + 1 if spec.relation else 0,
        background,
        *((good in text) + 2 * (bad in text) for good, bad in _LOOKS),
    ]


def _caption(spec: Spec, style: Style, long: int, rng: random.Random) -> str:
    return long_caption(spec, style, rng) if long else short_caption(spec, rng)

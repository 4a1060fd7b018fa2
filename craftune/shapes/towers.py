"""Three small text-image models that stand where HPSv2.1, PickScore and ImageReward stand.

`h` pairs a convolutional image encoder with a transformer over words, `p` a mixer over patches
with a recurrent network; both compare embeddings, as CLIP does. `i` reads the picture and the
prompt together, word by word, as BLIP does. They share no weights and no training data.
"""

import json
import re
import zlib
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "towers"
MAX_WORDS = 24
UNKNOWN_BUCKETS = 16
"""Unknown words share this many embeddings, by checksum."""

_WORD = re.compile(r"[a-z0-9]+")


class Words:
    """Texts to word numbers; 0 pads, the last `UNKNOWN_BUCKETS` numbers are unknown words."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self._numbers = {word: index + 1 for index, word in enumerate(words)}

    def __len__(self) -> int:
        return 1 + len(self.words) + UNKNOWN_BUCKETS

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 `[b, 24]`; longer texts are cut, the empty text is one unknown word."""
        rows = torch.zeros(len(texts), MAX_WORDS, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            found = (_WORD.findall(text.lower()) or [""])[:MAX_WORDS]
            row[: len(found)] = torch.tensor([self._number(word) for word in found])
        return rows

    def _number(self, word: str) -> int:
        bucket = 1 + len(self.words) + zlib.crc32(word.encode()) % UNKNOWN_BUCKETS
        return self._numbers.get(word, bucket)


class ConvImage(nn.Module):
    """Pictures to a grid of features, `[b, width, 8, 8]`, by strided convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        stages, previous = [], 3
        for share in (4, 2, 1):
            channels = width // share
            stages += [nn.Conv2d(previous, channels, 3, 2, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            if share < 4:
                stages += [nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(8, channels)]
                stages += [nn.SiLU()]
            previous = channels
        self.net = nn.Sequential(*stages)

    def forward(self, images: Tensor) -> Tensor:
        """`[b, 3, 64, 64]` in [0, 1] to `[b, width, 8, 8]`."""
        return self.net(images * 2 - 1)


class MixerImage(nn.Module):
    """Pictures to a grid of features, `[b, width, 8, 8]`, by patches and mixing."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, 4), nn.GELU(), nn.Conv2d(width // 2, width, 2, 2)
        )
        self.place = nn.Parameter(torch.zeros(64, width))
        self.blocks = nn.ModuleList(_MixerBlock(width) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        """`[b, 3, 64, 64]` in [0, 1] to `[b, width, 8, 8]`."""
        x = self.patches(images * 2 - 1).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return x.transpose(1, 2).unflatten(2, (8, 8))


class _MixerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_places, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.places = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
        self.channels = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.norm_places(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm_channels(x))


class TransformerText(nn.Module):
    """Word numbers to one vector per word, `[b, 24, width]`; padding is not attended to."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(MAX_WORDS, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """`[b, 24]` to `[b, 24, width]`."""
        return self.layers(self.words(ids) + self.place, src_key_padding_mask=ids == 0)


class RecurrentText(nn.Module):
    """Word numbers to one vector per word, `[b, 24, width]`, read from left to right."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.cell = nn.GRU(width, width, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        """`[b, 24]` to `[b, 24, width]`."""
        return self.cell(self.words(ids))[0]


class DualTower(nn.Module):
    """Cosine of image and text embeddings, scaled."""

    def __init__(self, image: nn.Module, text: nn.Module, width: int, embedding: int = 128) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.shrink = nn.Conv2d(width, 24, 1)
        self.image_head = nn.Sequential(
            nn.Flatten(), nn.Linear(24 * 64, 192), nn.SiLU(), nn.Linear(192, embedding)
        )
        self.text_head = nn.Linear(width, embedding)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def embed_images(self, images: Tensor) -> Tensor:
        """`[b, 3, 64, 64]` in [0, 1] to unit vectors `[b, 128]`."""
        return F.normalize(self.image_head(self.shrink(self.image(images))), dim=-1)

    def embed_texts(self, ids: Tensor) -> Tensor:
        """`[b, 24]` to unit vectors `[b, 128]`, from the last word."""
        last = (ids != 0).sum(1) - 1
        states = self.text(ids)[torch.arange(len(ids)), last]
        return F.normalize(self.text_head(states), dim=-1)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Scores `[b]`, between -exp(scale) and exp(scale)."""
        similarity = (self.embed_images(images) * self.embed_texts(ids)).sum(-1)
        return similarity * self.scale.exp()


class FusionTower(nn.Module):
    """Words look at the picture; the score is read from what they saw."""

    def __init__(self, vocabulary: int, width: int = 96) -> None:
        super().__init__()
        self.image = ConvImage(width)
        self.place = nn.Parameter(torch.randn(64, width) * 0.02)
        self.text = TransformerText(vocabulary, width, 1)
        self.looks = nn.ModuleList(_Look(width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def features(self, images: Tensor) -> Tensor:
        """`[b, 3, 64, 64]` in [0, 1] to `[b, 64, width]`."""
        return self.image(images).flatten(2).transpose(1, 2) + self.place

    def judge(self, features: Tensor, ids: Tensor) -> Tensor:
        """Scores `[b]` of pictures, given as `features`."""
        words, padding = self.text(ids), ids == 0
        for look in self.looks:
            words = look(words, features, padding)
        mask = (~padding).unsqueeze(-1)
        return self.head((words * mask).sum(1) / mask.sum(1)).squeeze(-1)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Scores `[b]`, without bounds."""
        return self.judge(self.features(images), ids)


class _Look(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.cross = nn.MultiheadAttention(width, 4, batch_first=True)
        self.among = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, words: Tensor, features: Tensor, padding: Tensor) -> Tensor:
        seen = self.norms[3](features)
        words = words + self.cross(self.norms[0](words), seen, seen, need_weights=False)[0]
        normed = self.norms[1](words)
        words = (
            words
            + self.among(normed, normed, normed, key_padding_mask=padding, need_weights=False)[0]
        )
        return words + self.think(self.norms[2](words))


def new_tower(name: str, vocabulary: int) -> DualTower | FusionTower:
    """Tower `name` ("h", "p" or "i") with random weights."""
    if name == "h":
        return DualTower(ConvImage(96), TransformerText(vocabulary, 96, 2), 96)
    if name == "p":
        return DualTower(MixerImage(96, 4), RecurrentText(vocabulary, 96), 96)
    if name == "i":
        return FusionTower(vocabulary)
    raise ValueError(f"unknown tower {name!r}; there are h, p and i")


@lru_cache
def load_tower(name: str) -> tuple[DualTower | FusionTower, Words]:
    """The trained tower, frozen, in float32, and its vocabulary. Loaded once per process."""
    words = Words(json.loads((FOLDER / name / "config.json").read_text())["words"])
    tower = new_tower(name, len(words))
    weights = load_file(FOLDER / name / "model.safetensors")
    tower.load_state_dict({key: value.float() for key, value in weights.items()})
    return tower.eval().requires_grad_(False), words

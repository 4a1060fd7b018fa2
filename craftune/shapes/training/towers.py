"""Stage `towers`: the three text-image reward models, each from its own scenes.

`h` and `p` learn from preferences as people give them: a fifth to a quarter of the answers are
wrong, captions are noisy, and sharper pictures are liked better. `i` learns from clean answers.
Each tower also learns to say what it sees, which makes the first minutes count.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn

from craftune.shapes.captions import confuse, corrupt, long_caption, short_caption
from craftune.shapes.towers import DualTower, FusionTower, Words, new_tower
from craftune.shapes.training.common import Pace, Trainer
from craftune.shapes.training.judged import Judged, ranking_loss
from craftune.shapes.training.pictures import SEEN, Pictures, seen_targets, told_targets
from craftune.shapes.training.text import sample_captions
from craftune.shapes.world import Spec

CHUNKS = 8
"""Thousands of scenes per tower."""
JUDGED_STEPS = {"h": 1000, "p": 4000, "i": 400}
PAIRS = 28
"""Scenes per batch; each comes with a scene that nearly shows the same."""


@dataclass(frozen=True)
class Taste:
    """What one tower's preference data is like."""

    seed: int
    flip_rate: float
    """Share of preferences stated the wrong way round."""
    confusion_rate: float
    """Share of captions that describe something else."""
    long_rate: float
    looks: float
    """How much sharpness counts; 0 where only the content does."""


TASTES = {
    "h": Taste(seed=5000, flip_rate=0.20, confusion_rate=0.12, long_rate=0.3, looks=0.5),
    "p": Taste(seed=6000, flip_rate=0.20, confusion_rate=0.10, long_rate=0.5, looks=0.3),
    "i": Taste(seed=7000, flip_rate=0.0, confusion_rate=0.0, long_rate=0.3, looks=0.0),
}


def train_tower(
    name: str, vae: AutoencoderTiny, judged: Path, folder: Path, out: Path, pace: Pace
) -> None:
    """Train tower `name` and write config.json and model.safetensors (fp16) to `out`.

    First on scenes (`folder/scenes`, for `pace`), then on the base's pictures (`folder/judged`).
    """
    taste = TASTES[name]
    words = Words(sorted({word for text in sample_captions(5000, 0) for word in _split(text)}))
    tower = new_tower(name, len(words))
    _learn_scenes(tower, words, vae, taste, folder / "scenes", pace)
    judged_pace = Pace(JUDGED_STEPS[name], 7e-4, warmup=20, decay_from=0.4)
    second = Trainer({"tower": tower}, judged_pace, folder / "judged")
    answers = Judged(judged, taste.flip_rate, random.Random(taste.seed + 1))

    def loss() -> Tensor:
        images, texts, shows = answers.draw()
        return ranking_loss(tower(images, words(texts)), shows)

    second.run(loss)
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() for k, v in tower.state_dict().items()}, out / "model.safetensors")
    config = {"tower": name, "words": words.words, "training": {**vars(taste), "steps": pace.steps}}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _learn_scenes(
    tower: DualTower | FusionTower,
    words: Words,
    vae: AutoencoderTiny,
    taste: Taste,
    folder: Path,
    pace: Pace,
) -> None:
    seen = nn.Linear(128 if isinstance(tower, DualTower) else 96 * 64, SEEN)
    trainer = Trainer({"tower": tower, "seen": seen}, pace, folder)
    if trainer.step >= pace.steps:
        return
    chunks = range(taste.seed, taste.seed + CHUNKS)
    pictures = Pictures(vae, chunks, random.Random(taste.seed + trainer.step))
    step = _dual_loss if isinstance(tower, DualTower) else _fusion_loss
    trainer.run(lambda: step(tower, seen, words, pictures, taste))


def _dual_loss(
    tower: DualTower, seen: nn.Module, words: Words, pictures: Pictures, taste: Taste
) -> Tensor:
    indices, shown, nearly = _draw(pictures)
    meant = [_meant(spec, pictures.rng, taste) for spec in shown + nearly]
    texts = [_caption(spec, i, pictures, taste) for spec, i in zip(meant, indices * 2, strict=True)]
    x = pictures.pixels(indices)
    images = tower.embed_images(torch.cat([x, _spoil(x[:PAIRS])]) if taste.looks else x)
    captions = tower.embed_texts(words(texts))
    n = 2 * PAIRS
    logits = tower.scale.exp().clamp(max=30) * images @ captions.T
    same = torch.tensor([[a == b for b in shown + nearly] for a in shown])
    same[torch.arange(n), torch.arange(n)] = False
    match = logits[:n].masked_fill(same, -1e4)
    target = torch.arange(n)
    contrast = F.cross_entropy(match, target) + F.cross_entropy(match[:, :n].T, target)
    own = match.diagonal()
    preferred = torch.cat([own - logits[target, target + n], own - _partner(logits[:n, :n])])
    loss = contrast + 2 * _preference(preferred, taste.flip_rate)
    if taste.looks:
        loss = loss + taste.looks * _preference(own[:PAIRS] - logits[n:, :PAIRS].diagonal(), 0.25)
    targets = torch.tensor([seen_targets(pictures.labels[i][1]) for i in indices])
    # Pictures and captions are read by the same head, which makes their embeddings meet.
    told = torch.tensor([told_targets(spec) for spec in meant])
    return loss + _naming(seen(images[:n]), targets) + _naming(seen(captions), told)


def _fusion_loss(
    tower: FusionTower, seen: nn.Module, words: Words, pictures: Pictures, taste: Taste
) -> Tensor:
    indices, shown, nearly = _draw(pictures)
    features = tower.features(pictures.pixels(indices))
    texts = [
        _caption(spec, i, pictures, taste)
        for spec, i in zip(shown + nearly, indices * 2, strict=True)
    ]
    own = texts[: len(shown)]
    scores = tower.judge(features.repeat(3, 1, 1), words(texts + _swap(own)))
    right, missed, swapped = scores.chunk(3)
    rank = _preference(torch.cat([right - missed, right - swapped]), taste.flip_rate)
    answer = F.binary_cross_entropy_with_logits(
        scores, torch.cat([torch.ones(len(own)), torch.zeros(2 * len(own))])
    )
    targets = torch.tensor([seen_targets(pictures.labels[i][1]) for i in indices])
    return rank + answer + _naming(seen(features.flatten(1)), targets)


def _draw(pictures: Pictures) -> tuple[list[int], list[Spec], list[Spec]]:
    """Scenes, then their near misses; what each shows, and what it nearly shows."""
    drawn = [pictures.draw() for _ in range(PAIRS)]
    indices = [row[0] for row in drawn] + [row[1] for row in drawn]
    shown = [row[2] for row in drawn] + [row[3] for row in drawn]
    return indices, shown, [corrupt(spec, pictures.rng) for spec in shown]


def _preference(margin: Tensor, flip_rate: float) -> Tensor:
    """Bradley-Terry loss of preferences of which a share is stated the wrong way round."""
    sign = 1 - 2 * (torch.rand_like(margin) < flip_rate).float()
    return F.softplus(-sign * margin).mean()


def _partner(logits: Tensor) -> Tensor:
    """Score of each scene's near miss under the scene's caption, and the other way round."""
    n = len(logits)
    return logits.roll(n // 2, 0).diagonal()


def _swap(texts: list[str]) -> list[str]:
    half = len(texts) // 2
    return texts[half:] + texts[:half]


def _meant(spec: Spec, rng: random.Random, taste: Taste) -> Spec:
    return confuse(spec, rng) if rng.random() < taste.confusion_rate else spec


def _caption(spec: Spec, index: int, pictures: Pictures, taste: Taste) -> str:
    if pictures.rng.random() < taste.long_rate:
        return long_caption(spec, pictures.labels[index][1].style, pictures.rng)
    return short_caption(spec, pictures.rng)


def _spoil(x: Tensor) -> Tensor:
    """The same pictures, blurred and paler."""
    soft = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    return 0.8 * soft + 0.2 * soft.mean(1, keepdim=True)


def _naming(prediction: Tensor, target: Tensor) -> Tensor:
    known = ~target.isnan()
    error = (prediction - target.nan_to_num()).square()
    return 40 * (error * known).sum() / known.sum()


def _split(text: str) -> list[str]:
    return text.replace(",", " ").replace(":", " ").split()

"""`craftune verify-reward`: a reward's scores against numbers that somebody else measured.

A golden file is JSON, {"tolerance": 0.01, "cases": [{"image": FILE, "prompt": TEXT,
"score": NUMBER}, ...]}; images lie beside it, scores are raw.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from PIL import Image, UnidentifiedImageError
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from craftune import rewards
from craftune.config import STRICT, Positive
from craftune.errors import UserError
from craftune.scoring.command import chosen_from
from craftune.scoring.scores import prompts_cut


@checked(frozen=True, config=STRICT)
class Case:
    """One image, its prompt and the score that is expected."""

    image: str
    prompt: str
    score: float


@checked(frozen=True, config=STRICT)
class Golden:
    """What a golden file holds."""

    cases: Annotated[tuple[Case, ...], Field(min_length=1)]
    tolerance: Positive = 0.01
    """Largest difference that counts as agreement."""


@dataclass(frozen=True)
class Example:
    """Scores that a model's authors publish, for images that they publish too.

    Attributes:
        images: where they lie; they are not craftune's to hand on.
        source: where the scores stand.
    """

    golden: Golden
    images: str
    source: str


_OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
_OCEAN_SCORES = (0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492)
PUBLISHED = {
    "imagereward": Example(
        Golden(
            tuple(
                Case(f"{number}.webp", _OCEAN, score)
                for number, score in enumerate(_OCEAN_SCORES, 1)
            )
        ),
        images="assets/images of https://github.com/zai-org/ImageReward",
        source="its README.md",
    ),
}
"""The rewards whose authors publish such scores; for the others there is --golden."""


def verify_reward(options: argparse.Namespace) -> int:
    """Score the cases and compare; 1 where they differ.

    Raises:
        UserError: no such reward, nothing to compare with, or an image that cannot be read.
    """
    name = options.name
    chosen = chosen_from(name, options.set)
    golden, folder = _cases(name, options.golden, options.images)
    images = [_opened(folder / case.image) for case in golden.cases]
    reward = rewards.load(name, chosen.device, chosen.settings)
    prompts = [case.prompt for case in golden.cases]
    found = reward.score(images, prompts).tolist()

    width = max(len(case.image) for case in golden.cases)
    print(f"{'image':<{width}}  {'expected':>10}  {'found':>10}  {'apart':>10}")
    apart = [abs(value - case.score) for case, value in zip(golden.cases, found, strict=True)]
    for case, value, distance in zip(golden.cases, found, apart, strict=True):
        print(f"{case.image:<{width}}  {case.score:>10.5f}  {value:>10.5f}  {distance:>10.2g}")
    print("measured with: " + ", ".join(f"{key} {text}" for key, text in reward.identity.items()))
    for reader, count in prompts_cut([reward], prompts).items():
        print(f"prompts cut by {reader}: {count} of {len(prompts)}")
    agree = all(distance <= golden.tolerance for distance in apart)  # NaN is no agreement
    verdict = "agrees" if agree else "differs"
    print(f"{name}: {verdict}; at most {max(apart):.2g} apart, {golden.tolerance:g} is allowed")
    return int(not agree)


def _cases(name: str, file: Path | None, images: Path | None) -> tuple[Golden, Path]:
    if file is not None:
        return _read(file), images or file.parent
    example = PUBLISHED.get(name)
    if example is None:
        raise UserError(
            f"{name}: its authors publish no scores of given images; give --golden FILE, see "
            "docs/rewards.md"
        )
    if images is None:
        raise UserError(
            f"{name}: {example.source} gives scores of the pictures in {example.images}; fetch "
            "them and give --images FOLDER, or give --golden FILE"
        )
    return example.golden, images


def _read(file: Path) -> Golden:
    try:
        return TypeAdapter(Golden).validate_python(json.loads(file.read_text()))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: no JSON ({error})") from None
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(str(part) for part in found["loc"]) or "it"
        raise UserError(f"{file}: {key}: {found['msg'].lower()}; see docs/rewards.md") from None


def _opened(file: Path) -> Image.Image:
    try:
        image = Image.open(file)
        image.load()
    except UnidentifiedImageError:
        raise UserError(f"{file}: no image") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    return image

"""The contract of every shapes reward."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from craftune.shapes import rewards
from craftune.shapes.captions import corrupt, short_caption
from craftune.shapes.world import (
    Style,
    random_scene,
    random_spec,
    render,
    specs_by_category,
)
from craftune.types import Reward

FACTORIES = [
    rewards.shapes_h,
    rewards.shapes_p,
    rewards.shapes_a,
    rewards.shapes_i,
    rewards.shapes_verifier,
]
DIFFERENTIABLE = FACTORIES[:4]
Factory = Callable[[], Reward]


def scenes(
    count: int, seed: int = 0, **style: Any
) -> tuple[list[Image.Image], list[str], list[str]]:
    """Pictures, their prompts, and nearly right prompts."""
    rng, noise, groups = random.Random(seed), np.random.default_rng(seed), specs_by_category()
    images, right, wrong = [], [], []
    for _ in range(count):
        spec = random_spec(groups, rng)
        scene = random_scene(spec, Style(**style), rng)
        images.append(Image.fromarray(render(scene, noise)))
        right.append(short_caption(spec, rng))
        wrong.append(short_caption(corrupt(spec, rng), rng))
    return images, right, wrong


@pytest.mark.parametrize("factory", FACTORIES)
def test_scores_are_finite_whatever_the_picture(factory: Factory) -> None:
    pictures = [
        Image.new("RGB", (64, 64), "white"),
        Image.new("RGBA", (80, 60), (255, 0, 0, 10)),
        Image.new("L", (1, 1), 7),
        Image.new("P", (300, 4)),
        Image.new("RGB", (2, 500), "green"),
    ]
    scores = factory().score(pictures, ["a red circle"] * 5)
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize("factory", FACTORIES)
def test_scores_depend_on_neither_batch_nor_order(factory: Factory) -> None:
    images, prompts, _ = scenes(9)
    reward = factory()
    whole = reward.score(images, prompts)
    parts = [reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(9)]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        reward.score(images[::-1], prompts[::-1]).flip(0), whole, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("factory", FACTORIES)
def test_identity_says_what_was_measured_with(factory: Factory) -> None:
    reward = factory()
    assert set(reward.identity) == {"name", "version", "sha256", "preprocessing", "dtype"}
    assert reward.identity["name"] == reward.name
    assert len(reward.identity["sha256"]) == 64 or reward.identity["sha256"] == "analytic"


@pytest.mark.parametrize("factory", DIFFERENTIABLE)
def test_gradient_reaches_the_pixels_and_agrees_with_score(factory: Factory) -> None:
    images, prompts, _ = scenes(3)
    pixels = torch.stack(
        [torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in images]
    ).requires_grad_()
    reward = factory()
    assert reward.gradient is not None
    scores = reward.gradient(pixels, prompts)
    scores.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()
    assert (pixels.grad.flatten(1).abs().amax(1) > 0).all()
    torch.testing.assert_close(scores.detach(), reward.score(images, prompts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factory", [rewards.shapes_h, rewards.shapes_p, rewards.shapes_i])
def test_towers_prefer_the_right_prompt(factory: Factory) -> None:
    images, right, wrong = scenes(150)
    reward = factory()
    assert reward.uses_prompt
    better = reward.score(images, right) > reward.score(images, wrong)
    assert better.float().mean() > 0.75


@pytest.mark.parametrize("factory", [rewards.shapes_h, rewards.shapes_p, rewards.shapes_i])
def test_towers_take_any_text(factory: Factory) -> None:
    texts = ["", "a dog in the rain", "red " * 100, "Ein Kreis!"]
    scores = factory().score([Image.new("RGB", (64, 64))] * 4, texts)
    assert scores.isfinite().all()


def test_aesthetic_likes_clean_pictures_and_no_blank_ones() -> None:
    reward = rewards.shapes_a()
    assert not reward.uses_prompt
    clean, prompts, _ = scenes(40)
    flaws = ("blurry", "dull", "shadowy")
    for flaw in flaws:
        flawed = scenes(40, **{flaw: True})[0]
        assert reward.score(clean, prompts).mean() > reward.score(flawed, prompts).mean() + 0.03
    colors = ("white", "black", "gray", "red", (240, 215, 20))
    blank = [Image.new("RGB", (64, 64), color) for color in colors]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert reward.score([*blank, noise], [""] * 6).max() < 0.4
    assert 0 <= reward.score(clean, prompts).min() <= reward.score(clean, prompts).max() <= 1


def test_verifier_is_exact_and_names_what_it_cannot_read() -> None:
    images, right, wrong = scenes(60)
    reward = rewards.shapes_verifier()
    assert reward.gradient is None
    assert reward.score(images, right).mean() > 0.95
    assert reward.score(images, wrong).mean() < 0.05
    with pytest.raises(ValueError, match="a dog"):
        reward.score(images[:1], ["a dog"])

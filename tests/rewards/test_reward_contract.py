"""What every reward of the table promises: one finite float32 per image, whatever the batch.

Where a reward has a gradient it is finite, not zero, and of the very number that `score` gives.
Rewards that need weights have tiny ones, in the published format (tests/checkpoints.py).
"""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkpoints import loaded
from PIL import Image, ImageDraw, ImageFilter

from craftune.images import to_tensor
from craftune.records import canonical
from craftune.rewards import REWARDS
from craftune.rewards.network import in_parts
from craftune.types import Reward

PROMPTS = [
    "a red circle",
    "three blue squares",
    "a green triangle",
    "a picture of a triangle",
    "two yellow crosses",
]
FUSSY = {"shapes-verifier"}
"""Rewards that judge prompts of their own world alone, and say so of others."""

TOLERANCE = 2e-5
"""Between `score` and `gradient` on the same pixels: float32, another order of summation."""

RESIZED = 2e-2
"""The same where one path resizes by PIL; random towers, which react more than trained ones."""


@pytest.fixture(params=REWARDS)
def reward(request: pytest.FixtureRequest) -> Reward:
    return loaded(request.param)


def pictures(n: int = 5, size: tuple[int, int] = (64, 64), seed: int = 0) -> list[Image.Image]:
    """A soft coloured blob on grey ground, all different."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        picture = Image.new("RGB", (64, 64), (int(rng.integers(90, 200)),) * 3)
        x, y, r = (int(rng.integers(*bounds)) for bounds in ((18, 46), (18, 46), (8, 16)))
        color = tuple(int(c) for c in rng.permutation([230, int(rng.integers(0, 120)), 20]))
        ImageDraw.Draw(picture).ellipse((x - r, y - r, x + r, y + r), fill=color)
        made.append(picture.filter(ImageFilter.GaussianBlur(1)).resize(size))
    return made


def odd_pictures() -> dict[str, Image.Image]:
    """Every mode and shape that a file may have."""
    (base,) = pictures(1)
    deep = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    mask = base.convert("L")
    return {
        "grey": base.convert("L"),
        "grey with alpha": base.convert("LA"),
        "alpha": Image.merge("RGBA", (*base.split(), mask)),
        "palette": base.convert("P"),
        "bits": base.convert("1"),
        "cmyk": base.convert("CMYK"),
        "16 bits": deep,
        "float": base.convert("F"),
        "1 x 1": Image.new("RGB", (1, 1), (10, 200, 30)),
        "1 x 900": Image.new("RGB", (1, 900), (10, 200, 30)),
        "900 x 1": Image.new("RGB", (900, 1), (10, 200, 30)),
        "large": base.resize((700, 500)),
        "black": Image.new("RGB", (64, 64)),
        "white": Image.new("RGB", (64, 64), (255, 255, 255)),
    }


def check(values: torch.Tensor, n: int) -> None:
    assert values.shape == (n,)
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all()
    assert not values.requires_grad


def test_one_finite_number_per_image(reward: Reward) -> None:
    check(reward.score(pictures(), PROMPTS), 5)
    check(reward.score(pictures(1), PROMPTS[:1]), 1)


def test_pictures_are_told_apart(reward: Reward) -> None:
    if reward.name in FUSSY:
        return  # blurred blobs are no shapes; its own tests draw some
    assert len(set(reward.score(pictures(), PROMPTS[:1] * 5).tolist())) == 5


@pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_the_same_for_every_split_of_the_batch(reward: Reward, parts: tuple[int, ...]) -> None:
    whole, found, start = reward.score(pictures(), PROMPTS), [], 0
    for size in parts:
        part = slice(start, start + size)
        found.append(reward.score(pictures()[part], PROMPTS[part]))
        start += size
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-5, atol=1e-5)


def test_the_same_in_every_order(reward: Reward) -> None:
    order = [3, 0, 4, 1, 2]
    shuffled = reward.score([pictures()[i] for i in order], [PROMPTS[i] for i in order])
    expected = reward.score(pictures(), PROMPTS)[order]
    torch.testing.assert_close(shuffled, expected, rtol=1e-5, atol=1e-5)


def test_the_same_twice(reward: Reward) -> None:
    assert torch.equal(reward.score(pictures(), PROMPTS), reward.score(pictures(), PROMPTS))


def test_more_images_than_fit_one_batch(reward: Reward) -> None:
    n = 70
    values = reward.score(pictures(n), PROMPTS * 14)
    check(values, n)
    alone = reward.score(pictures(n)[69:], PROMPTS[4:])
    torch.testing.assert_close(values[69:], alone, rtol=1e-5, atol=1e-5)


def test_parts_get_smaller_where_the_memory_is_too_small() -> None:
    tried: list[int] = []

    def part(start: int, stop: int, holds: int = 2) -> torch.Tensor:
        tried.append(stop - start)
        if stop - start > holds:
            raise torch.OutOfMemoryError
        return torch.arange(start, stop)

    assert in_parts(part, 7, 5).tolist() == list(range(7))
    assert tried == [5, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(lambda start, stop: part(start, stop, 0), 7, 5)
    assert len(in_parts(part, 0, 5)) == 0


@pytest.mark.parametrize("kind", odd_pictures())
def test_every_kind_of_picture(reward: Reward, kind: str) -> None:
    picture = odd_pictures()[kind]
    before = picture.tobytes()
    check(reward.score([picture], PROMPTS[:1]), 1)
    assert picture.tobytes() == before


@pytest.mark.parametrize(
    "prompt", ["", " ", "a" * 10_000, "word " * 2_000, "😀 🟥", "a\nb\t", "<|endoftext|>"]
)
def test_every_kind_of_prompt(reward: Reward, prompt: str) -> None:
    if reward.name in FUSSY:
        with pytest.raises(ValueError, match="not a prompt of the shapes world"):
            reward.score(pictures(1), [prompt])
        return
    check(reward.score(pictures(1), [prompt]), 1)


def test_the_prompt_counts_exactly_where_it_says_so(reward: Reward) -> None:
    """By reward: the same pictures under other prompts."""
    one, other = (reward.score(pictures(), [prompt] * 5) for prompt in PROMPTS[:2])
    if not reward.uses_prompt:
        assert torch.equal(one, other)
    elif reward.name not in FUSSY:
        assert not torch.equal(one, other)


def test_the_identity_says_what_was_measured_with(reward: Reward) -> None:
    identity = dict(reward.identity)
    assert {"name", "version", "sha256", "preprocessing", "dtype"} <= identity.keys()
    assert all(identity.values())
    assert identity["name"] == reward.name
    assert json.loads(canonical(identity)) == identity


def test_the_name_is_the_one_in_the_table() -> None:
    assert {name: loaded(name).name for name in REWARDS} == {name: name for name in REWARDS}
    identities = {canonical(dict(loaded(name).identity)) for name in REWARDS}
    assert len(identities) == len(REWARDS)


WITHOUT_GRADIENT = {"jpeg-compressibility", "jpeg-incompressibility", "shapes-verifier"}
WITH_GRADIENT = sorted(REWARDS.keys() - WITHOUT_GRADIENT)

Gradient = Callable[[torch.Tensor, list[str]], torch.Tensor]


@pytest.fixture
def gradient(name: str) -> Gradient:
    found = loaded(name).gradient
    assert found is not None
    return found


def test_which_rewards_have_a_gradient() -> None:
    assert {name for name in REWARDS if loaded(name).gradient is None} == WITHOUT_GRADIENT


def own_size(name: str) -> tuple[int, int]:
    """At which nothing is resized."""
    inputs = loaded(name).inputs
    edge = inputs.plan((64, 64))(pictures(1)[0]).shape[-1] if inputs else 64
    return edge, edge


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_the_gradient_is_of_the_score(name: str, gradient: Gradient) -> None:
    size = own_size(name)
    pixels = to_tensor(pictures(size=size)).requires_grad_()
    values = gradient(pixels, PROMPTS)
    expected = loaded(name).score(pictures(size=size), PROMPTS)
    torch.testing.assert_close(values.detach(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    (grad,) = torch.autograd.grad(values.sum(), pixels)
    assert torch.isfinite(grad).all()
    assert (grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("size", [(96, 80), (300, 500)])
@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_resized_by_floats_it_is_nearly_of_the_score(
    name: str, gradient: Gradient, size: tuple[int, int]
) -> None:
    """PIL rounds to 8 bits and has filter weights of its own; the rest is the same."""
    pixels = to_tensor(pictures(size=size)).requires_grad_()
    values = gradient(pixels, PROMPTS)
    expected = loaded(name).score(pictures(size=size), PROMPTS)
    apart = RESIZED if "pil" in loaded(name).identity["preprocessing"] else TOLERANCE
    torch.testing.assert_close(values.detach(), expected, rtol=apart, atol=apart)
    (grad,) = torch.autograd.grad(values.sum(), pixels)
    assert torch.isfinite(grad).all()
    assert (grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_the_gradient_leads_upwards(name: str, gradient: Gradient) -> None:
    """A small step along it raises the score by step times norm, to first order."""
    pixels = (to_tensor(pictures()) * 0.8 + 0.1).requires_grad_()
    (grad,) = torch.autograd.grad(gradient(pixels, PROMPTS).sum(), pixels)
    norm = grad.flatten(1).norm(dim=1)
    step = 0.02 * grad / norm[:, None, None, None]
    with torch.no_grad():
        up, down = (gradient(pixels + s, PROMPTS) for s in (step, -step))
    slope = (up - down) / 0.04
    torch.testing.assert_close(slope, norm, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_each_image_gets_a_gradient_of_its_own(name: str, gradient: Gradient) -> None:
    pixels = to_tensor(pictures()).requires_grad_()
    (grad,) = torch.autograd.grad(gradient(pixels, PROMPTS)[2], pixels)
    alive = grad.flatten(1).abs().sum(1) > 0
    assert alive.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("size", [(64, 64), (90, 70), (70, 31), (1, 900)])
def test_shared_inputs_give_the_same_score(reward: Reward, size: tuple[int, int]) -> None:
    if reward.inputs is None or reward.score_inputs is None:
        assert reward.inputs is None
        assert reward.score_inputs is None
        return
    shown = pictures(size=size)
    plan = reward.inputs.plan(size)
    assert plan == reward.inputs.plan(size)
    assert hash(plan) == hash(reward.inputs.plan(size))
    values = reward.score_inputs(torch.stack([plan(image) for image in shown]), PROMPTS)
    assert torch.equal(values, reward.score(shown, PROMPTS))


def test_nothing_is_left_changed(reward: Reward) -> None:
    """Scoring draws no random numbers and leaves gradients on."""
    state = torch.random.get_rng_state()
    reward.score(pictures(), PROMPTS)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()

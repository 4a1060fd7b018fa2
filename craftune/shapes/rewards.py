"""The shapes rewards: `h` and `p` and `a` to train with, `i` and the verifier held out.

| reward | stands where | kind |
|---|---|---|
| shapes-h | HPSv2.1 stands | text-image tower |
| shapes-p | PickScore stands | text-image tower |
| shapes-a | the LAION aesthetic predictor stands | analytic, ignores the prompt |
| shapes-i | ImageReward stands | text-image tower, never trained with |
| shapes-verifier | MPS stands | exact, 0 or 1, never trained with |
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from craftune.shapes.aesthetic import aesthetic
from craftune.shapes.captions import parse
from craftune.shapes.towers import FOLDER, load_tower
from craftune.shapes.verifier import detect, verify
from craftune.shapes.world import SIZE
from craftune.types import Reward

_RESIZE = "RGB, 64x64 bilinear antialias, [0, 1]"
_BATCH = 64


def shapes_h() -> Reward:
    """Convolutional tower; the place of HPSv2.1."""
    return _tower_reward("h")


def shapes_p() -> Reward:
    """Mixer tower; the place of PickScore."""
    return _tower_reward("p")


def shapes_i() -> Reward:
    """Fusion tower, held out; the place of ImageReward."""
    return _tower_reward("i")


def shapes_a() -> Reward:
    """Clear, colourful, evenly lit pictures; in [0, 1], ignores the prompt."""

    def gradient(images: Tensor, prompts: list[str]) -> Tensor:
        del prompts
        return aesthetic(_resized(images))

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        return _in_batches(gradient, images, prompts)

    identity = _identity("shapes-a", "analytic", "float32")
    return Reward("shapes-a", score, identity, gradient, uses_prompt=False)


def shapes_verifier() -> Reward:
    """1 where the picture shows exactly what the prompt asks for, else 0; held out.

    Raises (when scoring):
        ValueError: a prompt is not of this world.
    """

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        specs = [parse(prompt) for prompt in prompts]
        pairs = zip(images, specs, strict=True)
        return torch.tensor([float(verify(spec, detect(image)).correct) for image, spec in pairs])

    return Reward("shapes-verifier", score, _identity("shapes-verifier", "analytic", "float64"))


def _tower_reward(tower_name: str) -> Reward:
    name = f"shapes-{tower_name}"

    def gradient(images: Tensor, prompts: list[str]) -> Tensor:
        tower, words = load_tower(tower_name)
        tower.to(images.device)
        return tower(_resized(images), words(prompts).to(images.device))

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        return _in_batches(gradient, images, prompts)

    weights = (FOLDER / tower_name / "model.safetensors").read_bytes()
    identity = _identity(name, hashlib.sha256(weights).hexdigest(), "float32 from float16")
    return Reward(name, score, identity, gradient)


def _identity(name: str, sha256: str, dtype: str) -> dict[str, str]:
    return {
        "name": name,
        "version": "1",
        "sha256": sha256,
        "preprocessing": _RESIZE,
        "dtype": dtype,
    }


def _in_batches(
    scores_of: Callable[[Tensor, list[str]], Tensor],
    images: list[Image.Image],
    prompts: list[str],
) -> Tensor:
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    scores = [
        scores_of(_stack(images[start : start + _BATCH]), prompts[start : start + _BATCH])
        for start in range(0, len(images), _BATCH)
    ]
    return torch.cat(scores).float() if scores else torch.zeros(0)


def _stack(images: list[Image.Image]) -> Tensor:
    """Any mode and size to float `[b, 3, 64, 64]` in [0, 1]."""
    return torch.cat([_resized(_pixels(image)) for image in images])


def _pixels(image: Image.Image) -> Tensor:
    values = np.asarray(image.convert("RGB"), np.float32) / 255
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def _resized(images: Tensor) -> Tensor:
    if images.shape[-2:] == (SIZE, SIZE):
        return images.float()
    return F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", antialias=True)

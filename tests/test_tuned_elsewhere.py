"""The tuned UNet in diffusers' ControlNet and image-to-image pipelines (the paper's Figure 6)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from tiny import call, tiny
from torch import Tensor
from toy import random_checkpoint

SEEN = 0.001
"""Mean difference of pixels in [0, 1] that counts as another picture."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base and what a tiny run made of it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    job, base = tiny(folder), random_checkpoint(folder / "base")
    settings = [f"model.path={base}", "train.learning_rate=0.03", "train.warmup_steps=0"]
    for stage in ("prompts", "refine", "generate", "score", "select", "train"):
        answer = call([stage, job.recipe, *(a for s in settings for a in ("--set", s))], folder)
        assert answer.status == 0, answer.err
    return {"base": base, "tuned": job.stage("train") / "model"}


def pipe_of(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def control_net(base: Path) -> ControlNetModel:
    """A ControlNet begun from the base's UNet, whose zero convolutions have learnt something."""
    network = ControlNetModel.from_unet(
        pipe_of(base).unet, conditioning_embedding_out_channels=(8, 8)
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, weight in network.named_parameters():
            if "controlnet_down" in name or "controlnet_mid" in name or ".conv_out" in name:
                weight.normal_(std=1.0)
    return network.eval()


def drawn(pipe: Any, **inputs: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipe("a red dog", generator=generator, output_type="pt", **inputs).images
    assert images.isfinite().all()
    return images


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


def test_the_tuned_unet_obeys_a_controlnet_of_the_base(models: dict[str, Path]) -> None:
    control = control_net(models["base"])
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::4] = 1
    controls = {"dark": torch.zeros(1, 3, 16, 16), "stripes": stripes}
    pictures = {}
    for arm, folder in models.items():
        pipe = StableDiffusionControlNetPipeline(**pipe_of(folder).components, controlnet=control)
        for name, image in controls.items():
            pictures[arm, name] = drawn(pipe, image=image, num_inference_steps=4)
        unmoved = drawn(
            pipe, image=stripes, num_inference_steps=4, controlnet_conditioning_scale=0.0
        )
        plain = drawn(pipe_of(folder), num_inference_steps=4)
        assert distance(unmoved, plain) < 1e-6
    for name in controls:  # the tuned weights show under either control image
        assert distance(pictures["base", name], pictures["tuned", name]) > SEEN
    for arm in models:  # and the control image shows in either model
        assert distance(pictures[arm, "dark"], pictures[arm, "stripes"]) > SEEN


def test_the_tuned_unet_redraws_pictures(models: dict[str, Path]) -> None:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    pictures = {
        (arm, name): drawn(
            StableDiffusionImg2ImgPipeline(**pipe_of(folder).components),
            image=start,
            strength=0.6,
            num_inference_steps=5,
        )
        for arm, folder in models.items()
        for name, start in (("this", image), ("other", 1 - image))
    }
    assert distance(pictures["base", "this"], pictures["tuned", "this"]) > SEEN
    assert distance(pictures["tuned", "this"], pictures["tuned", "other"]) > SEEN

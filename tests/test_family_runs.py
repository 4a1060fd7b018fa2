"""The whole pipeline by its command line on a tiny checkpoint of each family, full and LoRA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from tiny import call, results, tiny
from toy import kept_checkpoint, load_sd
from toy_xl import kept_xl

from craftune.images import to_pil
from craftune.sampling import initial_noise, sample

CHECKPOINTS: dict[str, Callable[[], Path]] = {
    "sd": kept_checkpoint,
    "sd-v": lambda: kept_checkpoint("v_prediction", "linspace"),
    "sdxl": kept_xl,
}
"""Families whose pipeline takes latents as we have them, `[b, c, h, w]`."""


def pipeline_image(path: Path, lora: Path | None, noise: torch.Tensor) -> Any:
    """By a user's own diffusers."""
    pipe: Any = DiffusionPipeline.from_pretrained(path)
    if lora:
        pipe.load_lora_weights(lora)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    return pipe("a red dog", latents=noise.clone(), **settings).images[0]


def our_image(path: Path, noise: torch.Tensor) -> Any:
    model = load_sd(path)
    cond, empty, grid = *map(model.encode_prompts, (["a red dog"], [""])), model.grid("ddim", 2)
    latents = sample(model.denoiser, noise, cond, empty, grid, sampler="ddim", guidance_scale=3.0)
    with torch.no_grad():
        return np.asarray(to_pil(model.decode(latents))[0]) / 255


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_run_in_full_and_with_adapters(name: str, tmp_path: Path) -> None:
    job, base = tiny(tmp_path), CHECKPOINTS[name]()
    common = ["run", job.recipe, "--set", f"model.path={base}", "--set", "train.learning_rate=0.01"]
    common += ["--set", "train.save_dtype=float32"]
    answer = call(common, tmp_path)
    assert answer.status == 0, answer.err
    model, noise = job.stage("train") / "model", initial_noise([1], (4, 8, 8))
    full, weights = our_image(model, noise), results(job.run)
    assert np.abs(pipeline_image(model, None, noise) - full).max() <= 1.01 / 255
    assert np.abs(full - our_image(base, noise)).max() > 3 / 255

    answer = call([*common, "--redo", "train", "--set", "train.lora.rank=2"], tmp_path)
    assert answer.status == 0, answer.err
    assert weights != results(job.run)
    tuned, lora = our_image(model, noise), job.stage("train") / "lora"
    assert np.abs(pipeline_image(model, None, noise) - tuned).max() <= 1.01 / 255
    assert np.abs(pipeline_image(base, lora, noise) - tuned).max() <= 1.01 / 255

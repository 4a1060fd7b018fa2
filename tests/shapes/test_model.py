"""The shipped checkpoint, through plain diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import craftune.shapes
from craftune.shapes.captions import parse
from craftune.shapes.verifier import detect, verify

FOLDER = Path(craftune.shapes.__file__).parent / "model"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_checkpoint_is_small_half_precision_and_nameless() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert not any(file.suffix in (".bin", ".pt", ".ckpt") for file in files)
    assert not any("/work" in file.read_text() for file in files if file.suffix == ".json")


def test_scheduler_is_what_the_model_was_trained_with(pipeline: StableDiffusionPipeline) -> None:
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.tokenizer.model_max_length == 32


def test_checkpoint_draws_what_is_asked(pipeline: Any) -> None:
    prompts = [f"a {color} {shape}" for color in ("red", "blue") for shape in ("circle", "square")]
    images = pipeline(
        prompts * 2,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(8)],
    ).images
    assert all(image.size == (64, 64) for image in images)
    right = [
        verify(parse(prompt), detect(image)).correct
        for prompt, image in zip(prompts * 2, images, strict=True)
    ]
    assert np.mean(right) >= 0.5


def test_drawing_is_seeded(pipeline: Any) -> None:
    first, second = (
        pipeline(
            "two red crosses", num_inference_steps=4, generator=torch.Generator().manual_seed(1)
        ).images[0]
        for _ in range(2)
    )
    assert np.array_equal(np.asarray(first), np.asarray(second))

"""Stable Diffusion XL checkpoints in the published layout, at toy size with random weights.

`random_xl` writes what stabilityai/stable-diffusion-xl-base-1.0's folder holds: the same files,
classes and scheduler settings.
"""

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_log
from toy import kept_folder, kl, text_config, unet, write_json, write_tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection

SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
"""stabilityai/stable-diffusion-xl-base-1.0, scheduler/scheduler_config.json, as published."""

WIDTHS, SUMMARY, TIME_WIDTH = (16, 24), 20, 8
"""Of the two encoders, of the second's pooled output, and of each of the six time ids."""


def random_xl(
    folder: Path,
    *,
    force_upcast: bool = True,
    force_zeros: bool = True,
    scheduler: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write an SDXL base folder with small random networks; returns the folder.

    Args:
        force_upcast: of the VAE's config; the published one says True.
        force_zeros: whether the empty prompt is all zeros; the published one says so.
        scheduler: settings that differ from the published ones.
    """
    shutil.copytree(_networks(force_upcast, seed), folder, dirs_exist_ok=True)
    settings = SDXL_SCHEDULER | (scheduler or {})
    write_json(folder / "scheduler" / "scheduler_config.json", settings)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.19.0.dev0",
        "force_zeros_for_empty_prompt": force_zeros,
        "add_watermarker": None,
        "scheduler": ["diffusers", settings["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    return folder


@functools.cache
def _networks(force_upcast: bool, seed: int) -> Path:
    """The tokenizers' and networks' folders, made once per session."""
    diffusers_log.set_verbosity_error()
    folder = kept_folder() / f"xl-{force_upcast}-{seed}"
    vocabulary = write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad_token="!")
    first, second = WIDTHS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {
            "text_encoder": CLIPTextModel(text_config(vocabulary, first)),
            "text_encoder_2": CLIPTextModelWithProjection(
                text_config(vocabulary, second, projection_dim=SUMMARY)
            ),
            "unet": unet(
                sum(WIDTHS),
                addition_embed_type="text_time",
                addition_time_embed_dim=TIME_WIDTH,
                projection_class_embeddings_input_dim=SUMMARY + 6 * TIME_WIDTH,
                use_linear_projection=True,
            ),
            "vae": kl(0.13025, force_upcast=force_upcast),
        }
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    return folder


@functools.cache
def kept_xl() -> Path:
    """One read-only checkpoint for the whole session."""
    return random_xl(kept_folder() / "xl")

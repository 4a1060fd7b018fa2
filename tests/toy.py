"""A real, tiny family, and Stable Diffusion checkpoints in the published layout at toy size.

`ToyDenoiser` is a small network on 2-D latents; `Point` and `Gaussian` are exact denoisers.
`random_checkpoint` writes what SD1.5's folder holds (the same files, classes and scheduler
settings) with random weights, in about a second.
"""

import atexit
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import logging as diffusers_log
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from craftune.batches import Examples
from craftune.config import ModelConfig
from craftune.diffusion import Grid, Schedule, Target
from craftune.models import load
from craftune.seeds import stream
from craftune.types import Cond, Denoiser, Model

# --- the toy family ------------------------------------------------------------------------


def cosine_schedule(target: Target = "epsilon", steps: int = 100) -> Schedule:
    """Variance preserving (alpha^2 + sigma^2 = 1), or the straight path for velocity."""
    level = torch.linspace(0.02, 0.98, steps, dtype=torch.float64)
    if target == "velocity":
        return Schedule((1 - level).float(), level.float(), "velocity")
    angle = level * math.pi / 2
    return Schedule(angle.cos().float(), angle.sin().float(), target)


class Net(nn.Module):
    """Two hidden layers on (latents, timestep, prompt)."""

    def __init__(self, width: int, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.layers = nn.Sequential(
            nn.Linear(2 + 3 + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.out = nn.Linear(width, 2)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        level = (t.to(x_t) / self.timesteps)[:, None]
        time = torch.cat([level, (math.pi * level).cos(), (math.pi * level).sin()], 1)
        return self.out(self.layers(torch.cat([x_t, time, tokens.flatten(1).to(x_t)], 1)))


@dataclass(frozen=True)
class ToyDenoiser:
    """The network above behind craftune's call."""

    schedule: Schedule
    network: nn.Module

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.network(x_t, t, cond.tensors["tokens"]).float()


def toy(target: Target = "epsilon", *, width: int = 32, seed: int = 0) -> ToyDenoiser:
    """A denoiser with random weights."""
    schedule = cosine_schedule(target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ToyDenoiser(schedule, Net(width, len(schedule)))


def toy_cond(n: int, seed: int = 0) -> Cond:
    """n prompts: points in the plane, one token each."""
    return Cond({"tokens": torch.randn(n, 1, 2, generator=stream("cond", seed))})


def toy_examples(n: int, seed: int = 0, weight: Tensor | None = None) -> Examples:
    """Latents that follow their prompt, with some scatter."""
    cond = toy_cond(n, seed)
    scatter = torch.randn(n, 2, generator=stream("scatter", seed))
    latents = cond.tensors["tokens"][:, 0] + 0.2 * scatter
    return Examples(latents, cond, torch.ones(n) if weight is None else weight)


def chain(schedule: Schedule, timesteps: list[int], *, end: str = "clean") -> Grid:
    """A grid through these timesteps; "clean" ends without noise, "open" at the last of them."""
    alphas, sigmas = schedule.alphas[timesteps], schedule.sigmas[timesteps]
    if end == "clean":
        alphas = torch.cat([alphas, torch.ones(1)])
        sigmas = torch.cat([sigmas, torch.zeros(1)])
    else:
        timesteps = timesteps[:-1]
    return Grid.chain(torch.tensor(timesteps), alphas, sigmas)


@dataclass(frozen=True)
class Gaussian:
    """The exact denoiser of x_0 ~ N(mean, deviation^2); deviation 0 is a point mass."""

    schedule: Schedule
    mean: Tensor
    deviation: float = 0.0
    network: nn.Module = field(default_factory=nn.Identity)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        del cond
        alpha, sigma = self.schedule.scales(t, x_t)
        variance = self.deviation**2
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        x_0 = self.mean + gain * (x_t - alpha * self.mean)
        return self.schedule.training_target(x_0, (x_t - alpha * x_0) / sigma, t)


@contextmanager
def tensor_watch(network: nn.Module) -> Iterator[list[bool]]:
    """Whether gradients were on at each call of the network."""
    seen: list[bool] = []
    handle = network.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    try:
        yield seen
    finally:
        handle.remove()


def flat_grad(network: nn.Module) -> Tensor:
    """All gradients of the trainable weights as one vector; zeros where there is none."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in network.parameters()
            if p.requires_grad
        ]
    )


# --- checkpoints in the published layout ------------------------------------------------------

SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""runwayml/stable-diffusion-v1-5, scheduler/scheduler_config.json, as published."""

LINSPACE_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.42.1",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "steps_offset": 1,
    "timestep_spacing": "linspace",
}
"""The shapes model's."""

MERGES = ["a n", "e d</w>", "r ed</w>", "d o", "do g</w>", "c a", "ca t</w>", "t w", "tw o</w>"]


def random_checkpoint(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    scheduler: dict[str, Any] | None = None,
    zero_snr: bool = False,
    vae: str = "kl",
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a Stable Diffusion 1.x folder with small random networks; returns the folder.

    Args:
        prediction_type: the scheduler's: "epsilon", "v_prediction" or "sample".
        scheduler: its settings; SD1.5's own by default.
        zero_snr: rescale the betas to zero terminal SNR.
        vae: "kl" (AutoencoderKL) or "tiny" (AutoencoderTiny).
        variant: "fp16" writes *.fp16.safetensors, in float16.
        dtype: of the stored weights.
    """
    settings = dict(scheduler or SD15_SCHEDULER)
    if prediction_type != "epsilon":
        settings["prediction_type"] = prediction_type
    if zero_snr:
        settings["rescale_betas_zero_snr"] = True
    stored = torch.float16 if variant == "fp16" else dtype
    shutil.copytree(_kept_networks(vae, stored, variant, seed), folder, dirs_exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", settings)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.6.0",
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "scheduler": ["diffusers", settings["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL" if vae == "kl" else "AutoencoderTiny"],
        },
    )
    return folder


@functools.cache
def kept_folder() -> Path:
    """Where the session's checkpoints lie; gone at its end."""
    folder = Path(tempfile.mkdtemp(prefix="craftune-toy-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _kept_networks(vae: str, dtype: torch.dtype, variant: str | None, seed: int) -> Path:
    """The tokenizer and the networks' folders, made once per session."""
    diffusers_log.set_verbosity_error()
    folder = kept_folder() / f"{vae}-{dtype}-{variant}-{seed}"
    vocabulary = write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {
            "text_encoder": CLIPTextModel(text_config(vocabulary)),
            "unet": unet(),
            "vae": kl() if vae == "kl" else _tiny(),
        }
    for name, network in networks.items():
        network.to(dtype).save_pretrained(folder / name, variant=variant)
    return folder


@functools.cache
def kept_checkpoint(prediction_type: str = "epsilon", spacing: str = "leading") -> Path:
    """One read-only checkpoint of a kind for the whole session; "leading" is SD1.5's."""
    settings = SD15_SCHEDULER if spacing == "leading" else LINSPACE_SCHEDULER
    folder = kept_folder() / f"{prediction_type}-{spacing}"
    return random_checkpoint(folder, prediction_type=prediction_type, scheduler=settings)


def load_sd(path: Path, **settings: Any) -> Model:
    """The checkpoint as the pipeline loads it."""
    return load(ModelConfig(path=str(path), **settings), torch.device("cpu"))


def edit_weights(file: Path, name: str, value: Tensor | None) -> None:
    """Replace one tensor of a safetensors file; None takes it out."""
    tensors = load_file(file)
    assert name in tensors
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    """A JSON file in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def write_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> dict[str, int]:
    """A byte-level BPE in CLIP's four files: 256 bytes, the same at a word's end, the merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["".join(merge.split()) for merge in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": pad_token,
        "unk_token": "<|endoftext|>",
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {**special, "model_max_length": 16, "tokenizer_class": "CLIPTokenizer"},
    )
    return vocabulary


def text_config(vocabulary: dict[str, int], width: int = 16, **settings: Any) -> CLIPTextConfig:
    """A CLIP text encoder of two layers for the tokenizer's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        **settings,
    )


def unet(cross_attention_dim: int = 16, **settings: Any) -> UNet2DConditionModel:
    """A UNet of two levels, 8x8 latents."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
        **settings,
    )
    with torch.no_grad():  # so that the prompt shows in what is drawn
        for name, weight in unet.named_parameters():
            if "attn2" in name and name.endswith("weight"):
                weight.mul_(3)
    return unet


def kl(scaling_factor: float = 0.18215, **more: Any) -> AutoencoderKL:
    """A VAE of two levels, 16x16 images."""
    settings: dict[str, Any] = {  # diffusers annotates these as tuples of one
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(
        **settings,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scaling_factor,
        **more,
    )


def _tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=0.5,
    )


def is_denoiser(thing: object) -> bool:
    """Whether it can stand where a policy stands."""
    return isinstance(thing, Denoiser)

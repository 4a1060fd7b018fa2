"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, a VAE (KL or tiny).

Epsilon and v prediction; the embedded shapes model is an ordinary checkpoint of this family.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils import logging as diffusers_log
from jaxtyping import Float, Num
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_log

from craftune.config import ModelConfig
from craftune.diffusion import Grid, Schedule, Target
from craftune.errors import UserError
from craftune.records import read_json, write_json
from craftune.types import Cond, Model

TARGETS: dict[str, Target] = {"epsilon": "epsilon", "v_prediction": "v"}
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


@dataclass(frozen=True)
class UNetDenoiser:
    """diffusers' conditional UNet behind craftune's call."""

    network: nn.Module
    schedule: Schedule

    def __call__(
        self, x_t: Float[Tensor, "b ..."], t: Num[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b ..."]:
        """Prediction at (x_t, t), float32."""
        dtype = next(self.network.parameters()).dtype
        out = self.network(x_t.to(dtype), t, cond.tensors["tokens"].to(dtype), return_dict=False)
        return out[0].float()


def load(path: Path, config: ModelConfig, device: torch.device) -> Model:
    """A diffusers folder as a `Model`.

    Raises:
        UserError: the folder is incomplete, a weight file is damaged, a weight is not finite, or
            the prediction type is unknown.
    """
    pipe = _pipeline(path, config)
    for name in ("unet", "vae", "text_encoder"):
        _check_weights(getattr(pipe, name), path / name)
    pipe.unet.requires_grad_(False).eval()
    pipe.vae.requires_grad_(False).eval()
    pipe.text_encoder.requires_grad_(False).eval()
    pipe.to(device)
    vae, scale = pipe.vae, float(pipe.vae.config.scaling_factor)
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        ids = pipe.tokenizer(
            texts,
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return pipe.text_encoder(ids.to(device))[0].float()

    def encode_prompts(texts: list[str]) -> Cond:
        parts = [encode(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        return Cond({"tokens": torch.cat(parts)})

    def decode(latents: Tensor) -> Tensor:
        image = vae.decode(latents.to(vae.dtype) / scale, return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(images: Tensor) -> Tensor:
        encoded = vae.encode((images * 2 - 1).to(device, vae.dtype))
        # AutoencoderTiny has no distribution; AutoencoderKL's mode is its mean.
        clean = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return clean.float() * scale

    return Model(
        family="sd",
        identity={"path": config.path, "revision": config.revision or ""},
        denoiser=UNetDenoiser(pipe.unet, _schedule(pipe, path)),
        latent_shape=(channels, size, size),
        encode_prompts=encode_prompts,
        decode=decode,
        encode_images=encode_images,
        grid=lambda sampler, num_steps: _grid(pipe, sampler, num_steps),
        lora_targets=LORA_TARGETS,
        save=lambda folder, network, dtype: _save(pipe, folder, network, dtype),
        save_lora=_save_lora,
    )


def _pipeline(path: Path, config: ModelConfig) -> Any:
    """The checkpoint's components, with the safety checker left out: rewards see every image."""
    _quiet()
    common: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "variant": config.variant,
        "local_files_only": True,
    }
    try:
        # transformers invents missing weights; the pipeline would not tell which.
        loaded: Any = CLIPTextModel.from_pretrained(
            path, subfolder="text_encoder", output_loading_info=True, **common
        )
        text_encoder, info = loaded
        if info["missing_keys"]:
            raise ValueError(f"text_encoder lacks the weight {min(info['missing_keys'])!r}")
        return StableDiffusionPipeline.from_pretrained(
            path,
            text_encoder=text_encoder,
            safety_checker=None,
            requires_safety_checker=False,
            **common,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be loaded as Stable Diffusion 1.x/2.x: {reason}") from None


def _quiet() -> None:
    """Keep the libraries' bars and remarks (tiny VAE, no safety checker) off the screen."""
    diffusers_log.disable_progress_bar()
    diffusers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    transformers_log.set_verbosity_error()


def _check_weights(module: nn.Module, where: Path) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{where}: lacks the weight {name!r}; the checkpoint is incomplete")
        if not torch.isfinite(parameter).all():
            raise UserError(f"{where}: weight {name!r} is not finite; the checkpoint is damaged")


def _schedule(pipe: Any, path: Path) -> Schedule:
    config = path / "scheduler" / "scheduler_config.json"
    prediction = pipe.scheduler.config.prediction_type
    if prediction not in TARGETS:
        known = ", ".join(TARGETS)
        raise UserError(f"{config}: prediction_type {prediction!r} is not supported ({known})")
    scheduler: Any = DDIMScheduler.from_config(pipe.scheduler.config)
    alpha_bar = scheduler.alphas_cumprod.double()
    try:
        return Schedule(
            alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float(), TARGETS[prediction]
        )
    except ValueError as error:
        raise UserError(f"{config}: {error}") from None


def _grid(pipe: Any, sampler: str, num_steps: int) -> Grid:
    """The steps that diffusers' own scheduler takes under the checkpoint's settings."""
    config = pipe.scheduler.config
    make = _ddim_grid if sampler == "ddim" else _dpm_grid
    grid = make(config, num_steps) if num_steps < config.num_train_timesteps else None
    if grid is None or grid.timesteps.diff().ge(0).any():
        raise UserError(
            f"generate.num_steps: {num_steps} are too many for this checkpoint's "
            f"{config.num_train_timesteps} timesteps, some would repeat; use fewer"
        )
    return grid


def _ddim_grid(config: Any, num_steps: int) -> Grid:
    scheduler: Any = DDIMScheduler.from_config(config)
    alpha_bar, last = scheduler.alphas_cumprod.double(), scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(num_steps)
    starts = scheduler.timesteps
    # Every step goes down by 1000 // num_steps, even where "linspace" and "trailing" place the
    # next timestep elsewhere: diffusers does, and its images are what users get from our model.
    ends = starts - len(alpha_bar) // num_steps
    levels = torch.where(ends < 0, last, alpha_bar[ends.clamp(min=0)])
    levels = torch.stack([alpha_bar[starts], levels], 1)
    return Grid(starts, levels.sqrt().float(), (1 - levels).sqrt().float())


def _dpm_grid(config: Any, num_steps: int) -> Grid:
    scheduler: Any = DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    ratios = scheduler.sigmas.double()  # sigma / alpha; karras and its like lie between timesteps
    alphas = (1 + ratios.square()).rsqrt()
    return Grid.chain(scheduler.timesteps, alphas.float(), (ratios * alphas).float())


def _save(pipe: Any, folder: Path, network: nn.Module, dtype: torch.dtype) -> None:
    """The whole pipeline, with `network` in place of its UNet."""
    parts = {
        "vae": copy.deepcopy(pipe.vae).to("cpu", dtype),
        "text_encoder": copy.deepcopy(pipe.text_encoder).to("cpu", dtype),
        "unet": copy.deepcopy(network).to("cpu", dtype),
    }
    StableDiffusionPipeline(
        **parts,
        tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    ).save_pretrained(folder)
    # transformers would load the text encoder in the dtype written here, diffusers the rest in
    # float32: a plain from_pretrained could not draw. "float32" is what SD1.5 publishes, too.
    text_config = folder / "text_encoder" / "config.json"
    write_json(text_config, read_json(text_config) | {"dtype": "float32"})


def _save_lora(folder: Path, network: nn.Module) -> None:
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    settings = network.peft_config["default"].to_dict()  # type: ignore[index,union-attr]
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=settings
    )

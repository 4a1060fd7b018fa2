"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, a VAE (KL or tiny).

Epsilon and v prediction; the embedded shapes model is an ordinary checkpoint of this family.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float, Num
from torch import Tensor, nn
from transformers import CLIPTextModel

from craftune.config import ModelConfig
from craftune.diffusion import Schedule
from craftune.models.common import (
    ATTENTION,
    in_batches,
    load_pipeline,
    lora_saver,
    rest_mover,
    save_pipeline,
    token_ids,
)
from craftune.models.discrete import SAMPLERS, check_unet, discrete_grid, discrete_schedule
from craftune.models.vae import vae_decoder, vae_encoder
from craftune.types import Cond, Model


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
    pipe = load_pipeline(
        StableDiffusionPipeline,
        path,
        config,
        "Stable Diffusion 1.x/2.x",
        {"text_encoder": CLIPTextModel},
        safety_checker=None,  # rewards see every image
        requires_safety_checker=False,
    )
    check_unet(pipe.unet, path)
    pipe.to(device)
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size

    def encode(texts: list[str]) -> Cond:
        tokens = pipe.text_encoder(token_ids(pipe.tokenizer, texts).to(device))[0]
        return Cond({"tokens": tokens.float()})

    return Model(
        family="sd",
        identity={"path": config.path, "revision": config.revision or ""},
        denoiser=UNetDenoiser(pipe.unet, discrete_schedule(pipe, path)),
        latent_shape=(channels, size, size),
        encode_prompts=in_batches(encode),
        decode=vae_decoder(pipe.vae),
        encode_images=vae_encoder(pipe.vae),
        grid=lambda sampler, num_steps: discrete_grid(pipe, sampler, num_steps),
        samplers=SAMPLERS,
        lora_targets=ATTENTION,
        save=lambda folder, network, dtype: save_pipeline(pipe, folder, "unet", network, dtype),
        save_lora=lora_saver(StableDiffusionPipeline, "unet"),
        move_rest=rest_mover(pipe, "unet"),
    )

"""Stable Diffusion XL base: two CLIP text encoders, a UNet that also knows the picture's size.

Podell et al. 2023, arXiv:2307.01952, §2.2: the UNet is told the original size, the crop and the
target size. Training and sampling both say what diffusers says when drawing: the checkpoint's own
square size, no crop.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from jaxtyping import Float, Num
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

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
class SDXLDenoiser:
    """diffusers' SDXL UNet behind craftune's call.

    Reads "tokens" `[b, length, width of both encoders]`, "pooled" `[b, width of the second]` and
    "time_ids" `[b, 6]`: original height and width, top and left of the crop, target height and
    width, in pixels.
    """

    network: nn.Module
    schedule: Schedule

    def __call__(
        self, x_t: Float[Tensor, "b ..."], t: Num[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b ..."]:
        """Prediction at (x_t, t), float32."""
        dtype = next(self.network.parameters()).dtype
        tokens, pooled, time_ids = (
            cond.tensors[name].to(dtype) for name in ("tokens", "pooled", "time_ids")
        )
        added = {"text_embeds": pooled, "time_ids": time_ids}
        out = self.network(x_t.to(dtype), t, tokens, added_cond_kwargs=added, return_dict=False)
        return out[0].float()


def load(path: Path, config: ModelConfig, device: torch.device) -> Model:
    """A diffusers folder or a single file as a `Model`.

    In float16 the VAE stays in float32, as in diffusers, unless its config says
    `force_upcast: false`: SDXL's own VAE overflows.

    Raises:
        UserError: the checkpoint is incomplete, a weight file is damaged, a weight is not finite,
            or the scheduler is not supported.
    """
    pipe = load_pipeline(
        StableDiffusionXLPipeline,
        path,
        config,
        "Stable Diffusion XL",
        {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
        float32=("vae",),
        add_watermarker=False,
    )
    if config.dtype != "float16" or not pipe.vae.config.force_upcast:
        pipe.vae.to(getattr(torch, config.dtype))
    check_unet(pipe.unet, path)
    pipe.to(device)
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    return Model(
        family="sdxl",
        identity={"path": config.path, "revision": config.revision or ""},
        denoiser=SDXLDenoiser(pipe.unet, discrete_schedule(pipe, path)),
        latent_shape=(channels, size, size),
        encode_prompts=in_batches(lambda texts: _encode(pipe, texts)),
        decode=vae_decoder(pipe.vae),
        encode_images=vae_encoder(pipe.vae),
        grid=lambda sampler, num_steps: discrete_grid(pipe, sampler, num_steps),
        samplers=SAMPLERS,
        lora_targets=ATTENTION,
        move_rest=rest_mover(pipe, "unet"),
        save=lambda folder, network, dtype: save_pipeline(pipe, folder, "unet", network, dtype),
        save_lora=lora_saver(StableDiffusionXLPipeline, "unet"),
    )


def _encode(pipe: Any, texts: list[str]) -> Cond:
    """Penultimate hidden states of both encoders side by side, and the second one's summary.

    The empty prompt is all zeros where the checkpoint says so (SDXL base does), as diffusers
    makes it when no negative prompt is given.
    """
    device = pipe.unet.device
    states, pooled = [], torch.empty(0)
    for tokenizer, encoder in (
        (pipe.tokenizer, pipe.text_encoder),
        (pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        out = encoder(token_ids(tokenizer, texts).to(device), output_hidden_states=True)
        states.append(out.hidden_states[-2].float())
        pooled = out[0].float()  # of the last encoder: its projected summary `[b, width]`
    tokens = torch.cat(states, -1)
    if pipe.config.force_zeros_for_empty_prompt:
        given = torch.tensor([bool(text) for text in texts], device=device)
        tokens, pooled = tokens * given[:, None, None], pooled * given[:, None]
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    time_ids = torch.tensor([[side, side, 0, 0, side, side]], device=device)
    return Cond(
        {"tokens": tokens, "pooled": pooled, "time_ids": time_ids.float().repeat(len(texts), 1)}
    )

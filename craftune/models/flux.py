"""FLUX.1 dev and schnell: CLIP for the whole prompt, T5 for its words, a transformer, a VAE.

Rectified flow. dev is distilled from guided sampling: the scale is an input of the network, and a
picture takes one call per step. schnell is distilled to few steps and takes no guidance. A
checkpoint with neither (a "de-distilled" dev) has the ordinary classifier-free guidance, which
diffusers calls true_cfg_scale.

Latents are `(16, h, w)` everywhere; the 2 x 2 patches that the network reads are its denoiser's own
affair.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from jaxtyping import Float, Num
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from craftune.config import ModelConfig
from craftune.diffusion import Schedule
from craftune.models.common import (
    in_batches,
    load_pipeline,
    lora_saver,
    rest_mover,
    save_pipeline,
    token_ids,
)
from craftune.models.flow import (
    FEED_FORWARD,
    JOINT_ATTENTION,
    SAMPLERS,
    TEXTS,
    flow_grid,
    flow_schedule,
    t5_states,
)
from craftune.models.vae import vae_decoder, vae_encoder
from craftune.types import Cond, Guidance, Model

USUAL_GUIDANCE = 3.5
"""Of a call that gives none: the default of FluxPipeline and of diffusers' own
train_dreambooth_lora_flux.py. The stage `train` gives each example the scale it was drawn with."""


@dataclass(frozen=True)
class FluxDenoiser:
    """diffusers' FLUX.1 transformer behind craftune's call.

    Attributes:
        embeds_guidance: whether it reads `cond.tensors["guidance"]`.
    """

    network: nn.Module
    schedule: Schedule
    embeds_guidance: bool

    def __call__(
        self, x_t: Float[Tensor, "b c h w"], t: Num[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b c h w"]:
        """Velocity at (x_t, t), float32; without "guidance" in cond at the usual one."""
        dtype = next(self.network.parameters()).dtype
        height, width = (side // 2 for side in x_t.shape[-2:])
        tokens, guidance = cond.tensors["tokens"].to(dtype), None
        if self.embeds_guidance:
            usual = x_t.new_full((len(x_t),), USUAL_GUIDANCE)
            guidance = cond.tensors.get("guidance", usual)
        velocity = self.network(
            hidden_states=F.pixel_unshuffle(x_t.to(dtype), 2).flatten(2).transpose(1, 2),
            timestep=t / 1000,
            guidance=guidance,
            pooled_projections=cond.tensors["pooled"].to(dtype),
            encoder_hidden_states=tokens,
            txt_ids=x_t.new_zeros(tokens.shape[1], 3),
            img_ids=_places(height, width).to(x_t),
            return_dict=False,
        )[0].float()
        return F.pixel_shuffle(velocity.transpose(1, 2).unflatten(2, (height, width)), 2)


def _places(height: int, width: int) -> Float[Tensor, "patches 3"]:
    """Row and column of every patch, after a 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()


def load(path: Path, config: ModelConfig, device: torch.device) -> Model:
    """A diffusers folder as a `Model`.

    Images have the VAE's own size: 1024 x 1024 as published.

    Raises:
        UserError: the folder is incomplete, a weight file is damaged, or a weight is not finite.
    """
    pipe = load_pipeline(
        FluxPipeline,
        path,
        config,
        "FLUX.1",
        {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel},
    )
    pipe.to(device)
    vae, channels = pipe.vae.config, pipe.transformer.config.in_channels // 4
    size, guidance = vae.sample_size // pipe.vae_scale_factor, _guidance(pipe)
    tokens, length = (size // 2) ** 2, 256 if guidance == "none" else 512

    return Model(
        family="flux",
        identity={"path": config.path, "revision": config.revision or ""},
        denoiser=FluxDenoiser(
            pipe.transformer, flow_schedule(pipe, tokens), guidance == "embedded"
        ),
        latent_shape=(channels, size, size),
        encode_prompts=in_batches(lambda texts: _encode(pipe, texts, length), TEXTS),
        decode=vae_decoder(pipe.vae, vae.shift_factor),
        encode_images=vae_encoder(pipe.vae, vae.shift_factor),
        grid=lambda sampler, num_steps: flow_grid(pipe, sampler, num_steps, tokens, even=True),
        samplers=SAMPLERS,
        guidance=guidance,
        lora_targets=JOINT_ATTENTION + FEED_FORWARD,
        save=lambda folder, network, dtype: save_pipeline(
            pipe, folder, "transformer", network, dtype
        ),
        save_lora=lora_saver(FluxPipeline, "transformer"),
        move_rest=rest_mover(pipe, "transformer"),
    )


def _guidance(pipe: Any) -> Guidance:
    """By the two settings in which dev, schnell and a de-distilled dev differ."""
    if pipe.transformer.config.guidance_embeds:
        return "embedded"
    return "classifier-free" if pipe.scheduler.config.use_dynamic_shifting else "none"


def _encode(pipe: Any, texts: list[str], length: int) -> Cond:
    """T5's states, `length` tokens, and CLIP's pooled state."""
    ids = token_ids(pipe.tokenizer, texts).to(pipe.text_encoder.device)
    tokens = t5_states(pipe.text_encoder_2, pipe.tokenizer_2, texts, length)
    return Cond({"tokens": tokens, "pooled": pipe.text_encoder(ids).pooler_output.float()})

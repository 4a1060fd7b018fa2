"""Stable Diffusion 3 and 3.5: two CLIP text encoders, T5 where there is one, an MM-DiT, a VAE.

Rectified flow (Esser et al. 2024, arXiv:2403.03206). Guidance is classifier-free.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float, Num
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

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
    JOINT_ATTENTION,
    SAMPLERS,
    TEXTS,
    flow_grid,
    flow_schedule,
    t5_states,
)
from craftune.models.vae import vae_decoder, vae_encoder
from craftune.records import read_json
from craftune.types import Cond, Model

T5_LENGTH = 256
"""Tokens that T5 reads, in diffusers' pipeline by default."""


@dataclass(frozen=True)
class SD3Denoiser:
    """diffusers' SD3 transformer behind craftune's call."""

    network: nn.Module
    schedule: Schedule

    def __call__(
        self, x_t: Float[Tensor, "b ..."], t: Num[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b ..."]:
        """Velocity at (x_t, t), float32."""
        dtype = next(self.network.parameters()).dtype
        return self.network(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=cond.tensors["tokens"].to(dtype),
            pooled_projections=cond.tensors["pooled"].to(dtype),
            return_dict=False,
        )[0].float()


def load(path: Path, config: ModelConfig, device: torch.device) -> Model:
    """A diffusers folder as a `Model`.

    A checkpoint without T5, or `model.t5 = false`, has zeros in place of T5's states, as in
    diffusers. What is then saved lacks T5 too: diffusers loads it when told text_encoder_3=None
    and tokenizer_3=None.

    Raises:
        UserError: the folder is incomplete, a weight file is damaged, or a weight is not finite.
    """
    pipe = _pipeline(path, config)
    pipe.to(device)
    transformer, vae = pipe.transformer.config, pipe.vae.config
    size, shift = transformer.sample_size, vae.shift_factor
    tokens = (size // transformer.patch_size) ** 2

    return Model(
        family="sd3",
        identity={"path": config.path, "revision": config.revision or ""},
        denoiser=SD3Denoiser(pipe.transformer, flow_schedule(pipe, tokens)),
        latent_shape=(transformer.in_channels, size, size),
        encode_prompts=in_batches(lambda texts: _encode(pipe, texts), TEXTS),
        decode=vae_decoder(pipe.vae, shift),
        encode_images=vae_encoder(pipe.vae, shift),
        grid=lambda sampler, num_steps: flow_grid(pipe, sampler, num_steps, tokens),
        samplers=SAMPLERS,
        lora_targets=JOINT_ATTENTION,
        save=lambda folder, network, dtype: save_pipeline(
            pipe, folder, "transformer", network, dtype
        ),
        save_lora=lora_saver(StableDiffusion3Pipeline, "transformer"),
        move_rest=rest_mover(pipe, "transformer"),
    )


def _pipeline(path: Path, config: ModelConfig) -> Any:
    encoders = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    index = path / "model_index.json"
    published = read_json(index) if index.is_file() else {}
    without: dict[str, Any] = {}
    if not config.t5 or published.get("text_encoder_3", [None, None])[0] is None:
        del encoders["text_encoder_3"]
        without = {"text_encoder_3": None, "tokenizer_3": None}
    return load_pipeline(
        StableDiffusion3Pipeline, path, config, "Stable Diffusion 3", encoders, **without
    )


def _encode(pipe: Any, texts: list[str]) -> Cond:
    """Tokens `[b, CLIP's length + 256, width]`: CLIP's, filled up with zeros, then T5's."""
    both, pooled = [], []
    for tokenizer, encoder in (
        (pipe.tokenizer, pipe.text_encoder),
        (pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        # The pipeline cuts both at the first tokenizer's length.
        ids = token_ids(tokenizer, texts, pipe.tokenizer_max_length)
        out = encoder(ids.to(encoder.device), output_hidden_states=True)
        both.append(out.hidden_states[-2].float())
        pooled.append(out.text_embeds.float())
    clip, width = torch.cat(both, -1), pipe.transformer.config.joint_attention_dim
    if pipe.text_encoder_3 is None:
        t5 = clip.new_zeros(len(texts), T5_LENGTH, width)
    else:
        t5 = t5_states(pipe.text_encoder_3, pipe.tokenizer_3, texts, T5_LENGTH)
    filled = F.pad(clip, (0, width - clip.shape[-1]))
    return Cond({"tokens": torch.cat([filled, t5], 1), "pooled": torch.cat(pooled, 1)})

"""What the rectified-flow families share (SD3, FLUX.1): noise levels, steps and the T5 encoder.

x_t = (1 - sigma) * x_0 + sigma * noise, and the network predicts noise - x_0 (arXiv:2209.03003).
A timestep is 1000 * sigma, the time that these networks are given: whole in training, anything in
between while sampling.
"""

import math
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from jaxtyping import Float
from torch import Tensor

from craftune.diffusion import Grid, Schedule
from craftune.models import FLOW_SAMPLERS as SAMPLERS
from craftune.models import check_sampler
from craftune.models.common import token_ids

JOINT_ATTENTION = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""LoRA's targets, of image and text, as in diffusers' train_dreambooth_lora_sd3.py."""

FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
"""FLUX.1's beside attention, as in diffusers' train_dreambooth_lora_flux.py."""

TEXTS = 16
"""Texts that T5 reads at once: its attention over 512 tokens of so many takes 1 GB in bfloat16."""


def flow_schedule(pipe: Any, tokens: int) -> Schedule:
    """The levels sigma = 0, 0.001 ... 1 and the logit-normal law of training.

    The law has the checkpoint's own shift towards noise, as its pre-training at this image size
    had: scheduler.shift, or exp(mu) of the dynamic shift (the mode of FLUX.1-dev).

    Args:
        tokens: of an image inside the network, its (latent height / 2) * (latent width / 2).
    """
    config = pipe.scheduler.config
    sigmas = torch.linspace(0, 1, config.num_train_timesteps + 1)
    shift = math.exp(_mu(config, tokens)) if config.use_dynamic_shifting else config.shift
    return Schedule(1 - sigmas, sigmas, "velocity", "logit-normal", shift)


def flow_grid(pipe: Any, sampler: str, num_steps: int, tokens: int, *, even: bool = False) -> Grid:
    """The steps that the family's pipeline takes, ending in the clean image.

    Args:
        tokens: as in `flow_schedule`; dynamic shifting depends on it.
        even: start from sigma = 1, 1 - 1/n ... 1/n before shifting, as FLUX.1's pipeline does; else
            from the scheduler's own range, as SD3's.

    Raises:
        UserError: the sampler is another family's.
    """
    check_sampler(sampler, SAMPLERS)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    config = scheduler.config
    scheduler.set_timesteps(
        num_steps,
        sigmas=np.linspace(1.0, 1 / num_steps, num_steps) if even else None,
        mu=_mu(config, tokens) if config.use_dynamic_shifting else None,
    )
    return Grid.chain(scheduler.timesteps, 1 - scheduler.sigmas, scheduler.sigmas)


def _mu(config: Any, tokens: int) -> float:
    """log of the shift for images of this many tokens: linear between the two published sizes."""
    sizes = config.base_image_seq_len, config.max_image_seq_len
    return calculate_shift(tokens, *sizes, config.base_shift, config.max_shift)


def t5_states(
    encoder: Any, tokenizer: Any, texts: list[str], length: int
) -> Float[Tensor, "b length width"]:
    """T5's last hidden states of texts padded and cut to `length` tokens; no mask, as diffusers."""
    return encoder(token_ids(tokenizer, texts, length).to(encoder.device))[0].float()

"""Optimizers by name, and the learning rate as a function of the step."""

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import nn

from craftune.config import TrainConfig
from craftune.errors import UserError

Parameters = list[nn.Parameter]


def _adamw(config: TrainConfig, parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _adamw8bit(config: TrainConfig, parameters: Parameters) -> torch.optim.Optimizer:
    """bitsandbytes' block-wise quantised moments (Dettmers et al. 2022, arXiv:2110.02861)."""
    from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

    return AdamW8bit(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def _adafactor(config: TrainConfig, parameters: Parameters) -> torch.optim.Optimizer:
    """Shazeer & Stern 2018, arXiv:1804.04235, as DiffusionDPO fine-tunes SDXL.

    transformers' rather than torch's: torch's always multiplies the rate by each weight's own
    root mean square, so that a rate tuned for AdamW would move diffusion weights tens of times
    less.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


OPTIMIZERS: dict[str, Callable[[TrainConfig, Parameters], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
}
"""Name in `train.optimizer` -> optimizer of these parameters."""


def check_installed(name: str) -> None:
    """Refuse an optimizer whose library is missing.

    Raises:
        UserError: says what to install.
    """
    if name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer 'adamw8bit' needs bitsandbytes: pip install bitsandbytes; or use "
            "'adafactor', which needs nothing more"
        )


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step, counted from 0: linear warm-up, then the schedule down to 0.

    No step has a rate of 0: the first is one part of `warmup_steps` + 1, and 0 would come after
    the last one.
    """
    if step < config.warmup_steps or config.lr_schedule == "constant":
        return config.learning_rate * min(1, (step + 1) / (config.warmup_steps + 1))
    gone = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    left = 1 - gone if config.lr_schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2
    return config.learning_rate * left

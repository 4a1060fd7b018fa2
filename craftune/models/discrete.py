"""The UNet families of 1000 timesteps (SD1, SD2, SDXL): noise levels, and the samplers' steps."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from craftune.diffusion import Grid, Schedule, Target
from craftune.errors import UserError
from craftune.models import DISCRETE_SAMPLERS as SAMPLERS
from craftune.models import check_sampler

TARGETS: dict[str, Target] = {"epsilon": "epsilon", "v_prediction": "v"}


def check_unet(unet: Any, path: Path) -> None:
    """Refuse UNets that need more than latents, timestep and prompt.

    Raises:
        UserError: it inpaints, edits, or takes the guidance scale as an input.
    """
    given, made = unet.config.in_channels, unet.config.out_channels
    if given != made:
        raise UserError(
            f"{path}: its UNet reads {given} channels and gives {made} (inpainting or editing); "
            "give a text-to-image checkpoint"
        )
    if unet.config.time_cond_proj_dim:
        raise UserError(
            f"{path}: its UNet takes the guidance scale as an input (a distilled LCM); give the "
            "checkpoint it was distilled from"
        )


def discrete_schedule(pipe: Any, path: Path) -> Schedule:
    """Noise levels and target from the checkpoint's scheduler.

    Raises:
        UserError: the scheduler is of another kind (EDM, flow matching), the prediction type is
            unknown, or zero terminal SNR meets epsilon prediction.
    """
    config = path / "scheduler" / "scheduler_config.json" if path.is_dir() else path
    if "beta_schedule" not in pipe.scheduler.config:
        kind = type(pipe.scheduler).__name__
        raise UserError(f"{config}: scheduler {kind!r} is not of this family's 1000 timesteps")
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


def discrete_grid(pipe: Any, sampler: str, num_steps: int) -> Grid:
    """The steps that diffusers' own scheduler takes under the checkpoint's settings.

    Raises:
        UserError: the sampler is another family's, or there are too many steps.
    """
    check_sampler(sampler, SAMPLERS)
    config = pipe.scheduler.config
    grid = None
    if num_steps < config.num_train_timesteps:
        ddim = sampler == "ddim"
        grid = (
            _ddim_grid(config, num_steps) if ddim else _multistep_grid(config, sampler, num_steps)
        )
    if grid is None or grid.timesteps.diff().ge(0).any():
        raise UserError(
            f"generate.num_steps: {num_steps} are too many for this checkpoint's "
            f"{config.num_train_timesteps} timesteps, some would repeat; use fewer"
        )
    return grid


def discrete_scheduler(config: Any, sampler: str) -> Any:
    """diffusers' scheduler that draws as our sampler of this name does.

    Raises:
        UserError: the sampler is another family's.
    """
    check_sampler(sampler, SAMPLERS)
    if sampler == "ddim":
        return DDIMScheduler.from_config(config)
    if sampler == "unipc":
        return UniPCMultistepScheduler.from_config(config, final_sigmas_type="zero")
    return DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )


def _ddim_grid(config: Any, num_steps: int) -> Grid:
    scheduler = discrete_scheduler(config, "ddim")
    alpha_bar, last = scheduler.alphas_cumprod.double(), scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(num_steps)
    starts = scheduler.timesteps
    # Every step goes down by 1000 // num_steps, even where "linspace" and "trailing" place the
    # next timestep elsewhere: diffusers does, and its images are what users get from our model.
    ends = starts - len(alpha_bar) // num_steps
    levels = torch.where(ends < 0, last, alpha_bar[ends.clamp(min=0)])
    levels = torch.stack([alpha_bar[starts], levels], 1)
    return Grid(starts, levels.sqrt().float(), (1 - levels).sqrt().float())


def _multistep_grid(config: Any, sampler: str, num_steps: int) -> Grid:
    scheduler = discrete_scheduler(config, sampler)
    scheduler.set_timesteps(num_steps)
    ratios = scheduler.sigmas.double()  # sigma / alpha; karras and its like lie between timesteps
    alphas = (1 + ratios.square()).rsqrt()
    return Grid.chain(scheduler.timesteps, alphas.float(), (ratios * alphas).float())

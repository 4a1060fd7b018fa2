"""P-GRAFT's inference: the tuned network down to timestep t*, the starting one from there.

Called like the diffusers pipeline inside it. With adapters both are one network in memory, whose
adapters are on above t* and off below; with whole weights there are two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from craftune.errors import UserError
from craftune.models.common import LOADING_ERRORS, quiet
from craftune.models.discrete import SAMPLERS, discrete_scheduler
from craftune.models.files import resolve

LORA_FILE = "pytorch_lora_weights.safetensors"
FORGETFUL = (DDIMScheduler, FlowMatchEulerDiscreteScheduler)
"""Schedulers whose step depends on the step before through the latents alone."""


@dataclass(frozen=True)
class StitchedPipeline:
    """A diffusers pipeline that draws with two networks, one after the other.

    Attributes:
        pipe: the base's pipeline; its scheduler draws.
        t_star: the timestep at which the base takes over; the scheduler must come by it.
        tune: puts the tuned network into the pipeline.
        untune: puts the base's back.
    """

    pipe: Any
    t_star: float
    tune: Callable[[], None]
    untune: Callable[[], None]

    def __call__(
        self,
        prompt: str | list[str],
        *,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        **settings: Any,
    ) -> Any:
        """Draw: `.images`, as the pipeline inside gives them.

        Args:
            settings: as of that pipeline: num_inference_steps, guidance_scale, generator,
                output_type ... t* was tuned for one number of steps and one guidance scale.

        Raises:
            UserError: t* is none of the timesteps after the first, or the scheduler is unknown.
        """
        _forget(self.pipe.scheduler)  # refuses what it does not know before anything is drawn

        def turn(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            timesteps = pipe.scheduler.timesteps.double()
            found = torch.isclose(timesteps, torch.tensor(self.t_star).to(timesteps))
            if not found[1:].any():
                raise UserError(
                    f"t_star: {self.t_star:g} is no timestep of {len(timesteps)} steps after the "
                    f"first ({', '.join(f'{x:g}' for x in timesteps.tolist())}); draw with the "
                    "number of steps of the run"
                )
            if step + 1 < len(timesteps) and found[step + 1]:
                self.untune()
                _forget(pipe.scheduler)
            if callback_on_step_end is not None:
                tensors |= callback_on_step_end(pipe, step, t, tensors)
            return tensors

        self.tune()
        try:
            return self.pipe(prompt, callback_on_step_end=turn, **settings)
        finally:
            self.untune()

    def to(self, *place: Any, **places: Any) -> "StitchedPipeline":
        """Both networks and the rest to a device or dtype."""
        self.tune()
        self.pipe.to(*place, **places)
        self.untune()
        self.pipe.to(*place, **places)
        return self


def load_stitched(
    tuned: str | Path, base: str | Path, t_star: float, *, sampler: str = "auto", **settings: Any
) -> StitchedPipeline:
    """The pipeline of a P-GRAFT run; the run's 6-train/stitch.json has the values to give here.

    Args:
        tuned: 6-train/model, or the folder of its adapters, 6-train/lora.
        base: what was tuned: a diffusers folder, hub id, or "craftune:shapes/model".
        t_star: the timestep at which the base takes over.
        sampler: as in generate.sampler; "auto" is the family's own.
        settings: of `DiffusionPipeline.from_pretrained`, e.g. dtype=torch.float16.

    Raises:
        UserError: either cannot be loaded, or the family has no such sampler.
    """
    quiet()
    at = resolve(str(base))
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(at if at.is_dir() else str(base), **settings)
        name = "transformer" if "transformer" in pipe.components else "unet"
        flow = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
        if not flow:
            chosen = SAMPLERS[0] if sampler == "auto" else sampler
            pipe.scheduler = discrete_scheduler(pipe.scheduler.config, chosen)
        elif sampler not in ("auto", "euler"):
            raise UserError(f"sampler {sampler!r}: this checkpoint draws with 'euler'")
        pipe.set_progress_bar_config(disable=True)
        if (Path(tuned) / LORA_FILE).is_file():
            pipe.load_lora_weights(Path(tuned))
            stitched = StitchedPipeline(pipe, t_star, pipe.enable_lora, pipe.disable_lora)
        else:
            own = getattr(pipe, name)
            other = type(own).from_pretrained(tuned, subfolder=name, torch_dtype=own.dtype)
            other = other.to(own.device).eval()
            stitched = StitchedPipeline(
                pipe, t_star, lambda: setattr(pipe, name, other), lambda: setattr(pipe, name, own)
            )
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{tuned} on {base}: cannot be stitched: {reason}") from None
    stitched.untune()
    return stitched


def _forget(scheduler: Any) -> None:
    """Start anew from the latents: no memory of what the other network predicted.

    Raises:
        UserError: it is not known how this scheduler forgets.
    """
    if isinstance(scheduler, FORGETFUL):
        return
    if not isinstance(scheduler, DPMSolverMultistepScheduler | UniPCMultistepScheduler):
        raise UserError(
            f"{type(scheduler).__name__}: not known how to hand over between two networks; use "
            "sampler = 'ddim', 'dpm++2m' or 'unipc', or 'euler' for the flow families"
        )
    scheduler.model_outputs = [None] * len(scheduler.model_outputs)
    scheduler.lower_order_nums = 0
    if isinstance(scheduler, UniPCMultistepScheduler):
        scheduler.last_sample = None

"""Stage `train` of noise correction: noises and prompts -> the corrector."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from craftune.config import GenerateConfig, TrainConfig
from craftune.methods import NoiseCorrection
from craftune.noise import InvertedNoise, call_flops, new_corrector, save_corrector, summary
from craftune.noise.files import Shape
from craftune.processes import ALONE, Processes
from craftune.records import read_table, write_json
from craftune.stages.generate import guidance_of, sampler_of
from craftune.stages.train import shuffled
from craftune.training import train
from craftune.types import Cond, Model

FOLDER = "corrector"
"""Inside the stage's folder."""


@dataclass(frozen=True)
class NoiseFeed:
    """The batch of any step: endless reshuffling of the noises, as a function of the step."""

    noises: InvertedNoise
    batch_size: int
    seed: int

    @property
    def counts(self) -> Mapping[str, int]:
        """Inverted pictures."""
        return {"examples": len(self.noises.noise)}

    def __call__(self, step: int) -> InvertedNoise:
        """Noises `step * batch_size ...` of the sequence of shuffled epochs."""
        index = shuffled(len(self.noises.noise), self.batch_size, self.seed, step)
        index = index.to(self.noises.noise.device)
        return InvertedNoise(self.noises.noise[index], self.noises.cond.rows(index))


def train_corrector(
    config: TrainConfig,
    method: NoiseCorrection,
    drawing: GenerateConfig,
    model: Model,
    seed: int,
    pool: Path,
    out: Path,
    processes: Processes = ALONE,
) -> dict[str, int]:
    """Train a corrector on the noises that the stage `generate` found.

    Args:
        drawing: the sampler's settings, which the noises belong to.
        model: stays as it is; it encodes the prompts.
        pool: folder of the stage `generate`.
        out: receives corrector/ (config.json, model.safetensors), flops.json, metrics.jsonl.
        processes: those that share each batch; each calls this function.
    """
    feed = NoiseFeed(_noises(model, pool), config.batch_size, seed)
    device = feed.noises.noise.device
    shape = Shape(
        latent_shape=model.latent_shape,  # type: ignore[arg-type]
        patch=method.patch,
        width=method.width,
        depth=method.depth,
        cond_width=feed.noises.cond.tensors["prompt"].shape[1],
        corrector_steps=method.corrector_steps,
    )
    corrector = new_corrector(shape, seed)
    corrector.network.to(device)
    trained, fit = train(method, corrector, None, feed, config, seed, out, processes)
    counts = {
        **feed.counts,
        "steps": config.steps,
        "micro_batch": min(int(fit.micro_batch), len(processes.part(config.batch_size))),
    }
    if processes.main:
        sampler = sampler_of(drawing, model)
        about = {
            "model": dict(model.identity),
            "sampler": sampler,
            "num_steps": drawing.num_steps,
            "guidance_scale": drawing.guidance_scale,
        }
        save_corrector(out / FOLDER, trained, shape, about)
        write_json(out / "flops.json", _flops(method, drawing, model, corrector))
    return counts


def _noises(model: Model, pool: Path) -> InvertedNoise:
    device = next(model.denoiser.network.parameters()).device
    table = read_table(pool.glob("noises-*.parquet"))
    noise = torch.from_numpy(np.stack(table["noise"].to_numpy()).astype(np.float32))
    texts = table["prompt"].to_pylist()
    distinct = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(distinct)}
    parts = [
        summary(model.encode_prompts(distinct[start : start + 64])).tensors["prompt"]
        for start in range(0, len(distinct), 64)
    ]
    rows = torch.tensor([place[text] for text in texts], device=device)
    cond = Cond({"prompt": torch.cat(parts)[rows]})
    return InvertedNoise(noise.reshape(-1, *model.latent_shape).to(device), cond)


def _flops(
    method: NoiseCorrection, drawing: GenerateConfig, model: Model, corrector: Any
) -> dict[str, int]:
    """FLOPs of one call of each network, and of one image without and with correction."""
    device = next(model.denoiser.network.parameters()).device
    latents = torch.zeros(1, *model.latent_shape, device=device)
    cond, scale = guidance_of(model, model.encode_prompts([""]), drawing.guidance_scale)
    main = call_flops(model.denoiser, latents, cond)
    few = call_flops(corrector, latents, summary(cond))
    base = drawing.num_steps * main * (1 if scale == 1 else 2)
    return {
        "model_call": main,
        "corrector_call": few,
        "base_image": base,
        "tuned_image": base + method.corrector_steps * few,
    }

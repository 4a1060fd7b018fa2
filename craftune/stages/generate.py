"""Stage `generate`: prompts and rewrites -> the pool, Parquet shards of candidates."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from craftune.config import GenerateConfig
from craftune.errors import UserError
from craftune.images import encode_png, to_pil
from craftune.noise.corrector import Corrected
from craftune.processes import ALONE, Processes
from craftune.progress import track
from craftune.records import CANDIDATE, Prompt, Refined, read_rows, write_table
from craftune.sampling import initial_noise, sample
from craftune.seeds import stream_seed
from craftune.stages.states import kept_states
from craftune.types import Cond, Denoiser, Model


@dataclass(frozen=True)
class Request:
    """One image to draw: which text, and which noise."""

    text: str
    seed: int


def generate(
    config: GenerateConfig,
    model: Model,
    seed: int,
    prompts: Path,
    refined: Path,
    out: Path,
    processes: Processes = ALONE,
) -> dict[str, int]:
    """Draw variant 0 (the prompt itself) and every rewrite of every prompt.

    Finished shards are kept: a killed run goes on with the first missing one.

    Args:
        prompts: prompts.jsonl.
        refined: refined.jsonl.
        out: receives part-00000.parquet, ... with the schema `records.CANDIDATE`.
        processes: those that share the shards; each calls this function.
    """
    rows = _plan(config, model, seed, read_rows(Prompt, prompts), read_rows(Refined, refined))
    size = config.shard_size
    paths = {
        start: out / f"part-{start // size:05d}.parquet" for start in range(0, len(rows), size)
    }
    left = processes.told(lambda: [start for start, p in paths.items() if not p.is_file()])
    finished = min(len(rows), (len(paths) - len(left)) * size)
    empty = model.encode_prompts([""])
    mine, step = processes.share(left), size * processes.count
    for start in track(mine, "generate", len(rows), "image", step, finished):
        shard = rows[start : start + size]
        requests = [Request(row["refined_prompt"], row["seed"]) for row in shard]
        drawn = draw_images(config, model, model.denoiser, requests, empty)
        kept = {} if config.keep_latents else {"latents": None}
        made = [row | image | kept for row, image in zip(shard, drawn, strict=True)]
        write_table(paths[start], made, CANDIDATE)
    processes.settle(paths.values())
    return {"prompts": len({r["prompt_id"] for r in rows}), "candidates": len(rows)}


def draw_images(
    config: GenerateConfig, model: Model, denoiser: Denoiser, requests: list[Request], empty: Cond
) -> Iterator[dict[str, Any]]:
    """The image (PNG), final latents and kept states of each request, in order.

    Args:
        denoiser: the model's own, or the one that is being tuned.
        empty: the encoded empty prompt, one row.
    """
    grid = model.grid(sampler_of(config, model), config.num_steps)
    for start in range(0, len(requests), config.batch_size):
        batch = requests[start : start + config.batch_size]
        passed: dict[int, Tensor] = {}

        def keep(after: int, latents: Tensor, passed: dict[int, Tensor] = passed) -> None:
            if after in config.keep_states:
                passed[after] = latents

        latents = draw_latents(config, model, denoiser, batch, empty, keep)
        with torch.no_grad():
            pictures = to_pil(model.decode(latents))
        rows = zip(pictures, latents.cpu().flatten(1), strict=True)
        for row, (picture, latent) in enumerate(rows):
            yield {
                "image": {"bytes": encode_png(picture), "path": None},
                "latents": latent.numpy(),
                "states": kept_states(grid, passed, row),
            }


@torch.no_grad()
def draw_latents(
    config: GenerateConfig,
    model: Model,
    denoiser: Denoiser,
    batch: list[Request],
    empty: Cond,
    after: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "b ..."]:
    """The final latents of one batch; `after` is told the latents after each step."""
    device = empty.tensors["tokens"].device
    distinct = list(dict.fromkeys(request.text for request in batch))
    where = torch.tensor([distinct.index(request.text) for request in batch], device=device)
    cond = model.encode_prompts(distinct).rows(where)
    sampler = sampler_of(config, model)
    cond, scale = guidance_of(model, cond, config.guidance_scale)
    noise = initial_noise([request.seed for request in batch], model.latent_shape).to(device)
    if isinstance(denoiser, Corrected):
        noise = denoiser.start(noise, cond)
    return sample(
        denoiser,
        noise,
        cond,
        empty.rows(torch.zeros(len(batch), dtype=torch.long, device=device)),
        model.grid(sampler, config.num_steps),
        sampler=sampler,
        guidance_scale=scale,
        after=after,
    )


def guidance_of(model: Model, cond: Cond, scale: float) -> tuple[Cond, float]:
    """The prompts, and the scale that is left for classifier-free guidance.

    Raises:
        UserError: the checkpoint takes no guidance.
    """
    if model.guidance == "embedded":
        device = cond.tensors["tokens"].device
        return cond.having("guidance", torch.full((len(cond),), scale, device=device)), 1.0
    if model.guidance == "none" and scale != 1:
        raise UserError(
            f"generate.guidance_scale: this {model.family} checkpoint takes no guidance; use 1"
        )
    return cond, scale


def sampler_of(config: GenerateConfig, model: Model) -> str:
    """The sampler's name, "auto" resolved."""
    return model.samplers[0] if config.sampler == "auto" else config.sampler


def _plan(
    config: GenerateConfig, model: Model, seed: int, prompts: list[Prompt], refined: list[Refined]
) -> list[dict[str, Any]]:
    """Every candidate's row but its image, prompt by prompt, variant by variant."""
    rewrites: dict[str, list[Refined]] = {}
    for row in refined:
        rewrites.setdefault(row.prompt_id, []).append(row)
    common = {
        "sampler": sampler_of(config, model),
        "num_steps": config.num_steps,
        "guidance_scale": config.guidance_scale,
        "model": model.identity["path"],
    }
    rows = []
    for prompt in prompts:
        texts = [(0, 0, prompt.prompt)]
        for rewrite in rewrites.get(prompt.id, []):
            texts += [
                (rewrite.variant, k, rewrite.refined) for k in range(config.seeds_per_variant)
            ]
        for variant, k, text in texts:
            rows.append(
                {
                    "id": f"{prompt.id}-{variant}-{k}",
                    "prompt_id": prompt.id,
                    "prompt": prompt.prompt,
                    "refined_prompt": text,
                    "category": prompt.category,
                    "variant": variant,
                    "sample": k,
                    "seed": stream_seed("candidate", seed, prompt.id, variant, k),
                    **common,
                }
            )
    return rows

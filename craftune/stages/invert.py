"""Stage `generate` of noise correction: pictures with prompts -> noises that give them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from craftune.config import GenerateConfig
from craftune.errors import UserError
from craftune.images import decode, to_rgb, to_tensor
from craftune.methods import NoiseCorrection
from craftune.models import resolve
from craftune.noise import Inversion, invert
from craftune.pictures import MADE
from craftune.processes import ALONE, Processes
from craftune.progress import track
from craftune.records import Prompt, read_json, read_rows, write_json, write_table
from craftune.sampling import FIRST_ORDER, sample
from craftune.scoring.batches import Item
from craftune.scoring.sources import open_source
from craftune.scoring.tables import Source
from craftune.seeds import stream
from craftune.stages.generate import guidance_of, sampler_of
from craftune.types import Model

KEY = "method.settings.source"
NOISE = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("noise", pa.list_(pa.float32()))])
"""The noise from which the sampler draws one picture of the source."""


def source_of(method: NoiseCorrection) -> Source | None:
    """What `source` holds; None for pictures that are made of the run's training prompts.

    Raises:
        UserError: it is empty, or holds no pictures with prompts.
    """
    if not method.source:
        raise UserError(
            f"{KEY}: empty; name a folder of pictures with metadata.jsonl or Parquet files, or "
            f"{next(iter(MADE))!r} for the embedded model"
        )
    if method.source in MADE:
        return None
    found = open_source(resolve(method.source), None)
    if not found.prompts:
        raise UserError(
            f"{KEY} {method.source!r}: no picture has a prompt; put a metadata.jsonl with "
            "file_name and prompt beside them"
        )
    return found


def invert_pictures(
    config: GenerateConfig,
    method: NoiseCorrection,
    model: Model,
    seed: int,
    prompts: Path,
    out: Path,
    processes: Processes = ALONE,
) -> dict[str, int]:
    """Undo the sampler of [generate], with its steps and guidance, on each picture.

    Args:
        prompts: prompts.jsonl.
        out: receives noises-00000.parquet, ... with the schema `NOISE`, a shard's diagnostics
            beside each, and those of all in inversion.json; finished shards are kept.
        processes: those that share the shards; each calls this function.

    Raises:
        UserError: the sampler cannot be undone, or a step does not contract; a picture lacks a
            prompt or cannot be read.
    """
    sampler = sampler_of(config, model)
    if sampler not in FIRST_ORDER:
        raise UserError(
            f"generate.sampler: {sampler!r} looks back over several steps and has no step-wise "
            f"inverse; use {' or '.join(repr(s) for s in FIRST_ORDER if s in model.samplers)}"
        )
    total, items = _items(method, seed, prompts)
    size = config.shard_size
    starts = range(0, total, size)
    paths = {start: out / f"noises-{start // size:05d}.parquet" for start in starts}
    left = processes.told(lambda: [start for start, path in paths.items() if not path.is_file()])
    finished = min(total, (len(paths) - len(left)) * size)
    mine, step = processes.share(left), size * processes.count
    side = _side(model)
    for start, shard in track(
        _shards(items, size, mine), "invert", total, "picture", step, finished
    ):
        rows, about = _inverted(config, method, model, seed, start, shard, side)
        write_json(paths[start].with_suffix(".json"), about)
        write_table(paths[start], rows, NOISE)  # last: where it is, the shard is done
    processes.settle(paths.values())
    if processes.main:
        write_json(out / "inversion.json", _summary(paths.values()))
    return {"noises": total}


def _items(method: NoiseCorrection, seed: int, prompts: Path) -> tuple[int, Iterator[Item]]:
    """How many pictures, and each of them, not opened yet."""
    found = source_of(method)
    if found is not None:
        total = min(found.total, method.pictures)
        return total, islice(chain.from_iterable(items for _, items in found.shards()), total)
    texts = [row.prompt for row in read_rows(Prompt, prompts)]
    try:
        drawn = enumerate(MADE[method.source](texts, method.pictures, seed))
    except ValueError as error:
        raise UserError(f"{KEY} {method.source!r}: {error}") from None
    return method.pictures, (Item(f"made-{n}", texts[n % len(texts)], x) for n, x in drawn)


def _shards(
    items: Iterator[Item], size: int, wanted: Iterable[int]
) -> Iterator[tuple[int, list[Item]]]:
    """First place and items of each wanted shard; the places rise."""
    here = 0
    for start in wanted:
        yield start, list(islice(items, start - here, start - here + size))
        here = start + size


def _side(model: Model) -> tuple[int, int]:
    """Width and height of the model's pictures."""
    device = next(model.denoiser.network.parameters()).device
    with torch.no_grad():
        height, width = model.decode(torch.zeros(1, *model.latent_shape, device=device)).shape[-2:]
    return width, height


def _inverted(
    config: GenerateConfig,
    method: NoiseCorrection,
    model: Model,
    seed: int,
    start: int,
    shard: Sequence[Item],
    side: tuple[int, int],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `NOISE`, and how the inversion went."""
    rng, parts, noises = stream("blur", seed, start), [], []
    error = 0.0
    for first in range(0, len(shard), config.batch_size):
        batch = shard[first : first + config.batch_size]
        latents = _latents(method, model, batch, side, rng)
        part, again = _undone(config, method, model, latents, [str(item.prompt) for item in batch])
        parts.append(part)
        noises.append(part.noise.cpu())
        error = max(error, float((again - latents).norm() / latents.norm()))
    noise = torch.cat(noises)
    rows = [
        {"id": item.name, "prompt": item.prompt, "noise": z.flatten().numpy()}
        for item, z in zip(shard, noise, strict=True)
    ]
    calls = sum(p.calls * len(p.noise) for p in parts) / len(shard)
    return rows, {
        "pictures": len(shard),
        "iterations": torch.stack([p.iterations for p in parts]).amax(0).tolist(),
        "factors": torch.stack([p.factors for p in parts]).amax(0).tolist(),
        "calls_per_picture": calls,
        "regeneration_error": error,
        "mean_square": float(noise.square().mean()),
    }


def _latents(
    method: NoiseCorrection,
    model: Model,
    batch: Sequence[Item],
    side: tuple[int, int],
    rng: torch.Generator,
) -> Float[Tensor, "b ..."]:
    device = next(model.denoiser.network.parameters()).device
    pixels = to_tensor([_picture(item, side) for item in batch])
    encoded = model.encode_images(pixels.to(device))
    mean = encoded.mean.float()
    noise = torch.randn(2, *mean.shape, generator=rng).to(device)
    spread = 0.0 if encoded.std is None else encoded.std
    return mean + spread * noise[0] + method.blur * noise[1]


def _picture(item: Item, side: tuple[int, int]) -> Image.Image:
    """Opened, and cut to the model's size from the middle."""
    if item.prompt is None:
        raise UserError(f"{KEY}: picture {item.name} has no prompt; give it one, or take it away")
    try:
        data = item.data.read_bytes() if isinstance(item.data, Path) else item.data
        found = to_rgb(data) if isinstance(data, Image.Image) else decode(data or b"")
        return found if found.size == side else ImageOps.fit(found, side, Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{KEY}: picture {item.name} cannot be read: {error}") from None


def _undone(
    config: GenerateConfig,
    method: NoiseCorrection,
    model: Model,
    latents: Float[Tensor, "b ..."],
    texts: list[str],
) -> tuple[Inversion, Float[Tensor, "b ..."]]:
    """The noises of one batch, and the latents that the sampler draws from them."""
    cond, scale = guidance_of(model, model.encode_prompts(texts), config.guidance_scale)
    empty = model.encode_prompts([""]).rows(
        torch.zeros(len(texts), dtype=torch.long, device=latents.device)
    )
    sampler = sampler_of(config, model)
    grid, how = model.grid(sampler, config.num_steps), {"sampler": sampler, "guidance_scale": scale}
    try:
        found = invert(
            model.denoiser,
            latents,
            cond,
            empty,
            grid,
            most_iterations=method.most_iterations,
            **how,
        )
    except UserError as error:
        raise UserError(
            f"{error} (generate.num_steps = {config.num_steps}, method.settings.most_iterations = "
            f"{method.most_iterations}; lower guidance and more method.settings.blur help, too)"
        ) from None
    with torch.no_grad():
        again = sample(model.denoiser, found.noise, cond, empty, grid, **how)
    return found, again


def _summary(paths: Iterable[Path]) -> dict[str, Any]:
    """The shards' diagnostics as one."""
    parts = [read_json(path.with_suffix(".json")) for path in paths]
    count = sum(part["pictures"] for part in parts)

    def mean(name: str) -> float:
        return sum(part[name] * part["pictures"] for part in parts) / count

    return {
        "pictures": count,
        "iterations": np.max([part["iterations"] for part in parts], axis=0).tolist(),
        "factors": np.max([part["factors"] for part in parts], axis=0).tolist(),
        "calls_per_picture": mean("calls_per_picture"),
        "regeneration_error": max(part["regeneration_error"] for part in parts),
        "spread_of_the_noise": mean("mean_square") ** 0.5,
    }

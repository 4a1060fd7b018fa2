"""Stage `train`: selected images and their advantages -> the tuned model."""

import copy
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float
from torch import Tensor

from craftune.adapters import WithoutAdapter, add_lora, merged
from craftune.config import TrainConfig
from craftune.errors import UserError
from craftune.methods import CRAFT, SFT
from craftune.records import read_table
from craftune.seeds import stream
from craftune.training import train as run_loop
from craftune.types import Cond, Examples, Model


@dataclasses.dataclass(frozen=True)
class ExampleFeed:
    """The batch of any step: endless reshuffling of few examples, as a function of the step."""

    examples: Examples
    empty: Cond
    batch_size: int
    prompt_dropout: float
    seed: int

    def __call__(self, step: int) -> Examples:
        """Examples `step * batch_size ...` of the sequence of shuffled epochs."""
        count = len(self.examples.weight)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {
            epoch: torch.randperm(count, generator=stream("epoch", self.seed, epoch))
            for epoch in {place // count for place in places}
        }
        index = torch.stack([orders[place // count][place % count] for place in places])
        dropped = torch.rand(len(index), generator=stream("dropout", self.seed, step))
        device = self.examples.weight.device
        chosen = self.examples.rows(index.to(device))
        # The empty prompt is the last row, after those of the batch.
        size = self.batch_size
        rows = torch.where(dropped < self.prompt_dropout, size, torch.arange(size))
        cond = Cond.cat([chosen.cond, self.empty]).rows(rows.to(device))
        return dataclasses.replace(chosen, cond=cond)


def train(
    config: TrainConfig,
    method: CRAFT | SFT,
    model: Model,
    seed: int,
    selection: Path,
    pool: Path,
    out: Path,
) -> dict[str, int]:
    """Fine-tune on the selected candidates under their original prompts.

    Args:
        model: loaded in float32; its network is changed in place.
        selection: selection.parquet.
        pool: folder of the stage `generate`; the sampler's own final latents are trained on.
        out: receives model/ (a diffusers folder), metrics.jsonl, and lora/ for adapters.

    Raises:
        UserError: nothing is selected, or all weights are 0.
        FloatingPointError: training diverged; the last checkpoint stays.
    """
    network = model.denoiser.network
    device = next(network.parameters()).device
    examples = load_examples(method, model, selection, pool, device)
    if config.lora.rank:
        add_lora(network, config.lora, model.lora_targets, seed)
    else:
        network.requires_grad_(True)
    if device.type == "cuda":
        # Tensor cores convolve in this layout; in the other cuDNN transposes around each one.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    reference = None
    if method.needs_reference and config.lora.rank:
        reference = WithoutAdapter(model.denoiser)
    elif method.needs_reference:
        reference = copy.deepcopy(model.denoiser)
        reference.network.requires_grad_(False).eval()
    empty = model.encode_prompts([""])
    model.move_rest(torch.device("cpu"))
    feed = ExampleFeed(examples, empty, config.batch_size, config.prompt_dropout, seed)
    trained, fit = run_loop(method, model.denoiser, reference, feed, config, seed, out)

    partial = out / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    whole = merged(trained) if config.lora.rank else trained
    model.save(partial, whole, getattr(torch, config.save_dtype))
    if config.lora.rank:
        model.save_lora(out / "lora", trained)
    shutil.rmtree(out / "model", ignore_errors=True)
    partial.rename(out / "model")
    return {
        "examples": len(examples.weight),
        "steps": config.steps,
        "micro_batch": min(int(fit.micro_batch), config.batch_size),
        "gradient_checkpointing": int(fit.checkpointing is True),
    }


def load_examples(
    method: CRAFT | SFT, model: Model, selection: Path, pool: Path, device: torch.device
) -> Examples:
    """Latents, encoded original prompts and weights of the selected candidates.

    Examples that the method gives weight 0 are left out: they would teach nothing.
    """
    verdicts = read_table(selection, ["candidate", "prompt", "advantage", "selected"])
    chosen = verdicts.filter(verdicts["selected"])
    weight = method.weigh(torch.tensor(chosen["advantage"].to_numpy(), dtype=torch.float32))
    used = weight != 0
    if not used.any():
        raise UserError(
            f"{selection}: none of the {len(weight)} selected candidates has a weight other than "
            "0; select more (select.k, select.filter) or use method.name = 'sft'"
        )
    chosen = chosen.filter(used.numpy())
    latents = _latents(pool, chosen["candidate"].to_pylist(), model.latent_shape)
    texts = chosen["prompt"].to_pylist()
    return Examples(
        latents=latents.to(device),
        cond=model.encode_prompts(texts),
        weight=weight[used].to(device),
    )


def _latents(pool: Path, names: list[str], shape: tuple[int, ...]) -> Float[Tensor, "n ..."]:
    """Final latents of these candidates, in this order, reading one shard at a time."""
    where = {name: i for i, name in enumerate(names)}
    found = np.empty((len(names), *shape), np.float32)
    for shard in sorted(pool.glob("part-*.parquet")):
        table = read_table(shard, ["id", "latents"])
        wanted = pc.is_in(table["id"], value_set=pa.array(names, pa.string()))  # type: ignore[attr-defined]
        table = table.filter(wanted)
        for name, latents in zip(table["id"].to_pylist(), table["latents"], strict=True):
            found[where.pop(name)] = latents.values.to_numpy().reshape(shape)
    if where:
        raise UserError(f"{pool}: lacks the selected candidate {next(iter(where))}; --redo select")
    return torch.from_numpy(found)

"""Stage `train`: selected images and their advantages, or prompts alone -> the tuned model."""

import copy
import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int
from torch import Tensor

from craftune.adapters import WithoutAdapter, add_lora, merged, merged_into
from craftune.batches import Examples, Level
from craftune.config import TrainConfig
from craftune.errors import UserError
from craftune.images import decode, to_tensor
from craftune.methods import PGRAFT, FromExamples, FromPrompts
from craftune.processes import ALONE, Processes
from craftune.records import read_table
from craftune.seeds import stream
from craftune.stages.states import at_level
from craftune.training import train as run_loop
from craftune.types import Cond, Encoded, Model


@runtime_checkable
class Feed(Protocol):
    """What the loop is fed with."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What there is, for the stage's record; "examples" are images that train."""
        ...

    def __call__(self, step: int) -> Any:
        """The whole batch of a step, a function of its number alone."""
        ...


def shuffled(count: int, batch_size: int, seed: int, step: int) -> Int[Tensor, " b"]:
    """Places of a step's batch in the endless sequence of shuffled epochs of `count`."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: torch.randperm(count, generator=stream("epoch", seed, epoch))
        for epoch in {place // count for place in places}
    }
    return torch.stack([orders[place // count][place % count] for place in places])


@dataclasses.dataclass(frozen=True)
class ExampleFeed:
    """The batch of any step: endless reshuffling of few examples, as a function of the step."""

    examples: Examples
    empty: Cond
    batch_size: int
    prompt_dropout: float
    seed: int

    @property
    def counts(self) -> Mapping[str, int]:
        """Selected images that have a weight."""
        return {"examples": len(self.examples.weight)}

    def __call__(self, step: int) -> Examples:
        """Examples `step * batch_size ...` of the sequence of shuffled epochs."""
        index = shuffled(len(self.examples.weight), self.batch_size, self.seed, step)
        dropped = torch.rand(len(index), generator=stream("dropout", self.seed, step))
        device = self.examples.weight.device
        chosen = self.examples.rows(index.to(device))
        # The empty prompt is the last row, after those of the batch.
        size = self.batch_size
        rows = torch.where(dropped < self.prompt_dropout, size, torch.arange(size))
        cond = Cond.cat([chosen.cond, self.empty]).rows(rows.to(device))
        chosen = dataclasses.replace(chosen, cond=cond)
        return chosen.drawn(stream("encoded", self.seed, step))


def train(
    config: TrainConfig,
    method: FromExamples | FromPrompts,
    model: Model,
    seed: int,
    feed_of: Callable[[Model], Feed],
    out: Path,
    processes: Processes = ALONE,
    exact: Callable[[], Model] | None = None,
) -> dict[str, int]:
    """Fine-tune on what the feed gives.

    Args:
        model: its network is changed in place; in float32, save that adapters leave the rest
            frozen, so that it may be in bfloat16 under autocast.
        feed_of: the model -> its feed, `example_feed` or `prompt_feed` with their files; decides
            which of the model's other networks stay on the device.
        out: receives model/ (a diffusers folder), metrics.jsonl, and lora/ for adapters.
        processes: those that share each batch; each calls this function.
        exact: loads the checkpoint anew on the CPU without rounding it; given where `model` is
            rounded. Adapters are added to these weights.

    Raises:
        UserError: there is nothing to train on.
        FloatingPointError: training diverged; the last checkpoint stays.
    """
    network = model.denoiser.network
    device = next(network.parameters()).device
    feed = feed_of(model)
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
    trained, fit = run_loop(method, model.denoiser, reference, feed, config, seed, out, processes)
    counts = {
        **feed.counts,
        "steps": config.steps,
        "micro_batch": min(int(fit.micro_batch), len(processes.part(config.batch_size))),
        "gradient_checkpointing": int(fit.checkpointing is True),
    }
    if not processes.main:
        return counts

    if config.lora.rank:
        model.save_lora(out / "lora", trained)
    dtype = getattr(torch, config.save_dtype)
    if exact is not None:
        model = exact()
        trained = merged_into(model.denoiser.network, trained, dtype)
    elif config.lora.rank:
        trained = merged(trained)
    partial = out / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial, trained, dtype)
    shutil.rmtree(out / "model", ignore_errors=True)
    partial.rename(out / "model")
    return counts


def example_feed(
    config: TrainConfig,
    method: FromExamples,
    model: Model,
    seed: int,
    selection: Path,
    pool: Path,
) -> ExampleFeed:
    """The selected candidates under their original prompts; all but the denoiser goes to the CPU.

    Args:
        selection: selection.parquet.
        pool: folder of the stage `generate`; the sampler's own final latents are trained on, or
            where it has none what the VAE makes of the pictures.

    Raises:
        UserError: nothing is selected, or all weights are 0.
    """
    device = next(model.denoiser.network.parameters()).device
    examples = load_examples(method, model, selection, pool, device)
    empty, dropout = model.encode_prompts([""]), config.prompt_dropout
    if model.guidance != "classifier-free":
        # The empty prompt takes no part in drawing: there is no branch to keep, and each dropped
        # prompt would teach the distilled network to draw without looking at it.
        empty, dropout = examples.cond.rows(slice(0, 1)), 0.0
    model.move_rest(torch.device("cpu"))
    return ExampleFeed(examples, empty, config.batch_size, dropout, seed)


def load_examples(
    method: FromExamples, model: Model, selection: Path, pool: Path, device: torch.device
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
    names, level = chosen["candidate"].to_pylist(), Level()
    encoded, guidance = _from_pool(pool, names, model)
    if isinstance(method, PGRAFT):
        encoded, level = at_level(method, model.denoiser.schedule, pool, names, encoded)
    cond = model.encode_prompts(chosen["prompt"].to_pylist())
    if model.guidance == "embedded":
        # The scale that an example was drawn with: there, it is the base network's own sample, so
        # that the loss pulls towards what was selected and not from one scale to another.
        cond = cond.having("guidance", guidance.to(device))
    return Examples(
        latents=encoded.mean.to(device),
        cond=cond,
        weight=weight[used].to(device),
        std=None if encoded.std is None else encoded.std.to(device),
        level=level,
    )


def _from_pool(pool: Path, names: list[str], model: Model) -> tuple[Encoded, Float[Tensor, " n"]]:
    """Latents and guidance scales of these candidates, in order, one shard at a time."""
    where = {name: i for i, name in enumerate(names)}
    found: list[tuple[int, float, Encoded]] = []
    for shard in sorted(pool.glob("part-*.parquet")):
        table = read_table(shard, ["id", "guidance_scale", "latents"])
        wanted = pc.is_in(table["id"], value_set=pa.array(names, pa.string()))  # type: ignore[attr-defined]
        table = table.filter(wanted)
        if table["latents"].null_count:  # pictures are large, so they are read only where needed
            pictures = read_table(shard, ["image"]).filter(wanted)["image"]
            table = table.append_column("image", pictures)
        for row in table.to_pylist():
            found.append((where.pop(row["id"]), row["guidance_scale"], _latents(row, model)))
    if where:
        raise UserError(f"{pool}: lacks the selected candidate {next(iter(where))}; --redo select")
    _, scales, latents = zip(*sorted(found, key=lambda entry: entry[0]), strict=True)
    stds = [part.std for part in latents if part.std is not None]
    encoded = Encoded(torch.cat([part.mean for part in latents]), torch.cat(stds) if stds else None)
    return encoded, torch.tensor(scales)


def _latents(row: dict[str, Any], model: Model) -> Encoded:
    """The sampler's own, or what the VAE makes of the picture."""
    if row["latents"] is not None:
        return Encoded(torch.tensor(row["latents"]).view(1, *model.latent_shape), None)
    return model.encode_images(to_tensor([decode(row["image"]["bytes"])]))

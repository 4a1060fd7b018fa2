"""An unconditional flow model of the embedded world, trained here in minutes.

Pictures become latents of the embedded autoencoder (16 x 8 x 8), which a transformer of about a
million weights learns as a rectified flow. Its thousands of small mistakes are real ones: of a
network that is too small and was trained too short, drawn from with too few steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from craftune.batches import Examples
from craftune.config import ModelConfig, TrainConfig
from craftune.diffusion import Grid, Schedule
from craftune.methods.sft import SFT
from craftune.models import load
from craftune.rows import Layout, RowDenoiser, RowNetwork
from craftune.seeds import stream
from craftune.training import train
from craftune.types import Cond, Model

LATENTS = (16, 8, 8)
BLUR = 0.1
"""Standard deviation of the normal noise that data latents get, which have 1. Without it the last
step of a flow is not invertible: it maps all that is not a picture onto pictures. The decoder has
learnt to live with more (0.15 / 0.5)."""

MAIN = {"width": 96, "depth": 4}


@dataclass(frozen=True)
class World:
    """Latents to learn from, latents held out, and the autoencoder's other half."""

    model: Model
    learnt: Float[Tensor, "n 16 8 8"]
    held_out: Float[Tensor, "m 16 8 8"]


def nothing(count: int) -> Cond:
    """The condition of an unconditional model: a tensor without content, for its length."""
    return Cond({"tokens": torch.zeros(count, 1, 1)})


def flow_schedule() -> Schedule:
    """Levels sigma = 0, 0.001 ... 1 of the straight path, trained on uniformly."""
    sigmas = torch.linspace(0, 1, 1001)
    return Schedule(1 - sigmas, sigmas, "velocity")


def euler_grid(num_steps: int) -> Grid:
    """Equal steps from sigma = 1 to 0; a timestep is 1000 * sigma."""
    sigmas = torch.linspace(1, 0, num_steps + 1)
    return Grid.chain(1000 * sigmas[:-1], 1 - sigmas, sigmas)


def load_world(folder: Path, chunks: range, held_out: int = 2000) -> World:
    """Draw scenes of the world (1,000 per chunk) and encode them; kept in `folder`.

    The last `held_out` are never learnt from.
    """
    model = load(ModelConfig(path="craftune:shapes/model"), torch.device("cpu"))
    path = folder / f"latents-{chunks.start}-{chunks.stop}.pt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat([_encoded(model, seed) for seed in chunks]), path)
    latents = torch.load(path, weights_only=True).float()
    kept = len(latents) - held_out
    return World(model, latents[:kept], latents[kept:])


def _encoded(model: Model, seed: int) -> Float[Tensor, "n 16 8 8"]:
    from craftune.shapes.training.data import draw_chunk

    pixels = torch.from_numpy(draw_chunk(seed)[0]).permute(0, 3, 1, 2).float() / 255
    return torch.cat([model.encode_images(part).mean for part in pixels.split(100)]).half()


def blurred(latents: Float[Tensor, "n ..."], rng: torch.Generator) -> Float[Tensor, "n ..."]:
    """The law that the flow learns: data latents and a little noise."""
    return latents + BLUR * torch.randn(latents.shape, generator=rng)


def feed(latents: Float[Tensor, "n ..."], batch_size: int, seed: int) -> Callable[[int], Examples]:
    """Batches drawn with replacement, blurred anew each time."""

    def batch(step: int) -> Examples:
        rng = stream("flow-batch", seed, step)
        index: Int[Tensor, " b"] = torch.randint(len(latents), (batch_size,), generator=rng)
        x_0 = blurred(latents[index], rng)
        return Examples(x_0, nothing(batch_size), torch.ones(batch_size))

    return batch


def new_flow(seed: int, width: int, depth: int) -> RowDenoiser:
    """A flow with fresh weights."""
    layout = Layout(LATENTS, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RowNetwork(layout.rows, width, depth)
    return RowDenoiser(network, flow_schedule(), layout)


def train_flow(world: World, steps: int, seed: int, out: Path) -> RowDenoiser:
    """The main flow, kept in `out`; goes on from checkpoints there."""
    flow, kept = new_flow(seed, **MAIN), out / f"weights-{steps}.pt"
    if kept.is_file():
        flow.network.load_state_dict(torch.load(kept, weights_only=True))
        return flow
    config = TrainConfig(
        steps=steps,
        batch_size=64,
        micro_batch=64,
        learning_rate=1e-3,
        lr_schedule="linear",
        warmup_steps=100,
        weight_decay=0.0,
        ema_decay=0.995,
        save_every=200,
        gradient_checkpointing=False,
    )
    train(SFT(), flow, None, feed(world.learnt, 64, seed), config, seed, out)
    torch.save(flow.network.state_dict(), kept)
    return flow


def pictures(model: Model, latents: Float[Tensor, "n 16 8 8"]) -> Float[Tensor, "n 3 64 64"]:
    """Decoded, float32 in [0, 1]."""
    with torch.no_grad():
        return torch.cat([model.decode(part) for part in latents.split(100)])

"""Does inverse noise correction pay? docs/results/noise-correction.json and .svg come from here.

    python bench/noise_correction.py --out docs/results/noise-correction.json

A small unconditional flow of the embedded world is trained once (kept in --work). For each number
of its steps in CORRECTED fresh pictures are inverted once; for every seed a corrector is trained
and all points of the curve are drawn: Frechet distance to held-out pictures against FLOPs per
image. The first --held-out pictures are compared with; settings were chosen on the others.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distance_curve import curve
from jaxtyping import Float
from torch import Tensor

from craftune.errors import UserError
from craftune.noise import (
    InvertedNoise,
    NoiseCorrection,
    call_flops,
    correct,
    invert,
    trigonometric,
)
from craftune.records import read_json, write_json, write_text
from craftune.rows import Layout, RowDenoiser, RowNetwork
from craftune.sampling import sample
from craftune.seeds import stream
from craftune.shapes.training.common import prepare
from craftune.studies.common import Spread, loop
from craftune.studies.distance import features, frechet
from craftune.studies.flow import (
    LATENTS,
    World,
    blurred,
    euler_grid,
    load_world,
    nothing,
    pictures,
    train_flow,
)
from craftune.training import train

PLAIN = (4, 8, 12, 16, 32)
"""Steps of the uncorrected flow."""
CORRECTED = ((12, (2,)),)
"""Steps of the main flow, and of the corrector that was trained for them."""
CORRECTOR = {"width": 64, "depth": 2}
TOWERS = ("h", "p")


def inverted(
    main: RowDenoiser, latents: Float[Tensor, "n 16 8 8"], num_steps: int
) -> tuple[Float[Tensor, "n 16 8 8"], dict[str, Any]]:
    """Noises from which the main flow draws these latents, and how the inversion went."""
    grid, started = euler_grid(num_steps), time.process_time()
    parts = [
        invert(main, x, nothing(len(x)), None, grid, tolerance=1e-4) for x in latents.split(250)
    ]
    seconds = time.process_time() - started
    noise = torch.cat([part.noise for part in parts])
    cond, fresh = nothing(50), torch.randn(50, *LATENTS, generator=stream("known noise"))
    again = sample(main, noise[:50], cond, None, grid, sampler="euler")
    drawn = sample(main, fresh, cond, None, grid, sampler="euler")
    try:
        recovery: float | str = _relative(invert(main, drawn, cond, None, grid).noise, fresh)
    except UserError as error:
        recovery = str(error)
    return noise, {
        "examples": len(latents),
        "iterations": torch.stack([p.iterations for p in parts]).amax(0).tolist(),
        "factors": torch.stack([p.factors for p in parts]).amax(0).tolist(),
        "calls per example": float(np.mean([p.calls for p in parts])),
        "regeneration error": _relative(again, latents[:50]),
        "recovery of known noise": recovery,
        "spread of the noise": float(noise.std()),
        "cpu seconds": seconds,
    }


def unseen(count: int, folder: Path) -> Float[Tensor, "n 16 8 8"]:
    """Blurred latents of pictures that the flow has not learnt from."""
    chunks = range(907, 907 + -(-count // 1000))
    found = load_world(folder, chunks, held_out=0).learnt
    parts = zip(chunks, found.split(1000), strict=True)
    return torch.cat([blurred(part, stream("bf", chunk)) for chunk, part in parts])[:count]


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def new_corrector(seed: int) -> RowDenoiser:
    """About a tenth of the main flow's weights."""
    layout = Layout(LATENTS, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RowNetwork(layout.rows, **CORRECTOR)
    return RowDenoiser(network, trigonometric(), layout)


def learn(noise: Float[Tensor, "n 16 8 8"], steps: int, seed: int, out: Path) -> RowDenoiser:
    """A corrector trained on inverted noises by the one loop."""
    corrector = new_corrector(seed)

    def feed(step: int) -> InvertedNoise:
        index = torch.randint(len(noise), (64,), generator=stream("corrector", seed, step))
        return InvertedNoise(noise[index], nothing(64))

    train(NoiseCorrection(), corrector, None, feed, loop(steps, 1e-3), seed, out)
    return corrector


def distances(
    world: World, latents: Float[Tensor, "n 16 8 8"], wanted: dict[str, np.ndarray]
) -> dict[str, float]:
    """Tower -> Frechet distance of decoded latents to the held-out pictures."""
    images = pictures(world.model, latents)
    return {tower: frechet(features(tower, images), wanted[tower]) for tower in TOWERS}


def one_seed(
    world: World,
    main: RowDenoiser,
    noises: dict[int, Float[Tensor, "n 16 8 8"]],
    wanted: dict[str, np.ndarray],
    seed: int,
    options: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Point of the curve -> tower -> distance; all points start from the same noise."""
    fresh = torch.randn(options.images, *LATENTS, generator=stream("bench", seed))
    cond, found = nothing(options.images), {}
    for steps in PLAIN:
        drawn = sample(main, fresh, cond, None, euler_grid(steps), sampler="euler")
        found[f"{steps}"] = distances(world, drawn, wanted)
    for steps, corrector_steps in CORRECTED:
        out = options.work / f"corrector-{steps}-{seed}"
        corrector = learn(noises[steps], options.corrector_steps, seed, out)
        for few in corrector_steps:
            start = correct(corrector, fresh, cond, few)
            drawn = sample(main, start, cond, None, euler_grid(steps), sampler="euler")
            found[f"{steps}+{few}"] = distances(world, drawn, wanted)
    return found


def main() -> None:
    """Train, invert, measure, and write the table and the curve."""
    parser = argparse.ArgumentParser(description="Inverse noise correction")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flow-steps", type=int, default=5000, help="of training")
    parser.add_argument("--inverted", type=int, default=2500, help="examples")
    parser.add_argument("--corrector-steps", type=int, default=2400, help="of training")
    parser.add_argument("--images", type=int, default=1000, help="per point and seed")
    parser.add_argument("--held-out", type=int, default=1000, help="pictures compared with")
    parser.add_argument("--work", type=Path, default=Path("runs/flow"))
    parser.add_argument("--out", type=Path, default=Path("runs/noise-correction.json"))
    options = parser.parse_args()
    prepare(1, 0)
    world = load_world(options.work, range(900, 907))
    flow = train_flow(world, options.flow_steps, 0, options.work / "main-0")
    data = unseen(options.inverted, options.work)
    kept = {steps: _kept_inversion(flow, data, steps, options) for steps, _ in CORRECTED}
    held_out = pictures(world.model, world.held_out[: options.held_out])
    wanted = {tower: features(tower, held_out) for tower in TOWERS}
    rows = []
    for seed in range(options.seeds):
        path = options.work / f"seed-{seed}.json"
        if not path.is_file():
            noises = {steps: noise for steps, (noise, _) in kept.items()}
            write_json(path, one_seed(world, flow, noises, wanted, seed, options))
        rows.append(read_json(path))
    latents, cond = torch.zeros(1, *LATENTS), nothing(1)
    calls = {
        "main": call_flops(flow, latents, cond),
        "corrector": call_flops(new_corrector(0), latents, cond),
    }
    floor = blurred(world.learnt[: options.images], stream("floor"))
    some = options.images
    exact = {
        f"{steps}": sample(
            flow, noise[:some], nothing(len(noise[:some])), None, euler_grid(steps), sampler="euler"
        )
        for steps, (noise, _) in kept.items()
    }
    result = {
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("work", "out")},
        "flops per call": calls,
        "parameters": {
            "main": sum(p.numel() for p in flow.network.parameters()),
            "corrector": sum(p.numel() for p in new_corrector(0).network.parameters()),
        },
        "inversion": {str(steps): report for steps, (_, report) in kept.items()},
        "distance of real pictures": distances(world, floor, wanted),
        "distance from the inverted noises themselves": {
            steps: distances(world, drawn, wanted) for steps, drawn in exact.items()
        },
        "points": [_point(name, rows, calls) for name in rows[0]],
    }
    write_json(options.out, result)
    write_text(options.out.with_suffix(".svg"), curve(result["points"], TOWERS))
    for point in result["points"]:
        h = point["distance"]["h"]
        print(f"{point['name']:6s} {point['flops'] / 1e9:.2f} GFLOP  {h['mean']:.4f}")


def _kept_inversion(
    flow: RowDenoiser, data: Tensor, steps: int, options: argparse.Namespace
) -> tuple[Tensor, dict[str, Any]]:
    """As `inverted`, kept in the work folder."""
    path = options.work / f"inverted-{steps}.pt"
    if not path.is_file():
        torch.save(inverted(flow, data, steps), path)
    return torch.load(path, weights_only=True)


def _point(
    name: str, rows: list[dict[str, dict[str, float]]], calls: dict[str, int]
) -> dict[str, Any]:
    steps, few = (int(part) for part in f"{name}+0".split("+")[:2])
    return {
        "name": name,
        "main steps": steps,
        "corrector steps": few,
        "flops": steps * calls["main"] + few * calls["corrector"],
        "distance": {t: asdict(Spread.of([row[name][t] for row in rows])) for t in TOWERS},
        "per seed": {t: [row[name][t] for row in rows] for t in TOWERS},
    }


if __name__ == "__main__":
    main()

"""What the embedded model can do: the gates that must hold before aligning it makes sense.

    python -m craftune.shapes.measure [--split validation|test] [--draws 5] [--out gates.json]

CRAFT distils what refinement and selection bring out. So the base must know more than a plain
prompt brings out (refined prompts do better), draws of one prompt must differ (the best of five is
much better than one), and the rewards must see it (they correlate with the verifier).
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from craftune.shapes.captions import parse
from craftune.shapes.prompts import read
from craftune.shapes.refiner import refine
from craftune.shapes.rewards import shapes_a, shapes_h, shapes_i, shapes_p
from craftune.shapes.training.common import prepare
from craftune.shapes.verifier import detect, verify
from craftune.shapes.world import CATEGORIES

NUM_STEPS = 12
GUIDANCE_SCALE = 2.5
BATCH = 50
REWARDS = (shapes_h, shapes_p, shapes_i, shapes_a)

Statistic = Callable[[NDArray[np.intp]], float]
"""Of the prompts with these indices."""
Interval = dict[str, float | None]


@dataclass(frozen=True)
class Draws:
    """Pictures of every prompt, and what the verifier and the rewards say of them."""

    correct: NDArray[np.float64]
    """0 or 1, `[prompts, draws]`."""
    scores: dict[str, NDArray[np.float64]]
    """Per reward, `[prompts, draws]`."""
    images: list[Image.Image]
    """The first draw of each prompt."""


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The checkpoint, without progress bars."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Sampler:
    """A pipeline and how it is sampled."""

    pipeline: StableDiffusionPipeline
    num_steps: int = NUM_STEPS
    guidance_scale: float = GUIDANCE_SCALE


def generate(sampler: Sampler, prompts: Sequence[str], first_seed: int) -> list[Image.Image]:
    """One picture per prompt; the k-th is drawn from seed `first_seed` + k."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        texts = prompts[start : start + BATCH]
        seeds = range(first_seed + start, first_seed + start + len(texts))
        drawn: Any = sampler.pipeline(
            list(texts),
            num_inference_steps=sampler.num_steps,
            guidance_scale=sampler.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        images += drawn.images
    return images


def draw(sampler: Sampler, prompts: list[str], texts: Sequence[Sequence[str]], seed: int) -> Draws:
    """Draw every prompt once per text list: `texts[k][j]` is what draw k of prompt j is given.

    The verifier and the rewards judge by the prompt, whatever the text was.
    """
    correct, scores, first = [], {factory().name: [] for factory in REWARDS}, []
    specs = [parse(prompt) for prompt in prompts]
    for k, given in enumerate(texts):
        images = generate(sampler, given, seed + 100_000 * k)
        verdicts = [verify(s, detect(i)) for s, i in zip(specs, images, strict=True)]
        correct.append([float(verdict.correct) for verdict in verdicts])
        for factory in REWARDS:
            reward = factory()
            scores[reward.name].append(reward.score(images, prompts).numpy())
        first = first or images
    stacked = {name: np.stack(values, 1).astype(float) for name, values in scores.items()}
    return Draws(np.array(correct).T, stacked, first)


def gates(plain: Draws, refined: Draws, categories: list[str]) -> dict[str, object]:
    """Every gate with its value, 95 % interval (bootstrap over prompts) and bound."""
    rows = np.arange(len(categories))
    kinds = np.array(categories)

    def strict(i: NDArray[np.intp]) -> float:
        return float(plain.correct[i].mean())

    def gain(i: NDArray[np.intp]) -> float:
        return float(refined.correct[i].mean() - plain.correct[i].mean())

    def best(i: NDArray[np.intp]) -> float:
        return float(plain.correct[i].max(1).mean() - plain.correct[i].mean())

    measured: dict[str, object] = {
        "strict": _interval(strict, rows),
        "strict_refined": _interval(lambda i: float(refined.correct[i].mean()), rows),
        "refined_minus_plain": _interval(gain, rows),
        "best_of_n_minus_one": _interval(best, rows),
    }
    for name, pair in _correlations(plain):
        measured[name] = _interval(pair, rows)
    measured["strict_by_category"] = {
        kind: {
            "plain": round(float(plain.correct[kinds == kind].mean()), 3),
            "refined": round(float(refined.correct[kinds == kind].mean()), 3),
        }
        for kind in CATEGORIES
    }
    return measured


def _correlations(draws: Draws) -> Iterator[tuple[str, Statistic]]:
    """Pearson correlations over all pictures: rewards with the verifier, and with each other."""
    for name, scores in draws.scores.items():
        yield f"{name}~verifier", _correlation(scores, draws.correct)
    for first, second in itertools.combinations([n for n in draws.scores if n != "shapes-a"], 2):
        yield f"{first}~{second}", _correlation(draws.scores[first], draws.scores[second])


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> Statistic:
    def pearson(i: NDArray[np.intp]) -> float:
        first, second = a[i].ravel(), b[i].ravel()
        if first.std() == 0 or second.std() == 0:
            return math.nan
        return float(np.corrcoef(first, second)[0, 1])

    return pearson


def _interval(statistic: Statistic, rows: NDArray[np.intp], repeats: int = 400) -> Interval:
    rng = np.random.default_rng(0)
    values = [statistic(rng.choice(rows, len(rows))) for _ in range(repeats)]
    low, high = np.quantile(values, (0.025, 0.975))
    named = {"value": statistic(rows), "low": float(low), "high": float(high)}
    # A correlation with a constant is undefined; json has no nan.
    return {name: round(value, 3) if np.isfinite(value) else None for name, value in named.items()}


def sheet(images: list[Image.Image], columns: int = 14) -> Image.Image:
    """Pictures side by side."""
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * 66, rows * 66), "white")
    for index, image in enumerate(images):
        page.paste(image, (index % columns * 66 + 1, index // columns * 66 + 1))
    return page


def main() -> None:
    """Measure and write the gates."""
    parser = argparse.ArgumentParser(prog="python -m craftune.shapes.measure")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--prompts", type=int, help="use only so many, spread over categories")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    options = parser.parse_args()
    prepare(options.threads, options.seed)
    rows = read(options.split)
    rows = rows[:: len(rows) // options.prompts] if options.prompts else rows
    prompts = [prompt for prompt, _ in rows]
    sampler = Sampler(load_pipeline(options.model), options.num_steps, options.guidance_scale)
    rng, started = random.Random(options.seed), time.process_time()
    refined_texts = [refine(prompt, options.draws, rng) for prompt in prompts]
    plain = draw(sampler, prompts, [prompts] * options.draws, options.seed)
    refined = draw(sampler, prompts, list(zip(*refined_texts, strict=True)), options.seed + 1)
    seconds = time.process_time() - started
    report = {
        "split": options.split,
        "prompts": len(prompts),
        "draws": options.draws,
        "num_steps": options.num_steps,
        "guidance_scale": options.guidance_scale,
        "cpu_ms_per_image": round(500 * seconds / (len(prompts) * options.draws), 1),
        **gates(plain, refined, [category for _, category in rows]),
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.sheets:
        sheet(plain.images).save(options.sheets / "plain.png")
        sheet(refined.images).save(options.sheets / "refined.png")


if __name__ == "__main__":
    main()

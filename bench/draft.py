"""DRaFT-1 against DRaFT-LV on the embedded model: training reward by reward-gradient evaluations.

    python bench/draft.py [--seeds 3] [--steps 40] > docs/results/draft.json

Both arms take the same number of reward gradients per update: DRaFT-1 from 8 prompts, DRaFT-LV
(n = 2) from 4. Everything else is equal: adapters, learning rate, sampler, prompts' order. What is
compared is the reward of freshly drawn images of the base's own kind, at the same number of reward
gradients: the running mean of the last updates, and the area under the curve.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from craftune import rewards
from craftune.adapters import add_lora
from craftune.config import GenerateConfig, LoraConfig, ModelConfig, TrainConfig
from craftune.methods import DRaFT
from craftune.models import load, resolve
from craftune.records import Prompt, prompt_id, write_rows
from craftune.sampling import initial_noise
from craftune.stages.prompt_feed import prompt_feed
from craftune.training import train
from craftune.types import Model

REWARD = "shapes-p"
DRAWING = GenerateConfig(num_steps=8, guidance_scale=2.5)
ARMS = {"DRaFT-1": (8, 0), "DRaFT-LV n=2": (4, 2)}
PROBES = 32
"""Prompts, each with fixed noise, whose mean reward is taken before and after."""


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    arms = {}
    for name, (batch_size, repeats) in ARMS.items():
        found = [
            measure(seed, batch_size, repeats, options.steps, options.learning_rate)
            for seed in range(options.seeds)
        ]
        arms[name] = {"batch_size": batch_size, "repeats": repeats, "seeds": found}
    settings = vars(options) | {"reward": REWARD, "num_steps": DRAWING.num_steps}
    print(json.dumps({"settings": settings, "arms": arms, "summary": summary(arms)}, indent=1))


def measure(
    seed: int, batch_size: int, repeats: int, steps: int, learning_rate: float
) -> dict[str, Any]:
    """Train once; the curve, and the reward of the probes before and after."""
    model = load(ModelConfig("craftune:shapes/model"), torch.device("cpu"))
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        micro_batch=batch_size,
        gradient_checkpointing=False,
        learning_rate=learning_rate,
        warmup_steps=5,
        weight_decay=0.1,
        lora=LoraConfig(rank=8),
    )
    method = DRaFT(rewards={REWARD: 1.0}, repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        source = resolve("craftune:shapes/prompts/train.jsonl")
        rows = source.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(row)["prompt"] for row in rows]
        write_rows(Path(folder) / "p.jsonl", [Prompt(prompt_id(text), text) for text in texts])
        reward = {REWARD: rewards.load(REWARD)}
        path = Path(folder) / "p.jsonl"
        feed = prompt_feed(config, method, DRAWING, model, reward, seed, path)
        add_lora(model.denoiser.network, config.lora, model.lora_targets, seed)
        before = probe(model, feed.texts[:PROBES], method, feed)
        train(method, model.denoiser, None, feed, config, seed, Path(folder) / "train")
        rows = (Path(folder) / "train" / "metrics.jsonl").read_text().splitlines()
        after = probe(model, feed.texts[:PROBES], method, feed)
    curve = [json.loads(row)["reward"] for row in rows]
    norms = [json.loads(row)["grad_norm"] for row in rows]
    print(f"seed {seed}, n {repeats}: {before:.3f} -> {after:.3f}", file=sys.stderr, flush=True)
    return {
        "before": before,
        "after": after,
        "reward": [round(value, 4) for value in curve],
        "grad_norm_mean": float(np.mean(norms)),
        "reward_gradients": steps * batch_size * max(repeats, 1),
        "denoiser_calls": 2 * steps * batch_size * (DRAWING.num_steps + repeats),
    }


@torch.no_grad()
def probe(model: Model, texts: list[str], method: DRaFT, feed: Any) -> float:
    """Mean reward of fixed prompts at fixed noise, drawn in full."""
    plain = replace(method, repeats=0)
    batch = replace(feed(0), texts=texts, cond=model.encode_prompts(texts))
    draws = plain.draw(model.denoiser.schedule, batch, torch.Generator().manual_seed(7))
    draws = replace(draws, noise=initial_noise(range(len(texts)), model.latent_shape))
    return plain.loss(model.denoiser, None, batch, draws)[1]["reward"]


def summary(arms: dict[str, Any]) -> dict[str, Any]:
    """Gain of the probes: mean over the seeds and its standard error."""
    found = {}
    for name, arm in arms.items():
        gains = np.array([run["after"] - run["before"] for run in arm["seeds"]])
        found[name] = {
            "gain": float(gains.mean()),
            "standard_error": float(gains.std(ddof=1) / len(gains) ** 0.5),
            "reward_gradients": arm["seeds"][0]["reward_gradients"],
            "denoiser_calls": arm["seeds"][0]["denoiser_calls"],
        }
    return found


if __name__ == "__main__":
    main()

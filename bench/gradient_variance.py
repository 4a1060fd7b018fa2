"""How much of DRaFT's gradient varies with the noise of the last step, which DRaFT-LV averages out.

    OMP_NUM_THREADS=1 python bench/gradient_variance.py

Gradients of K = 1 at the embedded model's own weights, for the objective of bench/methods.py: 32
prompts with an image each, and 4 draws of each image's last step. Printed: the variance within
images (over those draws) and between them, summed over the weights, and the share of the former.
LV with n repeats removes 1 - 1/n of that share.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from methods import SCALES, WEIGHTS

from craftune import rewards
from craftune.config import GenerateConfig, ModelConfig, TrainConfig
from craftune.methods import DRaFT
from craftune.models import load, resolve
from craftune.records import Prompt, prompt_id, write_rows
from craftune.stages.prompt_feed import prompt_feed

IMAGES, DRAWS = 32, 4
DRAWING = GenerateConfig(sampler="ddim", num_steps=10, guidance_scale=2.5)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    model = load(ModelConfig("craftune:shapes/model"), torch.device("cpu"))
    method = DRaFT(rewards=WEIGHTS, scales=SCALES, repeats=1)
    config = TrainConfig(steps=1, batch_size=IMAGES)
    rows = resolve("craftune:shapes/prompts/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["prompt"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        write_rows(path, [Prompt(prompt_id(text), text) for text in texts])
        loaded = {name: rewards.load(name) for name in WEIGHTS}
        batch = prompt_feed(config, method, DRAWING, model, loaded, 0, path)(0)
    network = model.denoiser.network.train().requires_grad_(True)
    draws = method.draw(model.denoiser.schedule, batch, torch.Generator().manual_seed(3))
    within, means = 0.0, []
    for i in range(IMAGES):
        one, gradients = slice(i, i + 1), []
        for j in range(DRAWS):
            rng = torch.Generator().manual_seed(1000 * i + j)
            again = torch.randn(draws.again[one].shape, generator=rng)
            network.zero_grad()
            drawn = replace(draws.rows(one), again=again)
            loss, _ = method.loss(model.denoiser, None, batch.rows(one), drawn)
            loss.backward()
            parts = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
            gradients.append(torch.cat(parts))
        within += float(torch.stack(gradients).var(0).sum()) / IMAGES
        means.append(torch.stack(gradients).mean(0))
    between = float(torch.stack(means).var(0).sum()) - within / DRAWS
    share = within / (within + between)
    print(f"within images {within:.4f}, between them {between:.4f}: share {share:.1%}")


if __name__ == "__main__":
    main()

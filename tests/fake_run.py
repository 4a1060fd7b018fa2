"""A run folder as the stages leave it, with drawn pictures and made-up scores."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from craftune.config import (
    EvaluateConfig,
    ModelConfig,
    PromptsConfig,
    Recipe,
    ReportConfig,
    RunConfig,
    ScoreConfig,
)
from craftune.images import encode_png
from craftune.records import (
    CANDIDATE,
    SCORE,
    Prompt,
    canonical,
    prompt_id,
    write_json,
    write_rows,
    write_table,
)
from craftune.runs import STAGES, stage_folder
from craftune.select_config import SelectConfig
from craftune.stages import evaluate
from craftune.stages.select import choose

COLORS = {"red": (225, 40, 40), "green": (30, 160, 70), "blue": (45, 80, 225)}
SHAPES = ("circle", "square", "triangle")
TRAINING = ("shapes-h", "shapes-p", "shapes-a")
HELD_OUT = ("shapes-i", "strict")


SELECT = SelectConfig(
    roles={"h": "shapes-h", "p": "shapes-p", "a": "shapes-a"}, k=8, per_prompt_cap=2
)


@dataclass(frozen=True)
class Fake:
    """What the run is to look like."""

    train_prompts: int = 12
    test_prompts: int = 30
    variants: int = 4
    images: int = 2
    size: int = 64
    gain: float = 0.8
    held_out: tuple[str, ...] = HELD_OUT
    categories: bool = True
    texts: tuple[str, ...] = ()
    select: SelectConfig = SELECT
    resamples: int = 500
    seed: int = 0


FAKE = Fake()


def fake_run(folder: Path, fake: Fake = FAKE) -> Path:
    """Write every file that the report reads. Returns the folder."""
    rng = np.random.default_rng(fake.seed)
    for name in STAGES:
        stage_folder(folder, name).mkdir(parents=True)
    recipe = Recipe(
        run=RunConfig(name=folder.name, out=str(folder.parent), seed=fake.seed),
        model=ModelConfig("craftune:shapes/model"),
        prompts=PromptsConfig("craftune:shapes/prompts/train.jsonl"),
        score=ScoreConfig(TRAINING),
        select=fake.select,
        evaluate=EvaluateConfig(
            fake.held_out, "craftune:shapes/prompts/test.jsonl", fake.test_prompts, fake.images,
            fake.resamples,
        ),
        report=ReportConfig(),
    )  # fmt: skip
    write_json(folder / "run.json", asdict(recipe))
    prompts = _prompts(fake, rng, fake.train_prompts, "train")
    held_out = _prompts(fake, rng, fake.test_prompts, "test")
    write_rows(folder / "1-prompts" / "prompts.jsonl", prompts)
    write_rows(folder / "7-evaluate" / "prompts.jsonl", held_out)
    _pool(fake, rng, folder, prompts)
    funnel = choose(fake.select, folder / "3-generate", folder / "4-score", folder / "5-select")
    _training(folder / "6-train", rng)
    for model in ("base", "tuned"):
        _evaluation(fake, folder / "7-evaluate", held_out, model)
    rows = len(prompts) + len(held_out) + 7
    counts: dict[str, dict[str, int]] = {
        "prompts": {
            "rows": rows,
            "rejected: duplicate": 3,
            "rejected: empty": 0,
            "rejected: is an evaluation prompt": 4,
            "held_out": len(held_out),
            "not_drawn": 0,
            "prompts": len(prompts),
            "evaluation_prompts": len(held_out),
        },
        "refine": {"refined": len(prompts) * fake.variants},
        "generate": {"prompts": len(prompts), "candidates": funnel["candidates"]},
        "score": {"candidates": funnel["candidates"], "scores": funnel["candidates"] * 3},
        "select": funnel,
        "train": {"examples": funnel["selected"], "steps": 120},
        "evaluate": {f"{arm} images": len(held_out) * fake.images for arm in ("base", "tuned")},
    }
    seconds = [0.1, 0.4, 61.0, 20.5, 0.2, 95.3, 74.2]
    for name, spent in zip(STAGES, seconds, strict=False):
        write_done(folder, name, counts[name], spent)
    return folder


def write_done(folder: Path, name: str, counts: dict[str, int], seconds: float) -> None:
    outputs = {"model/unet/diffusion_pytorch_model.safetensors": "ab" * 32}
    record = {
        "stage": name,
        "config": {},
        "code": {},
        "inputs": {},
        "outputs": outputs if name == "train" else {},
        "counts": counts,
        "seconds": seconds,
        "device": "cpu",
        "versions": {"python": "3.11.4", "craftune": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6"},
    }
    write_json(stage_folder(folder, name) / "done.json", record)


def picture(text: str, seed: int, size: int, right: bool) -> bytes:
    """What the prompt names, or something else in another colour."""
    rng = np.random.default_rng([seed, len(text)])
    shade = int(rng.choice([245, 200, 30]))
    image = Image.new("RGB", (size, size), (shade, shade, shade))
    draw = ImageDraw.Draw(image)
    words = text.split()
    colors = [c for c in COLORS if c in words] or ["red"]
    shapes = [s for s in SHAPES if s in words] or ["circle"]
    for i, shape in enumerate(shapes):
        color = colors[i % len(colors)] if right else str(rng.choice(list(COLORS)))
        radius = size * (0.26 if len(shapes) == 1 else 0.18)
        x, y = (0.3 + 0.4 * i) * size if len(shapes) > 1 else size / 2, size * 0.5
        x, y = x + rng.normal() * size / 30, y + rng.normal() * size / 15
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, COLORS[color])
        elif shape == "square":
            draw.rectangle(box, COLORS[color])
        else:
            draw.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], COLORS[color])
    return encode_png(image)


def _prompts(fake: Fake, rng: np.random.Generator, n: int, split: str) -> list[Prompt]:
    found = {}
    for number in range(n):
        two = number % 3 == 2
        things = [f"{rng.choice(list(COLORS))} {rng.choice(SHAPES)}" for _ in range(1 + two)]
        text = f"{split} {number}: a " + " left of a ".join(things)
        if split == "test" and number < len(fake.texts):
            text = fake.texts[number]
        category = ("single", "color", "position")[number % 3] if fake.categories else ""
        found[text] = Prompt(prompt_id(text), text, category)
    return list(found.values())


def _scores(rng: np.random.Generator, quality: float, names: tuple[str, ...]) -> dict[str, float]:
    scale = {"shapes-h": (0.21, 0.02), "shapes-p": (21.0, 1.0), "shapes-a": (5.2, 0.4)}
    values = {}
    for name in names:
        if name == "strict":
            values[name] = float(quality > 0.1)
        else:
            center, spread = scale.get(name, (0.0, 1.0))
            values[name] = center + spread * (0.7 * quality + 0.7 * rng.normal())
    return values


def _pool(fake: Fake, rng: np.random.Generator, folder: Path, prompts: list[Prompt]) -> None:
    candidates: list[dict[str, Any]] = []
    scores = []
    for prompt in prompts:
        for variant in range(fake.variants + 1):
            quality = rng.normal() + 0.5 * (variant > 0)
            refined = prompt.prompt
            if variant:
                refined += f", studio light, crisp edges, plain background, take {variant}"
            name = f"{prompt.id}-{variant}-0"
            seed = int(rng.integers(1 << 30))
            candidates.append(
                {
                    "id": name,
                    "prompt_id": prompt.id,
                    "prompt": prompt.prompt,
                    "refined_prompt": refined,
                    "category": prompt.category,
                    "variant": variant,
                    "sample": 0,
                    "seed": seed,
                    "sampler": "ddim",
                    "num_steps": 20,
                    "guidance_scale": 4.0,
                    "model": "craftune:shapes/model",
                    "image": {
                        "bytes": picture(prompt.prompt, seed, fake.size, quality > 0),
                        "path": None,
                    },
                    "latents": [0.0],
                }
            )
            scores += [
                {"candidate": name, "reward": k, "value": v, "identity": _identity(k)}
                for k, v in _scores(rng, quality, TRAINING).items()
            ]
    half = len(candidates) // 2
    write_table(folder / "3-generate" / "part-00000.parquet", candidates[:half], CANDIDATE)
    write_table(folder / "3-generate" / "part-00001.parquet", candidates[half:], CANDIDATE)
    write_table(folder / "4-score" / "part-00000.parquet", scores, SCORE)


def _identity(name: str) -> str:
    return canonical({"name": name, "version": "1", "sha256": "cd" * 32, "dtype": "float32"})


def _evaluation(fake: Fake, folder: Path, prompts: list[Prompt], model: str) -> None:
    """Equal seeds, and luck shared by both models as equal noise shares it."""
    rng = np.random.default_rng([fake.seed, 7])
    images, scores = [], []
    for prompt in prompts:
        for sample in range(fake.images):
            seed, luck, own = int(rng.integers(1 << 30)), rng.normal(), 0.5 * rng.normal(size=2)
            values = []
            for arm, gain in enumerate((0.0, fake.gain)):
                quality = luck + own[arm] + gain
                values.append((quality, _scores(rng, quality, (*TRAINING, *fake.held_out))))
            quality, found = values[model == "tuned"]
            images.append(
                {
                    "id": f"{model}-{prompt.id}-{sample}",
                    "model": model,
                    "prompt_id": prompt.id,
                    "prompt": prompt.prompt,
                    "category": prompt.category,
                    "sample": sample,
                    "seed": seed,
                    "image": {
                        "bytes": picture(prompt.prompt, seed, fake.size, quality > 0.1),
                        "path": None,
                    },
                }
            )
            key = {"model": model, "prompt_id": prompt.id, "sample": sample}
            scores += [
                {**key, "reward": k, "value": v, "identity": _identity(k)} for k, v in found.items()
            ]
    write_table(folder / f"images-{model}-00000.parquet", images, evaluate.IMAGE)
    write_table(folder / f"scores-{model}-00000.parquet", scores, evaluate.SCORE)


def _training(folder: Path, rng: np.random.Generator) -> None:
    (folder / "model").mkdir(parents=True)
    write_json(folder / "model" / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    lines = []
    for step in range(120):
        error = 0.12 + 0.06 * np.exp(-step / 30) + 0.01 * rng.normal()
        line = {
            "step": step,
            "loss": round(1.2 * error, 6),
            "error": round(error, 6),
            "grad_norm": round(0.4 + 0.6 * np.exp(-step / 15) + 0.08 * abs(rng.normal()), 6),
            "learning_rate": 5e-5 * min(1.0, (step + 1) / 10),
            "seconds": round(0.8 + 0.01 * rng.normal(), 4),
        }
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def with_report(folder: Path, config: ReportConfig, **run: Any) -> None:
    """Change the [report] and [run] sections of run.json."""
    recipe = json.loads((folder / "run.json").read_text())
    recipe["report"] = asdict(config)
    recipe["run"] = asdict(replace(RunConfig(**recipe["run"]), **run))
    write_json(folder / "run.json", recipe)

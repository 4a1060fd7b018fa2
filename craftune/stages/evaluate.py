"""Stage `evaluate`: base and tuned draw the same held-out prompts with the same noise.

So do the scales between them that evaluate.scales names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from craftune import rewards
from craftune.config import EvaluateConfig, GenerateConfig
from craftune.processes import ALONE, Processes
from craftune.progress import track
from craftune.records import Prompt, read_rows, read_table, write_table
from craftune.seeds import stream_seed
from craftune.stages.generate import Request, draw_images
from craftune.stages.score import cut_prompts, score_rows, scored_with
from craftune.types import Model, Reward

IMAGE = pa.schema(
    [
        ("id", pa.string()),
        ("model", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("category", pa.string()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
)
"""One image of the comparison; `model` is "base", "tuned" or a scale (`mixing.scale_arm`)."""

SCORE = pa.schema(
    [
        ("model", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("reward", pa.string()),
        ("value", pa.float32()),
        ("identity", pa.dictionary(pa.int32(), pa.string())),
    ]
)
"""One number that one reward gave to one image of the comparison."""


def evaluate(
    arm: str,
    config: EvaluateConfig,
    drawing: GenerateConfig,
    model: Model,
    names: tuple[str, ...],
    seed: int,
    prompts: Path,
    out: Path,
    load: Callable[[str], Reward] = rewards.load,
    processes: Processes = ALONE,
    count: int = 0,
) -> dict[str, int]:
    """Draw and score one model's images. Returns their number, and which prompts were cut.

    Args:
        arm: what the model is called in the files: "base", "tuned", or `mixing.scale_arm`.
        drawing: sampler settings, as for the pool.
        names: rewards, training and held-out alike.
        seed: the noise depends on it, the prompt and the image's number, not on the arm.
        prompts: evaluation.jsonl.
        out: receives images-<arm>-*.parquet and scores-<arm>-*.parquet; finished ones are kept.
        load: a reward by its name, on the device where it is to run.
        processes: those that share the images; each calls this function.
        count: draw the first this many prompts; 0 takes all.
    """
    rows = _plan(arm, config, seed, read_rows(Prompt, prompts)[: count or None])
    size = drawing.shard_size
    empty = model.encode_prompts([""])
    loaded = [load(name) for name in dict.fromkeys(names)]
    starts = range(0, len(rows), size)
    files = {start: _files(out, arm, start, size) for start in starts}
    left = processes.told(lambda: [s for s in starts if not _finished(loaded, *files[s])])
    finished = min(len(rows), (len(starts) - len(left)) * size)
    mine, step = processes.share(left), size * processes.count
    for start in track(mine, f"evaluate {arm}", len(rows), "image", step, finished):
        shard = rows[start : start + size]
        images, scores = files[start]
        if not images.is_file():
            requests = [Request(row["prompt"], row["seed"]) for row in shard]
            drawn = draw_images(drawing, model, model.denoiser, requests, empty)
            made = [row | {"image": d["image"]} for row, d in zip(shard, drawn, strict=True)]
            write_table(images, made, IMAGE)
        table = read_table(images).to_pylist()
        by_id = {row["id"]: row for row in table}
        scored = [
            {k: by_id[s["candidate"]][k] for k in ("model", "prompt_id", "sample")} | s
            for s in score_rows(loaded, table, 64)
        ]
        write_table(scores, [{k: s[k] for k in SCORE.names} for s in scored], SCORE)
    processes.settle(path for pair in files.values() for path in pair)
    texts = dict.fromkeys(row["prompt"] for row in rows)
    return {f"{arm} images": len(rows)} | cut_prompts(loaded, texts)


def _finished(loaded: list[Reward], images: Path, scores: Path) -> bool:
    return images.is_file() and scored_with(loaded, scores)


def _files(out: Path, arm: str, start: int, size: int) -> tuple[Path, Path]:
    """Where the images and the scores of a shard go."""
    number = f"{arm}-{start // size:05d}.parquet"
    return out / f"images-{number}", out / f"scores-{number}"


def _plan(
    arm: str, config: EvaluateConfig, seed: int, prompts: list[Prompt]
) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{arm}-{prompt.id}-{k}",
            "model": arm,
            "prompt_id": prompt.id,
            "prompt": prompt.prompt,
            "category": prompt.category,
            "sample": k,
            "seed": stream_seed("evaluate", seed, prompt.id, k),
        }
        for prompt in prompts
        for k in range(config.images_per_prompt)
    ]

"""Stage evaluate: base and tuned draw the same prompts with the same noise."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toy import kept_checkpoint, load_sd

from craftune import rewards
from craftune.config import EvaluateConfig, GenerateConfig
from craftune.records import Prompt, prompt_id, read_table, write_rows
from craftune.stages.evaluate import evaluate
from craftune.types import Model, Reward

NAMES = ("jpeg-compressibility", "jpeg-incompressibility")
DRAWING = GenerateConfig(num_steps=2, guidance_scale=1.0, shard_size=3, batch_size=2)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_sd(kept_checkpoint())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation.jsonl"
    texts = [("a red dog", "animal"), ("two cats", "count"), ("a cup", "")]
    write_rows(path, [Prompt(prompt_id(text), text, kind) for text, kind in texts])
    return path


def run(
    arm: str,
    model: Model,
    prompts: Path,
    names: tuple[str, ...] = NAMES,
    drawing: GenerateConfig = DRAWING,
    seed: int = 0,
) -> dict[str, int]:
    config = EvaluateConfig(images_per_prompt=2)
    return evaluate(arm, config, drawing, model, names, seed, prompts, prompts.parent)


def images(prompts: Path, arm: str) -> list[dict]:
    return read_table(prompts.parent.glob(f"images-{arm}-*.parquet")).to_pylist()


def test_both_arms_draw_the_same_with_the_same_noise(model: Model, prompts: Path) -> None:
    """With one model for both, every picture is the same, byte by byte."""
    assert run("base", model, prompts) == {"base images": 6}
    assert run("tuned", model, prompts) == {"tuned images": 6}
    base, tuned = images(prompts, "base"), images(prompts, "tuned")
    keys = ("prompt_id", "prompt", "category", "sample", "seed", "image")
    assert [{k: row[k] for k in keys} for row in base] == [
        {k: row[k] for k in keys} for row in tuned
    ]
    assert {row["model"] for row in tuned} == {"tuned"}
    assert len({row["image"]["bytes"] for row in base}) == 6  # two different ones per prompt
    assert len({row["seed"] for row in base}) == 6


def test_every_image_has_every_score(model: Model, prompts: Path) -> None:
    run("base", model, prompts)
    scores = read_table(prompts.parent.glob("scores-base-*.parquet")).to_pylist()
    assert len(scores) == 12
    keys = {(row["prompt_id"], row["sample"], row["reward"]) for row in scores}
    assert keys == {
        (row["prompt_id"], row["sample"], name) for row in images(prompts, "base") for name in NAMES
    }
    values = {(row["prompt_id"], row["sample"], row["reward"]): row["value"] for row in scores}
    for image in images(prompts, "base"):
        at = (image["prompt_id"], image["sample"])
        assert values[(*at, NAMES[0])] == -values[(*at, NAMES[1])]


def test_a_reward_named_twice_scores_once(model: Model, prompts: Path) -> None:
    run("base", model, prompts, (NAMES[0], NAMES[0]))
    assert read_table(prompts.parent.glob("scores-base-*.parquet")).num_rows == 6


def test_the_noise_depends_on_seed_prompt_and_number_alone(model: Model, prompts: Path) -> None:
    run("base", model, prompts)
    few = images(prompts, "base")
    for path in prompts.parent.glob("*.parquet"):
        path.unlink()
    run("base", model, prompts, drawing=GenerateConfig(2 and "ddim", 2, 1.0), seed=1)
    assert not {row["seed"] for row in few} & {row["seed"] for row in images(prompts, "base")}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A reward that notes how many images it was shown."""
    seen: list[int] = []

    def score(shown: list, texts: list[str]) -> torch.Tensor:
        seen.append(len(texts))
        return torch.arange(float(len(shown)))

    made = Reward("counted", score, {"name": "counted", "version": "1"})
    monkeypatch.setitem(rewards.REWARDS, "counted", lambda: made)
    rewards.unload()
    yield seen
    rewards.unload()


@pytest.mark.parametrize(
    ("lost", "drawn", "scored"),
    [("images-base-00001", 1, [3]), ("scores-base-00001", 0, [3]), ("nothing", 0, [])],
)
def test_finished_shards_are_kept(
    model: Model, prompts: Path, counted: list[int], lost: str, drawn: int, scored: list[int]
) -> None:
    run("base", model, prompts, ("counted",))
    before = images(prompts, "base")
    (prompts.parent / f"{lost}.parquet").unlink(missing_ok=True)
    counted.clear()
    stamps = {path: path.stat().st_mtime_ns for path in prompts.parent.glob("images-*")}
    run("base", model, prompts, ("counted",))
    assert counted == scored
    now = {path: path.stat().st_mtime_ns for path in prompts.parent.glob("images-*")}
    assert len(now.items() - stamps.items()) == drawn
    assert images(prompts, "base") == before

"""Stage score: one finite number per candidate and reward, against the original prompt."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from craftune import rewards
from craftune.config import ScoreConfig
from craftune.errors import UserError
from craftune.images import encode_png
from craftune.records import CANDIDATE, read_table, write_table
from craftune.stages.score import score
from craftune.types import Reward

Score = Callable[[list[Image.Image], list[str]], Tensor]


def write_pool(folder: Path, sizes: tuple[int, ...] = (5, 5, 2)) -> Path:
    """Shards of candidates; candidate i is a picture of grey level i."""
    folder.mkdir()
    made = 0
    for number, size in enumerate(sizes):
        rows = []
        for i in range(made, made + size):
            image = {"bytes": encode_png(Image.new("RGB", (4, 4), (i, i, i))), "path": None}
            texts = {"prompt": f"prompt {i // 3}", "refined_prompt": f"rewrite {i}"}
            rows.append(dict.fromkeys(CANDIDATE.names) | {"id": f"c{i}", "image": image} | texts)
        made += size
        write_table(folder / f"part-{number:05d}.parquet", rows, CANDIDATE)
    return folder


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_pool(tmp_path / "pool")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Put a reward into the table for one test."""

    def install(function: Score, name: str = "mine", version: str = "1") -> str:
        made = Reward(name, function, {"name": name, "version": version})
        monkeypatch.setitem(rewards.REWARDS, name, lambda: made)
        rewards.unload()
        return name

    yield install
    rewards.unload()


def level(images: list[Image.Image], prompts: list[str]) -> Tensor:
    del prompts
    return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])  # type: ignore[index]


def found(out: Path, name: str = "mine") -> dict[str, float]:
    rows = read_table(out.glob("part-*.parquet")).to_pylist()
    return {row["candidate"]: row["value"] for row in rows if row["reward"] == name}


def test_each_candidate_gets_its_own_score(pool: Path, out: Path, reward: Any) -> None:
    names = (reward(level), reward(lambda i, p: -level(i, p), "minus"))
    counts = score(ScoreConfig(names, batch_size=3), pool, out)
    assert counts == {"candidates": 12, "scores": 24}
    assert found(out) == {f"c{i}": float(i) for i in range(12)}
    assert found(out, "minus") == {f"c{i}": -float(i) for i in range(12)}


def test_rewards_see_the_original_prompt(pool: Path, out: Path, reward: Any) -> None:
    """Eq. 3: a rewrite must not change what the image is judged by."""
    asked: list[str] = []
    name = reward(lambda i, p: asked.extend(p) or level(i, p))  # type: ignore[func-returns-value]
    score(ScoreConfig((name,)), pool, out)
    assert asked == [f"prompt {i // 3}" for i in range(12)]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_changes_no_number(
    pool: Path, out: Path, reward: Any, batch_size: int
) -> None:
    score(ScoreConfig((reward(level),), batch_size), pool, out)
    assert found(out) == {f"c{i}": float(i) for i in range(12)}


def test_finished_shards_are_kept(pool: Path, out: Path, reward: Any) -> None:
    score(ScoreConfig((reward(level),)), pool, out)
    (out / "part-00001.parquet").unlink()
    times = [(out / f"part-0000{i}.parquet").stat().st_mtime_ns for i in (0, 2)]
    time.sleep(0.01)
    calls = []
    name = reward(lambda i, p: calls.append(len(i)) or level(i, p))  # type: ignore[func-returns-value]
    score(ScoreConfig((name,)), pool, out)
    assert calls == [5]
    assert [(out / f"part-0000{i}.parquet").stat().st_mtime_ns for i in (0, 2)] == times
    assert len(found(out)) == 12


def test_shards_of_another_version_are_scored_again(pool: Path, out: Path, reward: Any) -> None:
    score(ScoreConfig((reward(level),)), pool, out)
    (out / "part-00001.parquet").unlink()
    score(ScoreConfig((reward(lambda i, p: level(i, p) + 100, version="2"),)), pool, out)
    assert min(found(out).values()) == 100


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda i, p: level(i, p)[:-1], r"'mine' returned shape \(2,\) for 3 images"),
        (lambda i, p: level(i, p)[:, None], r"returned shape \(3, 1\)"),
        (lambda i, p: level(i, p) / 0, "returned nan for image c0 .*'prompt 0'"),
        (lambda i, p: 1 / (level(i, p) - 4), "returned inf for image c4 .*'prompt 1'"),
    ],
)
def test_scores_that_are_none(
    pool: Path, out: Path, reward: Any, function: Score, said: str
) -> None:
    with pytest.raises(UserError, match=f"reward {said}|{said}"):
        score(ScoreConfig((reward(function),), batch_size=3), pool, out)


def test_a_prompt_that_a_reward_cannot_judge(pool: Path, out: Path) -> None:
    with pytest.raises(UserError, match=r"'shapes-verifier' cannot score: .*'prompt 0'"):
        score(ScoreConfig(("shapes-verifier",)), pool, out)


def test_a_mistake_of_our_own_is_no_fault_of_the_user(pool: Path, out: Path, reward: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        score(ScoreConfig((reward(lambda i, p: 1 // 0),)), pool, out)

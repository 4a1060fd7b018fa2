"""Stage `score`: the pool -> one number per candidate and reward, against the original prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from craftune import rewards
from craftune.config import ScoreConfig
from craftune.errors import UserError
from craftune.images import decode
from craftune.progress import track
from craftune.records import SCORE, canonical, read_table, write_table
from craftune.types import Reward


def score(config: ScoreConfig, pool: Path, out: Path) -> dict[str, int]:
    """Score every candidate with every reward (CRAFT, Eq. 3: always the original prompt).

    Finished shards are kept: a killed run goes on with the first missing one.

    Args:
        pool: folder of part-*.parquet with the schema `records.CANDIDATE`.
        out: receives part-*.parquet of the same names with the schema `records.SCORE`.

    Raises:
        UserError: a reward gave the wrong number of scores or one that is not finite.
    """
    loaded = [rewards.load(name) for name in config.rewards]
    shards = sorted(pool.glob("part-*.parquet"))
    count = 0
    for shard in track(shards, "score", len(shards), "shard"):
        rows = read_table(shard, ["id", "prompt", "image"]).to_pylist()
        count += len(rows)
        if not (out / shard.name).is_file():
            write_table(out / shard.name, score_rows(loaded, rows, config.batch_size), SCORE)
    return {"candidates": count, "scores": count * len(loaded)}


def score_rows(
    loaded: Sequence[Reward], rows: list[dict[str, Any]], batch_size: int
) -> list[dict[str, Any]]:
    """Rows of `records.SCORE` for rows with id, prompt and image; each image is decoded once."""
    scored = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        images = [decode(row["image"]["bytes"]) for row in batch]
        names, prompts = [row["id"] for row in batch], [row["prompt"] for row in batch]
        for reward in loaded:
            identity = canonical(dict(reward.identity))
            values = checked_score(reward, images, prompts, names)
            scored += [
                {"candidate": name, "reward": reward.name, "value": value, "identity": identity}
                for name, value in zip(names, values.tolist(), strict=True)
            ]
    return scored


@torch.no_grad()
def checked_score(
    reward: Reward, images: list[Image.Image], prompts: list[str], names: list[str]
) -> Tensor:
    """A reward's scores, `[b]`.

    Raises:
        UserError: not one finite number per image; names the reward and the candidate.
    """
    values = reward.score(images, prompts)
    if values.shape != (len(images),):
        raise UserError(
            f"reward {reward.name!r} returned shape {tuple(values.shape)} for {len(images)} "
            "images; it must return one number per image"
        )
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"reward {reward.name!r} returned {values[bad[0]].item()} for candidate "
            f"{names[bad[0]]} (prompt {prompts[bad[0]]!r}); mend the reward and run again, "
            "scores of finished shards are kept"
        )
    return values.float()

"""Stage `score`: the pool -> one number per candidate and reward, against the original prompt."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from craftune import rewards
from craftune.config import ScoreConfig
from craftune.processes import ALONE, Processes
from craftune.progress import track
from craftune.records import SCORE, canonical, read_table, write_table
from craftune.scoring.batches import Batch, Item, score_batches
from craftune.types import Reward

CUT = "prompts cut at "
"""How the counts begin of prompts that a reward reads only in part."""


def score(
    config: ScoreConfig,
    pool: Path,
    out: Path,
    load: Callable[[str], Reward] = rewards.load,
    processes: Processes = ALONE,
) -> dict[str, int]:
    """Score every candidate with every reward (CRAFT, Eq. 3: always the original prompt).

    Finished shards are kept: a killed run goes on with the first missing one. A shard that was
    scored with another version of a reward counts as missing.

    Args:
        pool: folder of part-*.parquet with the schema `records.CANDIDATE`.
        out: receives part-*.parquet of the same names with the schema `records.SCORE`.
        load: a reward by its name, on the device where it is to run.
        processes: those that share the shards; each calls this function.

    Raises:
        UserError: a reward failed, gave the wrong number of scores or one that is not finite.
    """
    loaded = [load(name) for name in config.rewards]
    names = processes.told(lambda: sorted(path.name for path in pool.glob("part-*.parquet")))
    left = processes.told(lambda: [n for n in names if not scored_with(loaded, out / n)])
    mine, finished = processes.share(left), len(names) - len(left)
    for name in track(mine, "score", len(names), "shard", processes.count, finished):
        rows = read_table(pool / name, ["id", "prompt", "image"]).to_pylist()
        write_table(out / name, score_rows(loaded, rows, config.batch_size), SCORE)
    processes.settle(out / name for name in names)
    prompts = read_table([pool / name for name in names], ["prompt"])["prompt"]
    counts = {"candidates": len(prompts), "scores": len(prompts) * len(loaded)}
    return counts | cut_prompts(loaded, prompts.unique().to_pylist())


def cut_prompts(loaded: Sequence[Reward], prompts: Iterable[str]) -> dict[str, int]:
    """How many of these distinct prompts each reward reads only in part, for the log."""
    prompts, counts = list(prompts), {}
    for reward in loaded:
        cut = sum(reward.limit.cuts(prompt) for prompt in prompts) if reward.limit else 0
        if reward.limit and cut:
            counts[f"{CUT}{reward.limit.tokens} tokens by {reward.name}"] = cut
    return counts | {"prompts": len(prompts)} if counts else {}


def scored_with(loaded: Sequence[Reward], path: Path) -> bool:
    """Whether this file of scores is there, and of these very rewards."""
    if not path.is_file():
        return False
    found = read_table(path, ["reward", "identity"]).group_by(["reward", "identity"]).aggregate([])
    return {(row["reward"], row["identity"]) for row in found.to_pylist()} == {
        (reward.name, canonical(dict(reward.identity))) for reward in loaded
    }


def score_rows(
    loaded: Sequence[Reward], rows: list[dict[str, Any]], batch_size: int
) -> list[dict[str, Any]]:
    """Rows of `records.SCORE` for rows with id, prompt and image; each image is decoded once.

    Raises:
        UserError: an image that cannot be read or scored; names it.
    """
    items = [Item(row["id"], row["prompt"], row["image"]["bytes"]) for row in rows]
    identities = {reward.name: canonical(dict(reward.identity)) for reward in loaded}
    starts = range(0, len(items), batch_size)
    batches = (Batch(None, items[start : start + batch_size]) for start in starts)
    return [
        {"candidate": item.name, "reward": name, "value": value, "identity": identities[name]}
        for _, scored in score_batches(loaded, batches, reject=False)
        for name, values in scored.values.items()
        for item, value in zip(scored.items, values.tolist(), strict=True)
    ]

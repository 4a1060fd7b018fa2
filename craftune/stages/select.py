"""Stage `select`: the scored pool -> the training set, with every candidate's verdict."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from craftune.errors import UserError
from craftune.explain import reason
from craftune.identities import one_identity_each
from craftune.records import read_table, write_json, written
from craftune.select_config import SelectConfig
from craftune.selection import NothingSelected, Selection, Status, select
from craftune.stages.keys import copies

POOL_COLUMNS = ["id", "prompt_id", "prompt", "refined_prompt", "category", "variant", "sample"]


@dataclass(frozen=True)
class Pool:
    """A scored pool as dense arrays; cell (group, column) of the flat row i is (row[i], column[i]).

    A column stands for one variant and sample in every group: 0 is the plain prompt, then come the
    samples of variant 1, of variant 2 and so on. Where a group lacks an image, its cell is empty.

    Attributes:
        table: `POOL_COLUMNS` of every candidate, in pool order.
        names: of the rewards.
        scores: float32 `[rewards, groups, columns]`, NaN where a candidate has no score.
        present: `[groups, columns]`.
        keys: `[groups, columns]`, equal for copies; None where none were asked for.
    """

    table: pa.Table
    names: tuple[str, ...]
    scores: np.ndarray
    present: np.ndarray
    row: np.ndarray
    column: np.ndarray
    keys: np.ndarray | None = None


def load_pool(pool: Path, scores: Path, key: str = "") -> Pool:
    """Join the pool's shards with its scores.

    Args:
        key: the function that says which candidates are copies, see `stages.keys`; "" for none.

    Raises:
        UserError: a reward scored with two identities, a score names no candidate, or two
            candidates are of the same prompt, variant and sample.
    """
    table = read_table(pool.glob("part-*.parquet"), POOL_COLUMNS)
    scored = read_table(scores.glob("part-*.parquet"))
    one_identity_each({str(scores): scored}, "run with --redo score")
    prompt = table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    variant, sample = table["variant"].to_numpy(), table["sample"].to_numpy()
    samples = int(sample.max()) + 1
    column = np.where(variant == 0, sample, 1 + (variant - 1) * samples + sample).astype(np.int64)

    rewards = scored["reward"].combine_chunks().dictionary_encode()
    names = tuple(rewards.dictionary.to_pylist())
    where = pc.index_in(scored["candidate"], table["id"].combine_chunks())  # type: ignore[attr-defined]
    if where.null_count:
        raise UserError(f"{scores}: scores of candidates that the pool lacks; --redo score")
    where = where.to_numpy()
    shape = (int(prompt.max()) + 1, 1 + int(variant.max()) * samples)
    if len(np.unique(prompt * shape[1] + column)) != len(prompt):
        raise UserError(f"{pool}: two candidates of one prompt and variant; --redo generate")
    values = np.full((len(names), *shape), np.nan, np.float32)
    values[rewards.indices.to_numpy(), prompt[where], column[where]] = scored["value"].to_numpy()
    present = np.zeros(shape, bool)
    present[prompt, column] = True
    keys = np.zeros(shape, np.int64) if key else None
    if keys is not None:
        keys[prompt, column] = copies(key, pool)
    return Pool(table, names, values, present, prompt, column, keys)


def choose(config: SelectConfig, pool: Path, scores: Path, out: Path) -> dict[str, int]:
    """Select, and write down the verdict on every candidate.

    Args:
        pool: folder of the stage `generate`.
        scores: folder of the stage `score`.
        out: receives selection.parquet (a row per candidate) and selection.json (statistics).

    Raises:
        UserError: nothing passes the filter, or the settings do not fit the pool.
    """
    loaded = load_pool(pool, scores, config.accept.key)
    try:
        found = select(config, loaded.names, loaded.scores, loaded.present, loaded.keys)
    except (NothingSelected, ValueError) as error:
        raise UserError(str(error)) from None
    _write_verdicts(config, loaded, found, out / "selection.parquet")
    write_json(
        out / "selection.json",
        {
            "funnel": found.funnel,
            "keeps": found.keeps,
            "scale": config.scale,
            "scales": {name: list(scale) for name, scale in found.scales.items()},
            "weights": {config.roles.get(k, k): w for k, w in config.weights.items()},
            **({"accept": {"rule": config.accept.rule, **found.accept}} if found.accept else {}),
        },
    )
    return found.funnel


def _write_verdicts(config: SelectConfig, pool: Pool, found: Selection, path: Path) -> None:
    at = (pool.row, pool.column)
    names = np.array([status.name.lower() for status in Status])
    columns = {
        "candidate": pool.table["id"],
        **{name: pool.table[name] for name in POOL_COLUMNS[1:]},
        "composite": found.composite[at],
        "gain": found.gain[at],
        "advantage": found.advantage[at],
        "passes": found.passes[pool.row],
        **({"log_kappa": found.log_kappa[at]} if found.accept else {}),
        "eligible": found.eligible[at],
        "rank": found.rank[at],
        "selected": found.selected[at],
        "status": pa.array(names[found.status[at]]),
        "reason": [reason(found, config, int(g), int(c)) for g, c in zip(*at, strict=True)],
    }
    with written(path) as partial:
        pq.write_table(pa.table(columns), partial, compression="zstd")

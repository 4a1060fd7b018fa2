"""What the report reads of a run folder: plain arrays, base and tuned aligned image by image."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from craftune.errors import UserError
from craftune.identities import one_identity_each
from craftune.methods import build
from craftune.mixing import scale_arm
from craftune.records import read_json, read_table
from craftune.runs import NEEDS, done, stage_folder

KEY = ["prompt_id", "sample"]


@dataclass(frozen=True)
class Evaluation:
    """Image pairs (one prompt, one seed, both models) in order of prompt id and sample.

    Attributes:
        ids: of the p prompts, sorted.
        texts: prompt of each.
        categories: of each; "" where it has none.
        prompt: position in `ids` of each of the n pairs.
        sample: number of the pair within its prompt.
        seed: shared by both images of a pair.
        base: reward -> scores of the base model's images; first the training rewards, then the
            held-out ones.
        tuned: the same for the tuned model.
        training: names of the rewards that scored the pool, or that were maximised; the others
            are held out. Empty where the model learnt from pictures.
        identities: reward -> what it was measured with.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    categories: tuple[str, ...]
    prompt: Int[np.ndarray, " n"]
    sample: Int[np.ndarray, " n"]
    seed: Int[np.ndarray, " n"]
    base: Mapping[str, Float[np.ndarray, " n"]]
    tuned: Mapping[str, Float[np.ndarray, " n"]]
    training: tuple[str, ...]
    identities: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        folder: where it lies.
        recipe: resolved, by section.
        stages: what each finished stage recorded, by name.
        evaluation: the comparison.
        selection: selection.json; of a run without a pool what was maximised, or where nothing was
            the mean of all rewards, as its "weights" and "scales".
        verdicts: selection.parquet, a row per candidate; empty without a pool.
        pool: reward -> raw scores, in the order of `verdicts`; empty without a pool.
        metrics: metric -> one value per logged step; "step" is one of them.
    """

    folder: Path
    recipe: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    evaluation: Evaluation
    selection: Mapping[str, Any]
    verdicts: pa.Table
    pool: Mapping[str, Float[np.ndarray, " n"]]
    metrics: Mapping[str, Float[np.ndarray, " steps"]]


def read_run(folder: Path) -> Run:
    """Read what the stages wrote.

    Raises:
        UserError: a stage is not finished, a file is damaged, or base and tuned are not paired.
    """
    recipe = read_json(folder / "run.json")
    method = build(recipe["method"]["name"], recipe["method"]["settings"])
    stages = {name: done(folder, name) for name in NEEDS[method.fed_with] if name != "report"}
    missing = [name for name, record in stages.items() if record is None]
    if missing:
        raise UserError(
            f"{stage_folder(folder, missing[0])}: stage {missing[0]!r} has not run, but the report "
            f"reads it; run `craftune {missing[0]}` or `craftune run` first"
        )
    if method.fed_with == "examples":
        verdicts = read_table(stage_folder(folder, "select") / "selection.parquet")
        selection = read_json(stage_folder(folder, "select") / "selection.json")
        pool = _pool_scores(stage_folder(folder, "score"), verdicts["candidate"])
        training = tuple(pool)
    elif method.fed_with == "pictures":
        # No reward was trained on; the composite is the mean of all, in spreads of the base.
        verdicts, pool, training = pa.table({}), {}, ()
        names = dict.fromkeys((*recipe["score"]["rewards"], *recipe["evaluate"]["rewards"]))
        selection = {"weights": dict.fromkeys(names, 1 / len(names)), "scales": {}}
    else:
        verdicts, pool, training = pa.table({}), {}, tuple(method.rewards)
        scales = {name: method.scales.get(name, (0.0, 1.0)) for name in training}
        selection = {"weights": method.rewards, "scales": scales}
    return Run(
        folder=folder,
        recipe=recipe,
        stages={name: record for name, record in stages.items() if record is not None},
        evaluation=_evaluation(
            stage_folder(folder, "evaluate"),
            training,
            _identities(folder, bool(pool), recipe["evaluate"]["scales"]),
        ),
        selection=selection,
        verdicts=verdicts,
        pool=pool,
        metrics=_metrics(stage_folder(folder, "train") / "metrics.jsonl"),
    )


def _identities(run: Path, with_pool: bool, scales: Iterable[float]) -> dict[str, dict[str, Any]]:
    """What each reward measured with, the same in the pool and in all models' images."""
    pool, images = stage_folder(run, "score"), stage_folder(run, "evaluate")
    paths = {str(pool): list(pool.glob("part-*.parquet"))} if with_pool else {}
    paths |= {
        f"{images}/scores-{model}-*.parquet": list(images.glob(f"scores-{model}-*.parquet"))
        for model in ("base", "tuned", *map(scale_arm, scales))
    }
    tables = {place: read_table(found, ["reward", "identity"]) for place, found in paths.items()}
    return one_identity_each(tables, "run with --redo score, on one device and with one reward")


def _evaluation(
    folder: Path, training: tuple[str, ...], identities: Mapping[str, Mapping[str, Any]]
) -> Evaluation:
    columns = [*KEY, "prompt", "category", "seed"]
    tables = {
        model: read_table(folder.glob(f"images-{model}-*.parquet"), columns).sort_by(
            [(key, "ascending") for key in KEY]
        )
        for model in ("base", "tuned")
    }
    if not tables["base"].select([*KEY, "seed"]).equals(tables["tuned"].select([*KEY, "seed"])):
        raise UserError(
            f"{folder}: base and tuned do not hold the same prompts, samples and seeds, so they "
            "cannot be compared; run with --redo evaluate"
        )
    table = tables["base"]
    ids, first, prompt = np.unique(
        np.array(table["prompt_id"].to_pylist()), return_index=True, return_inverse=True
    )
    scores = {}
    for model in ("base", "tuned"):
        scored = read_table(folder.glob(f"scores-{model}-*.parquet"))
        scores[model] = by_reward(scored, table, folder, model)
    order = [*training, *(name for name in scores["base"] if name not in training)]
    return Evaluation(
        ids=tuple(ids.tolist()),
        texts=tuple(table["prompt"].take(first).to_pylist()),
        categories=tuple(table["category"].take(first).to_pylist()),
        prompt=prompt.astype(np.int64),
        sample=table["sample"].to_numpy().astype(np.int64),
        seed=table["seed"].to_numpy(),
        base={name: scores["base"][name] for name in order},
        tuned={name: scores["tuned"][name] for name in order},
        training=training,
        identities={name: identities[name] for name in order},
    )


def by_reward(
    scored: pa.Table, table: pa.Table, folder: Path, model: str
) -> dict[str, Float[np.ndarray, " n"]]:
    """Scores of each reward in the order of the images."""
    found = {}
    for name, rows in _split(scored):
        rows = rows.sort_by([(key, "ascending") for key in KEY])
        values = rows["value"].to_numpy().astype(np.float64)
        if not rows.select(KEY).equals(table.select(KEY)) or not np.isfinite(values).all():
            raise UserError(
                f"{folder}/scores-{model}-*.parquet: reward {name!r} has no finite score for each "
                "image; run with --redo evaluate"
            )
        found[name] = values
    return found


def _split(scored: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each reward, in order of first appearance."""
    coded = scored["reward"].combine_chunks().dictionary_encode()
    codes = coded.indices.to_numpy()
    for code, name in enumerate(coded.dictionary.to_pylist()):
        yield name, scored.take(np.flatnonzero(codes == code))


def _pool_scores(folder: Path, candidates: pa.ChunkedArray) -> dict[str, Float[np.ndarray, " n"]]:
    """Raw scores of every candidate, NaN where there is none."""
    scored = read_table(folder.glob("part-*.parquet"), ["candidate", "reward", "value"])
    found = {}
    for name, rows in _split(scored):
        values = dict(zip(rows["candidate"].to_pylist(), rows["value"].to_pylist(), strict=True))
        found[name] = np.array([values.get(c, np.nan) for c in candidates.to_pylist()])
    return found


def _metrics(path: Path) -> dict[str, Float[np.ndarray, " steps"]]:
    """The log by metric; where a step was logged twice, as after a kill, the last line counts."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for _, row in sorted({row["step"]: row for row in lines}.items())]
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)
        for name in names
        if all(isinstance(row.get(name, 0.0), int | float) for row in rows)
    }


def iterate_images(
    paths: Iterable[Path], keys: list[str], wanted: Collection[tuple[Any, ...]] | None = None
) -> Iterator[tuple[tuple[Any, ...], bytes]]:
    """Key columns and image bytes of every row, some rows in memory at a time.

    Args:
        wanted: keys to yield, None = all; files without any of them are not read.
    """
    for path in sorted(paths):
        with pq.ParquetFile(path) as file:
            if wanted is not None and not _holds(file, keys, wanted):
                continue
            for batch in file.iter_batches(64, columns=[*keys, "image"]):
                found = zip(*(batch.column(key).to_pylist() for key in keys), strict=True)
                for row, key in enumerate(found):
                    if wanted is None or key in wanted:
                        yield key, batch.column("image")[row].as_py()["bytes"]


def _holds(file: pq.ParquetFile, keys: list[str], wanted: Collection[tuple[Any, ...]]) -> bool:
    table = file.read(columns=keys)
    found = zip(*(table[key].to_pylist() for key in keys), strict=True)
    return any(key in wanted for key in found)

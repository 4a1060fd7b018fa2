"""Stage select: pool and scores joined, chosen, every candidate with its verdict; it adds up."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from craftune.config import GenerateConfig
from craftune.errors import UserError
from craftune.records import CANDIDATE, SCORE, canonical, read_json, read_table, write_table
from craftune.select_config import SelectConfig
from craftune.selection import Status
from craftune.stages.select import choose, load_pool

NAMES = ("h", "p", "a")


def write_run(
    folder: Path, groups: int = 12, variants: int = 3, samples: int = 1, seed: int = 0
) -> tuple[Path, Path]:
    """A pool in shards of 10 with random scores; the groups lie one after the other."""
    rng = np.random.default_rng(seed)
    candidates, scores = [], []
    for g in range(groups):
        cells = [(0, 0), *((j, k) for j in range(1, variants + 1) for k in range(samples))]
        for variant, sample in cells:
            name = f"p{g}-{variant}-{sample}"
            candidates.append(
                dict.fromkeys(CANDIDATE.names)
                | {"id": name, "prompt_id": f"p{g}", "prompt": f"prompt {g}", "category": "c"}
                | {"refined_prompt": "r", "variant": variant, "sample": sample}
            )
            scores += [
                {
                    "candidate": name,
                    "reward": r,
                    "value": float(rng.normal()),
                    "identity": canonical({"name": r}),
                }
                for r in NAMES
            ]
    pool, scored = folder / "pool", folder / "scored"
    for place in (pool, scored):
        place.mkdir(exist_ok=True)
    random.Random(seed).shuffle(scores)  # the join goes by name, not by place
    for i in range(0, len(candidates), 10):
        write_table(pool / f"part-{i:05d}.parquet", candidates[i : i + 10], CANDIDATE)
    write_table(scored / "part-00000.parquet", scores, SCORE)
    return pool, scored


def run(folder: Path, pool: Path, scored: Path, **settings: Any) -> tuple[dict[str, int], Any]:
    config = SelectConfig(**{"filter": "I_h", "k": 4, **settings})
    counts = choose(config, pool, scored, folder)
    return counts, read_table(folder / "selection.parquet")


@pytest.mark.parametrize("samples", [1, 2])
def test_cells_hold_the_scores_of_their_candidates(tmp_path: Path, samples: int) -> None:
    pool, scored = write_run(tmp_path, samples=samples)
    loaded = load_pool(pool, scored)
    values = {
        (row["candidate"], row["reward"]): row["value"]
        for row in read_table(scored.glob("*")).to_pylist()
    }
    assert loaded.present.all()
    assert loaded.scores.shape == (3, 12, 1 + 3 * samples)
    rows = loaded.table.to_pylist()
    for i, row in enumerate(rows):
        group, column = loaded.row[i], loaded.column[i]
        for r, name in enumerate(loaded.names):
            assert loaded.scores[r, group, column] == np.float32(values[row["id"], name])
    assert all((loaded.column[i] == 0) == (row["variant"] == 0) for i, row in enumerate(rows))


def without(pool: Path, scored: Path, *names: str) -> None:
    """Take candidates out of the pool, and their scores with them."""
    for folder, key, schema in ((pool, "id", CANDIDATE), (scored, "candidate", SCORE)):
        for path in folder.glob("part-*.parquet"):
            rows = [row for row in read_table(path).to_pylist() if row[key] not in names]
            write_table(path, rows, schema)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_missing_image_shifts_no_column(tmp_path: Path, samples: int) -> None:
    pool, scored = write_run(tmp_path, samples=samples)
    whole = load_pool(pool, scored)
    cells = {name.as_py(): i for i, name in enumerate(whole.table["id"])}
    gone = ("p2-1-0", "p5-3-0", "p7-0-0", "p9-1-0", "p9-2-0", "p9-3-0")
    without(pool, scored, *gone)
    loaded = load_pool(pool, scored)
    assert loaded.present.sum() == whole.present.sum() - len(gone)
    assert not any(loaded.present[whole.row[cells[n]], whole.column[cells[n]]] for n in gone)
    where = [loaded.names.index(name) for name in whole.names]
    here = loaded.present
    assert np.array_equal(loaded.scores[where][:, here], whole.scores[:, here])


def test_a_group_without_its_baseline_is_dropped_by_name(tmp_path: Path) -> None:
    """Its first rewrite must not stand in for it."""
    pool, scored = write_run(tmp_path)
    without(pool, scored, "p4-0-0")
    counts, table = run(tmp_path, pool, scored, filter="none", k=40)
    assert counts["groups_dropped_no_baseline"] == 1
    dropped = [row for row in table.to_pylist() if row["status"] == "dropped_no_baseline"]
    assert [row["candidate"] for row in dropped] == ["p4-1-0", "p4-2-0", "p4-3-0"]
    assert all("baseline" in row["reason"] for row in dropped)
    assert counts["candidates"] == 47


def test_a_group_with_fewer_rewrites_still_takes_part(tmp_path: Path) -> None:
    pool, scored = write_run(tmp_path)
    without(pool, scored, *(f"p{g}-3-0" for g in range(12) if g != 1), "p1-1-0", "p1-2-0")
    counts, table = run(tmp_path, pool, scored, filter="none", k=40, per_prompt_cap=0)
    assert counts["candidates"] == 48 - 13
    taken = {row["candidate"] for row in table.to_pylist() if row["selected"]}
    assert {"p1-3-0", "p0-1-0", "p0-2-0"} <= taken


def test_two_candidates_of_one_cell(tmp_path: Path) -> None:
    pool, scored = write_run(tmp_path)
    row = read_table(pool / "part-00000.parquet").to_pylist()[1]
    write_table(pool / "part-00099.parquet", [row | {"id": "again"}], CANDIDATE)
    with pytest.raises(UserError, match="two candidates of one prompt and variant"):
        load_pool(pool, scored)


@pytest.mark.parametrize("name", ["I_h", "none", "I_hp", ("a",)])
def test_the_funnel_adds_up(tmp_path: Path, name: str | tuple[str, ...]) -> None:
    pool, scored = write_run(tmp_path)
    counts, table = run(tmp_path, pool, scored, filter=name, per_prompt_cap=1)
    states = [status.name.lower() for status in Status][1:]
    assert counts["candidates"] == sum(counts[state] for state in states) == table.num_rows == 48
    kept = (
        "groups_kept",
        "groups_removed_by_filter",
        "groups_dropped_nan",
        "groups_dropped_no_baseline",
    )
    assert counts["groups"] == sum(counts[key] for key in kept) == 12
    found = table["status"].to_pylist()
    assert {state: found.count(state) for state in states} == {s: counts[s] for s in states}
    assert sum(table["selected"].to_pylist()) == counts["selected"]


def test_every_candidate_has_a_verdict_and_a_reason(tmp_path: Path) -> None:
    pool, scored = write_run(tmp_path)
    _, table = run(tmp_path, pool, scored)
    for row in table.to_pylist():
        assert row["reason"].startswith("selected: ") == row["selected"]
        assert ("it is the baseline" in row["reason"]) == (row["variant"] == 0)
        assert row["selected"] == (row["status"] == "selected")
        assert row["eligible"] == (row["rank"] > 0)
        if row["variant"] == 0:
            assert row["status"] == "baseline"


def test_a_candidate_without_a_score_drops_its_group_by_name(tmp_path: Path) -> None:
    pool, scored = write_run(tmp_path)
    path = scored / "part-00000.parquet"
    rows = [row for row in read_table(path).to_pylist() if row["candidate"] != "p3-2-0"]
    write_table(path, rows, SCORE)
    counts, table = run(tmp_path, pool, scored)
    assert counts["groups_dropped_nan"] == 1
    dropped = [row for row in table.to_pylist() if row["status"] == "dropped_nan"]
    assert {row["prompt_id"] for row in dropped} == {"p3"}
    assert len(dropped) == 4


def test_nothing_selected_says_what_each_part_would_keep(tmp_path: Path) -> None:
    """Rewards that contradict each other: no image can win on both."""
    pool, scored = write_run(tmp_path)
    path = scored / "part-00000.parquet"
    rows = read_table(path).to_pylist()
    value = {row["candidate"]: row["value"] for row in rows if row["reward"] == "h"}
    opposite = [row | {"value": -value[row["candidate"]]} for row in rows if row["reward"] == "p"]
    write_table(path, [row for row in rows if row["reward"] != "p"] + opposite, SCORE)
    with pytest.raises(UserError, match=r"select.filter 'I_hp' keeps none of 12 .*h \d+, p \d+"):
        run(tmp_path, pool, scored, filter="I_hp")
    assert not (tmp_path / "selection.parquet").exists()


def test_scores_of_two_versions_never_mix(tmp_path: Path) -> None:
    pool, scored = write_run(tmp_path)
    rows = read_table(scored / "part-00000.parquet").to_pylist()
    rows[0]["identity"] = canonical({"name": rows[0]["reward"], "sha256": "another"})
    write_table(scored / "part-00000.parquet", rows[1:], SCORE)
    write_table(scored / "part-00001.parquet", rows[:1], SCORE)
    with pytest.raises(UserError, match=r"two identities: sha256 .*another.*--redo score"):
        load_pool(pool, scored)


def test_scores_of_an_unknown_candidate(tmp_path: Path) -> None:
    pool, scored = write_run(tmp_path)
    stranger = {"candidate": "x", "reward": "h", "value": 1.0, "identity": canonical({"name": "h"})}
    write_table(scored / "part-00001.parquet", [stranger], SCORE)
    with pytest.raises(UserError, match="candidates that the pool lacks"):
        load_pool(pool, scored)


def test_the_statistics_are_written_beside_the_verdicts(tmp_path: Path) -> None:
    pool, scored = write_run(tmp_path)
    counts, _ = run(tmp_path, pool, scored)
    found = read_json(tmp_path / "selection.json")
    assert found["funnel"] == counts
    assert found["keeps"] == {"h": counts["groups_kept"]}
    assert found["weights"] == {"h": 0.4, "p": 0.4, "a": 0.2}
    assert found["scale"] == "zscore"
    assert set(found["scales"]) == set(NAMES)


def test_the_default_shard_is_far_from_too_small() -> None:
    assert GenerateConfig().shard_size >= 100

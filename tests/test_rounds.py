"""GRAFT and P-GRAFT as whole runs: rounds, one after the other; a kill between; what is left."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks, forks
from tiny import Tiny, call, files, results, tiny

import craftune
from craftune.records import read_json, read_table
from craftune.runs import stage_folder

GRAFT = """
[method]
name = "graft"
"""
SELECT = """[select]
filter = "none"
weights = {{ "{module}:red" = 1.0 }}
accept = {{ rule = "{rule}"{more} }}
"""


@pytest.fixture(scope="module")
def processes() -> Iterator[Forks]:
    with forks() as started:
        yield started


def graft(
    folder: Path, *, rounds: int = 1, rule: str = "best-of", more: str = "", method: str = GRAFT
) -> Tiny:
    """A tiny run whose selection accepts; "rewrites" are the prompt itself."""
    job = tiny(folder, "rewards_graft")
    text = job.recipe.read_text().replace("[refine]", '[refine]\nby = "none"')
    text = text.replace('name = "tiny"', f'name = "tiny"\nrounds = {rounds}')
    start, end = text.index("[select]"), text.index("[train]")
    section = SELECT.format(module=job.module, rule=rule, more=more)
    job.recipe.write_text(text[:start] + section + method + text[end:])
    return job


def test_the_best_of_each_prompt_is_trained_on(tmp_path: Path) -> None:
    job = graft(tmp_path)
    answer = call(["run", job.recipe], job.folder)
    assert answer.status == 0, answer.err
    rows = read_table(job.stage("select") / "selection.parquet").to_pylist()
    for prompt in {row["prompt_id"] for row in rows}:
        group = [row for row in rows if row["prompt_id"] == prompt]
        best = max(group, key=lambda row: row["composite"])
        assert [row["candidate"] for row in group if row["selected"]] == [best["candidate"]]
        assert best["log_kappa"] == max(row["log_kappa"] for row in group)
    accepted = read_json(job.stage("select") / "selection.json")["accept"]
    assert accepted["rule"] == "best-of"
    assert 8 <= accepted["effective_size"] <= 24
    assert "not accepted (rule best-of)" in (job.stage("report") / "report.html").read_text()
    explained = call(["explain", job.run, "--prompt", "a red dog"], job.folder)
    assert "log kappa" in explained.out


def test_copies_by_the_user_s_key_are_kept_once(tmp_path: Path) -> None:
    job = graft(tmp_path, rule="distinct", more=', key = "keys_graft:same"')
    job.rewards.write_text(
        "def red(images, prompts):\n    return [float(i % 3 > 0) for i in range(len(images))]\n"
        "def rough(images, prompts):\n    return list(range(len(images)))\n"
    )
    keys = job.folder / "keys_graft.py"
    keys.write_text("def same(images, prompts):\n    return [prompt[:3] for prompt in prompts]\n")
    text = job.recipe.read_text().replace('filter = "none"', FIXED)
    job.recipe.write_text(text)
    answer = call(["run", job.recipe], job.folder)
    assert answer.status == 0, answer.err
    rows = read_table(job.stage("select") / "selection.parquet").to_pylist()
    taken = [row["prompt_id"] for row in rows if row["selected"]]
    good = {row["prompt_id"] for row in rows if row["composite"] == 1}
    assert sorted(taken) == sorted(good)  # one key per prompt, so one image each
    keys.write_text(keys.read_text().replace("prompt[:3] for", "prompt for"))
    assert "--redo select" in call(["run", job.recipe], job.folder).complaint


FIXED = 'filter = "none"\nscale = "fixed"\nfixed = { "rewards_graft:red" = [0, 1] }'


def test_a_round_starts_from_the_model_of_the_one_before(tmp_path: Path, processes: Forks) -> None:
    """Killed in the second round's training, and in its drawing: the same as undisturbed."""
    whole, job = graft(tmp_path / "whole", rounds=2), graft(tmp_path / "killed", rounds=2)
    assert call(["run", whole.recipe], whole.folder).status == 0
    first = whole.run / "round-1"
    begun = read_json(whole.stage("train") / "done.json")["config"]
    assert begun["model"]["path"] == str(stage_folder(first, "train") / "model")
    assert (
        begun["run"]["seed"] != read_json(first / "6-train" / "done.json")["config"]["run"]["seed"]
    )
    assert not stage_folder(first, "evaluate").exists()
    seeds = [
        set(read_table(x.glob("3-generate/part-*.parquet"), ["seed"])["seed"].to_pylist())
        for x in (first, whole.run)
    ]
    assert not seeds[0] & seeds[1]

    command = ["run", str(job.recipe)]
    places = [(stage_folder(job.run / "round-1", "train"), 3), (job.stage("generate"), 2)]
    for place, change in places:
        ended = processes.run(command, job.folder, kill_at=(str(place), change))
        assert ended.status == -signal.SIGKILL, ended
    ended = processes.run(command, job.folder)
    assert ended.status == 0, ended.err
    weights = {k: v for k, v in results(whole.run).items() if k.endswith(".safetensors")}
    assert weights
    assert weights == {k: v for k, v in results(job.run).items() if k in weights}
    before = files(job.run)
    again = processes.run(command, job.folder)
    assert again.status == 0
    assert {k: v for k, v in files(job.run).items() if k in before} == before


PGRAFT = """
[method]
name = "pgraft"
settings = {{ after = {after} }}
"""


def test_p_graft_is_compared_stitched_and_says_how_to_load(tmp_path: Path) -> None:
    job = graft(tmp_path, rounds=2, method=PGRAFT.format(after=1))
    text = job.recipe.read_text().replace("num_steps = 2", "num_steps = 3\nkeep_states = [1, 2]")
    text = text.replace("num_prompts = 4", "num_prompts = 4\nscales = [0.5]")
    job.recipe.write_text(text)
    answer = call(["run", job.recipe], job.folder)
    assert answer.status == 0, answer.err
    pool = read_table(job.stage("generate").glob("part-*.parquet"), ["states"]).to_pylist()
    assert all([s["after"] for s in row["states"]] == [1, 2] for row in pool)
    stitch = read_json(job.stage("train") / "stitch.json")
    assert stitch["t_star"] == pool[0]["states"][0]["timestep"]
    arms = [
        {r["image"]["bytes"] for r in read_table(found, ["image"]).to_pylist()}
        for found in (job.stage("evaluate").glob(f"images-{a}-*") for a in ("base", "scale-0.5"))
    ]
    assert not arms[0] & arms[1]
    assert f'craftune.load_stitched("{job.stage("train") / "model"}"' in answer.out

    exported = call(["export", job.run, "--to", "diffusers"], job.folder)
    assert exported.status == 0, exported.err
    out = job.run / "export" / "diffusers"
    snippet = "craftune.load_stitched(" + exported.out.partition("craftune.load_stitched(")[2]
    pipe = eval(snippet, {"craftune": craftune})
    assert pipe.t_star == pytest.approx(stitch["t_star"])
    assert len(pipe("a red circle", num_inference_steps=3, output_type="latent").images) == 1
    assert read_json(out / "stitch.json") == stitch
    card = (out / "README.md").read_text()
    assert 'craftune.load_stitched("path/to/this/folder"' in card
    assert "from_pretrained(" not in card.partition("## How it was made")[0]
    refused = call(["export", job.run, "--to", "single-file"], job.folder)
    assert "a P-GRAFT run draws with two networks" in refused.complaint
    assert not (job.run / "export" / "single-file").exists()

    other = call(["check", job.recipe, "--set", "method.settings.after=3"], job.folder)
    assert "3 is none of generate.keep_states [1, 2]" in other.complaint


def test_states_beyond_the_last_step_are_refused(tmp_path: Path) -> None:
    job = graft(tmp_path)
    refused = call(["check", job.recipe, "--set", "generate.keep_states=[2]"], job.folder)
    assert "keep_states must be below num_steps = 2" in refused.complaint

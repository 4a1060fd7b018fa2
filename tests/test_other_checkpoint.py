"""Nothing is special about our model: another checkpoint, the Parti prompts, a reward of one's own.

The checkpoint is a small random one in Stable Diffusion 1.x's published layout; the prompts are
read as the TSV that they are published as; the reward is given as package.module:function.
"""

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from tiny import Tiny, call, tiny
from toy import random_checkpoint

from craftune.records import Prompt, read_json, read_rows, read_table

PARTI = Path(__file__).parents[2] / "shared/data/partiprompts/PartiPrompts.tsv"
needs_parti = pytest.mark.skipif(not PARTI.is_file(), reason=f"{PARTI} is not here")


@pytest.fixture
def job(tmp_path: Path) -> Tiny:
    """A recipe on a checkpoint of its own, with the rewards inside a package."""
    made = tiny(tmp_path, "parti_rewards")
    package = tmp_path / "parti_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    made.rewards.rename(package / "inner.py")
    checkpoint = random_checkpoint(tmp_path / "other-model", seed=7)
    lines = made.recipe.read_text().replace("parti_rewards:", "parti_package.inner:").splitlines()
    lines = [f'path = "{checkpoint}"' if line.startswith("path =") else line for line in lines]
    lines = [f'source = "{PARTI}"' if line.startswith("source =") else line for line in lines]
    made.recipe.write_text("\n".join(lines))
    return made


def check(job: Tiny, limit: int, *overrides: str) -> None:
    settings = [f"prompts.limit={limit}", *overrides]
    answer = call(["run", job.recipe, *(a for s in settings for a in ("--set", s))], job.folder)
    assert answer.status == 0, answer.err
    counts = read_json(job.stage("prompts") / "done.json")["counts"]
    assert counts["rows"] == 1632
    ends = ("prompts", "not_drawn", "held_out")
    rejected = sum(n for name, n in counts.items() if name.startswith("rejected: "))
    assert rejected + sum(counts[name] for name in ends) == 1632
    prompts = read_rows(Prompt, job.stage("prompts") / "prompts.jsonl")
    assert all(prompt.category for prompt in prompts)
    pool = read_table(job.stage("generate").glob("*.parquet"), ["prompt", "model"])
    assert set(pool["prompt"].to_pylist()) == {prompt.prompt for prompt in prompts}
    assert set(pool["model"].to_pylist()) == {str(job.folder / "other-model")}
    names = {reward["name"] for reward in read_json(job.stage("report") / "report.json")["rewards"]}
    assert names == {"parti_package.inner:red", "parti_package.inner:rough"}
    DiffusionPipeline.from_pretrained(job.stage("train") / "model")


@needs_parti
def test_a_run_on_another_checkpoint(job: Tiny) -> None:
    check(job, 8)


@needs_parti
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_on_all_the_parti_prompts(job: Tiny) -> None:
    everything = ["generate.shard_size=256", "generate.num_steps=1", "evaluate.num_prompts=100"]
    check(job, 0, *everything, "select.k=50")
    pool = read_table(job.stage("generate").glob("*.parquet"), ["id"])
    counts = read_json(job.stage("prompts") / "done.json")["counts"]
    assert pool.num_rows == 3 * counts["prompts"]
    assert counts["prompts"] > 1500

"""A run of a method that is fed with prompts: four stages, no pool, a reward's own gradient."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import kept_checkpoint, load_sd

from craftune import pipeline, rewards
from craftune.budget import budget
from craftune.config import GenerateConfig, TrainConfig
from craftune.errors import UserError
from craftune.exporting import export
from craftune.methods import DRaFT
from craftune.recipes import load_recipe
from craftune.records import Prompt, prompt_id, read_json, write_rows
from craftune.runs import stage_folder
from craftune.stages.prompt_feed import PromptFeed, prompt_feed
from craftune.types import Reward

RECIPE = """
[run]
name = "straight"
out = "{out}"

[model]
path = "{model}"

[prompts]
source = "{prompts}"

[generate]
num_steps = 3
guidance_scale = 2.0

[method]
name = "draft"

[method.settings]
rewards = {{ "shapes-a" = 2.0 }}
scales = {{ "shapes-a" = [0.5, 0.1] }}
grad_steps = 2

[train]
steps = 2
batch_size = 3
micro_batch = 2
lora = {{ rank = 2 }}
save_dtype = "float32"

[evaluate]
num_prompts = 2
rewards = ["jpeg-compressibility"]
resamples = 50
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    texts = tmp_path / "prompts.txt"
    things = ("dog", "cat", "cup")
    texts.write_text("\n".join(f"{n} {thing}" for n in ("a", "two") for thing in things))
    path = tmp_path / "straight.toml"
    path.write_text(RECIPE.format(out=tmp_path, model=kept_checkpoint(), prompts=texts))
    return path


def test_it_needs_four_stages_and_shows_what_it_maximised(recipe: Path) -> None:
    folder = pipeline.run(load_recipe(recipe))
    assert sorted(path.name for path in folder.glob("?-*")) == [
        "1-prompts",
        "6-train",
        "7-evaluate",
        "8-report",
    ]
    rows = (folder / "6-train" / "metrics.jsonl").read_text().splitlines()
    assert [set(json.loads(row)) for row in rows] == [
        {"step", "loss", "reward", "shapes-a", "grad_norm", "learning_rate"}
    ] * 2
    first = json.loads(rows[0])
    assert first["reward"] == pytest.approx(2 * (first["shapes-a"] - 0.5) / 0.1, rel=1e-4)
    report = read_json(folder / "8-report" / "report.json")
    assert report["selection"] is None
    assert [entry["role"] for entry in report["rewards"]] == ["training", "held-out"]
    base = report["rewards"][0]["base"]
    assert report["composite"]["base"] == pytest.approx(2 * (base - 0.5) / 0.1, rel=1e-3)
    page = (folder / "8-report" / "report.html").read_text()
    assert "on the gradient of shapes-a" in page
    assert 'id="selection"' not in page
    assert (folder / "6-train" / "lora").is_dir()

    export(folder, "lora")
    card = (folder / "export" / "lora" / "README.md").read_text()
    assert "aligned with `shapes-a`" in card
    assert "| `shapes-a` | training |" in card
    assert "rewards' own gradient" in card

    weights = {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    pipeline.run(load_recipe(recipe))  # again: everything is done already
    assert {p: p.read_bytes() for p in folder.rglob("*.safetensors")} == weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ['method.settings.rewards={"shapes-verifier"=1.0}', "method.settings.scales={}"],
            "method.settings.rewards: 'shapes-verifier' has no gradient",
        ),
        (['method.settings.rewards={"shapes-q"=1.0}'], "unknown reward 'shapes-q'"),
        (['method.settings.scales={"shapes-h"=[0.0, 1.0]}'], "method.settings.scales"),
        (["method.name=craft", "method.settings={}"], "score.rewards: empty"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    recipe: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        pipeline.check(load_recipe(recipe, changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_its_costs_are_planned(recipe: Path) -> None:
    """Four prompts to train on and two held out; 2 x 3 images drawn in training, no pool."""
    page = budget(load_recipe(recipe)).splitlines()
    rows = {line.split()[0]: line.split() for line in page if line}
    assert rows["train"][1] == "6"
    assert rows["evaluate"][1] == "8"
    assert not {"generate", "score", "select"} & rows.keys()
    assert "Not counted: the rewards shapes-a, jpeg-compressibility." in page
    assert all(len(line) <= 80 for line in page[1:])


@pytest.mark.parametrize("options", [{"only": "select"}, {"again": "generate"}])
def test_a_stage_that_it_does_without_is_refused(recipe: Path, options: dict[str, str]) -> None:
    with pytest.raises(UserError, match="method 'draft' does without it"):
        pipeline.run(load_recipe(recipe), **options)  # type: ignore[arg-type]


def feed(tmp_path: Path, reward: Any, **changes: Any) -> PromptFeed:
    texts = ["two red dogs", "a cat", "a cup"]
    write_rows(tmp_path / "prompts.jsonl", [Prompt(prompt_id(text), text) for text in texts])
    method = DRaFT(rewards={"r": 1.0}, **changes)
    return prompt_feed(
        TrainConfig(batch_size=3),
        method,
        GenerateConfig(num_steps=3, guidance_scale=2.0),
        load_sd(kept_checkpoint()),
        {"r": Reward("r", lambda images, texts: torch.zeros(len(images)), {}, reward)},
        0,
        tmp_path / "prompts.jsonl",
    )


def test_the_gradient_passes_the_real_decoder_and_reaches_the_network_alone(
    tmp_path: Path,
) -> None:
    seen = []

    def brightness(images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        seen.append((images.shape[1], texts, images.requires_grad))
        return images.mean((1, 2, 3))

    found = feed(tmp_path, brightness)
    batch, method = found(0), DRaFT(rewards={"r": 1.0}, grad_steps=2)
    network = found.model.denoiser.network.requires_grad_(True)
    draws = method.draw(found.model.denoiser.schedule, batch, torch.Generator().manual_seed(0))
    method.loss(found.model.denoiser, None, batch, draws)[0].backward()
    assert seen == [(3, batch.texts, True)]
    assert max(p.grad.abs().max().item() for p in network.parameters() if p.grad is not None) > 0
    decoder = found.drawing.decode.__closure__
    assert decoder is not None
    assert not any(
        p.grad is not None
        for cell in decoder
        if isinstance(cell.cell_contents, torch.nn.Module)
        for p in cell.cell_contents.parameters()
    )


def test_prompts_are_a_function_of_the_step_and_all_are_seen(tmp_path: Path) -> None:
    found = feed(tmp_path, lambda images, texts: images.mean((1, 2, 3)))
    first, later, again = found(0), found(1), found(0)
    assert first.texts == again.texts
    assert sorted(first.texts) == sorted(later.texts) == ["a cat", "a cup", "two red dogs"]
    assert len({tuple(found(step).texts) for step in range(6)}) > 1
    wanted = found.model.encode_prompts(first.texts)
    torch.testing.assert_close(first.cond.tensors["tokens"], wanted.tensors["tokens"])


def test_rewards_with_a_gradient_pass() -> None:
    rewards.check_gradients(["shapes-h", "shapes-a", "pickscore"], "method.settings.rewards")
    assert stage_folder(Path("r"), "train").name == "6-train"

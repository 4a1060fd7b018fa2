"""Recipes: every key documented and in range, overrides of every kind, the ones we ship."""

import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from craftune import pipeline
from craftune.config import Recipe, RunConfig, TrainConfig
from craftune.errors import UserError
from craftune.recipes import SECTIONS, load_recipe, settings

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
LEAST = """
[run]
name = "least"
[model]
path = "m"
[prompts]
source = "p.txt"
[score]
rewards = ["a"]
[select]
"""


@pytest.fixture
def least(tmp_path: Path) -> Path:
    path = tmp_path / "least.toml"
    path.write_text(LEAST)
    return path


def leaves(kind: Any, prefix: str = "") -> dict[str, Any]:
    """ "section.key" -> type, for every key there is."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        inside = leaves(hint, f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: hint}
        found |= inside
    return found


def test_every_key_is_documented_with_its_default() -> None:
    shown = {f"{section}.{key.split(' = ')[0]}": text for section, key, text in settings()}
    assert shown.keys() == leaves(Recipe).keys() - {"reward"}  # each reward has keys of its own
    assert [key for key, text in shown.items() if not text.endswith((".", ")", "]"))] == []
    assert [key for key, text in shown.items() if len(text) < 15] == []


def test_the_manual_is_a_recipe(least: Path) -> None:
    """What `craftune list settings` prints, pasted into a recipe, is every default again."""
    expected, lines, last = load_recipe(least), [], ""
    required = {"name": '"least"', "path": '"m"', "source": '"p.txt"'}
    for section, key, text in settings():
        lines += [f"[{section}]"] * (section != last)
        last = section
        if key == "rewards = []" and section == "score":  # the least recipe has one
            lines.append('rewards = ["a"]')
        elif " = " in key:
            lines.append(key)
        elif text.startswith("Required."):
            lines.append(f"{key} = {required[key]}")
    least.write_text("\n".join(lines))
    assert load_recipe(least) == expected


def test_the_sections_are_those_of_a_recipe() -> None:
    assert {*SECTIONS, "reward"} == {field.name for field in fields(Recipe)}


def test_defaults_fill_what_a_recipe_leaves_out(least: Path) -> None:
    recipe = load_recipe(least)
    assert recipe.train == TrainConfig()
    assert recipe.run == RunConfig("least")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=7", 7),
        ("train.steps = 7", 7),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=1", 1.0),
        ("train.gradient_checkpointing=true", True),
        ("train.lora.rank=4", 4),
        ('train.lora.targets=["to_q", "to_k"]', ("to_q", "to_k")),
        ('score.rewards=["a", "b"]', ("a", "b")),
        ("run.name=bare words = fine", "bare words = fine"),
        ('run.name="2024"', "2024"),
        ("run.out=/tmp/over there", "/tmp/over there"),
        ("evaluate.source=", ""),
        ("model.revision=v1.0", "v1.0"),
        ("select.weights.a=0.5", {"a": 0.5}),
        ('select.roles={h = "a"}', {"h": "a"}),
        ("select.filter=none", "none"),
        ('select.filter=["a"]', ("a",)),
        ("method.settings.beta=2.0", {"beta": 2.0}),
        ("prompts.limit=1_000", 1000),
    ],
)
def test_overrides(least: Path, override: str, value: object) -> None:
    found: Any = load_recipe(least, [override])
    for part in override.partition("=")[0].strip().split("."):
        if isinstance(found, dict):
            found, value = found[part], value[part] if isinstance(value, dict) else value
        else:
            found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_counts(least: Path) -> None:
    assert load_recipe(least, ["train.steps=1", "train.steps=2"]).train.steps == 2


def complaint(least: Path, override: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(least, [override])
    return str(caught.value)


FREE = ("method.settings", "select.roles", "select.weights", "select.fixed", "reward")
"""Tables of the user's own names, or with keys that are checked elsewhere."""


@pytest.mark.parametrize("key", [key for key in leaves(Recipe) if key not in FREE])
def test_no_key_takes_any_value(least: Path, key: str) -> None:
    said = complaint(least, f"{key}={{odd = 1}}")
    assert f"least.toml, {key}: " in said
    assert "got {'odd': 1}" in said


ANY_SIGN = ("run.seed", "select.accept.tau")
NUMBERS = [key for key, kind in leaves(Recipe).items() if kind in (int, float)]


@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in ANY_SIGN])
@pytest.mark.parametrize("text", ["'7'", "-1", "nan", "true"])
def test_no_number_takes_everything(least: Path, key: str, text: str) -> None:
    assert key in complaint(least, f"{key}={text}")


def test_there_are_many_numbers() -> None:
    assert len(NUMBERS) > 20


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("tarin.steps=1", "tarin: unknown key 'tarin'; did you mean 'train'?"),
        ("train.stpes=1", "train.stpes: unknown key 'stpes'; did you mean 'steps'?"),
        ("train.lora.target=1", "train.lora.target: unknown key 'target'; did you mean 'targets'?"),
        ("select.fliter=1", "select.fliter: unknown key 'fliter'; did you mean 'filter'?"),
    ],
)
def test_unknown_keys_get_the_closest_known_one(least: Path, override: str, hint: str) -> None:
    assert f"least.toml, {hint}" in complaint(least, override)


@pytest.mark.parametrize("section", ["run", "model", "prompts"])
def test_a_missing_section_is_named(least: Path, section: str) -> None:
    parts = LEAST.split("\n[")
    least.write_text("\n[".join(part for part in parts if not part.startswith(f"{section}]")))
    with pytest.raises(UserError, match=f"least.toml, {section}: missing"):
        load_recipe(least)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_are_in_order_and_say_how_to_run_them(path: Path) -> None:
    recipe = load_recipe(path)
    if recipe.model.path.startswith("craftune:"):  # else the hub must answer which family it is
        pipeline.check(recipe)
    header = path.read_text().split("\n\n")[0]
    assert f"craftune run recipes/{path.name}" in header
    assert load_recipe(path).run.name == path.stem
    if path.stem in ("demo", "tiny"):
        assert [word for word in ("Hardware:", "Time:", "Expected:") if word not in header] == []


def test_there_are_recipes() -> None:
    assert {"demo", "tiny"} <= {path.stem for path in RECIPES}


def test_the_tiny_recipe_is_what_ci_runs() -> None:
    ci = (Path(__file__).parents[1] / ".ci" / "run").read_text()
    assert "craftune run recipes/tiny.toml" in ci
    assert subprocess.run(["bash", "-n", "-c", ci]).returncode == 0


@pytest.mark.parametrize(
    ("dtype", "rank", "precision", "expected"),
    [
        ("bfloat16", 4, "bfloat16", "bfloat16"),
        ("float16", 4, "bfloat16", "bfloat16"),  # what autocast makes of it anyway
        ("float32", 4, "bfloat16", "float32"),
        ("bfloat16", 4, "float32", "float32"),
        ("bfloat16", 0, "bfloat16", "float32"),  # master weights
    ],
)
def test_only_frozen_weights_may_be_narrow_in_training(
    dtype: str, rank: int, precision: str, expected: str
) -> None:
    settings = {"model.dtype": dtype, "train.lora.rank": rank, "train.precision": precision}
    recipe = load_recipe(RECIPES[0], [f"{key}={value}" for key, value in settings.items()])
    assert recipe.training_dtype == expected

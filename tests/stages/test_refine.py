"""Stage refine: N rewrites of every prompt, each by its own random stream, or an error."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from craftune import refiners
from craftune.config import RefineConfig
from craftune.errors import UserError
from craftune.records import Prompt, Refined, prompt_id, read_rows, write_rows
from craftune.stages.refine import refine

TEXTS = ("a cat", "a red dog", "two birds")


def run(folder: Path, texts: tuple[str, ...] = TEXTS, seed: int = 0, **config: Any) -> Any:
    write_rows(folder / "prompts.jsonl", [Prompt(prompt_id(text), text) for text in texts])
    counts = refine(RefineConfig(**config), seed, folder / "prompts.jsonl", folder)
    return counts, read_rows(Refined, folder / "refined.jsonl")


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """A function as "module:f"."""

    def install(function: Any) -> str:
        module = ModuleType("my_refiner")
        vars(module)["f"] = function
        monkeypatch.setitem(sys.modules, "my_refiner", module)
        return "my_refiner:f"

    return install


def test_every_prompt_gets_its_rewrites(tmp_path: Path) -> None:
    counts, rows = run(tmp_path, variants=3)
    assert counts == {"prompts": 3, "refined": 9, "equal to the prompt": 0}
    assert [row.variant for row in rows] == [1, 2, 3] * 3
    assert [row.prompt_id for row in rows] == [prompt_id(t) for t in TEXTS for _ in range(3)]


def test_the_rewrites_of_a_prompt_depend_on_seed_and_prompt_alone(tmp_path: Path) -> None:
    alone = run(tmp_path, texts=TEXTS[1:2])[1]
    among = [row for row in run(tmp_path)[1] if row.prompt_id == prompt_id(TEXTS[1])]
    assert alone == among
    assert run(tmp_path, seed=1)[1] != run(tmp_path)[1]


def test_each_prompt_has_a_random_stream_of_its_own(
    tmp_path: Path, mine: Callable[[Any], str]
) -> None:
    _, rows = run(tmp_path, by=mine(lambda p, n, rng: [str(rng.random()) for _ in range(n)]))
    assert len({row.refined for row in rows}) == len(rows) == 3 * 4


def test_rewrites_equal_to_the_prompt_are_counted(tmp_path: Path) -> None:
    assert run(tmp_path, by="none", variants=2)[0]["equal to the prompt"] == 6


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda p, n, rng: ["x"] * (n - 1), "gave 3 rewrites of 'a cat', but refine.variants = 4"),
        (lambda p, n, rng: ["x"] * (n + 1), "gave 5 rewrites"),
        (lambda p, n, rng: ["x"] * (n - 1) + [" "], "gave 3 rewrites"),
        (lambda p, n, rng: "text", "must give a list of str"),
        (lambda p, n, rng: [1] * n, "must give a list of str"),
        (lambda p, n, rng: None, "must give a list of str"),
        (lambda p, n, rng: 1 // 0, r"failed on 'a cat': ZeroDivisionError: .*test_refine.py, line"),
        (lambda p, n: [], "failed on 'a cat': TypeError"),
    ],
)
def test_a_refiner_that_misbehaves(
    tmp_path: Path, mine: Callable[[Any], str], function: Any, said: str
) -> None:
    with pytest.raises(UserError, match=f"refine.by 'my_refiner:f' .*{said}"):
        run(tmp_path, by=mine(function))
    assert not (tmp_path / "refined.jsonl").exists()


def test_a_refiner_of_our_own_that_cannot(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refine.by 'shapes' failed on 'a cat': .*shapes world"):
        run(tmp_path, by="shapes")


def test_white_space_is_made_single_blanks(tmp_path: Path, mine: Callable[[Any], str]) -> None:
    rows = run(tmp_path, by=mine(lambda p, n, rng: [f" {p}\n big "] * n))[1]
    assert rows[0].refined == "a cat big"


def test_rewrites_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(f'{{"prompt": "{t}", "refined": ["1", "2", "3"]}}\n' for t in TEXTS))
    rows = run(tmp_path, by="file", source=str(path), variants=2)[1]
    assert [row.refined for row in rows] == ["1", "2"] * 3
    assert {row.by for row in rows} == {"file"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a cat", "refined": ["1", "2"]}', "no rewrites of the prompt 'a red dog'"),
        ('{"prompt": "a cat", "refined": ["1"]}', "gave 1 rewrites of 'a cat'"),
        ('{"prompt": "a cat", "refined": "1"}', "r.jsonl, line 1: expected"),
        ('{"prompt": "a cat"}', "r.jsonl, line 1: expected"),
        ("[]", "r.jsonl, line 1: expected"),
        ("{", "r.jsonl, line 1: not valid JSON"),
    ],
)
def test_a_file_of_rewrites_that_does_not_do(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        run(tmp_path, by="file", source=str(tmp_path / "r.jsonl"), variants=2)


def test_no_refiner_of_that_name() -> None:
    with pytest.raises(UserError, match="did you mean 'template'"):
        refiners.check(RefineConfig(by="tmeplate"))

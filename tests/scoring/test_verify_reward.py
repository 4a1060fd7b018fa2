"""`craftune verify-reward`: agreement, difference, and what can be wrong with a golden file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import settings_of
from PIL import Image
from tiny import call

from craftune import rewards
from craftune.scoring import verify
from craftune.types import Reward

PROMPTS = ["a red circle", "two cats"]
COLORS = [(200, 30, 30), (20, 90, 160)]


def golden(folder: Path, add: float = 0.0, **more: Any) -> Path:
    """Two images and what `mps` gives them, `add` too much for the second."""
    images = [Image.new("RGB", (80, 60), color) for color in COLORS]
    values = rewards.load("mps", settings={"mps": settings_of("mps")}).score(images, PROMPTS)
    cases = []
    for number, (image, prompt, value) in enumerate(zip(images, PROMPTS, values, strict=True)):
        image.save(folder / f"{number}.png")
        score = value.item() + add * number
        cases.append({"image": f"{number}.png", "prompt": prompt, "score": score})
    file = folder / "golden.json"
    file.write_text(json.dumps({"cases": cases} | more))
    return file


def options(name: str) -> list[str]:
    pairs = [f"reward.{name}.{key}={value}" for key, value in settings_of(name).items()]
    return [part for pair in pairs for part in ("--set", pair)]


def test_agreement_and_difference(tmp_path: Path) -> None:
    """Status 0 or 1; the table names every image, the last line says how far apart."""
    file = golden(tmp_path)
    said = call(["verify-reward", "mps", "--golden", str(file), *options("mps")], tmp_path)
    assert said.status == 0, said.err
    assert "0.png" in said.out
    assert "threshold 0.3" in said.out
    assert "mps: agrees" in said.out
    assert "prompts cut" not in said.out

    golden(tmp_path, add=0.05)
    said = call(["verify-reward", "mps", "--golden", str(file), *options("mps")], tmp_path)
    assert said.status == 1, said.err
    assert "mps: differs; at most 0.05 apart, 0.01 is allowed" in said.out

    golden(tmp_path, add=0.05, tolerance=0.1)
    said = call(["verify-reward", "mps", "--golden", str(file), *options("mps")], tmp_path)
    assert said.status == 0


def test_no_number_is_no_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And images may lie elsewhere than beside the golden file."""
    (tmp_path / "pictures").mkdir()
    file = golden(tmp_path / "pictures").rename(tmp_path / "golden.json")
    given = ["verify-reward", "mps", "--golden", str(file), *options("mps")]
    assert "0.png: No such file" in call(given, tmp_path).complaint
    given += ["--images", str(tmp_path / "pictures")]
    assert call(given, tmp_path).status == 0
    made = Reward("mps", lambda images, prompts: torch.tensor([torch.nan] * 2), {"name": "mps"})
    monkeypatch.setattr(rewards, "load", lambda *arguments: made)
    assert call(given, tmp_path).status == 1


def test_a_cut_prompt_is_said(tmp_path: Path) -> None:
    """Numbers of a prompt that is read in part may agree and still say little."""
    file = golden(tmp_path)
    held = json.loads(file.read_text())
    held["cases"][0]["prompt"] = "word " * 40
    file.write_text(json.dumps(held | {"tolerance": 1e6}))
    said = call(["verify-reward", "mps", "--golden", str(file), *options("mps")], tmp_path)
    assert said.status == 0, said.err
    assert "prompts cut by mps at 77 tokens: 1 of 2" in said.out


def test_the_published_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its four pictures are looked for in --images, its numbers are compared."""
    expected = [case.score for case in verify.PUBLISHED["imagereward"].golden.cases]
    assert [round(score, 2) for score in expected] == [0.58, 0.27, -1.41, -2.03]
    for number in range(1, 5):
        Image.new("RGB", (64, 64), (50 * number,) * 3).save(tmp_path / f"{number}.webp")
    seen: list[tuple[int, str]] = []

    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        levels = [np.asarray(image.convert("RGB"))[0, 0, 0].item() for image in images]
        seen.extend(zip(levels, prompts, strict=True))
        return torch.tensor(expected) + 0.004

    made = Reward("imagereward", score, {"name": "imagereward"})
    monkeypatch.setattr(rewards, "load", lambda *arguments: made)
    said = call(["verify-reward", "imagereward", "--images", str(tmp_path)], tmp_path)
    assert said.status == 0, said.err
    assert [round(level / 50) for level, _ in seen] == [1, 2, 3, 4]
    assert {prompt for _, prompt in seen} == {
        "a painting of an ocean with clouds and birds, day time, low depth field effect"
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mps"], "mps: its authors publish no scores of given images; give --golden FILE"),
        (["imagereward"], "assets/images of https://github.com/zai-org/ImageReward; fetch them"),
        (["mpss", "--golden", "g.json"], "unknown reward 'mpss'; did you mean 'mps'"),
        (["mps", "--golden", "missing.json"], "missing.json: No such file"),
        (["mps", "--golden", "text.json"], "text.json: no JSON"),
        (["mps", "--golden", "empty.json"], "empty.json: cases: "),
        (["mps", "--golden", "key.json"], "key.json: cases.0.promt: "),
        (["mps", "--golden", "image.json"], "gone.png: No such file"),
        (["mps", "--golden", "broken.json"], "broken.png: no image"),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "text.json").write_text("mps = 3")
    (tmp_path / "empty.json").write_text('{"cases": []}')
    case = {"image": "gone.png", "prompt": "", "score": 1}
    (tmp_path / "image.json").write_text(json.dumps({"cases": [case]}))
    (tmp_path / "key.json").write_text(json.dumps({"cases": [case | {"promt": ""}]}))
    (tmp_path / "broken.json").write_text(json.dumps({"cases": [case | {"image": "broken.png"}]}))
    (tmp_path / "broken.png").write_text("no picture")
    given = [str(tmp_path / a) if a.endswith(".json") else a for a in arguments]
    answer = call(["verify-reward", *given], tmp_path)
    assert answer.status == 2
    assert said in answer.complaint

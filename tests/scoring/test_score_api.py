"""`craftune.score`: any kind of picture, numbers in their order, and mistakes said plainly."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import settings_of
from PIL import Image

import craftune
from craftune import rewards
from craftune.images import encode_png


def level(images: Sequence[Image.Image], prompts: list[str]) -> torch.Tensor:
    values = [
        np.asarray(image)[0, 0, 0] + 100 * len(prompt)
        for image, prompt in zip(images, prompts, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float32)


LEVEL = craftune.Reward("level", level, {"name": "level"})
LOOKS = craftune.Reward("looks", lambda i, p: level(i, p), {"name": "looks"}, uses_prompt=False)


def picture(red: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (red, 0, 0))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_every_kind_of_picture_in_its_place(tmp_path: Path, batch_size: int) -> None:
    (tmp_path / "2.png").write_bytes(encode_png(picture(2)))
    (tmp_path / "3.png").write_bytes(encode_png(picture(3)))
    images: list[Any] = [
        picture(0),
        np.asarray(picture(1)),
        str(tmp_path / "2.png"),
        tmp_path / "3.png",
        encode_png(picture(4)),
    ]
    found = craftune.score(images, ["", "a", "", "", ""], rewards=[LEVEL], batch_size=batch_size)
    assert found["level"].tolist() == [0, 101, 2, 3, 4]
    assert found["level"].dtype == np.float32
    assert craftune.score(images, "ab", rewards=[LEVEL])["level"].tolist() == [
        200,
        201,
        202,
        203,
        204,
    ]


def test_rewards_by_name_are_those_of_the_table() -> None:
    images = [picture(10), picture(200)]
    found = craftune.score(
        images,
        ["a red thing", "b"],
        rewards=["pickscore", "jpeg-compressibility"],
        settings={"pickscore": settings_of("pickscore")},
    )
    one = rewards.load("pickscore", settings={"pickscore": settings_of("pickscore")})
    assert found["pickscore"] == pytest.approx(one.score(images, ["a red thing", "b"]).numpy())
    assert list(found) == ["pickscore", "jpeg-compressibility"]


def test_cut_prompts_are_said(recwarn: pytest.WarningsRecorder) -> None:
    """Once per reward and call, and not where all of them is read."""
    settings = {name: settings_of(name) for name in ("pickscore", "imagereward", "aesthetic")}
    texts = ["a dog " * 10, "a dog " * 30, "a dog"]  # 42 tokens, 122 and 6: one per letter
    craftune.score([picture(9)] * 3, texts, rewards=list(settings), settings=settings)
    assert [str(warning.message) for warning in recwarn] == [
        "prompts cut by pickscore at 77 tokens: 1 of 3 images",
        "prompts cut by imagereward at 35 tokens: 2 of 3 images",
    ]
    craftune.score([picture(9)], texts[2:], rewards=list(settings), settings=settings)
    assert len(recwarn) == 2


def test_no_prompts_and_no_images() -> None:
    assert craftune.score([picture(3)], rewards=[LOOKS])["looks"].tolist() == [3]
    assert craftune.score([], [], rewards=[LEVEL])["level"].shape == (0,)


@pytest.mark.parametrize(
    ("images", "prompts", "names", "said"),
    [
        ([picture(1)], None, [LEVEL], "image 0: no prompt, which level need"),
        ([picture(1)], ["a", "b"], [LEVEL], "prompts: 2 for 1 images"),
        ([picture(1), b"x"], "a", [LEVEL], "image 1: no readable image"),
        (["none.png"], "a", [LEVEL], "image 0: none.png: no readable image: no such file"),
        ([picture(1)], "a", [LEVEL, LEVEL], "none twice"),
        ([picture(1)], "a", [], "name at least one"),
        ([picture(1)], "a", ["hpsv3"], "rewards: unknown reward 'hpsv3'"),
    ],
)
def test_mistakes(images: Any, prompts: Any, names: Any, said: str) -> None:
    with pytest.raises(craftune.UserError, match=said):
        craftune.score(images, prompts, rewards=names)

"""Rewards from outside: functions, factories and what can be wrong with them."""

import hashlib
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from craftune.errors import UserError
from craftune.rewards import check_names, load
from craftune.rewards.custom import from_import_path

IMAGES = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in (10, 20, 30)]
TEXTS = ["a", "b", "c"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module into the current directory; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write(source: str) -> str:
        name = f"mine_{uuid.uuid4().hex[:8]}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


@pytest.mark.parametrize(
    "body",
    [
        "[float(i.getpixel((0, 0))[0]) for i in images]",
        "tuple(i.getpixel((0, 0))[0] for i in images)",
        "np.array([i.getpixel((0, 0))[0] for i in images], np.float64)",
        "torch.tensor([float(i.getpixel((0, 0))[0]) for i in images], requires_grad=True)",
        "[torch.tensor(float(i.getpixel((0, 0))[0])) for i in images]",
        "torch.tensor([10, 20, 30], dtype=torch.bfloat16)",
    ],
)
def test_any_kind_of_numbers(module: Callable[[str], str], body: str) -> None:
    name = module(f"import numpy as np, torch\ndef f(images, prompts):\n    return {body}\n")
    values = from_import_path(f"{name}:f").score(IMAGES, TEXTS)
    assert torch.equal(values, torch.tensor([10.0, 20.0, 30.0]))
    assert not values.requires_grad


def test_a_function_is_named_by_its_path_and_its_source(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    name = module("__version__ = '3'\ndef f(images, prompts):\n    return [1.0] * len(images)\n")
    reward = load(f"{name}:f")
    assert reward.name == reward.identity["name"] == f"{name}:f"
    digest = hashlib.sha256((tmp_path / f"{name}.py").read_bytes()).hexdigest()
    assert reward.identity["sha256"] == digest
    assert reward.identity["version"] == "3"
    assert load(f"{name}:f") is reward


@pytest.mark.parametrize(
    ("parameters", "body", "uses_prompt"),
    [
        ("images, prompts", "[red(i) + len(p) for i, p in zip(images, prompts)]", True),
        ("image, prompt", "red(image) + len(prompt)", True),
        ("image, prompt, scale=1.0, *rest", "np.float64(scale * red(image) + len(prompt))", True),
        ("image, prompt, /", "torch.tensor(red(image) + len(prompt))", True),
        ("images", "[red(i) + 1 for i in images]", False),
        ("image", "red(image) + 1", False),
    ],
)
def test_the_parameters_names_say_how_it_is_called(
    module: Callable[[str], str], parameters: str, body: str, uses_prompt: bool
) -> None:
    start = "import numpy as np, torch\ndef red(i):\n    return i.getpixel((0, 0))[0]\n"
    name = module(f"{start}def f({parameters}):\n    return {body}\n")
    reward = from_import_path(f"{name}:f")
    assert reward.uses_prompt == uses_prompt
    assert reward.score(IMAGES, TEXTS).tolist() == [11, 21, 31]
    assert reward.score(IMAGES[:1], TEXTS[:1]).tolist() == [11]
    assert reward.score(IMAGES, TEXTS).dtype == torch.float32


def test_an_object_that_can_be_called(module: Callable[[str], str]) -> None:
    name = module("class F:\n    def __call__(self, image, prompt):\n        return 4\nf = F()\n")
    assert from_import_path(f"{name}:f").score(IMAGES, TEXTS).tolist() == [4, 4, 4]


FACTORY = """
from craftune.types import Reward
import torch
def make():
    identity = {"name": "inner", "sha256": "of the weights", "steps": 4}
    ones = lambda images, prompts: torch.ones(len(images))
    return Reward("inner", ones, identity, uses_prompt=False)
"""


def test_a_factory_gives_a_whole_reward_under_the_recipe_s_name(
    module: Callable[[str], str],
) -> None:
    """The recipe's roles and weights know it by its path."""
    name = module(FACTORY)
    reward = from_import_path(f"{name}:make")
    assert reward.name == f"{name}:make"
    assert not reward.uses_prompt
    assert reward.score(IMAGES, TEXTS).tolist() == [1, 1, 1]
    assert reward.identity["steps"] == "4"
    assert reward.identity["sha256"].endswith(" of the weights")


def test_a_module_in_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Callable[[str], str]
) -> None:
    name = module("")
    package = tmp_path / f"{name}_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("def f(images, prompts):\n    return [2.0] * len(images)\n")
    assert from_import_path(f"{package.name}.inner:f").score(IMAGES, TEXTS).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", r"unknown function 'f' \(known: none\)"),
        ("f = 3", "unknown function 'f'"),
        ("def g(): pass\nimport torch\n", r"unknown function 'f' \(known: g\)|did you mean 'g'"),
        ("def f(:", "cannot import .*SyntaxError"),
        ("1 / 0", r"cannot import .*ZeroDivisionError.*<module>, .*py, line 1"),
        ("def f():\n    return 3\n", r"returned int when called without arguments; .*\(images, pr"),
        ("def f():\n    raise OSError('no weights')", "failed to load: OSError: no weights"),
        ("def f(images, prompts):\n    return 'x'\n", "returned str; it must return one number"),
        ("def f(images, prompts):\n    return None\n", "returned NoneType"),
        ("def f(images, prompts):\n    return images[9]\n", r"IndexError.*\(in f, .*py, line 2\)"),
        ("def f(image):\n    return 'x'\n", "TypeError: returned str for one image, not a number"),
        ("def f(image):\n    return [1.0]\n", "TypeError"),
        ("import torch\ndef f(image):\n    return torch.ones(1)\n", "returned Tensor for one im"),
        ("def f(image, prompt):\n    return None\n", "TypeError"),
        (
            "def f(image, prompt):\n    return len(prompt) / 0\n",
            "ZeroDivisionError.*in f, .*line 2",
        ),
        *(
            (
                f"def f({names}):\n    return 1\n",
                r"its parameters are \(.*; name them \(images, pro",
            )
            for names in (
                "img, text",
                "prompts, images",
                "images, prompt",
                "image, prompts",
                "images, prompts, scale",
                "*images",
                "*, images, prompts",
                "**anything",
                "prompt",
                "image, images",
            )
        ),
        ("def f(images, prompts):\n    raise KeyError\n", "failed on 3 images: KeyError"),
    ],
)
def test_what_can_be_wrong_is_said(module: Callable[[str], str], source: str, said: str) -> None:
    name = module(source)
    with pytest.raises(UserError, match=said) as caught:
        from_import_path(f"{name}:f").score(IMAGES, TEXTS)
    assert f"{name}:f" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_user_s_own_traceback_is_kept_for_python(module: Callable[[str], str]) -> None:
    name = module("def f(images, prompts):\n    return {}['key']\n")
    with pytest.raises(UserError) as caught:
        from_import_path(f"{name}:f").score(IMAGES, TEXTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_memory_that_is_not_enough_is_no_fault_of_the_reward(
    module: Callable[[str], str],
) -> None:
    name = module(
        "import torch\ndef f(images, prompts):\n    raise torch.OutOfMemoryError('CUDA')\n"
    )
    with pytest.raises(torch.OutOfMemoryError):
        from_import_path(f"{name}:f").score(IMAGES, TEXTS)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["shapes-hh"], "score.rewards: unknown reward 'shapes-hh'; did you mean 'shapes-h'"),
        (["zzz"], 'unknown reward .*or give "package.module:function"'),
        (["shapes-h", "shapes-h"], "score.rewards: 'shapes-h' is listed twice"),
        (["ftp://host/x"], "score.rewards: 'ftp://host/x' is no address of a reward; write http"),
        (["http://"], "no address of a reward"),
        (["http://host:no"], "no address of a reward"),
        (["http://me:secret@host"], "without user, password or query"),
        (["http://host/?a=1"], "no address of a reward"),
        (["no.module:f"], "score.rewards, reward 'no.module:f': cannot import 'no.module'"),
    ],
)
def test_names_are_checked_before_anything_loads(names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_names(names, "score.rewards")


def test_jpeg_rewards_by_hand() -> None:
    """A flat picture is a small file, noise a large one; one reward is minus the other."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    images = [Image.new("RGB", (64, 64)), Image.fromarray(noise)]
    less, more = load("jpeg-compressibility"), load("jpeg-incompressibility")
    values = more.score(images, ["", ""])
    assert torch.equal(less.score(images, ["", ""]), -values)
    assert 0.5 < values[0] < 1.2  # kB; the header of a JPEG alone is some 600 bytes
    assert values[1] > 5

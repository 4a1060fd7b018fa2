"""Every rule of the table: n texts, the same for the same stream, nothing but the prompt."""

import random

import pytest

from craftune.refiners import RULES

PROMPTS = {"shapes": ["a red circle", "three squares", "a blue circle and a red square"]}
ANY = ["a cat", "x" * 10_000, "😀", "ends with a full stop.", 'a {p} "quoted" {0} %s brace', "."]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n", [1, 4, 16])
def test_n_rewrites_by_the_stream_alone(name: str, n: int) -> None:
    for prompt in PROMPTS.get(name, ANY):
        rewrites = RULES[name](prompt, n, random.Random(1))
        assert len(rewrites) == n
        assert all(isinstance(text, str) and text.strip() for text in rewrites)
        assert RULES[name](prompt, n, random.Random(1)) == rewrites
        if name != "none":
            assert len(set(rewrites)) == n
            assert RULES[name](prompt, n, random.Random(2)) != rewrites


@pytest.mark.parametrize("prompt", ANY)
def test_the_template_keeps_the_prompt(prompt: str) -> None:
    for rewrite in RULES["template"](prompt, 8, random.Random(0)):
        assert prompt.strip().rstrip(".,") in rewrite


def test_the_template_runs_out_of_texts_but_not_of_time() -> None:
    rewrites = RULES["template"]("a cat", 300, random.Random(0))
    assert len(rewrites) == 300
    assert len(set(rewrites)) == 240

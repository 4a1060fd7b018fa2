"""Asking a language model: what it is told, what is asked again, what is given up."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from craftune.config import ChatConfig, RefineConfig
from craftune.errors import UserError
from craftune.refiners.answers import Answer, Ask, Rejected
from craftune.refiners.chat import Complete, Reply, Request, by_chat, instruction

CAT, DOG = Ask("c", "a {n} cat", "refine/0/c"), Ask("d", "a dog", "refine/0/d")


def scripted(
    speak: Callable[[Request, int], str | Reply], asked: list[Request] | None = None
) -> Complete:
    """A model that says what `speak` says of a request and the number of the round."""
    rounds = 0

    def complete(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        nonlocal rounds
        rounds += 1
        for i in reversed(range(len(requests))):  # any order will do
            if asked is not None:
                asked.append(requests[i])
            said = speak(requests[i], rounds)
            yield i, said if isinstance(said, Reply) else Reply(said, True, 10, 3)

    return complete


def answers(complete: Complete, *asks: Ask, **settings: Any) -> dict[str, Answer]:
    config = RefineConfig(by="openai", **{"variants": 2, **settings})
    return {answer.prompt_id: answer for answer in by_chat(config, complete)(asks)}


def test_a_good_reply_is_one_request_a_prompt() -> None:
    asked: list[Request] = []
    found = answers(scripted(lambda r, k: "1. red\n2. blue", asked), CAT, DOG)
    assert found["c"] == Answer("c", ("red", "blue"), (), 1, 10, 3)
    assert len(asked) == 2


def test_the_model_is_told_number_words_and_prompt() -> None:
    asked: list[Request] = []
    answers(scripted(lambda r, k: "red\nblue", asked), CAT, max_words=7)
    assert "exactly 2 lines" in asked[0].text
    assert "at most 7 words" in asked[0].text
    assert asked[0].text.endswith("Prompt: a {n} cat")


def test_a_long_prompt_may_have_rewrites_as_long() -> None:
    asked: list[Request] = []
    long = Ask("l", "a small red house beside the sea", "l")
    found = answers(
        scripted(lambda r, k: "1 2 3 4 5 6 7\n1 2 3 4 5 6 7 8", asked), long, max_words=3
    )
    assert "at most 7 words" in asked[0].text
    assert found["l"].refined == ("1 2 3 4 5 6 7",)


def test_what_is_missing_is_asked_again_with_another_seed() -> None:
    asked: list[Request] = []

    def speak(request: Request, round_: int) -> str:
        return {1: "red\nI'm sorry", 2: "Red.", 3: "blue"}[round_]

    found = answers(scripted(speak, asked), DOG)["d"]
    assert found.refined == ("red", "blue")
    assert found.rejected == (Rejected(1, "I'm sorry", "refusal"), Rejected(2, "Red.", "duplicate"))
    assert (found.requests, found.tokens_in, found.tokens_out) == (3, 30, 9)
    assert len({request.seed for request in asked}) == 3
    assert ["exactly 2" in r.text for r in asked] == [True, False, False]
    assert "exactly 1 lines" in asked[1].text


def test_after_the_attempts_a_prompt_has_fewer() -> None:
    found = answers(scripted(lambda r, k: "red" if "dog" in r.text else "a\nb"), CAT, DOG)
    assert found["d"].refined == ("red",)
    assert found["d"].requests == 3
    assert [one.reason for one in found["d"].rejected] == ["duplicate"] * 2
    assert found["c"].refined == ("a", "b")


def test_a_finished_prompt_waits_for_no_other() -> None:
    order = [
        answer.prompt_id
        for answer in by_chat(
            RefineConfig(by="openai", variants=1),
            scripted(lambda r, k: "x" if k == 2 or "cat" in r.text else ""),
        )([DOG, CAT])
    ]
    assert order == ["c", "d"]


def test_seeds_depend_on_the_prompts_own_stream_alone() -> None:
    alone: list[Request] = []
    among: list[Request] = []
    answers(scripted(lambda r, k: "a\nb", alone), DOG)
    answers(scripted(lambda r, k: "a\nb", among), CAT, DOG)
    assert alone[0] in among


def test_more_lines_than_asked_for_are_left() -> None:
    assert answers(scripted(lambda r, k: "a\nb\nc\nd"), DOG)["d"].refined == ("a", "b")


def test_a_model_that_is_no_rewriter_is_soon_found_out() -> None:
    asks = [Ask(str(i), f"thing {i}", str(i)) for i in range(100)]
    asked: list[Request] = []
    with pytest.raises(UserError, match=r"first 32 replies of 'm' hold no usable.*32 refusal"):
        answers(scripted(lambda r, k: "Sorry.", asked), *asks, chat=ChatConfig(model="m"))
    assert len(asked) == 32


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"Rewrite {prompt}", r"lacks \{n\};"), (b"", "lacks"), (b"\xff{n}{prompt}", "not UTF-8")],
)
def test_an_instruction_that_does_not_do(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "i.txt").write_bytes(text)
    with pytest.raises(UserError, match=said):
        instruction(RefineConfig(by="openai", instruction=str(tmp_path / "i.txt")))


def test_no_instruction_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refine.instruction .*no such file"):
        instruction(RefineConfig(by="openai", instruction=str(tmp_path / "i.txt")))

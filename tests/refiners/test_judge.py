"""What a language model's reply is worth, line by line."""

import pytest

from craftune.refiners.judge import fault, rewrites_in

PROMPT = "a cat on a mat"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("1. A tabby cat", "A tabby cat"),
        ("(2) A tabby cat", "A tabby cat"),
        ("12: A tabby cat", "A tabby cat"),
        ("- A tabby cat", "A tabby cat"),
        ("* **A tabby cat**", "A tabby cat"),
        ("Version 3: A tabby cat", "A tabby cat"),
        ("**Version 3:** A tabby cat", "A tabby cat"),
        ('2. "A tabby cat"', "A tabby cat"),
        ("\u201cA tabby cat\u201d", "A tabby cat"),
        ("A  tabby\tcat", "A tabby cat"),
        ("3 cats", "3 cats"),
        ("2.5D render of a cat", "2.5D render of a cat"),
        ('"Cat" and "dog"', '"Cat" and "dog"'),
        ('A sign that says "1. cat"', 'A sign that says "1. cat"'),
    ],
)
def test_a_line_loses_what_a_list_adds(line: str, text: str) -> None:
    assert rewrites_in(line, whole=True) == [(text, "")]


def test_thoughts_fences_and_blank_lines_are_no_rewrites() -> None:
    reply = "<think>\nA cat?\n</think>\n```text\nOne cat\n\nAnother cat\n```"
    assert rewrites_in(reply, whole=True) == [("One cat", ""), ("Another cat", "")]
    assert rewrites_in("<think> and on and on", whole=False) == [("", "empty")]
    assert rewrites_in(" \n ", whole=True) == [("", "empty")]


def test_the_last_line_of_a_cut_reply_is_cut_off() -> None:
    assert rewrites_in("One cat\nAnoth", whole=False) == [("One cat", ""), ("Anoth", "cut off")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a tabby cat on a woven mat", ""),
        ("", "empty"),
        ("...", "empty"),
        ("I'm sorry, but I cannot help with that.", "refusal"),
        ("I\u2019m sorry", "refusal"),
        ("As an AI language model, I", "refusal"),
        ("I cannot describe a cat", "refusal"),
        ("抱歉\uff0c我无法", "refusal"),
        ("Here are 4 versions:", "remark"),
        ("Sure! Here you go:", "remark"),
        ("Let me know if you want more", "remark"),
        ("# Cats", "markup"),
        ("a **fluffy cat", "markup"),
        ('["a cat", "a dog"]', "markup"),
        ("a cat </s>", "markup"),
        ("a cat {prompt}", "markup"),
        ("a cat \ufffd", "not text"),
        ("a cat \x07", "not text"),
        ("cat " * 21, "too long"),
        ("c" * 401, "too long"),
        ("A cat, on a mat.", "same as the prompt"),
        ("a TALL cat", "duplicate"),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    assert fault(text, PROMPT, ["A tall cat."], max_words=20) == reason


def test_a_prompt_may_say_what_a_rewrite_must_not() -> None:
    prompt = "I'm sorry, a **bold** comic"
    assert fault(f"{prompt}, ink on paper", prompt, [], max_words=20) == ""
    assert fault("sure enough, a cat in the sun", PROMPT, [], max_words=20) == ""


def test_a_long_prompt_has_rewrites_as_long() -> None:
    assert fault("old cat " * 15, "cat " * 30, [], max_words=20) == ""
    assert fault("old cat " * 16, "cat " * 30, [], max_words=20) == "too long"

"""A language model's reply -> rewrites, and what is wrong with each."""

import re
import unicodedata
from collections.abc import Collection

EMPTY, CUT, REFUSAL, CHATTER = "empty", "cut off", "refusal", "remark"
MARKUP, NO_TEXT, TOO_LONG = "markup", "not text", "too long"
SAME, DUPLICATE = "same as the prompt", "duplicate"
REASONS = (EMPTY, CUT, REFUSAL, CHATTER, MARKUP, NO_TEXT, TOO_LONG, SAME, DUPLICATE)
"""Why a text is no usable rewrite, in the order in which it is looked at."""

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_NUMBER = re.compile(
    r"^(?:[-*•]\s+|\(?\d{1,2}[.):]\s+|(?:version|variant|rewrite|option)\s*\d*\s*[:.)-]\s+)+",
    re.IGNORECASE,
)
_BOLD = re.compile(r"(\*\*|__)(.+?)\1")
_MARKUP = re.compile(r"```|\*\*|^#|^\||^>|</?\w+>|^[\[{].*[\]}],?$|\{(?:n|prompt|words)\}")
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019", "\u300c": "\u300d"}
_REFUSAL = re.compile(
    r"^(?:i(?:['\u2019]| a)m (?:very |so )?(?:sorry|unable|afraid|not able)|sorry[,.]"
    r"|i apologi[sz]e|(?:unfortunately,? )?i (?:can ?not|can['\u2019]t|won['\u2019]t|must decline)"
    r"|as an ai\b|(?:很)?抱歉|对不起|我(?:无法|不能))",
    re.IGNORECASE,
)
_CHATTER = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|absolutely)\b.*[!:.]"
    r"|(?:here|below|these|the following) (?:are|is)\b.*:"
    r"|(?:let me know|i hope|feel free)\b.*|prompt:.*)$",
    re.IGNORECASE,
)


def rewrites_in(reply: str, whole: bool) -> list[tuple[str, str]]:
    """Every line of a reply without numbering, quotation marks and bold; and what cuts it short.

    Args:
        whole: whether the model ended the reply itself; otherwise its last line is cut off.
    """
    lines = [line.strip() for line in _THOUGHT.sub("", reply).splitlines()]
    lines = [line for line in lines if line and not line.startswith("```")]
    texts = [(_plain(line), "") for line in lines]
    if texts and not whole:
        texts[-1] = (texts[-1][0], CUT)
    return texts or [("", EMPTY)]


def fault(text: str, prompt: str, others: Collection[str], max_words: int) -> str:
    """Why a text is no usable rewrite of the prompt, or "".

    Args:
        others: rewrites of the same prompt that stand already.
        max_words: the longest rewrite; a longer prompt's own length counts instead.
    """
    words = max(max_words, _words(prompt))
    tests = {
        EMPTY: not any(map(str.isalnum, text)),
        REFUSAL: bool(_REFUSAL.match(text)) and not _REFUSAL.match(prompt),
        CHATTER: bool(_CHATTER.match(text)) and not _CHATTER.match(prompt),
        MARKUP: bool(_MARKUP.search(text)) and not _MARKUP.search(prompt),
        NO_TEXT: any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") for c in text)
        or "\N{REPLACEMENT CHARACTER}" in text,
        TOO_LONG: _words(text) > words or len(text) > 20 * words,
        SAME: _key(text) == _key(prompt),
        DUPLICATE: _key(text) in {_key(other) for other in others},
    }
    return next((reason for reason, found in tests.items() if found), "")


def _plain(line: str) -> str:
    """One line without the marks of a list and with single blanks."""
    text = _NUMBER.sub("", _BOLD.sub(r"\2", line)).strip()
    text = _NUMBER.sub("", text)
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1]
    return " ".join(text.split())


def _words(text: str) -> int:
    return len(text.split())


def _key(text: str) -> str:
    """Equal for texts that differ in case and punctuation alone."""
    return " ".join(re.findall(r"\w+", text.casefold()))

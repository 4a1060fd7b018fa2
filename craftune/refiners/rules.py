"""Refiners that are plain functions: a rule, a file of rewrites, or a function of the user's.

Such a function knows its prompts: whatever it gives wrongly is a mistake to mend, so nothing is
asked again and the first bad answer is an error.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from craftune.errors import UserError
from craftune.plugins import described
from craftune.records import json_lines
from craftune.refiners.answers import Answer, Ask, Refiner

Rule: TypeAlias = Callable[[str, int, random.Random], list[str]]
"""(prompt, n, rng) -> n rewrites."""


def none(prompt: str, n: int, rng: random.Random) -> list[str]:
    """The prompt itself, n times: variants then differ by their noise alone."""
    del rng
    return [prompt] * n


def by_rule(name: str, rule: Rule, n: int) -> Refiner:
    """A rule as a refiner that gives n rewrites of every prompt.

    Args:
        name: as in `refine.by`, for its errors.
    """

    def refine(asks: Sequence[Ask]) -> Iterator[Answer]:
        for ask in asks:
            yield Answer(ask.prompt_id, tuple(_rewrites(name, rule, ask, n)))

    return refine


def _rewrites(name: str, rule: Rule, ask: Ask, n: int) -> list[str]:
    """The rewrites of one prompt, checked."""
    where = f"refine.by {name!r}"
    try:
        rewrites = rule(ask.prompt, n, random.Random(ask.stream))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where} failed on {ask.prompt!r}: {error}") from None
    except Exception as error:
        if ":" not in name:
            raise
        raise UserError(f"{where} failed on {ask.prompt!r}: {described(error)}") from error
    if not isinstance(rewrites, list) or not all(isinstance(text, str) for text in rewrites):
        raise UserError(
            f"{where} gave {rewrites!r:.80} for {ask.prompt!r}; it must give a list of str"
        )
    rewrites = [" ".join(text.split()) for text in rewrites]
    if len(rewrites) != n or not all(rewrites):
        raise UserError(
            f"{where} gave {sum(map(bool, rewrites))} rewrites of {ask.prompt!r}, but "
            f"refine.variants = {n}; lower it, or make the refiner give more"
        )
    return rewrites


def from_file(source: str, path: Path) -> Rule:
    """The rewrites of JSON lines {"prompt": ..., "refined": [...]}.

    Args:
        source: the path as the recipe has it.

    Raises:
        UserError: no such file, a line of another form, or (later) a prompt without rewrites.
    """
    if not source or not path.is_file():
        raise UserError(f"refine.source {source!r}: no such file (refine.by is 'file')")
    found: dict[str, list[str]] = {}
    for number, value in json_lines(path):
        row = value if isinstance(value, dict) else {}
        prompt, texts = row.get("prompt"), row.get("refined")
        if not isinstance(prompt, str) or not isinstance(texts, list):
            raise UserError(
                f'{path}, line {number}: expected {{"prompt": "...", "refined": ["...", ...]}}'
            )
        found[" ".join(prompt.split())] = texts

    def look_up(prompt: str, n: int, rng: random.Random) -> list[str]:
        del rng
        if prompt not in found:
            raise UserError(f"{source}: no rewrites of the prompt {prompt!r}; add them")
        return found[prompt][:n]

    return look_up

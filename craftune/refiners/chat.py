"""Rewriting with a language model: what it is told, and how often it is asked.

One request asks for all rewrites of a prompt. What cannot be used (see `judge`) is asked for again
with another seed, at most `refine.attempts` times in all; then the prompt has fewer rewrites.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TypeAlias

from craftune.config import RefineConfig
from craftune.errors import UserError
from craftune.refiners.answers import Answer, Ask, Refiner, Rejected
from craftune.refiners.judge import fault, rewrites_in

PLACES = ("{n}", "{prompt}")
"""What an instruction must hold; {words} may stand in it too."""

PATIENCE = 32
"""Replies in a row, from the first on, without a usable rewrite: then the model is no rewriter."""


@dataclass(frozen=True)
class Request:
    """What the user says to the model, and the seed of its answer."""

    text: str
    seed: int


@dataclass(frozen=True)
class Reply:
    """What the model says; `whole` unless it was cut at the most tokens."""

    text: str
    whole: bool = True
    tokens_in: int = 0
    tokens_out: int = 0


Complete: TypeAlias = Callable[[Sequence[Request]], Iterator[tuple[int, Reply]]]
"""Replies with the numbers of their requests, in any order, each as soon as it is there."""


def instruction_file(config: RefineConfig) -> Path:
    """The file of `refine.instruction`; ours where none is given."""
    if config.instruction:
        return Path(config.instruction).expanduser()
    return Path(str(resources.files("craftune.refiners") / "instruction-v1.txt"))


def instruction(config: RefineConfig) -> str:
    """What the model is told.

    Raises:
        UserError: the file is missing, no text, or lacks the place of the prompt or the number.
    """
    path = instruction_file(config)
    if not path.is_file():
        raise UserError(f"refine.instruction {config.instruction!r}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    missing = [place for place in PLACES if place not in text]
    if missing:
        raise UserError(
            f"refine.instruction {str(path)!r}: lacks {' and '.join(missing)}; the number of "
            "rewrites and the prompt are put there"
        )
    return text.strip()


@dataclass
class _Draft:
    """The answer to one ask while it grows."""

    ask: Ask
    refined: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def take(self, config: RefineConfig, reply: Reply, attempt: int) -> None:
        """Sort a reply into rewrites and rejected texts; what is not needed is left out."""
        self.requests += 1
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        for text, cut in rewrites_in(reply.text, reply.whole):
            if len(self.refined) == config.variants:
                break
            reason = cut or fault(text, self.ask.prompt, self.refined, config.max_words)
            if reason:
                self.rejected.append(Rejected(attempt, text[:1000], reason))
            else:
                self.refined.append(text)

    def answer(self) -> Answer:
        return Answer(
            self.ask.prompt_id,
            tuple(self.refined),
            tuple(self.rejected),
            self.requests,
            self.tokens_in,
            self.tokens_out,
        )


def by_chat(config: RefineConfig, complete: Complete) -> Refiner:
    """A refiner that asks a language model.

    Raises:
        UserError: from `instruction`; or none of the first replies holds a usable rewrite.
    """
    told = instruction(config)

    def request(draft: _Draft, attempt: int) -> Request:
        ask, missing = draft.ask, config.variants - len(draft.refined)
        words = max(config.max_words, len(ask.prompt.split()))
        text = told.replace("{n}", str(missing)).replace("{words}", str(words))
        rng = random.Random(f"{ask.stream}/{attempt}")
        return Request(text.replace("{prompt}", ask.prompt), rng.getrandbits(31))

    def refine(asks: Sequence[Ask]) -> Iterator[Answer]:
        drafts, replies, useful = [_Draft(ask) for ask in asks], 0, False
        for attempt in range(1, config.attempts + 1):
            left = []
            for i, reply in complete([request(draft, attempt) for draft in drafts]):
                draft = drafts[i]
                draft.take(config, reply, attempt)
                replies, useful = replies + 1, useful or bool(draft.refined)
                if replies == PATIENCE and not useful:
                    raise UserError(_useless(config, drafts))
                if len(draft.refined) == config.variants or attempt == config.attempts:
                    yield draft.answer()
                else:
                    left.append(draft)
            drafts = left

    return refine


def _useless(config: RefineConfig, drafts: Sequence[_Draft]) -> str:
    rejected = [one for draft in drafts for one in draft.rejected]
    reasons = Counter(one.reason for one in rejected).most_common()
    return (
        f"refine.by {config.by!r}: the first {PATIENCE} replies of {config.chat.model!r} hold no "
        f"usable rewrite ({', '.join(f'{n} {reason}' for reason, n in reasons)}; e.g. "
        f"{rejected[0].text!r:.80}); choose another refine.chat.model or refine.instruction"
    )

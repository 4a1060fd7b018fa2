"""Stage `refine`: prompts.jsonl -> refined.jsonl, N rewrites of every prompt."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from craftune import refiners
from craftune.config import RefineConfig
from craftune.errors import UserError
from craftune.plugins import source_sha256
from craftune.progress import track
from craftune.records import Prompt, Refined, canonical, read_rows, write_rows, write_text
from craftune.refiners.answers import Answer, Ask, Rejected

ANSWERS = "answers.jsonl"
"""A line per finished prompt, written at once: what a killed run goes on from."""

NAMED = 5
"""Prompts with too few rewrites that are named on the terminal."""


def refine(
    config: RefineConfig, seed: int, prompts: Path, out: Path, device: str = "cpu"
) -> dict[str, int]:
    """Rewrite every prompt `config.variants` times; each by its own random stream.

    Finished prompts are kept: a killed run goes on with the others. They are made anew where a
    setting, or the source of the user's own function, has changed.

    Args:
        prompts: prompts.jsonl of the stage before.
        out: receives refined.jsonl, and answers.jsonl with all that was rejected and why.

    Returns:
        prompts, refined, "equal to the prompt"; for a language model also the prompts with fewer
        rewrites, requests, tokens, and the rejected texts by reason.

    Raises:
        UserError: the refiner fails; no prompt got a usable rewrite.
    """
    rows = read_rows(Prompt, prompts)
    made_from = _made_from(config, seed)
    finished = _finished(out / ANSWERS, made_from)
    asks = [
        Ask(row.id, row.prompt, f"refine/{seed}/{row.id}") for row in rows if row.id not in finished
    ]
    if asks:
        lines = [_line(answer, made_from) for answer in finished.values()]
        write_text(out / ANSWERS, "".join(lines))
        answers = refiners.load(config, device)(asks)
        with (out / ANSWERS).open("a", encoding="utf-8") as file:
            done = len(finished)
            for answer in track(answers, "refine", len(rows), "prompt", done=done):
                file.write(_line(answer, made_from))
                file.flush()  # now a kill of this process takes it no more
                finished[answer.prompt_id] = answer
    answers = [finished[row.id] for row in rows]
    if not any(answer.refined for answer in answers):
        raise UserError(_nothing(config, out / ANSWERS, answers))
    write_text(out / ANSWERS, "".join(_line(answer, made_from) for answer in answers))
    by = refiners.label(config)
    refined = [
        Refined(answer.prompt_id, j, text, by)
        for answer in answers
        for j, text in enumerate(answer.refined, 1)
    ]
    write_rows(out / "refined.jsonl", refined)
    _name_short(config, rows, answers, out / ANSWERS)
    return _counts(config, rows, answers)


def _made_from(config: RefineConfig, seed: int) -> str:
    """Digest of all that an answer depends on, but its prompt."""
    code = source_sha256(config.by, "refine.by") if ":" in config.by else ""
    value = {"seed": seed, "code": code, **refiners.made_from(config)}
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]


def _line(answer: Answer, made_from: str) -> str:
    return json.dumps({**asdict(answer), "made_from": made_from}, ensure_ascii=False) + "\n"


def _finished(path: Path, made_from: str) -> dict[str, Answer]:
    """Answers by prompt; half a line, as a kill may leave it, does not count."""
    found: dict[str, Answer] = {}
    if not path.is_file():
        return found
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
            same = value.pop("made_from") == made_from
            value["refined"] = tuple(value["refined"])
            value["rejected"] = tuple(Rejected(**one) for one in value["rejected"])
            answer = Answer(**value)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if same:
            found[answer.prompt_id] = answer
    return found


def _counts(
    config: RefineConfig, rows: Sequence[Prompt], answers: Sequence[Answer]
) -> dict[str, int]:
    texts = {row.id: row.prompt for row in rows}
    counts = {
        "prompts": len(rows),
        "refined": sum(len(answer.refined) for answer in answers),
        "equal to the prompt": sum(a.refined.count(texts[a.prompt_id]) for a in answers),
    }
    if not any(answer.requests for answer in answers):
        return counts
    reasons = Counter(one.reason for answer in answers for one in answer.rejected)
    return counts | {
        "prompts with fewer rewrites": sum(len(a.refined) < config.variants for a in answers),
        "requests": sum(answer.requests for answer in answers),
        "tokens in": sum(answer.tokens_in for answer in answers),
        "tokens out": sum(answer.tokens_out for answer in answers),
        **{f"rejected: {reason}": number for reason, number in sorted(reasons.items())},
    }


def _name_short(
    config: RefineConfig, rows: Sequence[Prompt], answers: Sequence[Answer], path: Path
) -> None:
    """Say which prompts have fewer rewrites than asked for, and why."""
    texts = {row.id: row.prompt for row in rows}
    short = [answer for answer in answers if len(answer.refined) < config.variants]
    for answer in short[:NAMED]:
        print(
            f"  refine: {len(answer.refined)} of {config.variants} rewrites of "
            f"{texts[answer.prompt_id]!r} after {config.attempts} attempts ({_reasons([answer])})",
            file=sys.stderr,
        )
    if len(short) > NAMED:
        print(f"  refine: and {len(short) - NAMED} more prompts, see {path}", file=sys.stderr)


def _reasons(answers: Sequence[Answer]) -> str:
    counts = Counter(one.reason for answer in answers for one in answer.rejected)
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "too few lines"


def _nothing(config: RefineConfig, path: Path, answers: Sequence[Answer]) -> str:
    return (
        f"{path}: no prompt got a usable rewrite from {refiners.label(config)!r} "
        f"({_reasons(answers)}); choose another refine.chat.model or refine.instruction and run "
        "with --redo refine"
    )

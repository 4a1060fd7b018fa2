"""Stage `refine`: prompts.jsonl -> refined.jsonl, N rewrites of every prompt."""

import json
import random
from pathlib import Path

from craftune.config import RefineConfig
from craftune.errors import UserError
from craftune.models import resolve
from craftune.records import Prompt, Refined, read_rows, write_rows
from craftune.refiners import FROM_FILE, load


def refine(config: RefineConfig, seed: int, prompts: Path, out: Path) -> dict[str, int]:
    """Rewrite every prompt `config.variants` times; each by its own random stream.

    Args:
        prompts: prompts.jsonl of the stage before.
        out: receives refined.jsonl.

    Raises:
        UserError: the refiner fails on a prompt (names it), or gives too few or empty rewrites.
    """
    rows = read_rows(Prompt, prompts)
    given = _from_file(config) if config.by == FROM_FILE else None
    refined = []
    for row in rows:
        rewrites = _rewrites(config, seed, row, given)
        for variant, text in enumerate(rewrites, 1):
            refined.append(Refined(row.id, variant, text, config.by))
    count = write_rows(out / "refined.jsonl", refined)
    same = sum(r.refined == row.prompt for row, r in _joined(rows, refined))
    return {"prompts": len(rows), "refined": count, "equal to the prompt": same}


def _rewrites(
    config: RefineConfig, seed: int, row: Prompt, given: dict[str, list[str]] | None
) -> list[str]:
    if given is not None:
        if row.prompt not in given:
            raise UserError(f"{config.source}: no rewrites of the prompt {row.prompt!r}")
        rewrites = given[row.prompt][: config.variants]
    else:
        try:
            rng = random.Random(f"refine/{seed}/{row.id}")
            rewrites = load(config.by)(row.prompt, config.variants, rng)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"refine.by {config.by!r} failed on {row.prompt!r}: {error}") from None
    rewrites = [" ".join(text.split()) for text in rewrites]
    if len(rewrites) != config.variants or not all(rewrites):
        raise UserError(
            f"refine.by {config.by!r} gave {sum(map(bool, rewrites))} rewrites of {row.prompt!r}, "
            f"but refine.variants = {config.variants}"
        )
    return rewrites


def _from_file(config: RefineConfig) -> dict[str, list[str]]:
    """Prompt -> its rewrites, from JSON lines {"prompt": ..., "refined": [...]}."""
    path = resolve(config.source)
    if not config.source or not path.is_file():
        raise UserError(f"refine.source {config.source!r}: no such file (refine.by is 'file')")
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[" ".join(row["prompt"].split())] = list(row["refined"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(
                f'{path}, line {number}: expected {{"prompt": "...", "refined": ["...", ...]}}'
            ) from None
    return found


def _joined(rows: list[Prompt], refined: list[Refined]) -> list[tuple[Prompt, Refined]]:
    by_id = {row.id: row for row in rows}
    return [(by_id[r.prompt_id], r) for r in refined]

"""Stage `refine`: prompts.jsonl -> refined.jsonl, N rewrites of every prompt."""

import random
from pathlib import Path

from craftune.config import RefineConfig
from craftune.errors import UserError
from craftune.models import resolve
from craftune.plugins import described
from craftune.records import Prompt, Refined, json_lines, read_rows, write_rows
from craftune.refiners import FROM_FILE, Refiner, load


def refine(config: RefineConfig, seed: int, prompts: Path, out: Path) -> dict[str, int]:
    """Rewrite every prompt `config.variants` times; each by its own random stream.

    Args:
        prompts: prompts.jsonl of the stage before.
        out: receives refined.jsonl.

    Raises:
        UserError: the refiner fails on a prompt (names it), or gives too few or empty rewrites.
    """
    rows = read_rows(Prompt, prompts)
    refiner = _from_file(config) if config.by == FROM_FILE else load(config.by)
    refined, same = [], 0
    for row in rows:
        texts = _rewrites(config, refiner, row, random.Random(f"refine/{seed}/{row.id}"))
        refined += [Refined(row.id, j, text, config.by) for j, text in enumerate(texts, 1)]
        same += texts.count(row.prompt)
    write_rows(out / "refined.jsonl", refined)
    return {"prompts": len(rows), "refined": len(refined), "equal to the prompt": same}


def _rewrites(config: RefineConfig, refiner: Refiner, row: Prompt, rng: random.Random) -> list[str]:
    """The rewrites of one prompt, checked."""
    where = f"refine.by {config.by!r}"
    try:
        rewrites = refiner(row.prompt, config.variants, rng)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where} failed on {row.prompt!r}: {error}") from None
    except Exception as error:
        if ":" not in config.by:
            raise
        raise UserError(f"{where} failed on {row.prompt!r}: {described(error)}") from error
    if not isinstance(rewrites, list) or not all(isinstance(text, str) for text in rewrites):
        raise UserError(
            f"{where} gave {rewrites!r:.80} for {row.prompt!r}; it must give a list of str"
        )
    rewrites = [" ".join(text.split()) for text in rewrites]
    if len(rewrites) != config.variants or not all(rewrites):
        raise UserError(
            f"{where} gave {sum(map(bool, rewrites))} rewrites of {row.prompt!r}, but "
            f"refine.variants = {config.variants}; lower it, or make the refiner give more"
        )
    return rewrites


def _from_file(config: RefineConfig) -> Refiner:
    """The rewrites of JSON lines {"prompt": ..., "refined": [...]}."""
    path = resolve(config.source)
    if not config.source or not path.is_file():
        raise UserError(f"refine.source {config.source!r}: no such file (refine.by is 'file')")
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
            raise UserError(f"{config.source}: no rewrites of the prompt {prompt!r}; add them")
        return found[prompt][:n]

    return look_up

"""Refiners: one prompt -> several richer rewrites. `REFINERS` is the table of names.

The rewrites only diversify what the model draws: rewards and training see the original prompt
(CRAFT, section 3.2). Out of tree, write "package.module:name" for a function
(prompt, n, rng) -> n rewrites, drawn with a `random.Random`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from craftune.config import RefineConfig
from craftune.errors import UserError, unknown_name
from craftune.models import resolve
from craftune.plugins import imported
from craftune.records import sha256
from craftune.refiners import endpoint, local
from craftune.refiners.answers import Refiner
from craftune.refiners.chat import Complete, by_chat, instruction, instruction_file
from craftune.refiners.rules import Rule, by_rule, from_file, none
from craftune.refiners.template import template
from craftune.shapes.refiner import refine as shapes

RULES: dict[str, Rule] = {"template": template, "none": none, "shapes": shapes}
"""Refiners that write by rule."""

CHATS: dict[str, Callable[[RefineConfig, str], Complete]] = {
    "transformers": local.complete,
    "openai": endpoint.complete,
}
"""Language models; of the settings, on a device."""

FROM_FILE = "file"
"""The refiner that reads `refine.source` instead of writing anything."""

REFINERS: dict[str, Any] = {**RULES, FROM_FILE: from_file, **CHATS}
"""Every name; the docstring's first line is what `craftune list refiners` prints."""


def load(config: RefineConfig, device: str = "cpu") -> Refiner:
    """The refiner of a recipe, ready to work; loads a local model.

    Raises:
        UserError: see `check`; a model, key or optional library is missing.
    """
    name = config.by
    if name in CHATS:
        return by_chat(config, CHATS[name](config, device))
    if name == FROM_FILE:
        return by_rule(name, from_file(config.source, resolve(config.source)), config.variants)
    return by_rule(name, _rule(name), config.variants)


def check(config: RefineConfig) -> None:
    """Refuse what cannot work, before anything loads.

    Raises:
        UserError: unknown name, nothing callable at the import path, a file or model not named.
    """
    if config.by in CHATS:
        if not config.chat.model:
            raise UserError(
                f"refine.chat.model: missing; refine.by = {config.by!r} needs a language model"
            )
        instruction(config)
    elif config.by == FROM_FILE:
        if not config.source:
            raise UserError("refine.source: missing; refine.by = 'file' reads the rewrites from it")
    else:
        _rule(config.by)


def made_from(config: RefineConfig) -> dict[str, Any]:
    """What the rewrites depend on: settings and digests of files."""
    found: dict[str, Any] = {"by": config.by, "variants": config.variants, "source": config.source}
    if config.source and resolve(config.source).is_file():
        found["source_sha256"] = sha256(resolve(config.source))
    if config.by not in CHATS:
        return found
    keys = ("model", "revision", "dtype", "base_url", "temperature", "top_p", "max_tokens")
    return found | {
        "attempts": config.attempts,
        "max_words": config.max_words,
        "instruction_sha256": sha256(instruction_file(config)),
        "chat": {key: getattr(config.chat, key) for key in keys}
        | _weights(Path(config.chat.model).expanduser()),
    }


def label(config: RefineConfig) -> str:
    """Who writes, as `records.Refined.by` has it."""
    return f"{config.by}:{config.chat.model}" if config.by in CHATS else config.by


def _rule(name: str) -> Rule:
    if name in RULES:
        return RULES[name]
    if ":" in name:
        return imported(name, "refine.by")[0]
    raise UserError(f"refine.by: {unknown_name('refiner', name, REFINERS)}")


def _weights(folder: Path) -> dict[str, Any]:
    """Digests of a local model's small files, sizes of its weights: reading those takes minutes."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    big = 1 << 26
    return {
        path.name: sha256(path) if path.stat().st_size < big else path.stat().st_size
        for path in files
    }

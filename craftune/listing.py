"""`craftune list`: the tables of names, and the manual of settings."""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from craftune.methods import METHODS, about
from craftune.models import FAMILIES
from craftune.recipes import keys_of, settings
from craftune.refiners import REFINERS
from craftune.rewards import REWARDS
from craftune.rewards.published import Published
from craftune.select_config import FILTERS

KEY_WIDTH = 29
"""Of "key = default" and the gap after it, in the tables of settings."""


def list_names(options: argparse.Namespace) -> int:
    """One line per name of a table."""
    if options.table == "settings":
        _print_keys(settings())
        print()
        _print_keys(
            row
            for name, entry in REWARDS.items()
            if isinstance(entry, Published)
            for row in keys_of(entry.settings, f'reward."{name}"')
        )
        return 0
    if options.table == "methods":
        for number, (name, kind) in enumerate(METHODS.items()):
            print(f"{chr(10) if number else ''}{name:<{KEY_WIDTH}}{': '.join(about(name))}")
            _print_keys(keys_of(kind, "method.settings"))
        return 0
    filters = {
        name: f"one image beats the plain prompt's on {' and '.join(roles)}"
        for name, roles in FILTERS.items()
    }
    tables: dict[str, Mapping[str, Any]] = {
        "rewards": REWARDS,
        "families": FAMILIES,
        "refiners": REFINERS,
        "filters": {**filters, "none": "every candidate passes"},
    }
    table = tables[options.table]
    width = max(map(len, table))
    for name, entry in table.items():
        if isinstance(entry, Published):
            _print_published(name, entry, width)
            continue
        text = entry if isinstance(entry, str) else (inspect.getdoc(entry) or "").splitlines()[0]
        print(f"{name:<{width}}  {text}")
    if options.table in ("rewards", "refiners"):
        print("\nYour own: package.module:function")
    if options.table == "rewards":
        print("In another process: http://host:port (craftune serve-reward, docs/http-rewards.md)")
        print('Where weights lie, and in which dtype they run: [reward."NAME"] (list settings)')
    if options.table == "filters":
        print("\nLetters are select.roles; a list of rewards is a filter, too.")
    return 0


def _print_published(name: str, entry: Published, width: int) -> None:
    print(f"{name:<{width}}  {entry.about}")
    print(f"{'':<{width}}  weights: {entry.source}; {entry.licence}; {entry.download}")


def _print_keys(rows: Iterable[tuple[str, str, str]]) -> None:
    """Keys as a recipe has them, section by section, with default and meaning."""
    columns = min(shutil.get_terminal_size().columns, 100)
    last = ""
    for section, key, text in rows:
        if section != last:
            print(f"{chr(10) if last else ''}[{section}]")
        last = section
        first = f"{key:<{KEY_WIDTH - 2}}  "
        print(textwrap.fill(text, columns, initial_indent=first, subsequent_indent=" " * KEY_WIDTH))

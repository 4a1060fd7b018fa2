"""The one exception that users meet: an input that craftune cannot work with."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What is wrong, where (file, key, value), what was expected and what would mend it.

    The command line prints it as one line and exits with status 2; finished work stays.
    """


class EndedElsewhere(Exception):  # noqa: N818 - nothing went wrong here
    """Another process of this launch says why it ends; this one ends without a word."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """A message for a name that is in no table, with the closest known one."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(names[:12]) + (f", ... {len(names)} in all" if len(names) > 12 else "")
    return f"unknown {kind} {name!r}{hint} (known: {shown or 'none'})"

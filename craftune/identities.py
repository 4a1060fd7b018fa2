"""Scores of one reward that were measured with different things never mix."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from craftune.errors import UserError


def one_identity_each(tables: Mapping[str, pa.Table], mend: str) -> dict[str, dict[str, Any]]:
    """What each reward of these tables of scores measured with.

    Args:
        tables: where they lie -> columns reward and identity.
        mend: what to do about a mixture.

    Raises:
        UserError: one reward measured with other weights, preprocessing or dtype here than there;
            names every part that differs.
    """
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for place, table in tables.items():
        for row in table.group_by(["reward", "identity"]).aggregate([]).to_pylist():
            name, identity = row["reward"], json.loads(row["identity"])
            before, other = seen.setdefault(name, (place, identity))
            keys = [k for k in sorted(other | identity) if other.get(k) != identity.get(k)]
            if keys:
                told = ", ".join(f"{k} {other.get(k)!r} and {identity.get(k)!r}" for k in keys)
                where = place if place == before else f"{before} and {place}"
                raise UserError(f"{where}: {name!r} scored with two identities: {told}; {mend}")
    return {name: identity for name, (_, identity) in seen.items()}

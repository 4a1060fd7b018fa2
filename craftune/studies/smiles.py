"""Molecules as texts: which are valid, which are stable, and which are the same. Needs RDKit."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from craftune.errors import UserError

LENGTH = 20
"""Letters of the longest text; a letter is an atom, a bond, a bracket or a ring number."""
ATOMS = frozenset(("C", "N", "O", "S", "F", "Cl"))

_LETTER = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|.")
_UNSTABLE = (
    "[OX2][OX2]",  # peroxides
    "[N,O,S;!a][F,Cl]",  # halogen on nitrogen, oxygen or sulfur
    "[N;!a]~[N;!a]~[N;!a]",  # chains of nitrogen
    "[#6]=[#6]=*",  # cumulated double bonds
    "[CX4]([OH])[OH]",  # geminal diols
    "[CX4]([OH])[NH,NH2]",  # hemiaminals
    "C=C[OH]",  # enols
    "[r3]=[r3]",  # double bonds in rings of three
    "[r]#[r]",  # triple bonds in rings
    "[Sv4,Sv6;!$(S=O)]",  # sulfur of high valence without oxygen
)
"""What falls apart or rearranges by itself. A list of rules, not a computation."""


def letters(text: str) -> list[str]:
    """A SMILES text cut into its letters."""
    return _LETTER.findall(text)


def chemistry() -> Any:
    """RDKit, silent.

    Raises:
        UserError: it is not installed.
    """
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        raise UserError("rdkit is missing; pip install 'craftune[molecules]'") from None
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    return Chem


def canonical(text: str) -> str | None:
    """The one SMILES of a molecule, however it is written; None where it is not valid.

    Valid: one molecule that RDKit reads and whose valences it accepts.
    """
    chem = chemistry()
    molecule = chem.MolFromSmiles(text) if text else None
    if molecule is None or "." in text:
        return None
    return chem.MolToSmiles(molecule)


@cache
def _patterns() -> list[Any]:
    return [chemistry().MolFromSmarts(pattern) for pattern in _UNSTABLE]


def stable(text: str) -> bool:
    """Valid, without charges or lone electrons, and with no group of `_UNSTABLE`."""
    if canonical(text) is None:
        return False
    molecule = chemistry().MolFromSmiles(text)
    plain = all(a.GetFormalCharge() == a.GetNumRadicalElectrons() == 0 for a in molecule.GetAtoms())
    return plain and not any(molecule.HasSubstructMatch(p) for p in _patterns())


def known_molecules() -> list[str]:
    """Canonical SMILES, sorted: small uncharged molecules of RDKit's Data/NCI/first_5K.smi."""
    chem = chemistry()
    from rdkit import RDConfig

    found = set()
    for line in (Path(RDConfig.RDDataDir) / "NCI/first_5K.smi").read_text().splitlines():
        for text in line.split()[:1]:
            molecule = chem.MolFromSmiles(text)
            parts = () if molecule is None else chem.GetMolFrags(molecule, asMols=True)
            found |= {chem.MolToSmiles(part, isomericSmiles=False) for part in parts}
    return sorted(filter(_fits, found))


def _fits(text: str) -> bool:
    molecule = chemistry().MolFromSmiles(text)
    if molecule is None or molecule.GetNumAtoms() < 4 or len(letters(text)) > LENGTH:
        return False
    return all(
        a.GetSymbol() in ATOMS and a.GetFormalCharge() == a.GetNumRadicalElectrons() == 0
        for a in molecule.GetAtoms()
    )


def written_anew(texts: Sequence[str], times: int) -> list[str]:
    """Each molecule in some more of its many writings: the writer learns the grammar sooner."""
    chem, found = chemistry(), set(texts)
    for text in texts:
        ways = chem.MolToRandomSmilesVect(chem.MolFromSmiles(text), times, randomSeed=1)
        found |= {way for way in ways if len(letters(way)) <= LENGTH}
    return sorted(found)


def measure(texts: Sequence[str], known: Callable[[str], bool]) -> dict[str, float]:
    """Rates over texts.

    Returns:
        valid and stable: shares of all; unique: distinct molecules among the stable; novel: share
        of those not in `known`; yield: distinct stable molecules per text, the product that counts.
    """
    valid = [name for text in texts if (name := canonical(text)) is not None]
    good = [name for name in valid if stable(name)]
    distinct = set(good)
    return {
        "valid": len(valid) / len(texts),
        "stable": len(good) / len(texts),
        "unique": len(distinct) / max(1, len(good)),
        "novel": sum(not known(name) for name in distinct) / max(1, len(distinct)),
        "yield": len(distinct) / len(texts),
    }

"""Molecules: a small writer of SMILES, and GRAFT with a reward of 0 or 1 and no copies.

    python -m craftune.studies.molecules --out docs/results/molecules.json

The setting of GRAFT's molecule experiment (Anil et al. 2025, arXiv:2510.02692): a reward that is 1
for a molecule that is valid and stable, de-duplicated by canonical SMILES. The generator here is a
recurrent network that learnt from small molecules of the NCI list that RDKit ships.
`pip install craftune[molecules]`.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from craftune.acceptance import AcceptConfig, accept
from craftune.seeds import stream, stream_seed
from craftune.studies.common import against_base, command
from craftune.studies.smiles import canonical, known_molecules, letters, measure, stable
from craftune.studies.smiles import written_anew as anew
from craftune.studies.writer import Alphabet, Writer, learn, new_writer

BASE_STEPS, ROUNDS, ROUND_STEPS, DRAWN, MEASURED = 500, 3, 60, 1500, 2000

ARMS: dict[str, AcceptConfig | None] = {
    "distinct": AcceptConfig(rule="distinct", key="canonical SMILES"),
    "binary": AcceptConfig(rule="binary"),
    "all": None,
}
"""GRAFT without copies, GRAFT with them, and training on all that was drawn: no selection."""


def accepted(texts: Sequence[str], config: AcceptConfig, seed: int) -> tuple[list[str], float]:
    """The texts that a rule takes, and its effective number of candidates."""
    names = [canonical(text) or "" for text in texts]
    reward = np.array([float(stable(text)) for text in texts])
    key = np.unique(names, return_inverse=True)[1]
    group, rng = np.zeros(len(texts), int), np.random.default_rng(seed)
    verdict = accept(config, reward, group, rng, key)
    return [texts[int(i)] for i in np.flatnonzero(verdict.taken)], verdict.effective_size


def run_arm(
    base: Writer, config: AcceptConfig | None, seed: int, known: Callable[[str], bool]
) -> dict[str, Any]:
    """Some rounds of drawing, accepting and training from the base."""
    writer = Writer(copy.deepcopy(base.network), base.schedule, base.alphabet)
    rounds: list[dict[str, float]] = []
    for number in range(ROUNDS):
        texts = writer.write(DRAWN, stream("draw", seed, number))
        drawn, size = len(texts), float(len(texts))
        if config is not None:
            texts, size = accepted(texts, config, stream_seed("accept", seed, number) % 2**32)
        rounds.append({"drawn": drawn, "accepted": len(texts), "effective": size})
        learn(writer, texts, ROUND_STEPS, 5e-4, seed=stream_seed("round", seed, number))
    # The same random numbers for every arm and for the base.
    return {**measure(writer.write(MEASURED, stream("measure", seed)), known), "rounds": rounds}


def study(seeds: int) -> dict[str, Any]:
    """Base and arms over seeds: means with intervals, and each arm's difference to the base."""
    molecules = known_molecules()
    texts, known = anew(molecules, 3), set(molecules).__contains__
    alphabet = Alphabet(tuple(sorted({letter for text in texts for letter in letters(text)})))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("base", *ARMS)}
    rounds: dict[str, list[Any]] = {name: [] for name in ARMS}
    for seed in range(seeds):
        base = new_writer(alphabet, seed)
        learn(base, texts, BASE_STEPS, 2e-3, seed)
        rows["base"].append(measure(base.write(MEASURED, stream("measure", seed)), known))
        for name, config in ARMS.items():
            found = run_arm(base, config, seed, known)
            rounds[name].append(found.pop("rounds"))
            rows[name].append(found)
    return {
        "molecules": len(molecules),
        "writings": len(texts),
        "settings": {
            "base steps": BASE_STEPS,
            "rounds": ROUNDS,
            "steps per round": ROUND_STEPS,
            "drawn per round": DRAWN,
            "measured on": MEASURED,
        },
        **against_base(rows),
        "rounds": rounds,
    }


if __name__ == "__main__":
    command("molecules", study)

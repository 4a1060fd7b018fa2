"""Molecules by their canonical text, what counts as stable, and a writer that learns."""

import numpy as np
import pytest
import torch

from craftune.acceptance import AcceptConfig
from craftune.seeds import stream
from craftune.studies.flow import nothing
from craftune.studies.writer import Alphabet, NextLetter, Texts, learn, new_writer

pytest.importorskip("rdkit")

from craftune.studies.molecules import ARMS, accepted
from craftune.studies.smiles import (
    LENGTH,
    canonical,
    known_molecules,
    letters,
    measure,
    stable,
    written_anew,
)

ETHANOL = ["CCO", "OCC", "C(O)C"]


def test_one_molecule_has_one_canonical_text() -> None:
    assert {canonical(text) for text in ETHANOL} == {"CCO"}
    assert canonical("c1ccccc1C") == canonical("Cc1ccccc1") == canonical("CC1=CC=CC=C1")


@pytest.mark.parametrize("text", ["", "C(C", "C1CC", "CC(C)(C)(C)C", "CO.CO", "c1cccc1"])
def test_what_is_no_molecule_has_none(text: str) -> None:
    assert canonical(text) is None
    assert not stable(text)


@pytest.mark.parametrize("text", ["CCO", "c1ccccc1Cl", "CS(=O)(=O)C", "NC(=O)N", "Oc1ccccc1"])
def test_ordinary_molecules_are_stable(text: str) -> None:
    assert stable(text)


@pytest.mark.parametrize(
    "text", ["COOC", "CNCl", "CN(N)NC", "C=C=C", "CC(O)O", "CC=CO", "C1=CC1", "C1CC#CC1", "[CH3]"]
)
def test_what_falls_apart_is_not(text: str) -> None:
    assert canonical(text) is not None
    assert not stable(text)


def test_without_copies_one_writing_of_each_stable_molecule_is_taken() -> None:
    texts = [*ETHANOL, "CCN", "C(C", "COOC", "NCC"]
    distinct, _ = accepted(texts, config_of("distinct"), seed=0)
    assert sorted(map(str, map(canonical, distinct))) == ["CCN", "CCO"]
    assert set(distinct) <= set(texts)
    with_copies, size = accepted(texts, config_of("binary"), seed=0)
    assert with_copies == [*ETHANOL, "CCN", "NCC"]
    assert size == pytest.approx(5)


def test_every_writing_of_a_molecule_has_the_same_chance() -> None:
    drawn = [accepted(ETHANOL, config_of("distinct"), seed)[0][0] for seed in range(150)]
    shares = np.array([drawn.count(text) / 150 for text in ETHANOL])
    assert (abs(shares - 1 / 3) < 0.13).all()


def config_of(name: str) -> AcceptConfig:
    config = ARMS[name]
    assert config is not None
    return config


def test_rates_are_of_texts_and_of_distinct_molecules() -> None:
    """5 of 8 valid, 4 stable, of them 2 distinct, one of which is known."""
    texts = ["CCO", "OCC", "C(O)C", "CCN", "COOC", "C(C", "", "C1CC"]
    found = measure(texts, {"CCO"}.__contains__)
    assert found == {"valid": 5 / 8, "stable": 4 / 8, "unique": 0.5, "novel": 0.5, "yield": 2 / 8}


def test_the_known_molecules_are_small_and_written_in_known_letters() -> None:
    found = known_molecules()
    assert len(found) > 1000
    assert found == sorted(set(found))
    assert all(canonical(text) == text for text in found[::50])
    again = written_anew(found[:20], 3)
    assert set(found[:20]) < set(again)
    assert {canonical(text) for text in again} == set(found[:20])
    assert max(len(letters(text)) for text in again) <= LENGTH


def test_texts_are_numbers_and_back() -> None:
    alphabet = Alphabet(("C", "Cl", "[nH]", "c", "1"))
    texts = ["CCl", "c1c[nH]c1", ""]
    assert alphabet.texts(alphabet.numbers(texts)) == texts
    assert alphabet.numbers(["CCl"])[0, :3].tolist() == [1, 2, 0]


def test_a_letter_is_predicted_from_those_before_it_alone() -> None:
    writer = new_writer(Alphabet(("C", "O")), 0)
    first, second = writer.alphabet.numbers(["CCCCO", "CCOOO"])[:, None]
    hot = [torch.nn.functional.one_hot(rows, 3).float() for rows in (first, second)]
    logits = [writer(x, torch.zeros(1), nothing(1)) for x in hot]
    assert torch.equal(logits[0][:, :3], logits[1][:, :3])
    assert not torch.allclose(logits[0][:, 3], logits[1][:, 3])


def test_a_writer_learns_what_it_is_given() -> None:
    writer = new_writer(Alphabet(("C", "O")), 0)
    batch = Texts(writer.alphabet.numbers(["CCO"] * 4))
    before, _ = NextLetter().loss(writer, None, batch, batch)
    learn(writer, ["CCO"], 60, 1e-2, seed=0)
    after, _ = NextLetter().loss(writer, None, batch, batch)
    assert after < 0.1 * before
    texts = writer.write(20, stream("test"))
    assert texts.count("CCO") > 12

"""A small network that writes texts letter by letter, learnt by the one loop."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from craftune.diffusion import Schedule
from craftune.seeds import stream
from craftune.studies.common import loop
from craftune.studies.smiles import LENGTH, letters
from craftune.training import train
from craftune.types import Cond, Denoiser, Metrics

WIDTH = 128


@dataclass(frozen=True)
class Alphabet:
    """Letters and their numbers; 0 ends a text and fills it up."""

    letters: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.letters) + 1

    def numbers(self, texts: Sequence[str]) -> Int[Tensor, "b length"]:
        """Texts of known letters as numbers."""
        rows = torch.zeros(len(texts), LENGTH, dtype=torch.long)
        known = {letter: i + 1 for i, letter in enumerate(self.letters)}
        for row, text in zip(rows, texts, strict=True):
            found = [known[letter] for letter in letters(text)]
            row[: len(found)] = torch.tensor(found)
        return rows

    def texts(self, rows: Int[Tensor, "b length"]) -> list[str]:
        """Numbers as texts; what stands after an end is not read."""
        names = ("", *self.letters)
        found = []
        for row in rows.tolist():
            end = row.index(0) if 0 in row else len(row)
            found.append("".join(names[number] for number in row[:end]))
        return found


@dataclass(frozen=True)
class Texts:
    """Texts as numbers: what the writer learns from."""

    letters: Int[Tensor, "b length"]

    def rows(self, index: slice) -> "Texts":
        """Part of the batch: a micro-batch."""
        return Texts(self.letters[index])


class WriterNetwork(nn.Module):
    """Letters to the logits of each next letter, read from left to right."""

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters + 1, width)
        self.cell = nn.GRU(width, width, batch_first=True)
        self.leave = nn.Linear(width, letters)

    def forward(
        self, before: Int[Tensor, "b length"], state: Tensor | None = None
    ) -> tuple[Float[Tensor, "b length letters"], Tensor]:
        """Args: before: the letter before each place; the number of letters stands for none."""
        seen, after = self.cell(self.letters(before), state)
        return self.leave(seen), after


@dataclass(frozen=True)
class Writer:
    """A `WriterNetwork` as the loop takes it. Letters are not noised: the schedule is unused."""

    network: nn.Module
    schedule: Schedule
    alphabet: Alphabet

    def __call__(
        self, x_t: Float[Tensor, "b length letters"], t: Tensor, cond: Cond
    ) -> Float[Tensor, "b length letters"]:
        """Logits of each letter of texts in one-hot form, given those to its left."""
        del t, cond
        start = torch.full((len(x_t), 1), x_t.shape[-1])
        return self.network(torch.cat([start, x_t.argmax(-1)[:, :-1]], 1))[0]

    @torch.no_grad()
    def write(self, count: int, rng: torch.Generator) -> list[str]:
        """New texts, letter by letter."""
        before, state, rows = torch.full((count, 1), len(self.alphabet)), None, []
        for _ in range(LENGTH):
            logits, state = self.network(before, state)
            before = torch.multinomial(logits[:, 0].softmax(-1), 1, generator=rng)
            rows.append(before)
        return self.alphabet.texts(torch.cat(rows, 1))


@dataclass(frozen=True)
class NextLetter:
    """The log-likelihood of texts: supervised fine-tuning of a writer."""

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def draw(self, schedule: Schedule, batch: Texts, rng: torch.Generator) -> Texts:
        """Nothing is drawn."""
        del schedule, rng
        return batch

    def loss(
        self, policy: Denoiser, reference: Denoiser | None, batch: Texts, draws: Texts
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Mean cross-entropy per letter, in nats; ends count, what fills up too."""
        del reference, draws
        width = policy.network.get_parameter("leave.bias").shape[0]
        texts = F.one_hot(batch.letters, width).float()
        t = torch.zeros(len(texts))
        logits = policy(texts, t, Cond({"tokens": texts[:, :1]}))
        loss = F.cross_entropy(logits.flatten(0, 1), batch.letters.flatten())
        return loss, {"loss": loss.item()}

    def check(self, metrics: Metrics) -> None:
        """Nothing beyond the loop's own checks."""


def new_writer(alphabet: Alphabet, seed: int) -> Writer:
    """A writer with fresh weights."""
    levels = torch.linspace(0, 1, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WriterNetwork(len(alphabet), WIDTH)
    return Writer(network, Schedule(1 - levels, levels, "velocity"), alphabet)


def learn(writer: Writer, texts: Sequence[str], steps: int, rate: float, seed: int) -> None:
    """Fine-tune in place on texts, drawn with replacement, by the one loop."""
    letters = writer.alphabet.numbers(texts)

    def feed(step: int) -> Texts:
        rng = stream("molecules", seed, step)
        return Texts(letters[torch.randint(len(letters), (64,), generator=rng)])

    with tempfile.TemporaryDirectory() as out:
        train(NextLetter(), writer, None, feed, loop(steps, rate), seed, Path(out))

"""A file of scores, made shard by shard beside its place: a killed job goes on where it was."""

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from craftune.errors import UserError
from craftune.progress import track
from craftune.records import canonical, read_table, write_rows, written
from craftune.scoring.batches import Batch, Rejection, Scored, score_batches
from craftune.scoring.tables import ABOUT, Source
from craftune.types import Reward

SCORES = pa.schema(
    [
        ("image", pa.string()),
        ("prompt", pa.string()),
        ("reward", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.float32()),
        ("identity", pa.dictionary(pa.int32(), pa.string())),
    ]
)
"""One number that one reward gave to one image, raw units; identity is canonical JSON."""


@dataclass(frozen=True)
class Outcome:
    """What scoring came to.

    Attributes:
        images: with scores.
        rejected: without, with the reasons.
        cut: "reward at n tokens" -> images whose prompt is longer than what it reads.
    """

    images: int
    rejected: list[Rejection]
    cut: dict[str, int]


def score_source(
    source: Source, loaded: Sequence[Reward], out: Path, batch_size: int, *, again: bool = False
) -> Outcome:
    """Score all images of a source into one Parquet file of the schema `SCORES`.

    Finished shards are kept beside it, in a folder of its name and ".parts", until all are done.
    A shard of other images, prompts or versions of a reward is made anew.

    Args:
        out: what is rejected goes beside it, in a .rejected.jsonl.
        again: throw away what is there and begin anew.

    Raises:
        UserError: `out` is there and not made from this; another process writes it; a reward is at
            fault.
    """
    identities = {reward.name: canonical(dict(reward.identity)) for reward in loaded}
    made_from = _digest([source.made_from(), identities])
    with _parts(out) as parts:
        if again:
            out.unlink(missing_ok=True)
            for part in parts.glob("part-*"):
                part.unlink()
        elif out.exists():
            return _finished(out, made_from)
        made = list(_score_parts(source, loaded, identities, parts, batch_size))
        outcome = _join(made, out, made_from)
        write_rows(rejections_file(out), outcome.rejected)
        shutil.rmtree(parts)
    return outcome


def rejections_file(out: Path) -> Path:
    """Where the images without scores are named."""
    return out.with_name(out.stem + ".rejected.jsonl")


@contextmanager
def _parts(out: Path) -> Iterator[Path]:
    """The folder of the finished shards, for this process alone."""
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out}: another process is writing it; wait for it, or choose another --out"
            ) from None
        try:
            yield parts
        finally:
            if not any(parts.glob("part-*")):
                shutil.rmtree(parts, ignore_errors=True)


def _finished(out: Path, made_from: str) -> Outcome:
    """What an earlier process made.

    Raises:
        UserError: it was made from something else, or is no file of scores.
    """
    about = _about(out)
    if about.pop("made_from", None) != made_from:
        raise UserError(
            f"{out}: is there already, and was not made from these images, prompts and rewards; "
            "choose another --out, or give --redo to replace it"
        )
    return _outcome([about])


def _score_parts(
    source: Source,
    loaded: Sequence[Reward],
    identities: Mapping[str, str],
    parts: Path,
    batch_size: int,
) -> Iterator[Path]:
    """Make the missing shards; yields all of them, in no order that matters."""
    kept: list[Path] = []
    before = sum(_images(_about(part)) for part in parts.glob("part-*.parquet"))

    def batches() -> Iterator[Batch[_Place]]:
        for number, (read_from, items) in enumerate(source.shards()):
            place = _Place(
                parts / f"part-{number:06d}.parquet", _digest([read_from, identities]), False
            )
            if _about(place.path).get("made_from") == place.made_from:
                kept.append(place.path)
                continue
            for start in range(0, len(items), batch_size):
                last = start + batch_size >= len(items)
                yield Batch(replace(place, last=last), items[start : start + batch_size])

    done: list[Scored] = []
    stream = score_batches(loaded, batches(), reject=True)
    total = source.total
    for place, scored in track(stream, "score", total, "image", _size, min(before, total)):
        done.append(scored)
        if place.last:
            _write_part(place, done, loaded, identities)
            yield place.path
            done = []
    yield from kept


@dataclass(frozen=True)
class _Place:
    """Where a batch belongs: its shard, what that is made from, and whether this is its end."""

    path: Path
    made_from: str
    last: bool


def _size(batch: tuple[_Place, Scored]) -> int:
    return len(batch[1].items) + len(batch[1].rejected)


def _write_part(
    place: _Place,
    done: Sequence[Scored],
    loaded: Sequence[Reward],
    identities: Mapping[str, str],
) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in SCORES.names}
    for scored in done:
        for name, values in scored.values.items():
            columns["image"] += [item.name for item in scored.items]
            columns["prompt"] += [item.prompt for item in scored.items]
            columns["reward"] += [name] * len(values)
            columns["value"] += values.tolist()
            columns["identity"] += [identities[name]] * len(values)
    items = [item for scored in done for item in scored.items]
    rejected = [one for scored in done for one in scored.rejected]
    cut = prompts_cut(loaded, [item.prompt for item in items])
    about = asdict(Outcome(len(items), rejected, cut))
    schema = _schema(about | {"made_from": place.made_from})
    with written(place.path) as partial:
        pq.write_table(pa.Table.from_pydict(columns, schema=schema), partial, compression="zstd")


def prompts_cut(loaded: Sequence[Reward], prompts: Sequence[str | None]) -> dict[str, int]:
    """How many of these prompts a reward reads in part: "NAME at N tokens" -> count, if any."""
    counts = {
        f"{reward.name} at {reward.limit.tokens} tokens": sum(
            reward.limit.cuts(prompt) for prompt in prompts if prompt
        )
        for reward in loaded
        if reward.limit
    }
    return {name: count for name, count in counts.items() if count}


def _join(parts: Sequence[Path], out: Path, made_from: str) -> Outcome:
    """All shards as one file, one row group each; whole or not at all."""
    parts = sorted(parts)
    outcome = _outcome([_about(part) for part in parts])
    schema = _schema(asdict(outcome) | {"made_from": made_from})
    with written(out) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(read_table(part).cast(schema))
    return outcome


def _schema(about: Mapping[str, Any]) -> pa.Schema:
    return SCORES.with_metadata({ABOUT: json.dumps(about)})


def _about(path: Path) -> dict[str, Any]:
    """The metadata of one of our files; {} where it is none."""
    try:
        held = pq.read_schema(path).metadata or {}
        about = json.loads(held.get(ABOUT, b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        return {}
    return about


def _images(about: Mapping[str, Any]) -> int:
    return about.get("images", 0) + len(about.get("rejected", ()))


def _outcome(abouts: Sequence[Mapping[str, Any]]) -> Outcome:
    """Of several files together."""
    cut: Counter[str] = Counter()
    for about in abouts:
        cut.update(about["cut"])
    rejected = [Rejection(**one) for about in abouts for one in about["rejected"]]
    return Outcome(sum(about["images"] for about in abouts), rejected, dict(cut))


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()

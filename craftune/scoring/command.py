"""`craftune score` on images: what is found, what is rejected, the scores and how they lie."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from craftune import rewards
from craftune.errors import UserError
from craftune.recipes import overridden
from craftune.scoring.scores import Outcome, rejections_file, score_source
from craftune.scoring.sources import open_source
from craftune.scoring.summary import summary
from craftune.types import Reward

OUT = Path("scores.parquet")
SHOWN = 10
"""Rejections that are named in the terminal."""
SETTINGS = {"score": {"batch_size": int}, "run": {"device": str}}
"""What --set may change besides the rewards' own settings, and the type of the value."""


@dataclass(frozen=True)
class Chosen:
    """The settings of a scoring.

    Attributes:
        settings: reward -> its section.
    """

    names: list[str]
    settings: Mapping[str, Mapping[str, Any]]
    batch_size: int
    device: torch.device


def score_images(options: argparse.Namespace) -> int:
    """Score, and show what came of it; 1 where images were rejected."""
    chosen = chosen_from(options.rewards or "", options.set)
    source = open_source(options.recipe, options.prompts)
    rewards.made_from(chosen.names, chosen.settings)
    loaded = [rewards.load(name, chosen.device, chosen.settings) for name in chosen.names]
    needing = [reward.name for reward in loaded if reward.uses_prompt]
    if needing and not source.prompts:
        raise UserError(
            f"{options.recipe}: has no prompts, but {' and '.join(needing)} judge an image by its "
            "prompt; give --prompts FILE (.jsonl, .csv or .parquet with columns file_name and "
            "prompt), or choose other --rewards"
        )
    print(f"{options.recipe}: {source.about}, on {chosen.device}", file=sys.stderr, flush=True)
    out = options.out or OUT
    again = options.redo is not None
    outcome = score_source(source, loaded, out, chosen.batch_size, again=again)
    _print_outcome(outcome, loaded, out)
    return int(bool(outcome.rejected))


def serve_one(options: argparse.Namespace) -> int:
    """Serve one reward until SIGINT or SIGTERM."""
    from craftune.rewards.serve import serve

    chosen = chosen_from(options.reward, options.set)
    reward = rewards.load(chosen.names[0], chosen.device, chosen.settings)
    server = serve(reward, options.host, options.port)
    address = f"http://{options.host}:{server.server_port}"
    print(f"{reward.name} on {chosen.device} at {address}; Ctrl-C ends it", flush=True)
    if not options.host.startswith("127.") and options.host != "localhost":
        print("whoever reaches this address can use it: there is no password", file=sys.stderr)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0


def refuse_options_of_images(options: argparse.Namespace) -> None:
    """With a recipe, these say nothing.

    Raises:
        UserError: one of them is given.
    """
    for name in ("rewards", "prompts", "out"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: not with a recipe, which says it itself")


def chosen_from(names: str, overrides: Sequence[str]) -> Chosen:
    """--rewards and --set, checked before anything loads.

    Raises:
        UserError: an unknown reward, setting or device, or a value that cannot be.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise UserError("--rewards: name at least one, as in --rewards hpsv2.1,pickscore")
    rewards.check_names(listed, "--rewards")
    given = overridden(overrides)
    for section, keys in given.items():
        for key, value in keys.items():
            kind = dict if section == "reward" else SETTINGS.get(section, {}).get(key)
            if kind is None or not isinstance(value, kind):
                raise UserError(
                    f"--set {section}.{key}={value!r}: when images are scored, settings are "
                    'reward."NAME".KEY, score.batch_size=NUMBER and run.device=NAME'
                )
    rewards.check_settings(given.get("reward", {}))
    batch_size = given.get("score", {}).get("batch_size", 64)
    if batch_size < 1:
        raise UserError(f"score.batch_size: must be at least 1, got {batch_size}")
    device = device_named(given.get("run", {}).get("device", "auto"))
    return Chosen(listed, given.get("reward", {}), batch_size, device)


def device_named(name: str) -> torch.device:
    """A torch device; "auto" is CUDA where there is one.

    Raises:
        UserError: torch does not know it, or has none of that kind.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"run.device {name!r}: {reason}") from None


def _print_outcome(outcome: Outcome, loaded: Sequence[Reward], out: Path) -> None:
    for one in outcome.rejected[:SHOWN]:
        print(f"rejected: {one.image}: {one.reason}", file=sys.stderr)
    if len(outcome.rejected) > SHOWN:
        print(f"rejected: {len(outcome.rejected) - SHOWN:,} more", file=sys.stderr, flush=True)
    print(summary(out, loaded))
    print()
    for reward, count in outcome.cut.items():
        print(f"prompts cut by {reward}: {count:,} of {outcome.images:,} images")
    print(f"scores: {out}")
    if outcome.rejected:
        print(f"rejected: {len(outcome.rejected):,}, see {rejections_file(out)}")

"""Rewards: images and prompts -> one number per image. `REWARDS` is the table of names.

An entry is a factory without arguments that returns a `Reward`, or a `Published` reward: weights
from the hub or a folder, with settings. Either is loaded once per process (and device). Out of
tree, write "package.module:name" wherever a name is accepted: a factory of a `Reward`, or simply a
function (images, prompts) -> one number per image. An address http://host:port/path is a reward
that another process computes.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from craftune.errors import UserError, unknown_name
from craftune.plugins import imported
from craftune.rewards.aesthetic import AESTHETIC
from craftune.rewards.clipscore import CLIPSCORE
from craftune.rewards.custom import from_import_path
from craftune.rewards.hps import hps
from craftune.rewards.imagereward import IMAGEREWARD
from craftune.rewards.jpeg import compressibility, incompressibility
from craftune.rewards.jpeg_proxy import jpeg_proxy
from craftune.rewards.mps import MPS
from craftune.rewards.pickscore import PICKSCORE
from craftune.rewards.published import Published, configured
from craftune.rewards.remote import RemoteSettings, check_address, is_address, remote_reward
from craftune.rewards.vqascore import VQASCORE
from craftune.rewards.weights import digest
from craftune.shapes.rewards import shapes_a, shapes_h, shapes_i, shapes_p, shapes_verifier
from craftune.types import Reward

REWARDS: dict[str, Callable[[], Reward] | Published] = {
    "hpsv2.1": hps("hpsv2.1"),
    "hpsv2.0": hps("hpsv2.0"),
    "pickscore": PICKSCORE,
    "aesthetic": AESTHETIC,
    "clipscore": CLIPSCORE,
    "imagereward": IMAGEREWARD,
    "mps": MPS,
    "vqascore": VQASCORE,
    "jpeg-compressibility": compressibility,
    "jpeg-incompressibility": incompressibility,
    "jpeg-proxy": jpeg_proxy,
    "shapes-h": shapes_h,
    "shapes-p": shapes_p,
    "shapes-a": shapes_a,
    "shapes-i": shapes_i,
    "shapes-verifier": shapes_verifier,
}

CPU = torch.device("cpu")

Settings = Mapping[str, Mapping[str, Any]]
"""Reward -> its section [reward."NAME"] of a recipe."""


def check_names(names: Iterable[str], key: str) -> None:
    """Refuse unknown and repeated names before anything loads; modules from outside are imported.

    Raises:
        UserError: names the recipe key, the name and the closest known one.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{key}: {name!r} is listed twice")
        seen.add(name)
        if is_address(name):
            check_address(name, key)
        elif ":" in name:
            imported(name, f"{key}, reward")
        elif name not in REWARDS:
            hint = 'or give "package.module:function" or "http://host:port"'
            raise UserError(f"{key}: {unknown_name('reward', name, REWARDS)}; {hint}")


def check_gradients(names: Iterable[str], key: str) -> None:
    """Refuse rewards that cannot be trained on by their gradient.

    Raises:
        UserError: names the recipe key and the reward.
    """
    for name in names:
        # All published rewards are networks that are differentiated; loading them is dear.
        if not isinstance(REWARDS.get(name), Published) and load(name).gradient is None:
            raise UserError(
                f"{key}: {name!r} has no gradient; take a reward that is differentiable, or a "
                "method that only needs scores, such as craft"
            )


def check_settings(settings: Settings) -> None:
    """Refuse sections of no published reward, unknown keys and values out of range.

    Raises:
        UserError: names the recipe key.
    """
    published = {name: entry for name, entry in REWARDS.items() if isinstance(entry, Published)}
    for name, given in settings.items():
        if is_address(name):
            configured(RemoteSettings, name, given)
            continue
        if name not in published:
            hint = 'a name with a dot is quoted, as in [reward."hpsv2.1"]'
            raise UserError(f"reward.{name}: {unknown_name('reward', name, published)}; {hint}")
        published[name].configured(name, given)


def made_from(names: Iterable[str], settings: Settings) -> dict[str, dict[str, Any]]:
    """Settings and sha256 of the weights of the published rewards among these, and what the
    servers of others say they are.

    Weights that are not here yet are downloaded.

    Raises:
        UserError: wrong settings, or weights that are not to be had; says what to fetch.
        ConnectionError: a server does not answer.
    """
    found = {}
    for name in dict.fromkeys(names):
        entry = REWARDS.get(name)
        if isinstance(entry, Published):
            config = entry.configured(name, settings.get(name, {}))
            weights = {"path_sha256": digest(entry.files(config))}
            found[name] = {key: vars(config)[key] for key in config.__dataclass_fields__} | weights
        elif is_address(name):
            found[name] = {"identity": dict(load(name, settings=settings).identity)}
    return found


def load(name: str, device: torch.device = CPU, settings: Settings | None = None) -> Reward:
    """The reward of this name or import path, loaded once per process, device and settings.

    Raises:
        UserError: unknown name, wrong settings, or weights that are not to be had.
    """
    check_names([name], "reward")
    entry = REWARDS.get(name)
    if is_address(name):
        return _loaded(name, CPU, configured(RemoteSettings, name, (settings or {}).get(name, {})))
    if not isinstance(entry, Published):
        return _loaded(name, CPU, None)
    return _loaded(name, device, entry.configured(name, (settings or {}).get(name, {})))


def display_scale(name: str) -> float:
    """What tables multiply a reward's stored scores by; 1 but for published rewards that say so."""
    entry = REWARDS.get(name)
    return entry.display_scale if isinstance(entry, Published) else 1.0


def unload() -> None:
    """Forget all loaded rewards; their memory is free once nobody holds them."""
    _loaded.cache_clear()


@functools.cache
def _loaded(name: str, device: torch.device, config: Any) -> Reward:
    entry = REWARDS.get(name)
    if isinstance(entry, Published):
        return entry.load(config, device)
    if is_address(name):
        return remote_reward(name, config)
    return entry() if entry else from_import_path(name)

"""Published files: found, downloaded, read without running code from them, and loaded strictly."""

import functools
import hashlib
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from craftune import records
from craftune.errors import UserError

Network = TypeVar("Network", bound=nn.Module)

SAFETENSORS_OR_BIN = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The weights of a transformers folder, the first that is there."""


def find(path: str, names: Sequence[str], key: str) -> Path:
    """The first of these files that a folder or a hub id has; a file is taken as it is.

    The hub's cache is used and filled as usual (HF_HOME, HF_HUB_OFFLINE).

    Args:
        path: a file, a folder, or a hub id such as "xswu/HPSv2".
        names: file names, in the order of preference.
        key: of the recipe, for messages.

    Raises:
        UserError: nothing there; says what to fetch from where.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        for name in names:
            if (local / name).is_file():
                return local / name
        raise UserError(f"{key} {path!r}: the folder holds no {' or '.join(names)}")
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise UserError(
            f"{key} {path!r}: no such file or folder; give one that holds {names[0]}, or a hub id"
        )
    return _from_hub(path, names, key)


def _from_hub(path: str, names: Sequence[str], key: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    reason, unreachable = "", False
    for name in names:
        try:
            return Path(hf_hub_download(path, name, local_files_only=unreachable))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            reason = reason or str(error).strip().splitlines()[0]
            # After half a minute of trying; another of the files may be in the cache.
            unreachable = unreachable or isinstance(error, LocalEntryNotFoundError)
    raise UserError(
        f"{key} {path!r}: no such file or folder here, and the hub did not give it ({reason}); "
        f"fetch {names[0]} from https://huggingface.co/{path} and set {key} to its folder"
    )


def parts(file: Path, path: str, key: str) -> list[Path]:
    """The files that an index of shards names, or the file itself."""
    if not file.name.endswith(".index.json"):
        return [file]
    names = sorted(set(records.read_json(file)["weight_map"].values()))
    return [find(path, (name,), key) for name in names]


def read(file: Path, key: str) -> dict[str, Any]:
    """What a .safetensors file, or a torch file of tensors and plain containers, holds.

    Raises:
        UserError: damaged, or a torch file that holds more than data.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{key}: {file}: damaged, or no mere weights; files that run code are not read"
        ) from None
    except Exception as error:  # torch, zipfile and safetensors each have their own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}: {file}: damaged ({reason}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file}: holds a {type(found).__name__}, not a table of tensors")
    return found


def load_strictly(
    make: Callable[[], Network],
    weights: Mapping[str, Tensor],
    source: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Network:
    """A network for inference with exactly these weights; no memory is spent on random ones.

    Args:
        make: builds it, with all its parameters.
        weights: one tensor per entry of its state.
        source: key and file, for messages.

    Raises:
        UserError: a missing, unknown or wrongly shaped tensor; names it.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        network = make()
    expected = network.state_dict()
    for said, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("also holds", weights.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" * (len(names) > 1)
            raise UserError(f"{source}: not this network's weights: {said} {min(names)!r}{more}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            shapes = f"{tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
            raise UserError(f"{source}: {name!r} has shape {shapes}")
    # Single numbers stay exact: PickScore's scale is 0.03 % off in float16.
    state = {
        name: tensor.to(device, dtype if tensor.ndim else torch.float32)
        for name, tensor in weights.items()
    }
    network.load_state_dict(state, strict=True, assign=True)
    return network.to(device).eval().requires_grad_(False)


def digest(files: Mapping[str, Path]) -> str:
    """sha256 of one file, or of the digests of several."""
    digests = {role: _sha256(path.resolve()) for role, path in files.items()}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256(records.canonical(digests).encode()).hexdigest()


def _sha256(path: Path) -> str:
    if path.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", path.name):
        return path.name  # the hub's cache names large files by their sha256
    state = path.stat()
    return _hashed(path, state.st_size, state.st_mtime_ns)


@functools.cache
def _hashed(path: Path, size: int, changed: int) -> str:
    """Once per process, as long as size and time of change are the same."""
    del size, changed
    return records.sha256(path)

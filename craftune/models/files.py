"""Where a recipe's checkpoint lies: a diffusers folder, one .safetensors file, or on the hub.

From the hub only data is fetched (json, txt, tokenizer models, safetensors), never code. Its
client's own settings hold: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from craftune.config import ModelConfig
from craftune.errors import UserError
from craftune.records import read_json

EMBEDDED = "craftune:"
"""Prefix of files that ship inside the package, e.g. craftune:shapes/model."""

SETTINGS = ("*.json", "*.txt", "*.model")
"""What a diffusers layout holds beside weights: configs, vocabularies, sentencepiece models."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def resolve(name: str) -> Path:
    """A path as given, or inside the package for "craftune:..."."""
    if name.startswith(EMBEDDED):
        return Path(__file__).parent.parent / name.removeprefix(EMBEDDED)
    return Path(name).expanduser()


def checkpoint(config: ModelConfig) -> Path:
    """The local diffusers folder or single file of a recipe's model; fetches a hub id.

    Raises:
        UserError: none of the three, or the hub does not give it.
    """
    path, key = resolve(config.path), f"model.path {config.path!r}"
    if path.suffix in PICKLES:
        raise UserError(
            f"{key}: a pickle can run code and is not read; give it as .safetensors "
            "(safetensors' convert script makes one) or as a diffusers folder"
        )
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"{key}: no such file; give a local .safetensors file")
        return path
    if config.config:
        raise UserError(
            f"model.config {config.config!r}: only a single .safetensors file needs it, "
            f"{config.path!r} has its own configs; leave it out"
        )
    if path.is_dir():
        return path
    if not _may_be_hub_id(config.path):
        raise UserError(f"{key}: no such folder; give a diffusers folder or .safetensors file")
    return _hub_checkpoint(config, key)


def settings_folder(config: ModelConfig, default: str) -> Path:
    """The local diffusers folder whose configs and tokenizer belong to a single file.

    Args:
        default: the hub id to take where `model.config` is empty.

    Raises:
        UserError: it is neither a folder nor to be had from the hub.
    """
    name = config.config or default
    if resolve(name).is_dir():
        return resolve(name)
    key = (
        f"model.config {name!r}"
        if config.config
        else f"{config.path}: a single file has no configs or tokenizer; those of {name!r}"
    )
    if not _may_be_hub_id(name):
        raise UserError(f"{key}: no such folder; give a diffusers folder or a hub id")
    mend = (
        "; set model.config to a diffusers folder of the same architecture (of it only .json "
        "and .txt files are read)"
    )
    return _snapshot(name, None, key, mend, list(SETTINGS), None)


def _may_be_hub_id(name: str) -> bool:
    path = resolve(name)
    return not (path.is_absolute() or path.exists() or name.startswith((".", "~", EMBEDDED)))


def _hub_checkpoint(config: ModelConfig, key: str) -> Path:
    """Configs and one set of weights: the variant's where a part has it, else the plain ones."""

    def fetch(allow: list[str], ignore: str | None = None) -> Path:
        return _snapshot(config.path, config.revision, key, "", allow, ignore)

    plain = "*/*.*.safetensors"  # left out: a dot in the name is a variant, fp16 or non_ema
    if not config.variant:
        return fetch([*SETTINGS, "*/*.safetensors"], plain)
    folder = fetch([*SETTINGS, f"*/*.{config.variant}.safetensors", f"*/*.{config.variant}-*"])
    parts = [file.parent.name for file in folder.glob("*/config.json")]
    lacking = [name for name in parts if not has_variant(folder / name, config.variant)]
    return fetch([f"{name}/*.safetensors" for name in lacking], plain) if lacking else folder


def has_variant(folder: Path, variant: str | None) -> bool:
    """Whether a part's weights are there in this variant."""
    marks = (f".{variant}.", f".{variant}-")
    return any(mark in file.name for file in folder.glob("*.safetensors") for mark in marks)


def loading_arguments(folder: Path) -> str:
    """What `from_pretrained` of this diffusers folder must be told beside it, as code.

    An SD3 without T5 loads only when it is said that there is none.
    """
    index = read_json(folder / "model_index.json")
    absent = [n for n in ("text_encoder_3", "tokenizer_3") if index.get(n) == [None, None]]
    return "".join(f", {name}=None" for name in absent)


def stitched_code(tuned: str, how: Mapping[str, Any]) -> str:
    """The call that draws with a P-GRAFT run.

    Args:
        tuned: folder of the tuned model or its adapters.
        how: the content of stitch.json.
    """
    return (
        f'craftune.load_stitched("{tuned}", "{how["base"]}", {float(how["t_star"])!r},\n'
        f'    sampler="{how["sampler"]}")'
    )


def check_whole(path: Path) -> None:
    """Read the headers of a weight file, or of all in a folder.

    Raises:
        UserError: a file is cut off, or is git-lfs's note of where it lies.
    """
    _dtypes(path)


def stored_dtype(path: Path) -> Literal["float32", "float16", "bfloat16"]:
    """The narrowest dtype in which a checkpoint, folder or file, loads without any rounding.

    Raises:
        UserError: a weight file is damaged.
    """
    found = _dtypes(path)
    if found <= {"BF16", "I64"}:
        return "bfloat16"
    return "float16" if found <= {"F16", "I64"} else "float32"


def _dtypes(path: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    found: set[str] = set()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        try:
            with safe_open(file, framework="pt") as weights:
                found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole file ({error}); copy it again") from None
    return found


def _snapshot(
    name: str, revision: str | None, key: str, mend: str, allow: list[str], ignore: str | None
) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
        )
    except GatedRepoError:
        reason = "it is gated; accept its licence on its page and log in with `hf auth login`"
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        reason = f"it is not in {constants.HF_HUB_CACHE} and {why}"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
    raise UserError(f"{key}: no such folder here, and the hub did not give it ({reason}){mend}")

"""A recipe: TOML plus `--set section.key=value` -> frozen, typed settings.

Everything is checked before anything loads: unknown sections, keys and names are refused with
the closest known one, values of the wrong type with what was expected. Attribute docstrings are
the manual (`craftune check --help-keys` prints them).
"""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from craftune.errors import UserError, unknown_name
from craftune.selection import SelectConfig

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Where the run lives and what all its stages share."""

    name: str
    """Name of the run folder."""
    out: str = "runs"
    """Folder that holds run folders, relative to the current directory."""
    seed: int = 0
    """Every random choice of the run follows from it."""
    device: str = "auto"
    """"auto" (cuda, else cpu), or a torch device such as "cuda:1"."""


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Which checkpoint is aligned."""

    path: str
    """A diffusers folder, a hub id, or "craftune:shapes/model" for the embedded model."""
    family: str = "auto"
    """A name of `craftune list families`; "auto" reads it from the checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Weight variant of the files, e.g. "fp16"."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights while sampling."""


@dataclass(frozen=True, config=STRICT)
class PromptsConfig:
    """Which prompts the pool is drawn for."""

    source: str
    """A .txt (one per line), .jsonl, .csv, .tsv or .parquet file."""
    column: str = "prompt"
    """Column or field of the text; for .csv and .tsv also matched without regard to case."""
    category: str = "category"
    """Column of a category for per-category tables; may be missing from the file."""
    limit: int = 0
    """Draw this many prompts by `run.seed`; 0 takes all."""


@dataclass(frozen=True, config=STRICT)
class RefineConfig:
    """How prompts are rewritten."""

    by: str = "template"
    """A name of `craftune list refiners`, or "package.module:function"."""
    variants: int = 4
    """N: rewrites per prompt, >= 1."""
    source: str = ""
    """For by = "file": a .jsonl with fields prompt and refined (a list of rewrites)."""


@dataclass(frozen=True, config=STRICT)
class GenerateConfig:
    """How candidates are drawn."""

    sampler: Literal["ddim", "dpm++2m"] = "dpm++2m"
    """DDIM (eta 0) or DPM-Solver++ 2M."""
    num_steps: int = 25
    """Network calls per image, >= 1; with guidance each is two."""
    guidance_scale: float = 7.5
    """Classifier-free guidance as diffusers counts it; 1 is none."""
    seeds_per_variant: int = 1
    """Images per refined prompt; the plain prompt always has one."""
    batch_size: int = 16
    """Images per network call; changes no image beyond float rounding."""
    shard_size: int = 256
    """Candidates per Parquet shard: the unit of work that survives a kill."""


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """Which rewards look at every candidate."""

    rewards: tuple[str, ...]
    """Names of `craftune list rewards`, or "package.module:function"."""
    batch_size: int = 64
    """Images per call of a reward."""


@dataclass(frozen=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters instead of all weights."""

    rank: int = 0
    """0 trains all weights of the denoiser; otherwise the adapters' rank."""
    alpha: int = 0
    """Scale of the adapters is alpha / rank; 0 means alpha = rank."""
    targets: tuple[str, ...] = ()
    """Module names to adapt; empty takes the family's default."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Knobs of the one loop, shared by all methods."""

    steps: int = 120
    """Optimizer updates."""
    batch_size: int = 128
    """Examples (image, t, noise) per update, whatever the micro-batch."""
    micro_batch: int = 0
    """Examples per forward and backward pass; 0 takes the whole batch. Changes only memory."""
    learning_rate: float = 5e-5
    """AdamW's; constant after the warm-up."""
    warmup_steps: int = 10
    """Updates over which the learning rate rises linearly from 0."""
    weight_decay: float = 1e-2
    """AdamW's decoupled decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this L2 norm."""
    prompt_dropout: float = 0.1
    """Share of examples trained on the empty prompt, which keeps guidance working."""
    ema_decay: float = 0.0
    """Decay per update of the averaged weights that are saved; 0 saves the last weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network under autocast; weights and losses stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 1.3 times the time."""
    save_every: int = 50
    """Updates between checkpoints."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted once a newer one is complete; 0 keeps all."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Of the saved model; the evaluation loads what was saved."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, config=STRICT)
class MethodConfig:
    """Which method, and its own hyper-parameters under [method.<name>]."""

    name: str = "craft"
    """A name of `craftune list methods`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The method's hyper-parameters; see `craftune list methods`."""


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """How base and tuned are compared: same prompts, same seeds, same sampler settings."""

    rewards: tuple[str, ...] = ()
    """Held-out rewards, in addition to those of [score]."""
    source: str = ""
    """Prompt file as in [prompts]; empty holds out `num_prompts` of the training prompts."""
    num_prompts: int = 300
    """Prompts to compare on; 0 takes all of `source`."""
    images_per_prompt: int = 2
    """Images of each model per prompt; diversity needs >= 2."""
    resamples: int = 10_000
    """Bootstrap resamples over prompts."""


@dataclass(frozen=True, config=STRICT)
class ReportConfig:
    """What the report shows."""

    title: str = ""
    """Headline; empty takes the run's name."""
    grid: int = 24
    """Prompts in the before/after grid."""
    gallery: int = 48
    """Chosen samples shown with their scores and reason."""


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A whole run, section by section."""

    run: RunConfig
    model: ModelConfig
    prompts: PromptsConfig
    score: ScoreConfig
    select: SelectConfig
    refine: RefineConfig = field(default_factory=RefineConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: a TOML file.
        overrides: "section.key=value" strings; the value is TOML, or a bare string.

    Raises:
        UserError: the file is missing or no TOML, a key is unknown, or a value has a wrong type.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; see the folder recipes/ for examples")
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(data, override)
    return _validate(data, str(path))


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one dotted key in place."""
    key, separator, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not separator or not sections or not name:
        raise UserError(f"--set {override!r}: expected section.key=value, e.g. train.steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override!r}: {section!r} is a value, not a section")
    data[name] = value


def _validate(data: dict[str, Any], source: str) -> Recipe:
    """JSON mode is strict about types but takes lists for tuples, as TOML needs."""
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise UserError(f"{source}, {_explain(error, data)}") from None
    except TypeError as error:
        raise UserError(f"{source}: a value cannot be used in a recipe: {error}") from None


def _explain(error: ValidationError, data: dict[str, Any]) -> str:
    """The first finding as "section.key: what is wrong"; unknown keys come first."""
    found = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")[0]
    key = ".".join(str(part) for part in found["loc"])
    if found["type"] == "unexpected_keyword_argument":
        kind: Any = Recipe
        for part in found["loc"][:-1]:
            kind = get_type_hints(kind).get(str(part), kind)
        known = [f.name for f in fields(kind)]
        return f"{key}: {unknown_name('key', str(found['loc'][-1]), known)}"
    if found["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = found["msg"].removeprefix("Value error, ")
    if message.startswith(f"{key}."):  # our own checks name the key and the value themselves
        return message
    got: Any = data
    for part in found["loc"]:
        got = got.get(str(part), "?") if isinstance(got, dict) else got
    return f"{key}: {message[0].lower()}{message[1:]}, got {got!r}"

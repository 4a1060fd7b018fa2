"""The settings of a recipe, section by section: frozen, typed, within their range.

Attribute docstrings are the manual; `craftune list settings` prints them. `craftune.recipes`
reads a recipe into them.
"""

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from craftune.select_config import SelectConfig

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


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
    rounds: Count = 1
    """Times that the pool is drawn and trained on, each from the model of the round before; all
    but the last round lie in round-1, round-2 ... inside the run folder."""

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name or "\0" in self.name:
            raise ValueError(f"run.name must be the name of one folder, got {self.name!r}")


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Which checkpoint is aligned."""

    path: str
    """A diffusers folder, a hub id, one .safetensors file with a whole checkpoint (SD1.x, SD2.x or
    SDXL), or "craftune:shapes/model" for the embedded model."""
    family: str = "auto"
    """A name of `craftune list families`; "auto" reads it from the checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Weight variant of the files, e.g. "fp16"."""
    config: str = ""
    """For one .safetensors file: a diffusers folder or hub id with the configs and tokenizer of
    its architecture; empty takes the one that diffusers names for that kind of file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights while sampling. Training keeps what it changes in float32; see
    `train.precision` for what stays frozen beside adapters."""
    t5: bool = True
    """false leaves out the T5 text encoder of SD3, which saves 9 GB in bfloat16; the prompt is
    then read by the two CLIP encoders alone, as by diffusers with text_encoder_3=None."""


@dataclass(frozen=True, config=STRICT)
class PromptsConfig:
    """Which prompts the pool is drawn for."""

    source: str
    """A .txt (one per line), .jsonl, .json (a list), .csv, .tsv or .parquet file; or a dataset of
    the hub, "hf://OWNER/NAME", "hf://OWNER/NAME@REVISION/FILE"."""
    split: str = "train"
    """Split of a dataset of the hub; not looked at where the source names a FILE."""
    column: str = "prompt"
    """Column or field of the text; for .csv and .tsv also matched without regard to case."""
    category: str = "category"
    """Column of a category for per-category tables; may be missing from the file."""
    limit: Natural = 0
    """Draw this many prompts by `run.seed`; 0 takes all."""


@dataclass(frozen=True, config=STRICT)
class ChatConfig:
    """The language model of the refiners "transformers" and "openai"."""

    model: str = ""
    """A folder or hub id (transformers), or what the endpoint calls it, e.g. "qwen-plus"."""
    revision: str | None = None
    """transformers: branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """transformers: of the weights; "auto" is the checkpoint's own."""
    base_url: str = "https://api.openai.com/v1"
    """openai: address of the endpoint, up to and without /chat/completions."""
    key_env: str = "OPENAI_API_KEY"
    """openai: NAME of the environment variable that holds the key; the key is written nowhere."""
    temperature: Positive = 0.9
    """Larger makes rewrites more different from each other, and more often useless."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of probability that tokens are drawn from."""
    max_tokens: Count = 1024
    """Longest reply; all rewrites of a prompt are one reply."""
    batch_size: Count = 16
    """Prompts at once (transformers), or requests at once (openai)."""
    timeout: Positive = 60.0
    """openai: seconds to wait for one reply."""
    retries: Natural = 6
    """openai: of a request that failed (429, 5xx, no answer), with growing pauses."""

    def __post_init__(self) -> None:
        # Not said what was got: it may be the key itself.
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise ValueError(
                "refine.chat.key_env must be the NAME of an environment variable that holds the "
                "key, such as DASHSCOPE_API_KEY; never write the key itself into a recipe"
            )
        if "@" in self.base_url or not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                "refine.chat.base_url must begin with http:// or https:// and hold no user or "
                "password; the key comes from the variable that refine.chat.key_env names"
            )


@dataclass(frozen=True, config=STRICT)
class RefineConfig:
    """How prompts are rewritten."""

    by: str = "template"
    """A name of `craftune list refiners`, or "package.module:function"."""
    variants: Count = 4
    """N: rewrites per prompt."""
    source: str = ""
    """For by = "file": a .jsonl with fields prompt and refined (a list of rewrites)."""
    instruction: str = ""
    """For a language model: a text file with {n} and {prompt} in it; empty takes ours."""
    attempts: Count = 3
    """For a language model: times that a prompt is asked for until all rewrites are usable."""
    max_words: Count = 50
    """For a language model: longest rewrite (CLIP reads 77 tokens, about 55 words), or the
    prompt's own length where that is more."""
    chat: ChatConfig = field(default_factory=ChatConfig)


@dataclass(frozen=True, config=STRICT)
class GenerateConfig:
    """How candidates are drawn."""

    sampler: Literal["auto", "ddim", "dpm++2m", "unipc", "euler"] = "auto"
    """DDIM (eta 0), DPM-Solver++ 2M or UniPC of order 2 for UNets, Euler for the flow families;
    "auto" takes the family's own: dpm++2m or euler."""
    num_steps: Count = 25
    """Network calls per image; with classifier-free guidance each is two."""
    guidance_scale: Positive = 7.5
    """Classifier-free guidance as diffusers counts it; 1 is none. FLUX.1-dev takes it as an input
    (3.5 is usual), FLUX.1-schnell takes none: 1."""
    seeds_per_variant: Count = 1
    """Images per refined prompt; the plain prompt always has one."""
    batch_size: Count = 16
    """Images per network call; changes no image beyond float rounding."""
    shard_size: Count = 256
    """Candidates per Parquet shard: the unit of work that survives a kill."""
    keep_latents: bool = True
    """Store each candidate's final latents, which training then learns from as they are: 66 kB an
    image for SD1.x, 262 kB for SDXL, 1 MB for SD3 and FLUX.1. false encodes the selected pictures
    by the VAE instead, mean and deviation once, drawn anew at every use."""
    keep_states: tuple[Count, ...] = ()
    """Store each candidate's latents after these numbers of steps, too; P-GRAFT trains on them."""

    def __post_init__(self) -> None:
        if any(after >= self.num_steps for after in self.keep_states):
            raise ValueError(
                f"generate.keep_states must be below num_steps = {self.num_steps}, "
                f"got {list(self.keep_states)}"
            )


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """Which rewards look at every candidate."""

    rewards: tuple[str, ...] = ()
    """Names of `craftune list rewards`, or "package.module:function". At least one where the
    method needs a pool; without a pool they are only compared on."""
    batch_size: Count = 64
    """Images per call of a reward."""


@dataclass(frozen=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters instead of all weights."""

    rank: Natural = 0
    """0 trains all weights of the denoiser; otherwise the adapters' rank."""
    alpha: Natural = 0
    """Scale of the adapters is alpha / rank; 0 means alpha = rank."""
    targets: tuple[str, ...] = ()
    """Module names to adapt; empty takes the family's default."""
    dora: bool = False
    """Train each adapted weight's length too (DoRA, arXiv:2402.09353): closer to full training at
    low ranks, slower."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Knobs of the one loop, shared by all methods."""

    steps: Count = 120
    """Optimizer updates."""
    batch_size: Count = 128
    """Examples (image, t, noise) per update, whatever the micro-batch."""
    micro_batch: Literal["auto"] | Count = "auto"
    """Examples per forward and backward pass; "auto" takes as many as a trial shows to fit in
    memory, up to the whole batch. Changes no result beyond float rounding."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """Bytes of state per trained weight: AdamW 8; 8-bit AdamW 2 (needs bitsandbytes); Adafactor
    next to none for matrices, at most 3 for 3 x 3 convolutions."""
    learning_rate: Positive = 5e-5
    """The highest rate, reached after the warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to 0 at the last step."""
    warmup_steps: Natural = 10
    """Updates over which the learning rate rises linearly from 0."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay of the gradient's mean and of its square; Adafactor has neither."""
    eps: Positive = 1e-8
    """AdamW's guard against division by 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """Decoupled decay of the weights, times the learning rate."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this L2 norm."""
    prompt_dropout: Share = 0.1
    """Share of examples trained on the empty prompt, which keeps guidance working. None are where
    guidance is not classifier-free (FLUX.1): no empty prompt is ever drawn with; and none for
    methods that draw their own images, whose gradient passes through both branches."""
    ema_decay: Share = 0.0
    """Decay per update of the averaged weights that are saved; 0 saves the last weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network under autocast; trained weights and losses stay float32. Weights
    that are frozen beside adapters are then held in bfloat16 too, unless model.dtype is float32."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about 1.3 times the time. "auto":
    where fewer than 4 examples, or than `micro_batch`, fit without."""
    save_every: Count = 50
    """Updates between checkpoints."""
    keep_checkpoints: Natural = 2
    """Older checkpoints are deleted once a newer one is complete; 0 keeps all."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Of the saved model; the evaluation loads what was saved."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.optimizer == "adafactor" and (self.betas, self.eps) != ((0.9, 0.999), 1e-8):
            raise ValueError("train.betas and train.eps are AdamW's; adafactor has neither")


@dataclass(frozen=True, config=STRICT)
class MethodConfig:
    """Which method, and its own hyper-parameters."""

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
    num_prompts: Natural = 300
    """Prompts to compare on; 0 takes all of `source`. Without it, at most half of [prompts]."""
    images_per_prompt: Count = 2
    """Images of each model per prompt; diversity needs >= 2."""
    resamples: Count = 10_000
    """Bootstrap resamples over prompts."""
    scales: tuple[Positive, ...] = ()
    """Also compare the tuning scaled: weights W_0 + s (W - W_0) for each s, such as [0.25, 0.5,
    0.75]; the base is 0, the tuned model 1, above 1 goes beyond it. Each s costs as much as the
    tuned model's images."""
    scale_prompts: Natural = 0
    """Compare `scales` on the first this many of the prompts; 0 takes all."""

    def __post_init__(self) -> None:
        twice = len(set(self.scales)) < len(self.scales)
        if twice or 1 in self.scales:
            reason = "names one twice" if twice else "1 is the tuned model, compared anyway"
            raise ValueError(f"evaluate.scales: {list(self.scales)} {reason}; leave it out")


@dataclass(frozen=True, config=STRICT)
class ReportConfig:
    """What the report shows."""

    title: str = ""
    """Headline; empty takes the run's name."""
    grid: Natural = 24
    """Prompts in the before/after grid."""
    gallery: Natural = 48
    """Chosen samples shown with their scores and reason."""


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A whole run, section by section."""

    run: RunConfig
    model: ModelConfig
    prompts: PromptsConfig
    score: ScoreConfig = field(default_factory=ScoreConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    reward: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of published rewards, e.g. [reward.pickscore]; see `craftune list rewards`."""

    @property
    def training_dtype(self) -> Literal["float32", "bfloat16"]:
        """In which the checkpoint is loaded for training.

        Adapters leave it frozen, and autocast rounds its matrices to bfloat16 anyway.
        """
        frozen = self.train.lora.rank > 0 and self.train.precision == "bfloat16"
        return "bfloat16" if frozen and self.model.dtype != "float32" else "float32"

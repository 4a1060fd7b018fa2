"""Stage `base`: text encoder and denoiser, trained together on latents and noisy captions."""

import copy
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from craftune.shapes.captions import (
    CONFUSION_RATE,
    LONG_CONFUSION_RATE,
    confuse,
    long_caption,
    short_caption,
)
from craftune.shapes.training.common import Pace, Trainer
from craftune.shapes.training.text import WIDTH, token_ids
from craftune.shapes.world import Spec, Style, random_spec, specs_by_category

BATCH = 64
LONG_RATE = 0.55
"""Share of long captions."""
EMPTY_RATE = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""
USED_TOKENS = 28
"""Captions are shorter than this; attending to fewer padding tokens saves time."""
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Scenes:
    """Encoded scenes and where to find those that show a spec."""

    latents: Tensor
    """fp16 `[n, 16, 8, 8]`, not scaled."""
    styles: list[Style]
    by_spec: dict[Spec, list[int]]

    @staticmethod
    def load(path: Path) -> "Scenes":
        """Read what `encode_scenes` wrote."""
        saved = torch.load(path, weights_only=False)
        by_spec: dict[Spec, list[int]] = {}
        for index, (spec, _) in enumerate(saved["labels"]):
            by_spec.setdefault(spec, []).append(index)
        return Scenes(saved["latents"], [scene.style for _, scene in saved["labels"]], by_spec)


def noise_schedule() -> DDPMScheduler:
    """The schedule of Stable Diffusion 1, with velocity as the target."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        clip_sample=False,
    )


def new_unet() -> UNet2DConditionModel:
    """2.8 M parameters: 64 and 96 channels, cross-attention at both levels."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


class Captioner:
    """Draws what the web would show: a caption, and a scene that it may describe wrongly."""

    def __init__(self, scenes: Scenes, seed: int) -> None:
        self.scenes, self.rng, self.groups = scenes, random.Random(seed), specs_by_category()

    def draw(self) -> tuple[int, str]:
        """Index of a scene, and its caption."""
        rng = self.rng
        asked = random_spec(self.groups, rng)
        long = rng.random() < LONG_RATE
        wrong_rate = LONG_CONFUSION_RATE if long else CONFUSION_RATE[asked.category]
        shown = confuse(asked, rng) if rng.random() < wrong_rate else asked
        index = rng.choice(self.scenes.by_spec.get(shown) or self.scenes.by_spec[asked])
        if rng.random() < EMPTY_RATE:
            return index, ""
        if long:
            return index, long_caption(asked, self.scenes.styles[index], rng)
        return index, short_caption(asked, rng)


def train_base(
    scenes: Scenes,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    vae: AutoencoderTiny,
    folder: Path,
    pace: Pace,
    seed: int,
) -> StableDiffusionPipeline:
    """Train, or go on training, and return the pipeline with the averaged weights."""
    unet = new_unet().to(memory_format=torch.channels_last)
    modules: dict[str, nn.Module] = {"unet": unet, "text_encoder": encoder.train()}
    averages = {f"ema_{k}": copy.deepcopy(m).requires_grad_(False) for k, m in modules.items()}
    trainer = Trainer({**modules, **averages}, pace, folder)
    schedule, captioner = noise_schedule(), Captioner(scenes, seed + trainer.step)
    scale = vae.config.scaling_factor

    def loss() -> Tensor:
        drawn = [captioner.draw() for _ in range(BATCH)]
        x_0 = scenes.latents[[index for index, _ in drawn]].float() * scale
        ids = token_ids(tokenizer, [caption for _, caption in drawn])[:, :USED_TOKENS]
        noise = torch.randn_like(x_0)
        # One timestep from each of BATCH equal ranges: less noise in the gradient.
        t = ((torch.arange(BATCH) + torch.rand(BATCH)) * (1000 / BATCH)).long()
        x_t = schedule.add_noise(x_0, noise, t).contiguous(memory_format=torch.channels_last)
        cond = encoder(ids).last_hidden_state
        prediction = unet(x_t, t, cond, return_dict=False)[0]
        return F.mse_loss(prediction, schedule.get_velocity(x_0, noise, t))

    def average(step: int) -> None:
        share = 1 - min(EMA_DECAY, (1 + step) / (10 + step))
        for name, module in modules.items():
            ema = averages[f"ema_{name}"]
            torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), share)

    trainer.run(loss, average)
    return pipeline(vae, tokenizer, averages["ema_text_encoder"], averages["ema_unet"])


def load_average(folder: Path, text_encoder: Path, vae: AutoencoderTiny) -> StableDiffusionPipeline:
    """The pipeline of the last checkpoint in `folder`, finished or not."""
    state = torch.load(folder / "state.pt", weights_only=True)
    encoder = CLIPTextModel.from_pretrained(text_encoder / "text_encoder")
    unet = new_unet()
    encoder.load_state_dict(state["ema_text_encoder"])
    unet.load_state_dict(state["ema_unet"])
    tokenizer = CLIPTokenizer.from_pretrained(text_encoder / "tokenizer")
    return pipeline(vae, tokenizer, encoder, unet)


def pipeline(
    vae: AutoencoderTiny,
    tokenizer: CLIPTokenizer,
    encoder: nn.Module,
    unet: nn.Module,
) -> StableDiffusionPipeline:
    """The parts as an ordinary pipeline, with DPM-Solver++ 2M as its sampler."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.to(memory_format=torch.contiguous_format).eval(),
        scheduler=DPMSolverMultistepScheduler.from_config(noise_schedule().config),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )

"""What methods on the reward's gradient are fed with: prompts, and how images are drawn of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from craftune.batches import Drawing, Prompts
from craftune.config import GenerateConfig, TrainConfig
from craftune.errors import UserError
from craftune.methods import FromPrompts
from craftune.methods.drawing import weighted
from craftune.records import Prompt, read_rows
from craftune.stages.generate import guidance_of, sampler_of
from craftune.stages.train import shuffled
from craftune.types import Model, Reward


@dataclass(frozen=True)
class PromptFeed:
    """The prompts of any step: endless reshuffling, as a function of the step.

    Prompts are encoded when their step comes: all of a large file's would not fit in memory.
    """

    texts: list[str]
    model: Model
    guidance_scale: float
    drawing: Drawing
    config: TrainConfig
    seed: int

    @property
    def counts(self) -> Mapping[str, int]:
        """Prompts, and the images that will be drawn of them."""
        return {
            "examples": self.config.steps * self.config.batch_size,
            "prompts": len(self.texts),
        }

    def __call__(self, step: int) -> Prompts:
        """Prompts `step * batch_size ...` of the sequence of shuffled epochs."""
        index = shuffled(len(self.texts), self.config.batch_size, self.seed, step)
        texts = [self.texts[i] for i in index]
        cond, _ = guidance_of(self.model, self.model.encode_prompts(texts), self.guidance_scale)
        return Prompts(texts, cond, self.drawing)


def prompt_feed(
    config: TrainConfig,
    method: FromPrompts,
    drawing: GenerateConfig,
    model: Model,
    rewards: Mapping[str, Reward],
    seed: int,
    prompts: Path,
) -> PromptFeed:
    """The training prompts; text encoders and VAE stay on the device, every step uses them.

    Args:
        drawing: sampler, steps and guidance of the images that are trained on.
        rewards: those that the method names, each with a gradient.
        prompts: prompts.jsonl.
    """
    texts = [row.prompt for row in read_rows(Prompt, prompts)]
    if not texts:
        raise UserError(f"{prompts}: no prompt to train on; --redo prompts")
    empty = model.encode_prompts([""])
    empty, scale = guidance_of(model, empty, drawing.guidance_scale)
    sampler = sampler_of(drawing, model)

    def reward(images: Tensor, texts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        scores = {}
        for name, each in rewards.items():
            assert each.gradient is not None, f"{name} has no gradient"
            scores[name] = each.gradient(images, texts)
        total = weighted(scores, method.rewards, method.scales)
        return total, {name: score.detach() for name, score in scores.items()}

    how = Drawing(
        grid=model.grid(sampler, drawing.num_steps),
        sampler=sampler,
        guidance_scale=scale,
        latent_shape=model.latent_shape,
        empty=empty,
        decode=model.decode,
        reward=reward,
    )
    return PromptFeed(texts, model, drawing.guidance_scale, how, config, seed)

"""CLIP-FlanT5 on transformers: T5, the patches of a CLIP tower, and two layers between them.

Flan-T5 has an output layer of its own. transformers 5 calls every T5's the same as its embeddings;
loading each by its name keeps them apart.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from craftune.errors import UserError
from craftune.rewards.text import CACHED, Tokenizer
from craftune.rewards.weights import load_strictly
from craftune.types import PromptLimit

BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)
AFTER = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
ANSWER = "Yes"
CONTEXT = 2048
"""Tokens that are read, of which the picture counts as one."""

VISION = "vision_tower.vision_tower."
LAYER = -2
"""Of the image tower's hidden states: the last layer but one, whose patches are read."""

_EXPECTED = {
    "model_type": "clip_t5",
    "mm_vision_select_layer": LAYER,
    "mm_projector_type": "mlp2x_gelu",
}


@dataclass(frozen=True)
class Answering:
    """The whole network.

    Attributes:
        vision: transformers' CLIP image tower.
        projector: from its width to T5's.
        t5: transformers' `T5ForConditionalGeneration`.
    """

    vision: Any
    projector: nn.Sequential
    t5: Any

    @property
    def patches(self) -> int:
        """How many tokens a picture is."""
        return (self.vision.config.image_size // self.vision.config.patch_size) ** 2

    @property
    def bytes_per_image(self) -> int:
        """Of activations in one pass without gradient, with room to spare and a long prompt."""
        config, tokens = self.t5.config, self.patches + 256
        width = 8 * config.d_model + 3 * config.d_ff + 3 * config.num_heads * tokens
        return tokens * width * 4

    def sureness(
        self, pixels: Float[Tensor, "b 3 s s"], prompts: list[str], tokenizer: Tokenizer
    ) -> Float[Tensor, " b"]:
        """Geometric mean of the chances of the answer's tokens, float32, with gradient.

        Args:
            pixels: as CLIP takes them, in the network's dtype.
        """
        shown = self.vision(pixels, output_hidden_states=True).hidden_states[LAYER][:, 1:]
        before, after = question(prompts, tokenizer)
        device = pixels.device
        parts = (
            self.t5.shared(before.to(device)).expand(len(prompts), -1, -1),
            self.projector(shown),
            self.t5.shared(after.to(device)),
        )
        read = torch.cat([torch.ones(len(prompts), before.shape[1] + self.patches), after != 0], 1)
        answer = torch.tensor(tokenizer.tokenizer(ANSWER)["input_ids"], device=device)
        start = answer.new_tensor([self.t5.config.decoder_start_token_id])
        logits = self.t5(
            inputs_embeds=torch.cat(parts, dim=1),
            attention_mask=read.to(device),
            decoder_input_ids=torch.cat((start, answer[:-1])).expand(len(prompts), -1),
        ).logits
        chances = logits.float().log_softmax(-1)
        return chances[:, torch.arange(len(answer)), answer].mean(-1).exp()


def question(prompts: list[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Token numbers before the picture `[1, n]` and after it `[b, m]`, padded with 0 at the end."""
    before = tokenizer.tokenizer(BEFORE)["input_ids"]
    most = CONTEXT - len(before) - 1
    rows = [tokenizer.tokenizer(AFTER.format(prompt))["input_ids"][:most] for prompt in prompts]
    longest = max(len(row) for row in rows)
    return torch.tensor([before]), torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def question_limit(tokenizer: Tokenizer) -> PromptLimit:
    """Prompts so long that the end of the question is lost."""
    before = len(tokenizer.tokenizer(BEFORE)["input_ids"]) + 1

    @functools.lru_cache(CACHED)
    def cuts(prompt: str) -> bool:
        return before + len(tokenizer.tokenizer(AFTER.format(prompt))["input_ids"]) > CONTEXT

    return PromptLimit(CONTEXT, cuts)


def load_t5(
    held: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: str,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[nn.Sequential, Any]:
    """Projector and T5 from the published keys.

    Raises:
        UserError: another model's config, or these are other weights.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    for key, expected in _EXPECTED.items():
        if config.get(key, expected) != expected:
            raise UserError(
                f"{source}: config.json says {key} {config[key]!r}, expected {expected!r}"
            )
    parsed = T5Config(**{k: v for k, v in config.items() if not k.startswith(("mm_", "model_"))})
    try:
        words, wide = held["shared.weight"], held["mm_projector.0.weight"]
    except KeyError as error:
        raise UserError(f"{source}: not this network's weights: lacks {error}") from None
    weights = {
        name: tensor
        for name, tensor in held.items()
        if not name.startswith(("mm_projector.", "vision_tower.", "embed_tokens."))
    }
    for coder in ("encoder", "decoder"):
        weights[f"{coder}.embed_tokens.weight"] = words

    def projector() -> nn.Sequential:
        width, seen = wide.shape
        return nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))

    between = {
        name.removeprefix("mm_projector."): tensor
        for name, tensor in held.items()
        if name.startswith("mm_projector.")
    }
    return (
        load_strictly(projector, between, source, device, dtype),
        load_strictly(lambda: T5ForConditionalGeneration(parsed), weights, source, device, dtype),
    )

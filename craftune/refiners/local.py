"""A language model on this machine, by transformers.

Every request has its own stream of uniform numbers, one per token, and a token is the one at which
the cumulative probability passes that number. So a reply depends on its request and seed, not on
the other requests of the batch, up to the rounding of the network's own sums: padding and batch
size change their order, and a number that falls within that rounding of a border takes the
neighbour. In float32 this is rare (about 1e-6 per token); in bfloat16 it happens.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from craftune.config import ChatConfig, RefineConfig
from craftune.errors import UserError
from craftune.refiners.chat import Complete, Reply, Request


def complete(config: RefineConfig, device: str) -> Complete:
    """A chat model on this machine: a folder or hub id for transformers (refine.chat.model)."""
    chat = config.chat
    model, tokenizer = _load(chat, device)

    def answer(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for start in range(0, len(requests), chat.batch_size):
            batch = requests[start : start + chat.batch_size]
            yield from enumerate(_replies(chat, model, tokenizer, batch), start)

    return answer


def draw_tokens(
    scores: Float[Tensor, "b v"], uniform: Sequence[float], temperature: float, top_p: float
) -> Int[Tensor, " b"]:
    """One token per row, by nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).

    Args:
        scores: logits, any dtype.
        uniform: a number in [0, 1) per row; the same number takes the same token.
        top_p: only the likeliest tokens that make up this share are drawn, at least one.
    """
    p = (scores.double() / temperature).softmax(-1)
    ordered, order = p.sort(descending=True, stable=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    kept[:, 0] = True
    p = p * torch.zeros_like(kept).scatter(-1, order, kept)
    cumulative = p.cumsum(-1)
    at = torch.tensor(uniform, dtype=torch.float64, device=p.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1)


def _load(chat: ChatConfig, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    folder = Path(chat.model).expanduser()
    name = str(folder) if folder.is_dir() else chat.model
    if not folder.is_dir() and (folder.is_absolute() or chat.model.startswith((".", "~"))):
        raise UserError(f"refine.chat.model {chat.model!r}: no such folder; give one, or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=chat.revision, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, revision=chat.revision, dtype=chat.dtype, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"refine.chat.model {chat.model!r}: cannot be loaded as a chat model ({reason})"
        ) from None
    if not tokenizer.chat_template:
        raise UserError(
            f"refine.chat.model {chat.model!r}: has no chat template; choose a model that was "
            "tuned to follow instructions (often named Instruct or Chat)"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.eval().requires_grad_(False).to(torch.device(device)), tokenizer


@torch.no_grad()
def _replies(
    chat: ChatConfig, model: Any, tokenizer: Any, batch: Sequence[Request]
) -> Iterator[Reply]:
    from transformers import GenerationConfig

    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": request.text}], tokenize=False, add_generation_prompt=True
        )
        for request in batch
    ]
    asked = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    asked = asked.to(model.device)
    streams = [random.Random(request.seed) for request in batch]

    def take(tokens: Tensor, scores: Tensor) -> Tensor:
        """Leaves one token per row, which greedy search then takes."""
        del tokens
        uniform = [stream.random() for stream in streams]
        drawn = draw_tokens(scores, uniform, chat.temperature, chat.top_p)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn[:, None], 0.0)

    settings = GenerationConfig(
        do_sample=False, max_new_tokens=chat.max_tokens, pad_token_id=tokenizer.pad_token_id
    )
    made = model.generate(
        input_ids=asked["input_ids"],
        attention_mask=asked["attention_mask"],
        generation_config=settings,
        logits_processor=[take],
    )
    ends = _end_tokens(model, tokenizer)
    answers = made[:, asked["input_ids"].shape[1] :].tolist()
    for row, mask in zip(answers, asked["attention_mask"], strict=True):
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        text = tokenizer.decode(row[:length], skip_special_tokens=True)
        yield Reply(text, length < len(row), int(mask.sum()), min(length + 1, len(row)))


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    found = found if isinstance(found, list) else [found]
    return {token for token in [*found, tokenizer.eos_token_id] if token is not None}

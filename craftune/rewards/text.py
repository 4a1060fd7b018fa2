"""Prompts as CLIP reads them: cleaning, tokens, and embeddings that are computed once."""

import functools
import hashlib
import html
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import torch
from jaxtyping import Int
from torch import Tensor

from craftune.errors import UserError
from craftune.records import canonical
from craftune.rewards.weights import find
from craftune.types import PromptLimit

CONTEXT = 77
"""Tokens that CLIP reads, start and end included."""

CACHED = 16_384
"""Prompts whose embeddings are kept; 64 MB at 1,024 floats each."""


def cleaned(text: str) -> str:
    """As open_clip and HPSv2 clean: mojibake mended, HTML entities read twice, single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers, cut and padded to a fixed length.

    Attributes:
        tokenizer: transformers' object.
        tokens: the fixed length.
        clean: what is done to a text first.
    """

    tokenizer: Any
    tokens: int = CONTEXT
    clean: Callable[[str], str] = str

    def __call__(self, texts: list[str]) -> Int[Tensor, "b tokens"]:
        """Token numbers `[b, tokens]`; longer texts lose their end, the end mark stays."""
        return self._read(texts)["input_ids"]

    def with_mask(self, texts: list[str]) -> Int[Tensor, "b 2 tokens"]:
        """Token numbers, and 1 where there is one: 0 where the text is padded."""
        found = self._read(texts)
        return torch.stack((found["input_ids"], found["attention_mask"]), 1)

    def _read(self, texts: list[str]) -> Any:
        return self.tokenizer(
            [self.clean(text) for text in texts],
            max_length=self.tokens,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )

    def cuts(self, text: str) -> bool:
        """Whether a text is longer than what is read of it."""
        return len(self.tokenizer(self.clean(text), truncation=False)["input_ids"]) > self.tokens

    def limit(self) -> PromptLimit:
        """For `Reward.limit`."""
        return PromptLimit(self.tokens, functools.lru_cache(CACHED)(self.cuts))

    def digest(self) -> str:
        """16 hex digits of the vocabulary's sha256."""
        text = canonical(self.tokenizer.get_vocab())
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def clip_tokenizer(path: str, key: str, clean: Callable[[str], str] = str) -> Tokenizer:
    """CLIP's byte-pair tokenizer from a folder or a hub id.

    Raises:
        UserError: the files are not there or damaged; says what to fetch.
    """
    folder = tokenizer_folder(path, ("tokenizer.json", "vocab.json"), key)
    from transformers import CLIPTokenizer

    return Tokenizer(_made(CLIPTokenizer, folder, path, key, "CLIP"), clean=clean)


def bert_tokenizer(path: str, key: str, tokens: int) -> Tokenizer:
    """BERT's tokenizer from a folder or a hub id, with BLIP's two marks [DEC] and [ENC].

    Raises:
        UserError: the files are not there or damaged; says what to fetch.
    """
    folder = tokenizer_folder(path, ("tokenizer.json", "vocab.txt"), key)
    from transformers import BertTokenizer

    tokenizer = _made(BertTokenizer, folder, path, key, "BERT")
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    return Tokenizer(tokenizer, tokens)


def t5_tokenizer(path: str, key: str) -> Tokenizer:
    """Flan-T5's tokenizer from a folder or a hub id.

    Raises:
        UserError: the files are not there or damaged; says what to fetch.
    """
    folder = tokenizer_folder(path, ("tokenizer.json",), key)
    from transformers import T5Tokenizer

    return Tokenizer(_made(T5Tokenizer, folder, path, key, "T5"))


def _made(kind: Any, folder: Path, path: str, key: str, name: str) -> Any:
    try:
        tokenizer = kind.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key} {path!r}: {folder} holds no {name} tokenizer ({reason})") from None
    tokenizer.model_max_length = 10**9  # texts are cut here and counted, so no warning
    return tokenizer


def tokenizer_folder(path: str, names: tuple[str, ...], key: str) -> Path:
    """The local folder of a tokenizer, downloaded where it is a hub id."""
    found = find(path, names, key)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        try:
            find(path, (name,), key)
        except UserError:
            continue  # which of them a tokenizer has differs from one to the next
    return found.parent


def remembered(
    encode: Callable[[list[str]], Tensor], most: int = CACHED
) -> Callable[[list[str]], Tensor]:
    """The same function of texts, `[b, ...]`, that encodes a text once.

    Args:
        encode: distinct texts -> one row each.
        most: rows that are kept, the last used ones.
    """
    rows: OrderedDict[str, Tensor] = OrderedDict()

    def embeddings(texts: list[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in rows]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            with torch.no_grad():
                rows.update(zip(part, encode(part), strict=True))
        found = torch.stack([rows[text] for text in texts])
        for text in dict.fromkeys(texts):
            rows.move_to_end(text)
        while len(rows) > most:
            rows.popitem(last=False)
        return found

    return embeddings

"""MPS's cross module: the picture's tokens read the prompt's (Zhang et al. 2024, arXiv:2405.14705).

Each layer adds cross attention to the prompt with a feed-forward beside it, then self-attention
with rotary positions and a feed-forward beside it. Queries have heads; keys and values are shared
by all of them. Feed-forwards are SwiGLU. Names are those of the published weights.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from craftune.errors import UserError

HEAD = 64
"""Width of an attention head."""


class CrossAttention(nn.Module):
    """What a layer adds from the prompt, and its feed-forward."""

    def __init__(self, width: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * hidden, bias=False),
            SwiGLU(),
            nn.Linear(hidden, width, bias=False),
        )

    def forward(self, x: Tensor, words: Tensor, kept: Tensor) -> Tensor:
        """Picture's tokens `[b, n, width]`, prompt's `[b, m, width]`, which count `[b, m]`."""
        x = self.norm(x)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        mask = kept[:, None, None, :]
        return self.to_out(_attend(self.to_q(x), keys, values, mask)) + self.ff(x)


class SelfAttention(nn.Module):
    """What a layer adds from the picture itself, and its feed-forward."""

    def __init__(self, width: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.parts = (inner, HEAD, HEAD, 2 * hidden)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Picture's tokens `[b, n, width]` and their rotary angles `[n, HEAD]`."""
        queries, keys, values, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, -1)
        heads = _rotated(_heads(queries), angles)
        attended = _attend(heads, _rotated(keys, angles), values, None)
        return self.attn_out(attended) + self.ff_out(hidden)


class SwiGLU(nn.Module):
    """The first half, gated by the second."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., 2 n]` to `[..., n]`."""
        values, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * values


class Layer(nn.Module):
    """One `fn`: upstream wraps each part in a residual module of that name."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn


class CrossModel(nn.Module):
    """The whole module.

    Args:
        width: of all tokens.
        inner: of all heads together.
        hidden: of the feed-forwards.
        depth: number of layers.
        frequencies: of the rotary positions, `[HEAD / 2]`, as the checkpoint holds them; they
            stay float32, since positions up to 256 are multiplied with them.
    """

    frequencies: Tensor

    def __init__(
        self, width: int, inner: int, hidden: int, depth: int, frequencies: Tensor
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Layer(CrossAttention(width, inner, hidden)),
                    Layer(SelfAttention(width, inner, hidden)),
                ]
            )
            for _ in range(depth)
        )
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(
        self,
        x: Float[Tensor, "b n width"],
        words: Float[Tensor, "b m width"],
        kept: Bool[Tensor, "b m"],
    ) -> Float[Tensor, "b n width"]:
        """Picture's tokens after all layers; words that are not kept are not read."""
        places = torch.arange(x.shape[1], device=x.device)
        angles = torch.outer(places.float(), self.frequencies).repeat(1, 2)
        for cross, own in self.layers:  # type: ignore[misc]
            x = x + cross.fn(x, words, kept)
            x = x + own.fn(x, angles)
        return x


def cross_of(named: Mapping[str, Tensor], source: str) -> Callable[[], CrossModel]:
    """What makes the cross module of these weights: widths and depth from shapes.

    Raises:
        UserError: these are other weights.
    """
    first = "cross_model.layers.0."
    try:
        inner, width = named[f"{first}0.fn.to_q.weight"].shape
        hidden = named[f"{first}0.fn.ff.2.weight"].shape[1]
        frequencies = named[f"{first}1.fn.rotary_emb.inv_freq"]
    except KeyError as error:
        raise UserError(f"{source}: not this network's weights: lacks {error}") from None
    depth = len({name.split(".")[2] for name in named if name.startswith("cross_model.layers.")})
    return lambda: CrossModel(width, inner, hidden, depth, frequencies)


def counted(
    words: Float[Tensor, "b m width"], condition: Float[Tensor, "c width"], threshold: float
) -> Bool[Tensor, "b m"]:
    """Which of a prompt's tokens have to do with the condition, each prompt by itself."""
    fit = (words.float() @ condition.float().T).amax(-1)
    return fit / fit.amax(-1, keepdim=True) > threshold


def _heads(x: Tensor) -> Tensor:
    """`[b, n, heads x HEAD]` to `[b, heads, n, HEAD]`."""
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Heads of queries over one head of keys and values, which all of them share."""
    if queries.ndim == 3:
        queries = _heads(queries)
    shared = (each[:, None].expand(-1, queries.shape[1], -1, -1) for each in (keys, values))
    attended = F.scaled_dot_product_attention(queries, *shared, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of coordinates, half a head apart, turned by the angle of their place."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * angles.cos() + turned * angles.sin()).to(x.dtype)

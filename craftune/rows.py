"""A small transformer over rows of numbers: patches of latents, boxes of a page, letters of a text.

Big enough for the studies and for a corrector of the starting noise, small enough for one thread.
Axes: b batch; n rows; d numbers per row.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from craftune.diffusion import Schedule
from craftune.types import Cond


@dataclass(frozen=True)
class Layout:
    """How latents `[c, h, w]` lie in rows: patches of `side` x `side`; one row is one patch."""

    shape: tuple[int, int, int]
    side: int

    def __post_init__(self) -> None:
        if self.shape[1] % self.side or self.shape[2] % self.side:
            raise ValueError(f"patches of {self.side} do not tile latents of {self.shape}")

    @property
    def rows(self) -> tuple[int, int]:
        """Number of rows, and numbers per row."""
        c, h, w = self.shape
        return h * w // self.side**2, c * self.side**2

    def split(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Latents to rows."""
        return F.unfold(latents, self.side, stride=self.side).transpose(1, 2)

    def join(self, rows: Float[Tensor, "b n d"]) -> Float[Tensor, "b c h w"]:
        """Rows to latents."""
        return F.fold(rows.transpose(1, 2), self.shape[1:], self.side, stride=self.side)


class RowNetwork(nn.Module):
    """Rows and a time to rows; the time and the condition scale and shift every block (adaLN).

    A fresh network returns zeros: as a velocity that is the identity.

    Args:
        rows: number of rows and numbers per row.
        cond_width: width of the condition, one vector per example; 0 for none.
    """

    def __init__(
        self, rows: tuple[int, int], width: int, depth: int, heads: int = 4, cond_width: int = 0
    ) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Linear(rows[1], width)
        self.place = nn.Parameter(torch.randn(rows[0], width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.cond = nn.Linear(cond_width, width) if cond_width else None
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, rows[1])
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        time: Float[Tensor, " b"],
        cond: Float[Tensor, "b width"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Args: time in [0, 1]."""
        state = self.time(_waves(time, self.width))
        if self.cond is not None and cond is not None:
            state = state + self.cond(cond)
        state, rows = F.silu(state), self.enter(x) + self.place
        for block in self.blocks:
            rows = block(rows, state)
        return self.leave(self.norm(rows))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.state = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU("tanh"), nn.Linear(3 * width, width)
        )

    def forward(self, rows: Tensor, state: Tensor) -> Tensor:
        scale, shift, gate, scale_2, shift_2, gate_2 = self.state(state)[:, None].chunk(6, -1)
        normed = self.norms[0](rows) * (1 + scale) + shift
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        rows = rows + (1 + gate) * self.out(seen)
        normed = self.norms[1](rows) * (1 + scale_2) + shift_2
        return rows + (1 + gate_2) * self.think(normed)


def _waves(time: Float[Tensor, " b"], width: int) -> Float[Tensor, "b width"]:
    """Sines and cosines of a time in [0, 1], from one to about a thousand periods."""
    half = width // 2
    speeds = torch.exp(torch.linspace(0, math.log(1000), half, device=time.device))
    angles = time[:, None] * speeds * 2
    return torch.cat([angles.sin(), angles.cos()], 1)


@dataclass(frozen=True)
class RowDenoiser:
    """A `RowNetwork` as a `Denoiser`.

    Attributes:
        layout: how latents lie in rows; None where they are rows already.
        cond: the tensor of the condition that the network reads, `[b, width]`; "" for none.
    """

    network: nn.Module
    schedule: Schedule
    layout: Layout | None = None
    cond: str = ""

    def __call__(
        self, x_t: Float[Tensor, "b ..."], t: Num[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b ..."]:
        """Prediction at (x_t, t)."""
        rows = self.layout.split(x_t) if self.layout else x_t
        given = cond.tensors[self.cond] if self.cond else None
        time = t.to(x_t.dtype) / (len(self.schedule) - 1)
        found = self.network(rows, time, given)
        return self.layout.join(found) if self.layout else found

"""From a network that judges prepared pictures to a whole `Reward`: batches, gradient, dtype."""

from collections.abc import Callable, Mapping

import torch
from PIL import Image
from torch import Tensor

from craftune.rewards.preprocess import MiddleSquare, PaddedSquare
from craftune.types import PromptLimit, Reward

Judge = Callable[[Tensor, list[str]], Tensor]
"""Prepared pictures on the device, uint8 or float in [0, 1], and prompts -> scores, float32."""

MOST = 128
"""Pictures per pass on CUDA, where the memory allows; more gain no speed."""

ON_CPU = 4
"""Pictures per pass elsewhere; more leave the cache (78 ms a picture at 4, 85 at 16, 101 at 32, for
the three towers of bench/score.py on one core)."""

LOSS_SCALE = 1024.0
"""Gradients are this much larger inside a float16 network, whose smallest number is 6e-8."""


def network_reward(
    judge: Judge,
    inputs: MiddleSquare | PaddedSquare,
    identity: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    bytes_per_image: int,
    uses_prompt: bool = True,
    limit: PromptLimit | None = None,
    remember: Callable[[list[str]], object] | None = None,
) -> Reward:
    """The reward whose number `judge` gives.

    Args:
        judge: with a gradient to the pictures; any batch.
        inputs: how pictures are prepared.
        identity: name, version, sha256 and what is special; preprocessing and dtype are added.
        dtype: of the network.
        bytes_per_image: of activations in one pass without gradient.
        remember: called with all prompts of a batch first, whose pictures go in smaller parts.
    """

    @torch.no_grad()
    def score_inputs(prepared: Tensor, prompts: list[str]) -> Tensor:
        def part(start: int, stop: int) -> Tensor:
            pictures = prepared[start:stop].to(device, non_blocking=True)
            return judge(pictures, prompts[start:stop]).float().cpu()

        if remember is not None:
            remember(prompts)
        return in_parts(part, len(prepared), fitting(device, bytes_per_image))

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        if not images:
            return torch.zeros(0)
        prepared = [inputs.plan(image.size)(image) for image in images]
        return score_inputs(torch.stack(prepared), prompts)

    def gradient(images: Tensor, prompts: list[str]) -> Tensor:
        pictures = inputs.differentiable(images.to(device))
        if dtype == torch.float16 and pictures.requires_grad:
            pictures = _backward_times(pictures, 1 / LOSS_SCALE)
            return _backward_times(judge(pictures, prompts), LOSS_SCALE).to(images.device)
        return judge(pictures, prompts).to(images.device)

    return Reward(
        identity["name"],
        score,
        dict(identity) | {"preprocessing": str(inputs), "dtype": str(dtype).split(".")[1]},
        gradient,
        uses_prompt,
        inputs,
        score_inputs,
        limit,
    )


def fitting(device: torch.device, bytes_per_image: int) -> int:
    """Pictures per pass: what a third of the free memory holds."""
    if device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(MOST, (free + cached) // 3 // bytes_per_image))


def in_parts(part: Callable[[int, int], Tensor], n: int, size: int) -> Tensor:
    """`part(start, stop)` over 0 .. n; parts get smaller where the device's memory is too small."""
    done: list[Tensor] = []
    start = 0
    while start < n:
        try:
            done.append(part(start, min(n, start + size)))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            torch.cuda.empty_cache()
            size //= 2
            continue
        start += size
    return torch.cat(done) if done else torch.zeros(0)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None  # type: ignore[attr-defined]


def _backward_times(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient is multiplied on the way back."""
    return _Backward.apply(x, factor)  # type: ignore[no-any-return]

"""CRAFT: advantage-weighted SFT on images that the model drew itself.

Sun et al. 2026, "CRAFT: Aligning Diffusion Models with Fine-Tuning Is Easier Than You Think",
arXiv:2603.18991. The loss is Algorithm 1, step 4; the filters (Eq. 4), the composite reward and
the advantages (step 3) are `craftune.selection`. Symbols: A-hat = `advantage`.

    L = mean over the batch of  A * |eps_theta(x_t, t, c) - eps|^2,   c the original prompt,

t uniform (the family's law), fresh (t, noise) per draw, w(t) dropped, A and x_0 without gradient.
`noise` can weigh and bias t; its default is that.

A term with A < 0 has no lower bound, and the paper does not say what becomes of it. `negatives`
chooses; docs/theory.md argues the default. Differs from the paper: where the paper divides by
b * N with masked terms, this is the mean over the examples that train (equal up to a factor
that Adam removes).

Fed with `Examples`. All but "drop" need the reference: one more forward pass.
"""

from dataclasses import field
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.batches import Draws, Examples
from craftune.config import STRICT
from craftune.diffusion import Schedule
from craftune.methods.denoising import NoiseLevels, predict, squared_error
from craftune.types import Denoiser, Metrics


@dataclass(frozen=True, config=STRICT)
class CRAFT:
    """Hyper-parameters and training step of CRAFT."""

    fed_with: ClassVar[Literal["examples"]] = "examples"

    negatives: Literal["drop", "keep", "clip", "anchor"] = "drop"
    """What advantages below 0 do. "drop": nothing, weight max(A, 0). "keep": the paper's letter,
    stopped when it diverges. "clip": weight max(A, -clip), stopped likewise. "anchor": the bounded
    form below."""
    clip: Annotated[float, Field(ge=0)] = 0.5
    """For "clip": the lowest weight is -clip."""
    guard: Annotated[float, Field(gt=1)] = 2.0
    """For "keep" and "clip": stop when the error on negatives exceeds guard times the
    reference's."""
    beta: Annotated[float, Field(gt=0)] = 1.0
    """For "anchor": how far the two mixtures lean; smaller moves further from the reference."""
    advantage_max: Annotated[float, Field(gt=0)] = 3.0**0.5
    """For "anchor": the advantage that counts as certain; sqrt(N - 1) is the bound for N."""
    noise: NoiseLevels = field(default_factory=NoiseLevels)

    @property
    def needs_reference(self) -> bool:
        """The guard and the anchor compare with the starting network."""
        return self.negatives != "drop"

    def weigh(self, advantage: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Weight of each example; those with weight 0 never reach the network."""
        if self.negatives == "drop":
            return advantage.clamp(min=0)
        if self.negatives == "clip":
            return advantage.clamp(min=-self.clip)
        return advantage

    def draw(self, schedule: Schedule, batch: Examples, rng: torch.Generator) -> Draws:
        """One timestep and one noise per example."""
        return self.noise.draw(schedule, batch, rng)

    def loss(
        self, policy: Denoiser, reference: Denoiser | None, batch: Examples, draws: Draws
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Algorithm 1, step 4, or its anchored form."""
        prediction, target = predict(policy, batch, draws)
        error = squared_error(prediction, target)
        counts = self.noise.weight(policy.schedule, draws.t)
        metrics = {"error": error.mean().item()}
        if not self.needs_reference:
            loss = (counts * batch.weight * error).mean()
            return loss, {"loss": loss.item(), **metrics}
        assert reference is not None, f'negatives = "{self.negatives}" needs the reference'
        with torch.no_grad():
            start, _ = predict(reference, batch, draws)
        start_error = squared_error(start, target)
        metrics["reference_error"] = start_error.mean().item()
        if self.negatives == "anchor":
            share = (0.5 + batch.weight / (2 * self.advantage_max)).clamp(0, 1)
            terms = anchored_loss(prediction, start, target, share, self.beta)
        else:
            negative = (batch.weight < 0).float()
            metrics["negative_error"] = (negative * error).mean().item()
            metrics["negative_reference_error"] = (negative * start_error).mean().item()
            terms = batch.weight * error
        loss = (counts * terms).mean()
        return loss, {"loss": loss.item(), **metrics}

    def check(self, metrics: Metrics) -> None:
        """The guard of the signed forms, "keep" and "clip".

        Raises:
            FloatingPointError: the error on negatives has grown too far.
        """
        start = metrics.get("negative_reference_error", 0.0)
        ratio = metrics["negative_error"] / start if start else 0.0
        if ratio > self.guard:
            raise FloatingPointError(
                f"the error on negatives is {ratio:.2f} times the starting network's, above "
                f"method.settings.guard = {self.guard}: the signed loss diverges; set "
                'method.settings.negatives to "anchor" or "drop", or lower train.learning_rate'
            )


def anchored_loss(
    prediction: Float[Tensor, "b ..."],
    start: Float[Tensor, "b ..."],
    target: Float[Tensor, "b ..."],
    share: Float[Tensor, " b"],
    beta: float,
) -> Float[Tensor, " b"]:
    """The signed loss with a floor, per example, >= 0.

    share * |v+ - y|^2 + (1 - share) * |v- - y|^2 with v+ = beta v + (1 - beta) v_o and
    v- = (1 + beta) v_o - beta v. At v = v_o its gradient is that of (2 share - 1) beta |v - y|^2;
    its curvature is 2 beta^2 whatever the share, so its minimum is finite:
    v_o + (2 share - 1)/beta (y - v_o).

    Args:
        prediction: v, the policy's.
        start: v_o, the reference's, no gradient.
        target: y.
        share: probability that the example is good, [0, 1]; 1/2 + advantage / (2 max).
        beta: > 0.

    Source: the form of DiffusionNFT (arXiv:2509.16117) with its old policy held at the start.
    """
    positive = beta * prediction + (1 - beta) * start
    negative = (1 + beta) * start - beta * prediction
    return share * squared_error(positive, target) + (1 - share) * squared_error(negative, target)

"""The forward process: how clean latents become noisy, and what the denoiser predicts.

Every family mixes latents and noise as  x_t = alpha_t * x_0 + sigma_t * noise;  families differ
in (alpha, sigma), in the prediction target and in the timesteps they were trained on. Nothing
here knows about a network, a device or a file.

Shapes: b = batch; ... = latent axes, e.g. (c, h, w) or (tokens, channels).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

Target = Literal["epsilon", "v", "velocity"]
TimestepLaw = Literal["uniform", "logit-normal"]


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a model family, indexed by timestep.

    Attributes:
        alphas: signal scale per timestep, decreasing.
        sigmas: noise scale per timestep, increasing.
        target: what the denoiser predicts. "epsilon" is the noise (Ho et al. 2020,
            arXiv:2006.11239), "v" is alpha * noise - sigma * x_0 (Salimans & Ho 2022,
            arXiv:2202.00512), "velocity" is noise - x_0 (rectified flow, arXiv:2209.03003).
        law: the timestep distribution of the family's own pre-training: "uniform", or
            "logit-normal" (SD3, Esser et al. 2024, arXiv:2403.03206), t = sigmoid(normal).
        shift: of the logit-normal law towards noise, as larger images are trained with: a level
            u becomes shift * u / (1 + (shift - 1) * u) (same paper, Eq. 23), which adds
            log(shift) to its logit. 1 is none.

    Raises:
        ValueError: unknown target, alphas and sigmas of different lengths, or a last timestep
            without signal under "epsilon" (zero terminal SNR), where x_0 cannot be recovered.
    """

    alphas: Float[Tensor, " timesteps"]
    sigmas: Float[Tensor, " timesteps"]
    target: Target
    law: TimestepLaw = "uniform"
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise ValueError(f"unknown target {self.target!r}; choose from {get_args(Target)}")
        if len(self.alphas) != len(self.sigmas):
            raise ValueError(f"{len(self.alphas)} alphas but {len(self.sigmas)} sigmas")
        if self.target == "epsilon" and self.alphas.min() <= 0:
            raise ValueError(
                "a schedule with zero terminal SNR cannot be used with epsilon prediction: "
                "x_0 is undefined at its last timestep; use a v-prediction checkpoint"
            )

    def __len__(self) -> int:
        return len(self.sigmas)

    def scales(
        self, t: Int[Tensor, " b"], like: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        """alpha_t and sigma_t, one per sample, shaped to broadcast against `like`."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self.alphas.to(like)[t].view(shape), self.sigmas.to(like)[t].view(shape)

    def add_noise(
        self, x_0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b ..."]:
        """Noisy latents x_t."""
        alpha, sigma = self.scales(t, x_0)
        return alpha * x_0 + sigma * noise

    def training_target(
        self, x_0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b ..."]:
        """What a perfect denoiser returns at (x_t, t)."""
        if self.target == "epsilon":
            return noise
        if self.target == "velocity":
            return noise - x_0
        alpha, sigma = self.scales(t, x_0)
        return alpha * noise - sigma * x_0

    def split(
        self, prediction: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        """Clean latents and noise implied by a prediction at (x_t, t)."""
        return self.split_at(prediction, x_t, *self.scales(t, x_t))

    def split_at(
        self,
        prediction: Float[Tensor, "b ..."],
        x_t: Float[Tensor, "b ..."],
        alpha: Tensor,
        sigma: Tensor,
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        """The same at any level: samplers also visit levels between timesteps."""
        if self.target == "epsilon":
            return (x_t - sigma * prediction) / alpha, prediction
        if self.target == "velocity":
            x_0 = (x_t - sigma * prediction) / (alpha + sigma)
            return x_0, x_0 + prediction
        x_0 = (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
        return x_0, (sigma * x_t + alpha * prediction) / (alpha**2 + sigma**2)

    def random_timesteps(self, n: int, rng: torch.Generator) -> Int[Tensor, " n"]:
        """Timesteps from the family's pre-training law, one per sample, on the rng's device."""
        if self.law == "uniform":
            return torch.randint(len(self), (n,), generator=rng, device=rng.device)
        logit = torch.randn(n, generator=rng, device=rng.device) + math.log(self.shift)
        level = torch.sigmoid(logit)
        return (level * len(self)).long().clamp(max=len(self) - 1)


@dataclass(frozen=True)
class Grid:
    """The steps of a sampler, from noise to image: where each starts and which level it aims at.

    Attributes:
        timesteps: where the network is called, decreasing; between integers where the family's
            time is continuous.
        alphas: signal scale at the start and at the end of each step.
        sigmas: noise scale likewise; the very last is 0 for an exact end.
    """

    timesteps: Num[Tensor, " steps"]
    alphas: Float[Tensor, "steps 2"]
    sigmas: Float[Tensor, "steps 2"]

    def __post_init__(self) -> None:
        if not self.alphas.shape == self.sigmas.shape == (len(self.timesteps), 2):
            raise ValueError("a grid has two levels per network call: its start and its end")

    def __len__(self) -> int:
        return len(self.timesteps)

    @staticmethod
    def chain(
        timesteps: Num[Tensor, " steps"],
        alphas: Float[Tensor, " levels"],
        sigmas: Float[Tensor, " levels"],
    ) -> "Grid":
        """Each step ends where the next one starts: one level more than network calls."""
        pairs = [torch.stack([levels[:-1], levels[1:]], 1) for levels in (alphas, sigmas)]
        return Grid(timesteps, *pairs)

    def tail(self, n: int) -> "Grid":
        """The last n steps."""
        return Grid(self.timesteps[-n:], self.alphas[-n:], self.sigmas[-n:])

    def jump(self, step: int) -> "Grid":
        """The steps up to this one (counted from 0), which goes straight to the clean latents.

        DDIM's and Euler's step to there is the predicted x_0 itself; so is the last step of the
        samplers of second order.
        """
        alphas, sigmas = self.alphas[: step + 1].clone(), self.sigmas[: step + 1].clone()
        alphas[-1, 1], sigmas[-1, 1] = 1.0, 0.0
        return Grid(self.timesteps[: step + 1], alphas, sigmas)

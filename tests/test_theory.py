"""Theorem 3.1 of CRAFT (arXiv:2603.18991) on a diffusion model that can be solved exactly.

An image is one number, the noise predictor is affine, eps(x_t, t) = a_t * x_t + b_t, so likelihood,
ELBO and every expectation have a closed form. docs/theory.md says what the claims mean; the
numbers that it quotes are printed by:  .venv/bin/pytest tests/test_theory.py -s
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev

from craftune.methods.craft import anchored_loss

T, GROUP = 6, 4
BETA = torch.linspace(0.05, 0.4, T, dtype=torch.float64)
ALPHA, VAR = 1 - BETA, BETA  # VAR is sigma_t^2, the variance of a reverse step
ALPHA_BAR = ALPHA.cumprod(0)
BEFORE = ALPHA_BAR / ALPHA  # alpha_bar of the step before
LAMBDA = BETA**2 / (2 * VAR * ALPHA * (1 - ALPHA_BAR))  # Eq. 12 of DDPM, arXiv:2006.11239
PAPER_W = (1 - ALPHA_BAR) / (2 * VAR * ALPHA_BAR)  # w(t) of CRAFT's Eq. 9
# Gauss-Hermite nodes: with three, expectations of polynomials in the noise are exact to degree 5.
NOISE = math.sqrt(3) * torch.tensor([-1, 0, 1], dtype=torch.float64)
NODE_WEIGHT = torch.tensor([1, 4, 1], dtype=torch.float64) / 6
EXACT = torch.stack([(1 - ALPHA_BAR).sqrt(), torch.zeros_like(BETA)], dim=1)  # reverses N(0, 1)
OLD = EXACT * 0.8 + torch.tensor([0.0, 0.1])  # an imperfect model, where fine-tuning starts


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def reverse_mean(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and shift of the mean of x_{t-1} given x_t, per step."""
    k = BETA / (1 - ALPHA_BAR).sqrt()
    return (1 - k * theta[:, 0]) / ALPHA.sqrt(), -k * theta[:, 1] / ALPHA.sqrt()


def marginal(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the images that the model draws."""
    slope, shift = reverse_mean(theta)
    mean, var = torch.zeros(()), torch.ones(())
    for t in reversed(range(T)):
        mean, var = slope[t] * mean + shift[t], slope[t] ** 2 * var + VAR[t]
    return mean, var


def log_p(theta: Tensor, x: Tensor) -> Tensor:
    mean, var = marginal(theta)
    return -0.5 * (2 * math.pi * var).log() - (x - mean) ** 2 / (2 * var)


def elbo(theta: Tensor, x: Tensor) -> Tensor:
    """E_q[log p(x_{0:T}) - log q(x_{1:T} | x_0)], from the moments of (x_{t-1}, x_t) given x_0."""
    slope, shift = reverse_mean(theta)
    mean = BEFORE.sqrt() * x[..., None] * (1 - slope * ALPHA.sqrt()) - shift
    var = (1 - BEFORE) * (1 - slope * ALPHA.sqrt()) ** 2 + slope**2 * BETA
    steps = -0.5 * (2 * math.pi * VAR).log() - (mean**2 + var) / (2 * VAR)
    last = -0.5 * (math.log(2 * math.pi) + ALPHA_BAR[-1] * x**2 + 1 - ALPHA_BAR[-1])
    return steps.sum(-1) + last + 0.5 * (2 * math.pi * math.e * BETA).log().sum()


def posterior_kl(theta: Tensor, x: Tensor) -> Tensor:
    """KL(q(x_{1:T} | x_0) || p_theta(x_{1:T} | x_0)), per image, from the joint Gaussians."""
    slope, shift = reverse_mean(theta)
    step = torch.diag(torch.ones(T - 1), -1) - torch.diag(slope)
    root = torch.cat([step / VAR.sqrt()[:, None], torch.eye(T)[-1:]])
    first = (x[..., None] * torch.eye(T)[0] - shift) / VAR.sqrt()
    constant = torch.cat([first, torch.zeros_like(first[..., :1])], dim=-1)
    precision, t = root.T @ root, torch.arange(T)
    low, high = torch.minimum(t[:, None], t), torch.maximum(t[:, None], t)
    cov = (ALPHA_BAR[high] / ALPHA_BAR[low]).sqrt() * (1 - ALPHA_BAR[low])
    gap = -constant @ root @ torch.linalg.inv(precision) - ALPHA_BAR.sqrt() * x[..., None]
    logdets = torch.logdet(precision) + torch.logdet(cov)
    return 0.5 * ((precision * cov).sum() - T + ((gap @ precision) * gap).sum(-1) - logdets)


def predict(theta: Tensor, x: Tensor) -> Tensor:
    """The predicted noise at every image, step and node: [..., image, t, node]."""
    x_t = ALPHA_BAR.sqrt()[:, None] * x[..., None, None] + (1 - ALPHA_BAR).sqrt()[:, None] * NOISE
    return theta[:, :1] * x_t + theta[:, 1:]


def error(theta: Tensor, x: Tensor) -> Tensor:
    """E |eps_theta(x_t) - eps|^2: [..., image, t]."""
    return (predict(theta, x) - NOISE) ** 2 @ NODE_WEIGHT


def craft_loss(theta: Tensor, x: Tensor, advantage: Tensor) -> Tensor:
    return (advantage * (error(theta, x) @ LAMBDA)).mean()


def anchor(theta: Tensor, x: Tensor, advantage: Tensor, beta: float) -> Tensor:
    """The shipped form of `negatives = "anchor"`, in expectation over the noise and t."""
    new, old, noise = torch.broadcast_tensors(predict(theta, x), predict(OLD, x), NOISE)
    share = (0.5 + advantage / (2 * math.sqrt(GROUP - 1)))[..., None, None].expand_as(new)
    new_rows, old_rows, target = (each.reshape(-1, 1) for each in (new, old, noise))
    values = anchored_loss(new_rows, old_rows, target, share.flatten(), beta).view_as(new)
    return (values @ NODE_WEIGHT @ LAMBDA).mean()


def advantages(score: Tensor) -> Tensor:
    return (score - score.mean(-1, keepdim=True)) / score.std(-1, correction=0, keepdim=True)


def groups(*n: int) -> tuple[Tensor, Tensor]:
    """Groups of images drawn by the old model, and their advantages; the best image is 1."""
    mean, var = marginal(OLD)
    x = mean + var.sqrt() * torch.randn(*n, GROUP)
    return x, advantages(-((x - 1) ** 2))


def gap(theta: Tensor, x: Tensor, advantage: Tensor, log: Callable = elbo) -> Tensor:
    """Objective (Eq. 2, with this log-likelihood) minus the bound that meets it at OLD, per group:
    negative where the bound fails."""
    ratio = (log(theta, x) - log(OLD, x)).exp()
    loss = (error(theta, x) - error(OLD, x)) @ LAMBDA
    return (advantage * (ratio - 1 + loss)).mean(-1)


def test_likelihood_is_elbo_plus_kl_so_the_three_formulas_check_each_other() -> None:
    x, theta = torch.randn(5), OLD + 0.1 * torch.randn(T, 2)
    torch.testing.assert_close(log_p(theta, x), elbo(theta, x) + posterior_kl(theta, x))


def test_h1_gradient_at_the_starting_weights_is_the_elbo_policy_gradient() -> None:
    x, advantage = groups()
    policy = grad(lambda theta: (advantage * (elbo(theta, x) - elbo(OLD, x)).exp()).mean())(OLD)
    loss = grad(craft_loss)(OLD, x, advantage)
    print(f"\nH1 relative error of the gradient: {(policy + loss).norm() / loss.norm():.0e}")
    torch.testing.assert_close(policy, -loss)


def test_h2_the_gap_is_of_second_order_and_its_leading_term_is_known() -> None:
    (x, advantage), g, second, third = groups(), torch.randn(T, 2), [], []
    for eta in (4e-3, 2e-3):
        change = elbo(OLD + eta * g, x) - elbo(OLD, x)
        second.append(gap(OLD + eta * g, x, advantage).item())
        third.append(second[-1] - 0.5 * (advantage * change**2).mean().item())
    ratios = second[0] / second[1], third[0] / third[1]
    print(f"\nH2 half the step: gap / {ratios[0]:.2f}, beyond its leading term / {ratios[1]:.2f}")
    assert ratios == pytest.approx((4, 8), rel=0.05)


def test_h3_with_weights_at_least_zero_the_bound_holds_at_every_theta() -> None:
    x, advantage = groups(2000)
    thetas = [OLD + eta * torch.randn(T, 2) for eta in (0.01, 0.05, 0.2, 1.0) for _ in range(10)]
    worst = min(gap(theta, x, advantage.clamp(min=0)).min().item() for theta in thetas)
    print(f"\nH3 smallest gap over 40 thetas x 2000 groups: {worst:.0e}")
    assert worst > -1e-12


@pytest.mark.parametrize(("name", "theta"), [("imperfect", OLD), ("exact", EXACT)])
def test_h4_the_true_gradient_has_a_kl_term_that_only_an_exact_model_is_rid_of(
    name: str, theta: Tensor
) -> None:
    x, advantage = groups()
    true, kl = (grad(lambda q, f=f: (advantage * f(q, x)).mean()) for f in (log_p, posterior_kl))
    loss = grad(craft_loss)(theta, x, advantage)
    torch.testing.assert_close(true(theta), -loss + kl(theta))
    cosine = -(true(theta) * loss).sum() / true(theta).norm() / loss.norm()
    print(f"\nH4 {name} model: cosine of the true gradient with CRAFT's {cosine:.4f}")
    assert (cosine > 1 - 1e-9) == (name == "exact")


def test_h5_with_weights_at_least_zero_a_reweighted_loss_bounds_the_true_objective() -> None:
    (x, advantage), theta = groups(1000), OLD + torch.randn(T, 2)
    shrink = (-posterior_kl(OLD, x)).exp()
    bound = shrink * (1 - (error(theta, x) - error(OLD, x)) @ LAMBDA)
    print(f"\nH5 weights shrink by exp(-KL), {shrink.min():.3f} to {shrink.max():.3f}")
    assert (advantage.clamp(min=0) * ((log_p(theta, x) - log_p(OLD, x)).exp() - bound)).min() >= 0


def test_e1_the_change_of_the_elbo_is_not_the_change_of_the_likelihood() -> None:
    x, thetas = groups(500)[0], [OLD + 0.05 * torch.randn(T, 2) for _ in range(200)]
    change, true = (torch.stack([f(q, x) - f(OLD, x) for q in thetas]) for f in (elbo, log_p))
    wrong = (change * true < 0).double().mean().item()
    print(f"\nE1 the ELBO's change has the wrong sign in {wrong:.0%} of {true.numel()} cases")
    assert wrong > 0.05


def test_e3_with_signed_advantages_the_bound_fails() -> None:
    """Per group and, as the theorem has it, in expectation over groups."""
    x, advantage = groups(4000)
    thetas = [OLD + 0.05 * torch.randn(T, 2) for _ in range(50)]
    gaps = torch.stack([gap(theta, x, advantage) for theta in thetas])
    errors = gaps.mean(1) / gaps.std(1) * len(x) ** 0.5  # in standard errors
    tiny = OLD + 1e-4 * (torch.stack(thetas) - OLD)
    true = torch.stack([gap(theta, x, advantage, log_p) for theta in tiny])
    true_errors = true.mean(1) / true.std(1) * len(x) ** 0.5
    fails = (gaps < 0).double().mean()
    print(f"\nE3 ELBO: fails in {fails:.0%} of {gaps.numel()}; in expectation in", end=" ")
    print(f"{(errors < -5).sum()} of 50 directions, holds in {(errors > 5).sum()};", end=" ")
    print(f"likelihood, step 1e-4: fails in {(true_errors < -5).sum()}")
    assert fails > 0.3
    assert (errors < -5).any()
    assert (true_errors < -5).any()


def test_e5_the_weight_of_the_elbo_is_ddpms_summed_over_t() -> None:
    x, theta = torch.tensor([0.7]), OLD + 0.05 * torch.randn(T, 2)
    change = (elbo(theta, x) - elbo(OLD, x)).item()
    decrease = (error(OLD, x) - error(theta, x))[0]
    ours = (decrease @ LAMBDA).item()
    excess = PAPER_W / LAMBDA
    print(f"\nE5 change of the ELBO {change:+.5f}; DDPM's weight, summed {ours:+.5f}", end=", ")
    print(f"averaged {ours / T:+.5f}; paper's w / DDPM's {excess[0]:.3g} to {excess[-1]:.3g}")
    assert ours == pytest.approx(change, abs=1e-12)
    torch.testing.assert_close(excess, (1 - ALPHA_BAR) ** 2 / (BETA**2 * BEFORE))


def test_advantages_of_a_group_are_bounded_and_the_bounds_are_attained() -> None:
    high, low = math.sqrt(GROUP - 1), 1 / math.sqrt(GROUP - 1)
    assert advantages(torch.tensor([1.0, 0, 0, 0]))[0].item() == pytest.approx(high)
    assert advantages(torch.tensor([1.0, 1, 1, 0]))[0].item() == pytest.approx(low)
    best = advantages(torch.randn(100_000, GROUP)).amax(1)
    print(f"\nbest of {GROUP}: {best.min():.3f} to {best.max():.3f}, mean {best.mean():.2f}")
    assert low - 1e-9 <= best.min() <= best.max() <= high + 1e-9


def test_signed_advantages_make_the_loss_unbounded_below() -> None:
    """The loss is quadratic in theta: one negative eigenvalue is a way down without an end."""
    for x, advantage in zip(*groups(100), strict=True):
        curvature = jacrev(grad(craft_loss))(OLD, x, advantage).view(2 * T, 2 * T)
        values, vectors = torch.linalg.eigh(curvature)
        assert values[0] < 0
        assert craft_loss(OLD + 1e9 * vectors[:, 0].view(T, 2), x, advantage) < -1e9


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_anchor_has_crafts_direction_the_curvature_of_sft_and_a_floor(beta: float) -> None:
    x, advantage = groups()
    start, craft = grad(anchor)(OLD, x, advantage, beta), grad(craft_loss)(OLD, x, advantage)
    torch.testing.assert_close(start, beta / math.sqrt(GROUP - 1) * craft)
    curvature = jacrev(grad(anchor))(OLD, x, advantage, beta)
    sft = jacrev(grad(craft_loss))(OLD, x, torch.ones(GROUP))
    torch.testing.assert_close(curvature, beta**2 * sft)
    assert torch.linalg.eigvalsh(sft.view(2 * T, 2 * T))[0] > 0
    assert min(anchor(OLD + 9 * torch.randn(T, 2), x, advantage, beta) for _ in range(99)) >= 0


def test_anchors_minimiser_moves_the_prediction_by_the_advantage_over_beta() -> None:
    beta, signed = 0.7, torch.tensor([-0.4, 0.0, 1.0])  # advantage / its maximum
    start, target = torch.randn(2, 3, 5)

    def loss(prediction: Tensor) -> Tensor:
        return anchored_loss(prediction, start, target, (1 + signed) / 2, beta)

    best = start + signed[:, None] / beta * (target - start)
    floor = (1 - signed**2) * (target - start).square().mean(1)
    torch.testing.assert_close(loss(best), floor)
    assert (loss(best + 0.1 * torch.randn(3, 5)) > floor).all()

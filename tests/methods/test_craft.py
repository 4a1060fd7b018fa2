"""CRAFT: the weighted loss, its four readings of negative advantages, and the anchored form."""

import copy
import math
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import ToyDenoiser, cosine_schedule, flat_grad, toy, toy_cond, toy_examples

from craftune.batches import Draws, Examples
from craftune.methods import CRAFT, SFT, build
from craftune.methods.craft import anchored_loss
from craftune.methods.denoising import predict, squared_error
from craftune.seeds import stream

Negatives = Literal["drop", "keep", "clip", "anchor"]
ADVANTAGE = torch.tensor([-1.7, -0.4, 0.0, 0.3, 1.2, 1.7])


def moved(policy: ToyDenoiser, amount: float = 0.1, seed: int = 9) -> ToyDenoiser:
    """A copy some way from where it started."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for i, weight in enumerate(other.network.parameters()):
            weight.add_(amount * torch.randn(weight.shape, generator=stream("moved", seed, i)))
    return other


def fixed(value: float) -> ToyDenoiser:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))

        def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            return self.value.expand_as(x_t)

    return ToyDenoiser(cosine_schedule(), Fixed())


# --- weights ---------------------------------------------------------------------------------


def test_weights_under_each_reading_of_negatives() -> None:
    wanted = {
        "drop": [0.0, 0.0, 0.0, 0.3, 1.2, 1.7],
        "keep": [-1.7, -0.4, 0.0, 0.3, 1.2, 1.7],
        "clip": [-0.5, -0.4, 0.0, 0.3, 1.2, 1.7],
        "anchor": [-1.7, -0.4, 0.0, 0.3, 1.2, 1.7],
    }
    for name, weights in wanted.items():
        found = CRAFT(negatives=name).weigh(ADVANTAGE)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(weights))
    assert CRAFT(negatives="clip", clip=0.0).weigh(ADVANTAGE).min() == 0


def test_only_the_guard_and_the_anchor_need_the_reference() -> None:
    needs = {n: CRAFT(negatives=n).needs_reference for n in get_args(Negatives)}
    assert needs == {"drop": False, "keep": True, "clip": True, "anchor": True}


@pytest.mark.parametrize("negatives", ["keep", "clip", "anchor"])
def test_a_missing_reference_is_not_passed_over(negatives: Negatives) -> None:
    batch = toy_examples(2)
    method = CRAFT(negatives=negatives)
    draws = method.draw(toy().schedule, batch, stream(0))
    with pytest.raises(AssertionError, match="needs the reference"):
        method.loss(toy(), None, batch, draws)


# --- the signed loss -------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    """Errors 2.5 and 4.5 under weights 2 and -1: (2 * 2.5 - 4.5) / 2 = 0.25."""
    batch = toy_examples(2, weight=torch.tensor([2.0, -1.0]))
    draws = Draws(torch.tensor([3, 60]), torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    for method in (CRAFT("clip", clip=1.0), CRAFT("keep")):
        loss, metrics = method.loss(fixed(0.0), fixed(0.5), batch, draws)
        assert loss.item() == pytest.approx(0.25)
        assert metrics["error"] == pytest.approx(3.5)
    # reference 0.5: ((0.5 - 1)^2 + (0.5 + 2)^2) / 2 = 3.25 and (2.5^2 + 0.5^2) / 2 = 3.25
    assert metrics["reference_error"] == pytest.approx(3.25)
    assert metrics["negative_error"] == pytest.approx(4.5 / 2)
    assert metrics["negative_reference_error"] == pytest.approx(3.25 / 2)


def test_the_gradient_is_the_advantage_weighted_sum_of_each_example_s() -> None:
    """grad L = 1/n sum_i A_i grad l_i, by autograd of every example alone."""
    policy = toy("v")
    batch = toy_examples(6, weight=ADVANTAGE)
    method = CRAFT(negatives="clip", clip=10.0)
    draws = method.draw(policy.schedule, batch, stream(0))
    method.loss(policy, policy, batch, draws)[0].backward()
    found = flat_grad(policy.network)
    wanted = torch.zeros_like(found)
    for i, weight in enumerate(ADVANTAGE):
        policy.network.zero_grad()
        rows = slice(i, i + 1)
        error = squared_error(*predict(policy, batch.rows(rows), draws.rows(rows)))
        error.sum().backward()
        wanted += weight * flat_grad(policy.network) / 6
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_the_gradient_is_the_finite_difference_of_the_loss() -> None:
    policy = toy()
    batch = toy_examples(6, weight=ADVANTAGE)
    method = CRAFT(negatives="clip", clip=10.0)
    draws = method.draw(policy.schedule, batch, stream(0))
    method.loss(policy, policy, batch, draws)[0].backward()
    *_, bias = policy.network.parameters()
    for place in range(2):
        values = []
        for change in (1e-2, -2e-2):
            with torch.no_grad():
                bias[place] += change
                values.append(method.loss(policy, policy, batch, draws)[0].item())
        with torch.no_grad():
            bias[place] += 1e-2
        assert bias.grad is not None
        assert bias.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)


def test_weights_latents_and_prompts_get_no_gradient() -> None:
    batch = toy_examples(4, weight=torch.ones(4).requires_grad_(False))
    policy = toy()
    method = CRAFT()
    loss, _ = method.loss(policy, None, batch, method.draw(policy.schedule, batch, stream(0)))
    loss.backward()
    assert batch.latents.grad is None
    assert batch.weight.grad is None


# --- the guard -------------------------------------------------------------------------------


def guard_metrics(policy_value: float, weight: list[float]) -> dict[str, float]:
    """Errors of the policy and of a reference at 0 against noise 1: (v - 1)^2 and 1."""
    n = len(weight)
    batch = toy_examples(n, weight=torch.tensor(weight))
    draws = Draws(torch.full((n,), 50), torch.ones(n, 2))
    _, metrics = CRAFT(negatives="keep").loss(fixed(policy_value), fixed(0.0), batch, draws)
    return metrics


def test_the_guard_stops_when_negatives_are_thrown_too_far() -> None:
    """(v - 1)^2 = 2 at v = 1 - sqrt(2) = -0.414."""
    CRAFT("keep").check(guard_metrics(-0.41, [1.0, -1.0]))
    with pytest.raises(FloatingPointError, match=r"2\.\d+ times .*guard = 2.0.*anchor"):
        CRAFT("keep").check(guard_metrics(-0.42, [1.0, -1.0]))
    CRAFT("keep", guard=3.0).check(guard_metrics(-0.42, [1.0, -1.0]))


def test_the_guard_looks_at_negatives_alone() -> None:
    CRAFT("keep").check(guard_metrics(-5.0, [1.0, 0.5]))
    CRAFT("drop").check({"loss": 1.0})


# --- the anchored form -----------------------------------------------------------------------

prediction_space = st.tuples(*[st.floats(-3, 3)] * 3)


def scalars(*values: float) -> list[Tensor]:
    return [torch.tensor([[value]], dtype=torch.float64) for value in values]


def test_the_anchored_loss_by_hand() -> None:
    """v 2, v_o 1, y 0, r 0.75, beta 0.5: v+ = 1.5, v- = 0.5; 0.75 * 2.25 + 0.25 * 0.25 = 1.75."""
    v, start, y = scalars(2.0, 1.0, 0.0)
    loss = anchored_loss(v, start, y, torch.tensor([0.75], dtype=torch.float64), 0.5)
    assert loss.tolist() == [pytest.approx(1.75)]


@settings(max_examples=50, deadline=None)
@given(space=prediction_space, share=st.floats(0, 1), beta=st.floats(0.1, 5))
def test_at_the_start_the_anchored_gradient_is_the_signed_loss_s(
    space: tuple[float, float, float], share: float, beta: float
) -> None:
    """2 beta (2r - 1)(v_o - y); curvature 2 beta^2 whatever r; never below 0."""
    _, start, y = scalars(*space)
    r = torch.tensor([share], dtype=torch.float64)
    v = start.clone().requires_grad_(True)
    loss = anchored_loss(v, start, y, r, beta)
    (slope,) = torch.autograd.grad(loss.sum(), v, create_graph=True)
    wanted = 2 * beta * (2 * share - 1) * (start - y)
    torch.testing.assert_close(slope.detach(), wanted, atol=1e-9, rtol=1e-7)
    (curvature,) = torch.autograd.grad(slope.sum(), v)
    torch.testing.assert_close(curvature, torch.full_like(v, 2 * beta**2).detach())
    assert loss.item() >= 0


@settings(max_examples=50, deadline=None)
@given(space=prediction_space, share=st.floats(0, 1), beta=st.floats(0.1, 5))
def test_the_anchored_minimum_is_finite_and_where_it_is_said_to_be(
    space: tuple[float, float, float], share: float, beta: float
) -> None:
    """v_o + (2r - 1)/beta (y - v_o): smaller beta goes further. A quadratic's minimum by Newton."""
    v, start, y = scalars(*space)
    r = torch.tensor([share], dtype=torch.float64)
    v.requires_grad_(True)
    loss = anchored_loss(v, start, y, r, beta)
    (slope,) = torch.autograd.grad(loss.sum(), v)
    found = v.detach() - slope / (2 * beta**2)
    wanted = start + (2 * share - 1) / beta * (y - start)
    torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-6)
    assert anchored_loss(found, start, y, r, beta).item() <= loss.item() + 1e-9


def test_anchored_examples_of_certainty_one_are_sft_at_beta_one() -> None:
    v, start, y = torch.randn(3, 5, 4)
    torch.testing.assert_close(anchored_loss(v, start, y, torch.ones(5), 1.0), squared_error(v, y))


def test_an_advantage_of_the_bound_is_certain_and_one_of_zero_pulls_nowhere() -> None:
    """r = 1/2 + A / (2 sqrt 3): 1 at sqrt 3, 0 at -sqrt 3, 1/2 at 0, clamped beyond."""
    bound = math.sqrt(3)
    batch = toy_examples(5, weight=torch.tensor([bound, -bound, 0.0, 9.0, -9.0]))
    reference = toy()
    draws = CRAFT().draw(reference.schedule, batch, stream(0))
    policy = moved(reference)
    found, _ = CRAFT("anchor", beta=0.5).loss(policy, reference, batch, draws)
    prediction, target = predict(policy, batch, draws)
    start, _ = predict(reference, batch, draws)
    shares = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0])
    wanted = anchored_loss(prediction, start, target, shares, 0.5).mean()
    torch.testing.assert_close(found, wanted)


def test_at_the_start_anchor_and_keep_pull_the_same_way() -> None:
    """Gradient of the anchored loss = beta / A_max times the signed loss's, example by example."""
    weight = torch.tensor([-1.7, -0.4, 0.3, 1.2])
    batch = toy_examples(4, weight=weight)
    gradients = []
    for method in (CRAFT("keep"), CRAFT("anchor", beta=0.5)):
        reference = toy()
        policy = copy.deepcopy(reference)
        draws = method.draw(policy.schedule, batch, stream(0))
        method.loss(policy, reference, batch, draws)[0].backward()
        gradients.append(flat_grad(policy.network))
        assert flat_grad(reference.network).eq(0).all()
    torch.testing.assert_close(
        gradients[1], gradients[0] * 0.5 / math.sqrt(3), atol=1e-6, rtol=1e-4
    )


# --- it learns -------------------------------------------------------------------------------


def two_answers() -> tuple[Examples, Tensor]:
    """Every prompt has a good image at (1, 0) and a bad one at (-1, 0), of advantage +-1."""
    cond = toy_cond(32)
    side = torch.tensor([1.0, -1.0]).repeat(16)
    latents = torch.stack([side, torch.zeros(32)], 1)
    return Examples(latents, cond, side), side


def errors_after(method: CRAFT | SFT, steps: int = 150) -> tuple[float, float]:
    """Error of the trained policy on good and on bad images, over the start's."""
    examples, side = two_answers()
    batch = Examples(examples.latents, examples.cond, method.weigh(examples.weight))
    reference = toy("v")
    policy = copy.deepcopy(reference)
    optimizer = torch.optim.Adam(policy.network.parameters(), 3e-3)
    for step in range(steps):
        draws = method.draw(policy.schedule, batch, stream(step))
        loss, _ = method.loss(policy, reference, batch, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    draws = method.draw(policy.schedule, batch, stream("held-out"))
    with torch.no_grad():
        after = squared_error(*predict(policy, batch, draws))
        before = squared_error(*predict(reference, batch, draws))
    ratio = [after[s].mean().item() / before[s].mean().item() for s in (side > 0, side < 0)]
    return ratio[0], ratio[1]


def test_dropping_negatives_learns_the_good() -> None:
    good, bad = errors_after(CRAFT("drop"))
    assert good < 0.6
    assert bad > good + 0.2


def test_the_anchor_learns_the_good_leaves_the_bad_and_stays_near_the_start() -> None:
    good, bad = errors_after(CRAFT("anchor"))
    assert good < 0.8
    assert 1.2 < bad < 5


@pytest.mark.parametrize("negatives", ["keep", "clip"])
def test_signed_losses_without_a_floor_run_away(negatives: Negatives) -> None:
    """Why "keep" has its guard: nothing else in the loop would stop it."""
    good, bad = errors_after(CRAFT(negatives))
    assert good > 10
    assert bad > 10


# --- settings --------------------------------------------------------------------------------


def test_settings_are_checked_by_name_and_range() -> None:
    assert build("craft", {"negatives": "anchor", "beta": 0.5}) == CRAFT("anchor", beta=0.5)
    for settings_, key in (
        ({"beta": 0}, "beta"),
        ({"guard": 0.5}, "guard"),
        ({"clip": -1}, "clip"),
    ):
        with pytest.raises(ValueError, match=f"method.settings.{key}"):
            build("craft", settings_)
    with pytest.raises(ValueError, match="did you mean 'negatives'"):
        build("craft", {"negative": "drop"})

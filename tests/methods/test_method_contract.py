"""What every method fed with examples owes the loop, and each of CRAFT's readings."""

import copy
import math
from typing import Any

import pytest
import torch
from toy import ToyDenoiser, flat_grad, toy, toy_examples

from craftune.batches import Draws, Examples
from craftune.methods import METHODS, build
from craftune.seeds import stream
from craftune.types import Method

CASES = {
    **{
        name: (name, {"after": 1} if name == "pgraft" else {})
        for name, kind in METHODS.items()
        if kind.fed_with == "examples"
    },
    "pgraft restricted-t": ("pgraft", {"after": 1, "option": "restricted-t"}),
    **{f"craft {n}": ("craft", {"negatives": n}) for n in ("keep", "clip", "anchor")},
}
WEIGHT = torch.tensor([1.7, -0.6, 0.3, 1.2, -1.7, 0.9, 0.1, -0.2])


@pytest.fixture(params=CASES)
def method(request: pytest.FixtureRequest) -> Any:
    name, settings = CASES[request.param]
    return build(name, settings)


def setting(method: Any, target: str = "epsilon") -> tuple[ToyDenoiser, ToyDenoiser, Examples, Any]:
    reference = toy(target)  # type: ignore[arg-type]
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for weight in policy.network.parameters():
            weight.mul_(1.1)
    reference.network.requires_grad_(False)
    weight = method.weigh(WEIGHT)
    batch = toy_examples(8, weight=weight)
    return policy, reference, batch, method.draw(policy.schedule, batch, stream(0))


def test_every_method_has_its_case() -> None:
    """Those fed with prompts have theirs in test_reward_gradient.py, pictures in tests/noise."""
    others = {name for name, kind in METHODS.items() if kind.fed_with != "examples"}
    assert {name for name, _ in CASES.values()} == set(METHODS) - others


def test_it_has_the_interface(method: Any) -> None:
    assert isinstance(method, Method)
    assert isinstance(method.needs_reference, bool)


@pytest.mark.parametrize("target", ["epsilon", "v", "velocity"])
def test_the_loss_is_finite_and_the_gradient_is_the_policy_s_alone(
    method: Any, target: str
) -> None:
    policy, reference, batch, draws = setting(method, target)
    loss, metrics = method.loss(policy, reference, batch, draws)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert math.isfinite(loss.item())
    assert metrics["loss"] == loss.item()
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    loss.backward()
    assert flat_grad(policy.network).abs().max() > 0
    assert all(p.grad is None for p in reference.network.parameters())
    for tensor in (batch.latents, batch.weight, batch.cond.tensors["tokens"], draws.noise):
        assert tensor.grad is None
        assert not tensor.requires_grad


def test_the_reference_gets_no_gradient_even_where_it_could(method: Any) -> None:
    policy, reference, batch, draws = setting(method)
    reference.network.requires_grad_(True)
    method.loss(policy, reference, batch, draws)[0].backward()
    assert all(p.grad is None for p in reference.network.parameters())


def test_it_only_reads_the_reference_where_it_says_so(method: Any) -> None:
    policy, reference, batch, draws = setting(method)
    calls = []
    reference.network.register_forward_hook(lambda *_: calls.append(1))
    method.loss(policy, reference, batch, draws)
    assert bool(calls) == method.needs_reference
    if not method.needs_reference:
        assert method.loss(policy, None, batch, draws)[0].isfinite()


def test_the_same_draws_give_the_same_bits(method: Any) -> None:
    found = []
    for _ in range(2):
        policy, reference, batch, draws = setting(method)
        torch.randn(7)  # the global generator plays no part
        loss, metrics = method.loss(policy, reference, batch, draws)
        loss.backward()
        found.append((loss.detach(), flat_grad(policy.network), metrics))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_draws_come_from_the_generator_alone_and_differ_by_example(method: Any) -> None:
    policy, _, batch, one = setting(method)
    torch.manual_seed(77)
    same = method.draw(policy.schedule, batch, stream(0))
    other = method.draw(policy.schedule, batch, stream(1))
    assert isinstance(one, Draws)
    assert torch.equal(one.noise, same.noise)
    assert torch.equal(one.t, same.t)
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.noise[0], one.noise[1])
    assert one.t.unique().numel() > 1


@pytest.mark.parametrize("sizes", [(4, 4), (1,) * 8, (3, 3, 2)])
def test_micro_batches_add_up_to_the_batch(method: Any, sizes: tuple[int, ...]) -> None:
    """Loss, every metric and the gradient, each micro-batch counted by its share."""
    policy, reference, batch, draws = setting(method)
    loss, metrics = method.loss(policy, reference, batch, draws)
    loss.backward()
    whole = flat_grad(policy.network)
    policy.network.zero_grad()
    start, sums = 0, dict.fromkeys(metrics, 0.0)
    for size in sizes:
        rows = slice(start, start + size)
        part, values = method.loss(policy, reference, batch.rows(rows), draws.rows(rows))
        (part * size / 8).backward()
        sums = {name: sums[name] + values[name] * size / 8 for name in sums}
        start += size
    torch.testing.assert_close(flat_grad(policy.network), whole, atol=1e-6, rtol=1e-4)
    for name, value in metrics.items():
        assert sums[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_weight_of_zero_teaches_nothing(method: Any) -> None:
    """Save for the anchor, where it holds the policy at the start."""
    policy, reference, batch, draws = setting(method)
    none = Examples(batch.latents, batch.cond, torch.zeros(8))
    method.loss(policy, reference, none, draws)[0].backward()
    held = getattr(method, "negatives", "") == "anchor"
    assert (flat_grad(policy.network).abs().max() > 0) == held


def test_the_check_passes_on_what_a_start_gives(method: Any) -> None:
    _, reference, batch, draws = setting(method)
    method.check(method.loss(reference, reference, batch, draws)[1])

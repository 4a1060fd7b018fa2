"""DRaFT, ReFL and AlignProp: the gradient is the chain's, truncated where it says so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Gaussian, ToyDenoiser, chain, cosine_schedule, flat_grad, toy, toy_cond

from craftune.batches import Drawing, Prompts, Starts
from craftune.diffusion import Schedule, Target
from craftune.errors import UserError
from craftune.methods import METHODS, AlignProp, DRaFT, ReFL, build
from craftune.methods.drawing import weighted
from craftune.sampling import sample
from craftune.seeds import stream
from craftune.types import Cond, Method

STEPS = 5
REWARD = {"right": 1.0}
TARGETS: tuple[Target, ...] = ("epsilon", "v", "velocity")
FED_WITH_PROMPTS = [name for name, kind in METHODS.items() if kind.fed_with == "prompts"]


def to_the_right(images: Tensor, texts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """High for images near (2, 0); curved, so that gradients depend on where one is."""
    assert len(images) == len(texts)
    reward = -(images - torch.tensor([2.0, 0.0])).square().sum(1).sqrt()
    return reward, {"right": reward.detach()}


def prompts(
    n: int, schedule: Schedule, steps: int = STEPS, *, guidance: float = 2.0, **changes: Any
) -> Prompts:
    """n points as prompts, drawn through an even grid by DDIM."""
    times = torch.linspace(len(schedule) - 1, 5, steps).long().tolist()
    drawing = Drawing(
        grid=chain(schedule, times),
        sampler="ddim",
        guidance_scale=guidance,
        latent_shape=(2,),
        empty=Cond({"tokens": torch.zeros(1, 1, 2)}),
        decode=lambda latents: latents,
        reward=to_the_right,
    )
    texts = [f"point {i}" for i in range(n)]
    return Prompts(texts, toy_cond(n), replace(drawing, **changes))


def gradient(method: Any, policy: ToyDenoiser, batch: Prompts, draws: Starts) -> Tensor:
    policy.network.zero_grad()
    method.loss(policy, None, batch, draws)[0].backward()
    return flat_grad(policy.network)


# --- DRaFT and DRaFT-K ------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_all_steps_are_the_full_gradient(target: Target) -> None:
    """K = S, K = 0 (all), and a chain written out with neither truncation nor recomputation."""
    policy = toy(target)
    batch = prompts(6, policy.schedule)
    method = DRaFT(REWARD)
    draws = method.draw(policy.schedule, batch, stream(0))
    full = gradient(DRaFT(REWARD, grad_steps=0), policy, batch, draws)
    torch.testing.assert_close(
        gradient(DRaFT(REWARD, grad_steps=STEPS), policy, batch, draws), full, atol=0, rtol=0
    )

    policy.network.zero_grad()
    how, x = batch.drawing, draws.noise
    empty = how.empty.rows(torch.zeros(6, dtype=torch.long))
    for i, t in enumerate(how.grid.timesteps):
        batch_t = t.expand(6)
        without, with_prompt = policy(x, batch_t, empty), policy(x, batch_t, batch.cond)
        guided = without + 2.0 * (with_prompt - without)
        (alpha, alpha_end), (sigma, sigma_end) = how.grid.alphas[i], how.grid.sigmas[i]
        x_0, noise = policy.schedule.split_at(guided, x, alpha, sigma)
        x = alpha_end * x_0 + sigma_end * noise
    (-how.reward(x, batch.texts)[0].mean()).backward()
    torch.testing.assert_close(full, flat_grad(policy.network), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_the_gradient_is_the_finite_difference(target: Target, sampler: str) -> None:
    """In float64, through guidance, sampler, decoder and reward."""
    policy = toy(target, width=8)
    policy.network.double()
    batch = prompts(3, policy.schedule, sampler=sampler, decode=torch.tanh)
    method = DRaFT(REWARD, grad_steps=0)
    noise = torch.randn(3, 2, generator=stream(1), dtype=torch.float64)
    draws = Starts(noise, torch.empty(3, 0, 2))
    double = Double(policy.schedule, policy.network)

    def value() -> Tensor:
        x_0 = sample_all(double, batch, draws.noise, STEPS)
        return to_the_right(torch.tanh(x_0), batch.texts)[0].mean()

    value().backward()
    found = flat_grad(policy.network)
    place = 0
    for weight in policy.network.parameters():
        index = tuple(0 for _ in weight.shape)
        values = []
        for change in (1e-5, -2e-5):
            with torch.no_grad():
                weight[index] += change
                values.append(value().item())
        with torch.no_grad():
            weight[index] += 1e-5
        difference = (values[0] - values[1]) / 2e-5
        assert found[place].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)
        place += weight.numel()

    # And the method's loss is that function, in float32.
    policy.network.float()
    single = replace(draws, noise=noise.float())
    torch.testing.assert_close(
        -gradient(method, policy, batch, single), found.float(), atol=1e-4, rtol=1e-3
    )


@dataclass(frozen=True)
class Double:
    """The toy's denoiser without its return to float32."""

    schedule: Schedule
    network: nn.Module

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.network(x_t, t, cond.tensors["tokens"])


def sample_all(policy: Any, batch: Prompts, noise: Tensor, grad_steps: int) -> Tensor:
    how = batch.drawing
    return sample(
        policy,
        noise,
        batch.cond,
        how.empty.rows(torch.zeros(len(noise), dtype=torch.long)),
        how.grid,
        sampler=how.sampler,
        guidance_scale=how.guidance_scale,
        grad_steps=grad_steps,
    )


class PerStep(nn.Module):
    """One parameter per timestep: tells which steps have a gradient, and how large."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((timesteps,), 0.1))

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return 0.3 * x_t + self.shift[t][:, None] + 0.1 * tokens[:, 0]


@pytest.mark.parametrize("k", [1, 2, STEPS])
def test_the_steps_before_the_last_k_receive_exactly_zero(k: int) -> None:
    schedule = cosine_schedule("v")
    policy = ToyDenoiser(schedule, PerStep(len(schedule)))
    batch = prompts(4, schedule)
    draws = DRaFT(REWARD).draw(schedule, batch, stream(0))
    found = gradient(DRaFT(REWARD, grad_steps=k), policy, batch, draws)
    by_step = found[batch.drawing.grid.timesteps]
    assert torch.equal(by_step[: STEPS - k], torch.zeros(STEPS - k))
    assert (by_step[STEPS - k :] != 0).all()
    full = gradient(DRaFT(REWARD, grad_steps=0), policy, batch, draws)
    torch.testing.assert_close(
        by_step[STEPS - k :], full[batch.drawing.grid.timesteps][STEPS - k :]
    )


def test_both_branches_of_guidance_are_differentiated() -> None:
    """At scale w the empty prompt's branch counts 1 - w, the prompt's w."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty, self.prompt = (nn.Parameter(torch.zeros(2)) for _ in range(2))

        def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            is_empty = (tokens == 0).flatten(1).all(1)[:, None]
            return x_t + torch.where(is_empty, self.empty, self.prompt)

    schedule = cosine_schedule("epsilon")
    policy = ToyDenoiser(schedule, Branches())
    batch = prompts(4, schedule, guidance=3.0)
    draws = DRaFT(REWARD).draw(schedule, batch, stream(0))
    empty, prompt = gradient(DRaFT(REWARD), policy, batch, draws).split(2)
    torch.testing.assert_close(empty / -2.0, prompt / 3.0)
    assert prompt.abs().min() > 0


# --- DRaFT-LV -----------------------------------------------------------------------------------


def test_low_variance_expects_the_same_gradient_and_varies_less() -> None:
    """Where x_1 given the drawn x_0 has the sampler's law, LV's mean is that of K = 1.

    It has for the exact denoiser of a point: what is drawn is that point, and the sampler arrives
    at the last level with alpha_1 point + sigma_1 (the start's noise), as LV noises it to.
    """
    schedule = cosine_schedule("epsilon")
    where = torch.tensor([0.5, -0.3])

    class NearPoint(nn.Module):
        """The exact denoiser of a point, shifted by a parameter that is 0."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))

        def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            cond = Cond({"tokens": tokens})
            exact = Gaussian(schedule, where)(x_t, t, cond)
            return exact + self.shift * (1 + x_t.square())

    policy = ToyDenoiser(schedule, NearPoint())
    batch = prompts(1, schedule, steps=3, guidance=1.0)

    def estimates(method: DRaFT, count: int) -> Tensor:
        found = []
        for i in range(count):
            draws = method.draw(schedule, batch, stream("estimate", i))
            found.append(gradient(method, policy, batch, draws))
        return torch.stack(found)

    one, low = estimates(DRaFT(REWARD), 300), estimates(DRaFT(REWARD, repeats=4), 300)
    error = (one.var(0) / 300 + low.var(0) / 300).sqrt()
    assert ((one.mean(0) - low.mean(0)).abs() < 4 * error).all()
    ratio = low.var(0) / one.var(0)
    assert (ratio < 0.4).all(), ratio  # 1/4 for independent repeats
    assert (ratio > 0.15).all(), ratio


@pytest.mark.parametrize("target", TARGETS)
def test_low_variance_noises_to_the_last_level_and_keeps_no_gradient_before(target: Target) -> None:
    schedule = cosine_schedule(target)
    seen = []

    class Watched(PerStep):
        def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            seen.append((x_t.detach(), int(t[0]), torch.is_grad_enabled()))
            return super().forward(x_t, t, tokens)

    policy = ToyDenoiser(schedule, Watched(len(schedule)))
    batch = prompts(2, schedule, guidance=1.0)
    method = DRaFT(REWARD, repeats=3)
    draws = method.draw(schedule, batch, stream(0))
    found = gradient(method, policy, batch, draws)
    x_0 = sample_all(policy, batch, draws.noise, 0)
    x_1, t, on = seen[STEPS]
    alpha, sigma = batch.drawing.grid.alphas[-1, 0], batch.drawing.grid.sigmas[-1, 0]
    wanted = alpha * x_0.repeat_interleave(3, 0) + sigma * draws.again.flatten(0, 1)
    torch.testing.assert_close(x_1, wanted)
    assert [grad for _, _, grad in seen[:STEPS]] == [False] * STEPS
    assert on
    assert t == batch.drawing.grid.timesteps[-1]
    assert set(found.nonzero().flatten().tolist()) == {t}


# --- ReFL and AlignProp --------------------------------------------------------------------------


def test_refl_rewards_the_x_0_that_is_predicted_at_tau() -> None:
    policy = toy("v")
    batch = prompts(4, policy.schedule, steps=8, guidance=1.0)
    method = ReFL(REWARD, earliest=0.75, hinge=1.0, scale=0.5)
    taus = {method.draw(policy.schedule, batch, stream(i)).cut for i in range(60)}
    assert taus == {6, 7}
    draws = replace(method.draw(policy.schedule, batch, stream(0)), cut=6)
    how, x = batch.drawing, draws.noise
    for i in range(6):
        t = how.grid.timesteps[i].expand(4)
        x_0, noise = policy.schedule.split_at(
            policy(x, t, batch.cond), x, how.grid.alphas[i, 0], how.grid.sigmas[i, 0]
        )
        x = (how.grid.alphas[i, 1] * x_0 + how.grid.sigmas[i, 1] * noise).detach()
    t = how.grid.timesteps[6].expand(4)
    x_0, _ = policy.schedule.split_at(
        policy(x, t, batch.cond), x, how.grid.alphas[6, 0], how.grid.sigmas[6, 0]
    )
    wanted = 0.5 * (1.0 - how.reward(x_0, batch.texts)[0]).mean()
    loss, _ = method.loss(policy, None, batch, draws)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    wanted.backward()
    expected = flat_grad(policy.network)
    torch.testing.assert_close(
        gradient(method, policy, batch, draws), expected, atol=1e-5, rtol=1e-3
    )


def test_beyond_the_hinge_nothing_is_taught() -> None:
    policy = toy()
    batch = prompts(4, policy.schedule)
    method = ReFL(REWARD, hinge=-1e6)
    draws = method.draw(policy.schedule, batch, stream(0))
    assert gradient(method, policy, batch, draws).abs().max() == 0
    assert method.loss(policy, None, batch, draws)[1]["below_hinge"] == 0


def test_refl_s_guidance_is_off_unless_asked_for() -> None:
    policy = toy()
    strong, none = (prompts(4, policy.schedule, guidance=scale) for scale in (5.0, 1.0))
    draws = ReFL(REWARD).draw(policy.schedule, none, stream(0))
    plain = [ReFL(REWARD).loss(policy, None, batch, draws)[0] for batch in (strong, none)]
    assert torch.equal(*plain)
    guided = ReFL(REWARD, guided=True).loss(policy, None, strong, draws)[0]
    assert not torch.equal(guided, plain[0])


@pytest.mark.parametrize(("law", "wanted"), [("uniform", range(50)), ("gaussian", range(1, 50))])
def test_alignprop_s_cut_has_its_law(law: Any, wanted: range) -> None:
    method, rng = AlignProp(REWARD, law=law), stream(0)
    found = torch.tensor([method.cut(50, rng) for _ in range(4000)])
    assert set(found.tolist()) <= set(wanted)
    mean, deviation = found.float().mean().item(), found.float().std().item()
    if law == "uniform":
        assert (mean, deviation) == (pytest.approx(24.5, abs=0.8), pytest.approx(14.4, abs=0.5))
    else:  # N(42, 5) floored, without its tail beyond 50
        assert (mean, deviation) == (pytest.approx(41.0, abs=0.6), pytest.approx(4.5, abs=0.5))


def test_alignprop_is_draft_from_its_cut() -> None:
    policy = toy()
    batch = prompts(4, policy.schedule)
    draws = replace(AlignProp(REWARD).draw(policy.schedule, batch, stream(0)), cut=2)
    found = gradient(AlignProp(REWARD), policy, batch, draws)
    assert torch.equal(found, gradient(DRaFT(REWARD, grad_steps=3), policy, batch, draws))


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FED_WITH_PROMPTS)
def test_the_reward_rises(name: str, target: Target) -> None:
    policy = toy(target)
    batch = prompts(16, policy.schedule, guidance=1.0)
    method: Any = build(name, {"rewards": REWARD})
    optimizer = torch.optim.Adam(policy.network.parameters(), 3e-3)
    rewards = []
    for step in range(40):
        draws = method.draw(policy.schedule, batch, stream(step))
        loss, metrics = method.loss(policy, None, batch, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(metrics["reward"])
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


CASES = {name: (name, {}) for name in FED_WITH_PROMPTS} | {"draft lv": ("draft", {"repeats": 2})}


@pytest.mark.parametrize("case", CASES)
def test_it_is_a_method_whose_micro_batches_add_up(case: str) -> None:
    """Loss, every metric and the gradient, which is the policy's alone."""
    name, settings = CASES[case]
    method: Any = build(name, {"rewards": REWARD, **settings})
    assert isinstance(method, Method)
    policy = toy("v")
    batch = prompts(7, policy.schedule)
    draws = method.draw(policy.schedule, batch, stream(3))
    loss, metrics = method.loss(policy, None, batch, draws)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert metrics["loss"] == loss.item()
    whole = gradient(method, policy, batch, draws)
    assert whole.abs().max() > 0
    assert not any(
        t.requires_grad for t in (draws.noise, draws.again, batch.cond.tensors["tokens"])
    )
    policy.network.zero_grad()
    sums = dict.fromkeys(metrics, 0.0)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        share = (rows.stop - rows.start) / 7
        part, values = method.loss(policy, None, batch.rows(rows), draws.rows(rows))
        (part * share).backward()
        sums = {key: sums[key] + values[key] * share for key in sums}
    torch.testing.assert_close(flat_grad(policy.network), whole, atol=1e-6, rtol=1e-4)
    assert sums == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_draws_come_from_the_generator_alone_and_differ_by_prompt(case: str) -> None:
    name, settings = CASES[case]
    method: Any = build(name, {"rewards": REWARD, **settings})
    batch = prompts(4, cosine_schedule())
    one = method.draw(cosine_schedule(), batch, stream(0))
    torch.manual_seed(77)
    same, other = (method.draw(cosine_schedule(), batch, stream(i)) for i in (0, 1))
    assert torch.equal(one.noise, same.noise)
    assert torch.equal(one.again, same.again)
    assert one.cut == same.cut
    assert not torch.equal(one.noise, other.noise)
    everything = torch.cat([one.noise, one.again.flatten(0, 1)])
    assert len(everything.unique(dim=0)) == len(everything)


@contextmanager
def kept_bytes() -> Iterator[Callable[[], int]]:
    """What autograd keeps for the backward pass, each storage once."""
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else another may lie where it lay
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(found.values())


def memory(steps: int, k: int, *, checkpoint: bool) -> int:
    policy = toy("v", width=64)
    batch = prompts(32, policy.schedule, steps=steps)
    noise = DRaFT(REWARD).draw(policy.schedule, batch, stream(0)).noise
    how = batch.drawing
    with kept_bytes() as kept:
        sample(
            policy,
            noise,
            batch.cond,
            how.empty.rows(torch.zeros(32, dtype=torch.long)),
            how.grid,
            sampler="ddim",
            guidance_scale=2.0,
            grad_steps=k,
            checkpoint=checkpoint,
        )
        return kept()


def test_memory_is_flat_in_the_steps_and_linear_in_k() -> None:
    grid = 2 * 2 * 4  # bytes of a step's levels: all that grows with the steps
    longer = memory(40, 2, checkpoint=False) - memory(5, 2, checkpoint=False)
    assert longer == 35 * grid
    one, two, four, eight = (memory(20, k, checkpoint=False) for k in (1, 2, 4, 8))
    assert two > 1.8 * one
    assert eight - four == pytest.approx(2 * (four - two), rel=0.02)


def test_recomputed_activations_leave_only_latents_behind() -> None:
    """Per step three latents' worth, where activations are a hundred times that."""
    with_all = memory(20, 20, checkpoint=False)
    one, some, all_of_them = (memory(20, k, checkpoint=True) for k in (1, 10, 20))
    latents = 32 * 2 * 4
    assert (all_of_them - one) / 19 <= 8 * latents
    assert all_of_them < with_all / 20
    assert some < all_of_them


@pytest.mark.parametrize("k", [2, STEPS])
def test_recomputing_changes_no_bit_of_the_gradient(k: int) -> None:
    policy = toy()
    batch = prompts(4, policy.schedule)
    noise = DRaFT(REWARD).draw(policy.schedule, batch, stream(0)).noise
    found = []
    for checkpoint in (False, True):
        policy.network.zero_grad()
        how = batch.drawing
        x_0 = sample(
            policy,
            noise,
            batch.cond,
            how.empty.rows(torch.zeros(4, dtype=torch.long)),
            how.grid,
            sampler="dpm++2m",
            guidance_scale=2.0,
            grad_steps=k,
            checkpoint=checkpoint,
        )
        x_0.square().mean().backward()
        found.append(flat_grad(policy.network))
    assert torch.equal(*found)


def test_the_weighted_sum_by_hand() -> None:
    scores = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([10.0, 30.0])}
    found = weighted(scores, {"a": 2.0, "b": -0.5}, {"b": (10.0, 4.0)})
    assert found.tolist() == [2.0, 3.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "method.settings.rewards: field required"),
        ({"rewards": {}}, "at least 1 item"),
        ({"rewards": REWARD, "grad_steps": 3, "repeats": 2}, "leave grad_steps at 1"),
        ({"rewards": REWARD, "scales": {"right": [0.0, 0.0]}}, "greater than 0"),
        ({"rewards": REWARD, "gradsteps": 3}, "did you mean 'grad_steps'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        build("draft", settings)
    assert message in str(error.value)

"""SFT: the denoising error, all examples alike."""

import pytest
import torch
from torch import Tensor, nn
from toy import ToyDenoiser, cosine_schedule, flat_grad, toy, toy_examples

from craftune.batches import Draws
from craftune.methods import CRAFT, SFT
from craftune.methods.denoising import squared_error
from craftune.seeds import stream


class Zero(nn.Module):
    """Predicts 0 everywhere; one weight, so that it can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.value.expand_as(x_t)


def test_the_loss_by_hand() -> None:
    """Noise (1, -2) and (3, 0) against 0: (1 + 4) / 2 = 2.5 and 9 / 2 = 4.5, mean 3.5."""
    batch = toy_examples(2)
    draws = Draws(torch.tensor([3, 60]), torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    loss, metrics = SFT().loss(ToyDenoiser(cosine_schedule(), Zero()), None, batch, draws)
    assert loss.item() == pytest.approx(3.5)
    assert metrics == {"loss": pytest.approx(3.5), "error": pytest.approx(3.5)}


def test_the_error_is_a_mean_over_latents_not_a_sum() -> None:
    one, other = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    assert squared_error(one, other).shape == (3,)
    torch.testing.assert_close(squared_error(one, other)[1], (one[1] - other[1]).square().mean())
    assert squared_error(one, one).eq(0).all()


@pytest.mark.parametrize("target", ["epsilon", "v", "velocity"])
def test_the_network_sees_x_t_its_prompt_and_is_asked_for_the_target(target: str) -> None:
    """A network that answers with the true target of its own (x_t, t, prompt) has loss 0."""
    policy = toy(target)  # type: ignore[arg-type]
    batch = toy_examples(6)
    draws = SFT().draw(policy.schedule, batch, stream(0))
    alpha, sigma = policy.schedule.scales(draws.t, batch.latents)

    class Knowing(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            assert torch.equal(t, draws.t)
            assert torch.equal(tokens, batch.cond.tensors["tokens"])
            x_0 = batch.latents
            noise = (x_t - alpha * x_0) / sigma
            return policy.schedule.training_target(x_0, noise, t)

    loss, _ = SFT().loss(ToyDenoiser(policy.schedule, Knowing()), None, batch, draws)
    assert loss.item() < 1e-8


def test_it_is_craft_with_unit_weights() -> None:
    batch = toy_examples(8)
    gradients = []
    for method in (SFT(), CRAFT(negatives="drop")):
        policy = toy()
        draws = method.draw(policy.schedule, batch, stream(1))
        loss, _ = method.loss(policy, None, batch, draws)
        loss.backward()
        gradients.append(flat_grad(policy.network))
    assert torch.equal(*gradients)


def test_it_weighs_all_alike() -> None:
    assert SFT().weigh(torch.tensor([-1.5, 0.0, 2.0])).tolist() == [1.0, 1.0, 1.0]


def test_draws_are_fresh_noise_and_timesteps_over_the_whole_schedule() -> None:
    schedule = cosine_schedule()
    batch = toy_examples(5000)
    draws = SFT().draw(schedule, batch, stream(0))
    assert draws.t.unique().numel() == len(schedule)
    assert draws.noise.mean().abs() < 0.05
    assert (draws.noise.std() - 1).abs() < 0.05
    assert len(draws.noise.unique(dim=0)) == 5000


def test_it_learns() -> None:
    """200 updates bring the error on held-out draws below 0.6 of the start's."""
    policy, batch, method = toy(), toy_examples(64), SFT()
    held_out = method.draw(policy.schedule, batch, stream("held-out"))
    before = method.loss(policy, None, batch, held_out)[0].item()
    optimizer = torch.optim.Adam(policy.network.parameters(), 1e-2)
    for step in range(200):
        loss, _ = method.loss(
            policy, None, batch, method.draw(policy.schedule, batch, stream(step))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert method.loss(policy, None, batch, held_out)[0].item() < 0.6 * before

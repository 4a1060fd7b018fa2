"""Scaled and mixed tunings: the ends are base and tuned, adapters add up, as peft adds them."""

import copy

import pytest
import torch
from toy import kept_checkpoint, load_sd, toy

from craftune.adapters import add_lora, merged
from craftune.config import LoraConfig
from craftune.mixing import mix_into, mixed
from craftune.seeds import stream
from craftune.types import Model


def test_by_hand() -> None:
    """1 + 0.5 (3 - 1) - 2 (0 - 1) = 4."""
    base, one, two = ({"w": torch.tensor([value])} for value in (1.0, 3.0, 0.0))
    assert mixed(base, [(one, 0.5), (two, -2.0)])["w"].tolist() == [4.0]
    assert base["w"].tolist() == [1.0]


def test_the_ends_are_base_and_tuned() -> None:
    base, tuned = toy(seed=0).network.state_dict(), toy(seed=1).network.state_dict()
    for scale, wanted in ((0.0, base), (1.0, tuned)):
        found = mixed(base, [(tuned, scale)])
        for name, weight in wanted.items():
            assert torch.equal(found[name], weight)
    assert mixed(base, []).keys() == base.keys()


def test_half_way_is_the_mean() -> None:
    base, tuned = toy(seed=0).network.state_dict(), toy(seed=1).network.state_dict()
    for name, weight in mixed(base, [(tuned, 0.5)]).items():
        torch.testing.assert_close(weight, (base[name] + tuned[name]) / 2)


def test_half_precision_is_rounded_once() -> None:
    """Three quarters of the way from 1 to the next bfloat16 is that one; 1/4 of the way is 1."""
    network = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    ends = [{"weight": torch.tensor([[x]])} for x in (1.0, 1 + 2**-7)]
    for scale, wanted in ((0.75, 1 + 2**-7), (0.25, 1.0)):
        mix_into(network, ends[0], [(ends[1], scale)])
        assert network.weight.item() == wanted


def adapted(model: Model, seed: int) -> torch.nn.Module:
    """A copy of the network with adapters that change it."""
    network = copy.deepcopy(model.denoiser.network)
    add_lora(network, LoraConfig(rank=2), model.lora_targets, seed)
    with torch.no_grad():
        for i, weight in enumerate(p for p in network.parameters() if p.requires_grad):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=stream("lora", seed, i)))
    return network


def test_scaled_weights_are_scaled_adapters() -> None:
    model = load_sd(kept_checkpoint())
    network = adapted(model, 1)
    whole = copy.deepcopy(model.denoiser.network)
    mix_into(whole, whole.state_dict(), [(merged(network).state_dict(), 0.4)])
    network.set_adapters(["default"], [0.4])  # type: ignore[operator]
    x = torch.randn(2, *model.latent_shape, generator=stream("x"))
    cond, t = model.encode_prompts(["two red dogs", "a cat"]), torch.tensor([10, 900])
    tokens = cond.tensors["tokens"]
    with torch.no_grad():
        found, wanted = (n(x, t, tokens, return_dict=False)[0] for n in (whole, network))
        start = model.denoiser(x, t, cond)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert (found - start).abs().max() > 1e-3


def test_other_networks_are_refused() -> None:
    network = toy(width=8).network
    base, other = network.state_dict(), toy(width=16).network.state_dict()
    with pytest.raises(ValueError, match=r"'layers\.0\.weight' is not the same"):
        mixed(base, [(other, 1.0)])
    with pytest.raises(ValueError, match=r"'out\.bias'"):
        mixed(base, [({k: v for k, v in base.items() if k != "out.bias"}, 1.0)])
    with pytest.raises(ValueError, match=r"'more' is not the same in all models: absent and of"):
        mixed(base, [(base | {"more": base["out.bias"]}, 1.0)])
    before = {k: v.clone() for k, v in base.items()}
    with pytest.raises(ValueError, match="not the same"):
        mix_into(network, base, [(other, 0.5)])
    assert all(torch.equal(weight, before[k]) for k, weight in network.state_dict().items())

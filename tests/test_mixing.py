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
            torch.testing.assert_close(found[name], weight)
    assert mixed(base, []).keys() == base.keys()


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
    mix_into(whole, [(merged(network), 0.4)])
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
    base, other = toy(width=8).network.state_dict(), toy(width=16).network.state_dict()
    with pytest.raises(ValueError, match=r"'layers\.0\.weight' is not the same"):
        mixed(base, [(other, 1.0)])
    with pytest.raises(ValueError, match=r"'out\.bias'"):
        mixed(base, [({k: v for k, v in base.items() if k != "out.bias"}, 1.0)])

"""LoRA on a Stable Diffusion UNet: what trains, what is the start, and what loads elsewhere."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from toy import flat_grad, kept_checkpoint, load_sd

from craftune.adapters import WithoutAdapter, add_lora, merged, merged_into
from craftune.batches import Examples
from craftune.config import LoraConfig, TrainConfig
from craftune.errors import UserError
from craftune.methods import CRAFT, SFT
from craftune.sampling import initial_noise, sample
from craftune.seeds import stream
from craftune.training import train
from craftune.types import Denoiser, Model

LORA = LoraConfig(rank=2, alpha=4)
DORA = LoraConfig(rank=2, alpha=4, dora=True)
T = torch.tensor([10, 500, 900])
PROMPTS = ["a red dog", "two cats", ""]


def adapted(seed: int = 0, lora: LoraConfig = LORA, start: bool = False) -> Model:
    """A model with adapters; unless `start`, as if they had been trained."""
    model = load_sd(kept_checkpoint())
    network = model.denoiser.network
    add_lora(network, lora, model.lora_targets, seed)
    if not start:
        with torch.no_grad():
            for i, weight in enumerate(p for p in network.parameters() if p.requires_grad):
                weight.add_(0.2 * torch.randn(weight.shape, generator=stream("trained", i)))
    return model


def examples(model: Model, n: int = 6) -> Examples:
    latents = torch.randn(n, *model.latent_shape, generator=stream("latents"))
    weight = torch.tensor([1.2, -0.8, 0.4, -1.5, 0.9, 0.3])[:n]
    return Examples(latents, model.encode_prompts(["a dog", "two cats"] * (n // 2)), weight)


def answer(model: Model, denoiser: Denoiser | None = None) -> Tensor:
    x_t = torch.randn(3, *model.latent_shape, generator=stream("x_t"))
    with torch.no_grad():
        return (denoiser or model.denoiser)(x_t, T, model.encode_prompts(PROMPTS))


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_fresh_adapters_change_nothing_and_trained_ones_do(lora: LoraConfig) -> None:
    start = answer(load_sd(kept_checkpoint()))
    torch.testing.assert_close(answer(adapted(lora=lora, start=True)), start, atol=1e-6, rtol=1e-5)
    assert torch.equal(answer(adapted(start=True)), start)
    assert (answer(adapted(lora=lora)) - start).abs().max() > 0.01


def test_dora_trains_one_length_per_output_beside_the_factors() -> None:
    network = adapted(lora=DORA).denoiser.network
    lengths = [p for n, p in network.named_parameters() if "magnitude" in n]
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    assert len(lengths) == len(layers) > 0
    assert all(p.requires_grad and p.ndim == 1 for p in lengths)


def test_only_adapters_are_trainable_on_the_family_s_targets() -> None:
    network = adapted().denoiser.network
    trainable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert not any("lora_" in name for name in frozen)
    for target in load_sd(kept_checkpoint()).lora_targets:
        assert any(f".{target}.lora_A" in name for name in trainable)


@pytest.mark.parametrize(("alpha", "scale"), [(0, 1.0), (4, 2.0), (1, 0.5)])
def test_adapters_count_alpha_over_rank(alpha: int, scale: float) -> None:
    network = adapted(lora=LoraConfig(rank=2, alpha=alpha), start=True).denoiser.network
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    assert all(layer.scaling == {"default": scale} for layer in layers)


def test_training_changes_the_adapters_alone(tmp_path: Path) -> None:
    model = adapted(start=True)
    network = model.denoiser.network
    before = copy.deepcopy(network.state_dict())
    config = TrainConfig(steps=3, batch_size=6, learning_rate=1e-2, save_every=1)
    batch = examples(model)
    train(SFT(), model.denoiser, None, lambda _: batch, config, 0, tmp_path)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    adapters = {k for k in before if "lora_" in k}
    assert changed == adapters
    state = torch.load(tmp_path / "checkpoint-2" / "state.pt", weights_only=True)
    assert set(state["network"]) == adapters


def test_the_adapters_start_is_the_seed_s_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    one = adapted(seed=3, start=True).denoiser.network.state_dict()
    after = torch.rand(1)
    torch.manual_seed(2)
    same = adapted(seed=3, start=True).denoiser.network.state_dict()
    other = adapted(seed=4, start=True).denoiser.network.state_dict()
    factors = [k for k in one if "lora_A" in k]
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in factors)
    torch.manual_seed(1)
    load_sd(kept_checkpoint())
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_the_reference_is_the_starting_network_exactly(lora: LoraConfig) -> None:
    model = adapted(lora=lora)
    reference = WithoutAdapter(model.denoiser)
    assert torch.equal(answer(model, reference), answer(load_sd(kept_checkpoint())))
    assert (answer(model) - answer(model, reference)).abs().max() > 0.01
    assert reference.schedule is model.denoiser.schedule
    assert isinstance(reference, Denoiser)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_beside_the_switched_off_reference_are_those_beside_a_copy(
    checkpointing: bool,
) -> None:
    """Switching off and on between the policy's forward and backward pass loses nothing."""
    found = []
    for kind in ("switched", "copy"):
        model = adapted()
        policy = model.denoiser
        reference: Any = WithoutAdapter(policy)
        if kind == "copy":
            reference = load_sd(kept_checkpoint()).denoiser
        if checkpointing:
            policy.network.enable_gradient_checkpointing()  # type: ignore[operator]
        policy.network.train()
        batch = examples(model)
        method = CRAFT("anchor")
        draws = method.draw(policy.schedule, batch, stream(0))
        loss, _ = method.loss(policy, reference, batch, draws)
        loss.backward()
        found.append((loss.detach(), flat_grad(policy.network)))
        assert all("lora_" in n for n, p in policy.network.named_parameters() if p.requires_grad)
    assert found[0][1].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-5)


def test_the_adapters_come_on_again_after_an_error() -> None:
    model = adapted()
    with pytest.raises(RuntimeError):
        WithoutAdapter(model.denoiser)(torch.zeros(3, 9, 8, 8), T, model.encode_prompts(PROMPTS))
    assert (answer(model) - answer(load_sd(kept_checkpoint()))).abs().max() > 0.01


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_merged_is_the_policy_without_adapters(lora: LoraConfig) -> None:
    model = adapted(lora=lora)
    whole = merged(model.denoiser.network)
    assert not any("lora" in name for name in whole.state_dict())
    assert (
        whole.state_dict().keys() == load_sd(kept_checkpoint()).denoiser.network.state_dict().keys()
    )
    plain = load_sd(kept_checkpoint())
    plain.denoiser.network.load_state_dict(whole.state_dict())
    torch.testing.assert_close(answer(plain), answer(model), atol=1e-4, rtol=1e-4)
    assert (answer(plain) - answer(model, WithoutAdapter(model.denoiser))).abs().max() > 0.01


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_merged_into_a_fresh_start_is_merged(lora: LoraConfig) -> None:
    """To the bit in float32; in a narrower dtype the sum is rounded once, the rest not at all."""
    network = adapted(lora=lora).denoiser.network
    wanted = merged(network).state_dict()
    before = load_sd(kept_checkpoint()).denoiser.network.state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        start = load_sd(kept_checkpoint()).denoiser.network
        found = merged_into(start, network, dtype).state_dict()
        assert found.keys() == wanted.keys()
        changed = {k for k in wanted if not torch.equal(wanted[k], before[k])}
        assert changed
        assert all(torch.equal(found[k], wanted[k].to(dtype)) for k in changed)
        assert all(torch.equal(found[k], before[k]) for k in wanted.keys() - changed)


def test_adapters_are_float32_beside_a_base_of_two_bytes() -> None:
    model = load_sd(kept_checkpoint(), dtype="bfloat16")
    network = model.denoiser.network
    for lora in (LORA, DORA):
        copied = copy.deepcopy(network)
        add_lora(copied, lora, model.lora_targets, 0)
        kinds = {(p.requires_grad, p.dtype) for p in copied.parameters()}
        assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    add_lora(network, LORA, model.lora_targets, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(answer(model), answer(model, WithoutAdapter(model.denoiser)))


@pytest.mark.parametrize(
    "lora", [LORA, LoraConfig(rank=4), LoraConfig(rank=4, alpha=1), DORA], ids=str
)
def test_saved_adapters_load_in_a_plain_pipeline(tmp_path: Path, lora: LoraConfig) -> None:
    """The same latents: also where alpha is not the rank."""
    model = adapted(lora=lora)
    model.save_lora(tmp_path, model.denoiser.network)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    diffusers.utils.logging.set_verbosity_error()
    pipe: Any = StableDiffusionPipeline.from_pretrained(kept_checkpoint())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise([1], model.latent_shape)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    wanted = pipe("a red dog", latents=noise.clone(), **settings).images

    def ours(denoiser: Denoiser) -> Tensor:
        cond, empty = model.encode_prompts(["a red dog"]), model.encode_prompts([""])
        grid = model.grid("ddim", 4)
        return sample(denoiser, noise, cond, empty, grid, sampler="ddim", guidance_scale=3.0)

    scale = wanted.abs().max().item()
    assert (ours(model.denoiser) - wanted).abs().max() <= 1e-4 * scale
    assert (ours(WithoutAdapter(model.denoiser)) - wanted).abs().max() > 1e-2 * scale


def test_a_saved_merged_model_draws_like_the_policy(tmp_path: Path) -> None:
    model = adapted()
    model.save(tmp_path, merged(model.denoiser.network), torch.float32)
    torch.testing.assert_close(answer(load_sd(tmp_path)), answer(model), atol=1e-4, rtol=1e-4)


def test_targets_that_no_module_has_are_refused() -> None:
    model = load_sd(kept_checkpoint())
    config = LoraConfig(rank=2, targets=("to_nowhere",))
    with pytest.raises(UserError, match=r"train.lora.targets: .*to_nowhere") as caught:
        add_lora(model.denoiser.network, config, model.lora_targets, 0)
    assert len(str(caught.value).splitlines()) == 1

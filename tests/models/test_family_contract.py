"""What every family owes the pipeline, over the whole table."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from toy import kept_checkpoint, load_sd
from toy_flow import kept_flow
from toy_xl import kept_xl

from craftune.adapters import add_lora, merged
from craftune.config import GenerateConfig, LoraConfig, ModelConfig
from craftune.errors import UserError
from craftune.models import ADMITTED, FAMILIES, PIPELINES, family_of
from craftune.types import Cond, Denoiser, Model

CHECKPOINTS: dict[str, list[Callable[[], Path]]] = {
    "sd": [kept_checkpoint, lambda: kept_checkpoint("v_prediction", "linspace")],
    "sdxl": [kept_xl],
    "sd3": [lambda: kept_flow("sd3"), lambda: kept_flow("sd3-no-t5")],
    "flux": [lambda: kept_flow("flux-dev"), lambda: kept_flow("flux-schnell")],
}
"""Family -> functions that write, or know, a tiny checkpoint of it."""

CASES = [(name, i) for name, makers in CHECKPOINTS.items() for i in range(len(makers))]
PROMPTS = ["two red dogs", "a cat", "", "two red dogs"]


@pytest.fixture(params=CASES, ids=str)
def model(request: pytest.FixtureRequest) -> Model:
    name, number = request.param
    return load_sd(CHECKPOINTS[name][number]())


def ask(model: Model, rows: slice) -> torch.Tensor:
    x_t = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        return model.denoiser(x_t[rows], t[rows], model.encode_prompts(PROMPTS).rows(rows))


def test_every_family_has_a_checkpoint_and_a_pipeline() -> None:
    assert set(CHECKPOINTS) == set(FAMILIES) == set(PIPELINES.values())


def test_the_family_is_read_from_the_checkpoint() -> None:
    for name, makers in CHECKPOINTS.items():
        assert family_of(ModelConfig(path=str(makers[0]()))) == name


def test_a_folder_of_no_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        family_of(ModelConfig(path=str(tmp_path)))
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(UserError, match="no known family"):
        family_of(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="did you mean 'sd'"):
        family_of(ModelConfig(path=str(tmp_path), family="sdd"))


def test_the_denoiser_gives_finite_float32_of_the_latents_shape(model: Model) -> None:
    assert isinstance(model.denoiser, Denoiser)
    out = ask(model, slice(0, 4))
    assert out.dtype == torch.float32
    assert out.shape == (4, *model.latent_shape)
    assert torch.isfinite(out).all()


def test_each_row_is_answered_for_itself(model: Model) -> None:
    """Whatever else is in the batch, up to summation order; prompt, t and latents all count."""
    whole = ask(model, slice(0, 4))
    parts = torch.cat([ask(model, slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    x_t, t = torch.randn(1, *model.latent_shape), torch.tensor([500])
    cond = model.encode_prompts(PROMPTS)
    with torch.no_grad():
        one = model.denoiser(x_t, t, cond.rows(slice(0, 1)))
        assert not torch.equal(one, model.denoiser(x_t, t, cond.rows(slice(1, 2))))
        assert not torch.equal(one, model.denoiser(x_t, t + 100, cond.rows(slice(0, 1))))


def test_prompts_are_rows_of_finite_tokens(model: Model) -> None:
    cond = model.encode_prompts(PROMPTS)
    assert len(cond) == 4
    assert "tokens" in cond.tensors
    for tensor in cond.tensors.values():
        assert len(tensor) == 4
        assert torch.isfinite(tensor).all()
        assert not tensor.requires_grad
        assert torch.equal(tensor[0], tensor[3])
    assert not torch.equal(cond.tensors["tokens"][0], cond.tensors["tokens"][1])


def test_conds_are_cut_and_joined_by_row(model: Model) -> None:
    cond = model.encode_prompts(PROMPTS)
    picked = cond.rows(torch.tensor([2, 0, 0]))
    again = Cond.cat([cond.rows(slice(2, 3)), cond.rows(slice(0, 1)), cond.rows(slice(0, 1))])
    for name, tensor in picked.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
        assert torch.equal(tensor[0], cond.tensors[name][2])


def test_images_are_in_0_1_and_go_back_to_latents(model: Model) -> None:
    latents = torch.randn(2, *model.latent_shape)
    with torch.no_grad():
        images = model.decode(latents)
    assert images.dtype == torch.float32
    assert images.shape[:2] == (2, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    back, again = model.encode_images(images), model.encode_images(images)
    assert back.mean.shape == latents.shape
    assert torch.equal(back.mean, again.mean)  # no draw
    if back.std is not None:
        assert back.std.shape == latents.shape
        assert back.std.min() > 0


def test_grids_go_from_noise_to_image(model: Model) -> None:
    schedule = model.denoiser.schedule
    for sampler, steps in itertools.product(model.samplers, (1, 4, 25)):
        grid = model.grid(sampler, steps)
        assert len(grid.timesteps) == steps
        assert grid.timesteps.diff().lt(0).all()
        ratio = grid.sigmas / grid.alphas
        assert ratio[:, 1].lt(ratio[:, 0]).all()
        # a step starts at its timestep's own level in the schedule, between two of them too
        at = np.interp(grid.timesteps, np.arange(len(schedule)), schedule.alphas)
        np.testing.assert_allclose(grid.alphas[:, 0], at, rtol=1e-4, atol=1e-6)


def test_its_samplers_are_known_before_it_is_loaded(model: Model) -> None:
    assert ADMITTED[model.family] == model.samplers


def test_a_sampler_of_another_family_is_refused_by_naming_the_right_ones(model: Model) -> None:
    others = (
        set(get_args(get_type_hints(GenerateConfig)["sampler"])) - {"auto"} - set(model.samplers)
    )
    for name in others:
        with pytest.raises(UserError) as caught:
            model.grid(name, 4)
        assert len(str(caught.value).splitlines()) == 1
        assert all(f"'{admitted}'" in str(caught.value) for admitted in model.samplers)
        assert name in str(caught.value)
    assert others


def test_the_network_trains(model: Model) -> None:
    network = model.denoiser.network.requires_grad_(True)
    x_t, t = torch.randn(2, *model.latent_shape), torch.tensor([10, 900])
    model.denoiser(x_t, t, model.encode_prompts(PROMPTS[:2])).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == []
    assert any(name.endswith(model.lora_targets[0]) for name, _ in network.named_modules())


def test_gradient_checkpointing_gives_the_same_gradients(model: Model) -> None:
    network = model.denoiser.network.requires_grad_(True).train()
    x_t, t = torch.randn(2, *model.latent_shape), torch.tensor([10, 900])
    cond = model.encode_prompts(PROMPTS[:2])
    found = []
    for checkpointing in (False, True):
        network.zero_grad()
        if checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        model.denoiser(x_t, t, cond).square().mean().backward()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-5)


def network_of(path: Path) -> tuple[Any, torch.nn.Module]:
    """A plain diffusers pipeline, as a user loads it, and its denoiser.

    An SD3 without T5 is the one checkpoint that diffusers loads only when told what it lacks.
    """
    index = json.loads((path / "model_index.json").read_text())
    lacking: dict[str, Any] = {name: None for name, kind in index.items() if kind == [None, None]}
    pipe: Any = DiffusionPipeline.from_pretrained(path, **lacking)
    return pipe, pipe.components.get("unet", pipe.components.get("transformer"))


def assert_equal_weights(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    state = wanted.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, weight in found.state_dict().items():
        torch.testing.assert_close(weight, state[name], atol=1e-6, rtol=1e-5)


def test_what_is_saved_loads_everywhere_the_same(model: Model, tmp_path: Path) -> None:
    with torch.no_grad():
        for i, weight in enumerate(model.denoiser.network.parameters()):
            weight.mul_(1 + 0.1 * math.sin(i))
    model.save(tmp_path, model.denoiser.network, torch.float32)
    again, latents = load_sd(tmp_path), torch.randn(2, *model.latent_shape)
    assert (again.family, again.latent_shape) == (model.family, model.latent_shape)
    assert again.denoiser.schedule.target == model.denoiser.schedule.target
    torch.testing.assert_close(again.denoiser.schedule.sigmas, model.denoiser.schedule.sigmas)
    torch.testing.assert_close(ask(again, slice(0, 4)), ask(model, slice(0, 4)))
    with torch.no_grad():
        torch.testing.assert_close(again.decode(latents), model.decode(latents))
    assert_equal_weights(network_of(tmp_path)[1], model.denoiser.network)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adapters_load_in_a_plain_pipeline(case: tuple[str, int], tmp_path: Path) -> None:
    path = CHECKPOINTS[case[0]][case[1]]()
    model = load_sd(path)
    network = model.denoiser.network
    add_lora(network, LoraConfig(rank=2), model.lora_targets, seed=0)
    with torch.no_grad():
        for key, weight in network.named_parameters():
            if "lora_B" in key:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_lora(tmp_path, network)
    pipe, plain = network_of(path)
    before = {key: weight.clone() for key, weight in plain.state_dict().items()}
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_equal_weights(plain, merged(network))
    assert any(not torch.equal(weight, before[key]) for key, weight in plain.state_dict().items())


def test_all_networks_but_the_denoiser_make_room_and_come_back(model: Model) -> None:
    """Text encoders and VAE are of no use while the denoiser trains."""
    network = model.denoiser.network
    before = model.encode_prompts(PROMPTS[:2]).tensors["tokens"]
    model.move_rest(torch.device("cpu"))
    assert torch.equal(model.encode_prompts(PROMPTS[:2]).tensors["tokens"], before)
    model.move_rest(torch.device("meta"))
    assert not any(p.is_meta for p in network.parameters())
    with pytest.raises((NotImplementedError, RuntimeError)):
        model.encode_prompts(PROMPTS[:2]).tensors["tokens"].sum().item()
    with pytest.raises((NotImplementedError, RuntimeError)):
        model.decode(torch.zeros(1, *model.latent_shape)).sum().item()


def test_a_model_that_the_disk_cannot_hold_is_not_begun(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the bytes in half precision."""
    network = model.denoiser.network
    model.save(tmp_path / "full", network, torch.float32)
    size = sum(f.stat().st_size for f in (tmp_path / "full").rglob("*.safetensors"))
    little = shutil.disk_usage(tmp_path)._replace(free=int(0.8 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    with pytest.raises(UserError, match=r"the model needs .* GB but .* GB are free"):
        model.save(tmp_path / "none", network, torch.float32)
    assert not (tmp_path / "none").exists()
    model.save(tmp_path / "half", network, torch.float16)


def test_a_network_in_the_gpu_s_layout_is_saved_as_any_other(model: Model, tmp_path: Path) -> None:
    network = model.denoiser.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.save(tmp_path / "model", network, torch.float32)
    found = load_sd(tmp_path / "model").denoiser.network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.items())

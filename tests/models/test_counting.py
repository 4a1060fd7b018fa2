"""Counted figures against published and hand-worked ones; the table against a fresh count."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from toy import kept_checkpoint, load_sd
from toy_flow import kept_flow

from craftune.adapters import add_lora
from craftune.assumed import BACKWARD, RECOMPUTED, Figures
from craftune.config import LoraConfig, ModelConfig
from craftune.errors import UserError
from craftune.models import counting
from craftune.models.counting import configs, count, drawing, training
from craftune.models.figures import figures
from craftune.models.published import LORA_RANK, PUBLISHED, published
from craftune.training_costs import example_flops

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FLUX = "black-forest-labs/FLUX.1-dev"
FULL = LoraConfig()


def table(name: str, lora: LoraConfig = FULL, checkpointing: bool = False) -> Figures:
    found = published(name, lora, checkpointing)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "weights", "teraflops"),
    [
        (SD15, 859.5e6, 0.803),
        (SDXL, 2567.5e6, 6.761),
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2028.3e6, 8.904),
        (FLUX, 11901e6, 74.38),
    ],
)
def test_the_table_has_the_known_figures(name: str, weights: float, teraflops: float) -> None:
    found = table(name)
    assert found.parameters[found.denoiser] == pytest.approx(weights, rel=1e-4)
    assert found.forward_flops == pytest.approx(teraflops * 1e12, rel=1e-3)
    assert found.trained == found.parameters[found.denoiser]


def test_the_table_has_the_parts_that_draw() -> None:
    sd, xl, flux = table(SD15), table(SDXL), table(FLUX)
    assert (sd.side, xl.side, flux.side) == (512, 1024, 1024)
    assert (sd.latent_numbers, xl.latent_numbers) == (4 * 64 * 64, 4 * 128 * 128)
    assert sd.decode_flops == pytest.approx(2.515e12, rel=1e-3)
    assert xl.decode_flops == pytest.approx(10.47e12, rel=1e-3)
    assert sd.text_flops == pytest.approx(13.3e9, rel=1e-2)
    assert xl.text_flops == pytest.approx((13.3 + 97.9) * 1e9, rel=1e-2)
    assert flux.guidance_embedded
    assert not xl.guidance_embedded


def test_the_table_has_what_training_keeps() -> None:
    """GiB per image in 16 bit, as saved tensors were counted: 0.92 and 6.81, checkpointed less."""
    for name, kept, checkpointed in ((SD15, 0.92, 0.14), (SDXL, 6.81, 0.55)):
        assert table(name).kept_bytes / 2**30 == pytest.approx(kept, rel=0.07)
        found = table(name, checkpointing=True).kept_bytes / 2**30
        assert found == pytest.approx(checkpointed, rel=0.05)


def test_lora_grows_with_its_rank() -> None:
    assert table(SD15, LoraConfig(rank=16)).trained == pytest.approx(3.19e6, rel=1e-2)
    assert table(SDXL, LoraConfig(rank=16)).trained == pytest.approx(23.2e6, rel=1e-2)
    assert table(SDXL, LoraConfig(rank=64)).trained == 4 * table(SDXL, LoraConfig(rank=16)).trained
    assert published(SDXL, LoraConfig(rank=16, targets=("to_q",)), False) is None


def test_a_fresh_count_of_sd15_is_the_table() -> None:
    assert count(PUBLISHED[SD15], FULL, checkpointing=False) == table(SD15)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith(("stabilityai", "black"))])
def test_a_fresh_count_is_the_table(name: str) -> None:
    lora = LoraConfig(rank=LORA_RANK)
    assert count(PUBLISHED[name], FULL, checkpointing=True) == table(name, checkpointing=True)
    assert training(PUBLISHED[name], lora, False) == {
        "trained": table(name, lora).trained,
        "kept_bytes": table(name, lora).kept_bytes,
    }


def test_backward_costs_what_the_model_says() -> None:
    """Forward and backward of SD1.5's UNet on meta: three and three and three quarter forwards."""
    config = {k: v for k, v in PUBLISHED[SD15]["unet"].items() if k != "_class_name"}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        inputs = torch.empty(1, 4, 64, 64), torch.zeros(1), torch.empty(1, 77, 768)
    flops = {}
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with FlopCounterMode(display=False) as counter:
            unet(*inputs)[0].sum().backward()
        flops[checkpointing] = counter.get_total_flops()
    forward = table(SD15).forward_flops
    assert flops[False] / forward == pytest.approx(1 + BACKWARD, rel=0.01)
    assert flops[True] / forward == pytest.approx(1 + BACKWARD + RECOMPUTED["unet"], rel=0.01)


@pytest.fixture(scope="module")
def only_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint without its weights."""
    folder = tmp_path_factory.mktemp("configs")
    for path in kept_checkpoint().glob("*/config.json"):
        (folder / path.parent.name).mkdir()
        (folder / path.parent.name / "config.json").write_bytes(path.read_bytes())
    return folder


def test_a_folder_is_counted_from_its_configs_alone(only_configs: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(kept_checkpoint(), safety_checker=None)
    found = figures(ModelConfig(str(only_configs)), FULL, False)
    for name in ("unet", "vae", "text_encoder"):
        assert found.parameters[name] == sum(p.numel() for p in getattr(pipe, name).parameters())
    assert 0 < found.forward_bytes < found.kept_bytes


def test_a_folder_without_a_denoiser_is_named(only_configs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vae/config\.json: missing"):
        figures(ModelConfig(str(tmp_path)), FULL, False)
    parts = configs(only_configs)
    parts["unet"] |= {"_class_name": "KandinskyUNet"}
    with pytest.raises(UserError, match=r"'KandinskyUNet' cannot be counted"):
        drawing(parts)


@pytest.mark.parametrize("path", ["./nowhere", "model.safetensors", "/no/such/folder"])
def test_a_missing_checkpoint_is_named(path: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        figures(ModelConfig(path), FULL, False)


def test_an_unknown_hub_id_without_network_says_what_works() -> None:
    with pytest.raises(UserError, match=r"not counted in advance.*stable-diffusion-xl-base-1\.0"):
        figures(ModelConfig("nobody/nothing"), FULL, False)


def test_examples_cost_their_share() -> None:
    from craftune.config import TrainConfig

    found = table(SDXL)
    lora = TrainConfig(gradient_checkpointing=False, lora=LoraConfig(rank=16))
    assert (
        example_flops(TrainConfig(gradient_checkpointing=False), found) == 3 * found.forward_flops
    )
    assert example_flops(lora, found) == pytest.approx(14.19e12, rel=0.01)
    checkpointed = TrainConfig(gradient_checkpointing=True)
    assert example_flops(checkpointed, found) == pytest.approx(25.443e12, rel=0.01)
    assert example_flops(checkpointed, table(FLUX)) == pytest.approx(297.5e12, rel=0.01)


@pytest.mark.parametrize(("kind", "embedded"), [("flux-dev", True), ("flux-schnell", False)])
def test_flux_without_embedded_guidance_has_two_calls_unless_its_scale_is_1(
    kind: str, embedded: bool
) -> None:
    """schnell takes no scale but 1; a de-distilled dev has the same network and takes any."""
    found = drawing(configs(kept_flow(kind)))
    assert found.guidance_embedded == embedded


def test_t5_is_padded_as_the_family_pads_it() -> None:
    """FLUX.1-schnell's to 256, a dev's to 512; the scheduler tells a de-distilled dev."""
    seen = {}
    for kind in ("flux-dev", "flux-schnell"):
        model, parts = load_sd(kept_flow(kind)), configs(kept_flow(kind))
        seen[kind] = counting._t5_tokens(parts)
        assert seen[kind] == model.encode_prompts(["a"]).tensors["tokens"].shape[1]
    assert seen == {"flux-dev": 512, "flux-schnell": 256}
    parts = configs(kept_flow("flux-schnell"))
    assert "scheduler" in parts
    parts["scheduler"]["use_dynamic_shifting"] = True
    assert drawing(parts).forward_flops > drawing(configs(kept_flow("flux-schnell"))).forward_flops


def test_schnell_costs_less_than_dev() -> None:
    dev, schnell = table(FLUX), table("black-forest-labs/FLUX.1-schnell")
    assert not schnell.guidance_embedded
    # 4,096 patches and 256 tokens instead of 512. Attention goes with the square of their sum: two
    # products of 2 * 4608^2 * 3072 in each of 57 layers; all else is linear in it.
    less, attention = 4352 / 4608, 57 * 4 * 4608**2 * 3072
    expected = less * (dev.forward_flops - attention) + less**2 * attention
    assert schnell.forward_flops == pytest.approx(expected, rel=1e-3)
    assert schnell.kept_bytes < dev.kept_bytes


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_adapters_are_counted_where_the_family_puts_them(kind: str) -> None:
    lora = LoraConfig(rank=2)
    model = load_sd(kept_flow(kind))
    add_lora(model.denoiser.network, lora, model.lora_targets, 0)
    trained = sum(p.numel() for p in model.denoiser.network.parameters() if p.requires_grad)
    assert training(configs(kept_flow(kind)), lora, False)["trained"] == trained

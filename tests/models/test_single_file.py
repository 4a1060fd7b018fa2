"""One .safetensors file: loaded equal to its folder, or refused in one line that says the mend."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import call, tiny
from toy import SD15_SCHEDULER, edit_weights, kept_checkpoint, kept_folder, load_sd, write_json
from toy_ldm import single_file
from toy_xl import kept_xl

from craftune.config import ModelConfig
from craftune.errors import UserError
from craftune.exporting import ldm
from craftune.models import family_of, identity
from craftune.records import read_json

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROMPTS = ["two red dogs", ""]
XL_MARK = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
FLUX = "double_blocks.0.img_attn.norm.key_norm.scale"
FLUX_DEV = "guidance_in.in_layer.bias"
SD35 = "joint_blocks.37.x_block.mlp.fc1.weight"
"""Of each kind the weight by which diffusers tells it."""


@pytest.fixture(scope="module")
def file() -> Path:
    return single_file(kept_checkpoint(), kept_folder() / "sd.safetensors")


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """What a user without a network has: the folder without its weights."""
    drop = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(kept_checkpoint(), tmp_path / "settings", ignore=drop))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache: Path, name: str, folder: Path) -> None:
    """As huggingface_hub lays a download out."""
    entry = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, entry / "snapshots" / "0123abcd")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123abcd")


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_sd(path, **settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def assert_same_model(found: Any, wanted: Any) -> None:
    x_t, t = torch.randn(2, *wanted.latent_shape), torch.tensor([10, 900])
    cond = wanted.encode_prompts(PROMPTS)
    torch.testing.assert_close(found.encode_prompts(PROMPTS).tensors, cond.tensors)
    with torch.no_grad():
        torch.testing.assert_close(found.denoiser(x_t, t, cond), wanted.denoiser(x_t, t, cond))
        torch.testing.assert_close(found.decode(x_t), wanted.decode(x_t))
        images = torch.rand(2, 3, 16, 16)
        encoded = found.encode_images(images)
        torch.testing.assert_close(encoded.mean, wanted.encode_images(images).mean)


# --- what is loaded --------------------------------------------------------------------------


def test_a_file_is_its_folder(file: Path, settings: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(file), config=str(settings))
    assert family_of(config) == "sd"
    model = load_sd(file, config=str(settings))
    wanted = load_sd(kept_checkpoint())
    assert_same_model(model, wanted)
    model.save(tmp_path / "saved", model.denoiser.network, torch.float32)
    assert_same_model(load_sd(tmp_path / "saved"), wanted)


def test_an_sdxl_file_is_its_folder(tmp_path: Path) -> None:
    """By a layer that the toy has not got, and diffusers ignores, it is told from others."""
    folder, path = kept_xl(), tmp_path / "xl.safetensors"
    weights = {XL_MARK: torch.zeros(1)}
    for part, write in (("unet", ldm.unet_weights), ("vae", ldm.vae_weights)):
        stored = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        weights |= write(stored, read_json(folder / part / "config.json"))
    weights |= ldm.clip_weights(load_file(folder / "text_encoder" / "model.safetensors"), "sdxl")
    weights |= ldm.open_clip_weights(load_file(folder / "text_encoder_2" / "model.safetensors"))
    save_file(weights, path)
    config = ModelConfig(path=str(path), config=str(folder))
    assert family_of(config) == "sdxl"
    assert_same_model(load_sd(path, config=str(folder)), load_sd(folder))


@pytest.mark.parametrize(
    ("kind", "weights", "hub"),
    [
        ("flux-schnell", {FLUX: (128,)}, "black-forest-labs/FLUX.1-schnell"),
        ("flux-dev", {FLUX: (128,), FLUX_DEV: (8,), "img_in.weight": (8, 64)}, "FLUX.1-dev"),
        ("sd35_large", {SD35: (2,)}, "stabilityai/stable-diffusion-3.5-large"),
    ],
)
def test_files_of_flow_models_are_refused_with_what_to_give(
    tmp_path: Path, kind: str, weights: dict[str, tuple[int, ...]], hub: str
) -> None:
    path = tmp_path / "flow.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in weights.items()}, path)
    message = refusal(path)
    assert f"kind {kind!r} is not read; set model.path to a diffusers folder" in message
    assert hub in message
    assert "Transformer2DModel.from_single_file(FILE).save_pretrained" in message


def test_configs_come_from_the_hub_s_cache(file: Path, settings: Path, empty_cache: Path) -> None:
    """Those of the repository that diffusers names, or of the one in the recipe."""
    assert "HF_HUB_OFFLINE" in refusal(file)
    put_in_cache(empty_cache, SD15, settings)
    assert_same_model(load_sd(file), load_sd(kept_checkpoint()))
    write_json(
        settings / "scheduler/scheduler_config.json",
        SD15_SCHEDULER | {"prediction_type": "v_prediction"},
    )
    put_in_cache(empty_cache, "some/v-model", settings)
    assert load_sd(file, config="some/v-model").denoiser.schedule.target == "v"


def test_the_identity_is_of_weights_and_configs(file: Path, settings: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(file), config=str(settings))
    first = identity(config)
    assert first == identity(config)
    (settings / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    second = identity(config)
    assert first["files"]["weights"] == second["files"]["weights"]
    assert first != second
    other = Path(shutil.copy(file, tmp_path / "other.safetensors"))
    edit_weights(other, "model.diffusion_model.out.2.bias", torch.ones(4))
    assert identity(ModelConfig(path=str(other), config=str(settings))) != second


# --- what is refused -------------------------------------------------------------------------


def test_offline_the_error_says_what_is_needed(file: Path, empty_cache: Path) -> None:
    message = refusal(file)
    assert SD15 in message
    assert str(empty_cache) in message
    assert "set model.config to a diffusers folder" in message


def test_the_command_line_says_it_before_anything_loads(file: Path, tmp_path: Path) -> None:
    job, short = tiny(tmp_path), tmp_path / "short.safetensors"
    short.write_bytes(file.read_bytes()[:1000])
    for path, said in (
        (short, "not a whole .safetensors file"),
        (tmp_path / "none.safetensors", "no such file"),
        (tmp_path / "model.ckpt", "a pickle can run code"),
    ):
        answer = call(["check", job.recipe, "--set", f"model.path={path}"], tmp_path)
        assert said in answer.complaint


def test_configs_that_are_not_there(file: Path, tmp_path: Path) -> None:
    message = refusal(file, config=str(tmp_path / "nowhere"))
    assert message.startswith(f"model.config '{tmp_path}/nowhere': no such folder")


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_pickle_is_never_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n")
    assert "a pickle can run code" in refusal(path)


def test_a_truncated_file(file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.safetensors"
    for size in (4, 200, file.stat().st_size - 100):
        short.write_bytes(file.read_bytes()[:size])
        assert f"{short}: not a whole .safetensors file" in refusal(short)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.middle_block.1.norm.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_missing_weight_and_one_that_is_not_finite(
    file: Path, settings: Path, tmp_path: Path, name: str
) -> None:
    bad = Path(shutil.copy(file, tmp_path / "bad.safetensors"))
    edit_weights(bad, name, torch.full_like(_tensor(file, name), torch.nan))
    assert "is not finite; the checkpoint is damaged" in refusal(bad, config=str(settings))
    edit_weights(bad, name, None)
    message = refusal(bad, config=str(settings))
    assert str(bad) in message
    assert re.search("lacks (a|the) weight", message)


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, lora)
    assert "give a whole checkpoint, not a LoRA" in refusal(lora)


def test_a_file_of_another_family(file: Path, settings: Path) -> None:
    message = refusal(file, config=str(settings), family="sdxl")
    assert "model.family 'sdxl'" in message
    assert "is of family 'sd'" in message


def test_an_inpainting_file_is_of_no_known_family(tmp_path: Path) -> None:
    path = tmp_path / "inpainting.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}, path)
    assert "kind 'inpainting' is of no known family" in refusal(path)


def test_stable_diffusion_2_must_say_what_it_predicts(tmp_path: Path) -> None:
    """Its files for epsilon and for v have the same keys."""
    path = tmp_path / "v2.safetensors"
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: torch.zeros(8, 1024)}, path)
    message = refusal(path)
    assert "does not say what it predicts; set model.config" in message
    assert "stable-diffusion-2-1-base" in message


@pytest.mark.parametrize(
    ("mark", "setting"),
    [("v_pred", {"prediction_type": "v_prediction"}), ("ztsnr", {"rescale_betas_zero_snr": True})],
)
def test_a_file_marked_v_prediction_needs_such_a_scheduler(
    settings: Path, tmp_path: Path, mark: str, setting: dict[str, Any]
) -> None:
    path = single_file(kept_checkpoint(), tmp_path / "marked.safetensors", [mark])
    message = refusal(path, config=str(settings))
    assert f"is marked {mark!r}" in message
    scheduler = SD15_SCHEDULER | {"prediction_type": "v_prediction"} | setting
    write_json(settings / "scheduler/scheduler_config.json", scheduler)
    assert load_sd(path, config=str(settings)).denoiser.schedule.target == "v"

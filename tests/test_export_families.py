"""Every family's adapters and whole model, in each format that the family has."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Tiny, call, tiny
from toy import random_checkpoint
from toy_flow import flow_checkpoint
from toy_xl import random_xl

from craftune.errors import UserError
from craftune.exporting import export, ldm
from craftune.exporting.trained import read_lora
from craftune.records import read_json


def trained(folder: Path, base: Path, *more: str) -> Tiny:
    """A tiny run with LoRA up to its training, visibly changed."""
    job = tiny(folder)
    settings = [
        f"model.path={base}",
        "train.lora={rank=2, alpha=6}",
        "train.learning_rate=0.03",
        "train.warmup_steps=0",
        *more,
    ]
    for stage in ("prompts", "refine", "generate", "score", "select", "train"):
        answer = call([stage, job.recipe, *(a for s in settings for a in ("--set", s))], folder)
        assert answer.status == 0, answer.err
    return job


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("xl")
    return trained(folder, random_xl(folder / "base"), "generate.guidance_scale=3.0")


@pytest.mark.parametrize("to", ["diffusers", "lora", "kohya", "single-file"])
def test_sdxl_is_exported(to: str, xl: Tiny, tmp_path: Path) -> None:
    out, check = export(xl.run, to, tmp_path / "made")
    assert check.difference <= 1e-6
    assert check.change > 0.01
    card = (out / "README.md").read_text()
    assert "StableDiffusionXLPipeline" in card
    assert "This run has not been evaluated." in card
    if to == "kohya":
        weights, metadata = read_lora(out / "tiny.safetensors")
        assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.alpha" in weights
        assert not any("down_blocks" in name or "up_blocks" in name for name in weights)
        assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    if to == "single-file":
        weights = load_file(out / "tiny.safetensors")
        assert "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias" in weights
        assert {weight.dtype for weight in weights.values()} == {torch.float16}


@pytest.mark.parametrize(("kind", "spec"), [("sd3", "stable-diffusion-3"), ("flux-dev", "flux-1-")])
def test_flow_families_are_exported(kind: str, spec: str, tmp_path: Path) -> None:
    run = trained(tmp_path, flow_checkpoint(tmp_path / "base", kind)).run
    for to in ("diffusers", "lora"):
        out, check = export(run, to)
        assert check.difference <= 1e-5
        assert check.change > 0.01
    _, metadata = read_lora(out / "pytorch_lora_weights.safetensors")
    assert metadata["modelspec.architecture"].startswith(spec)
    assert metadata["modelspec.architecture"].endswith("/lora")
    for to, said in (("kohya", "use --to lora"), ("single-file", "use --to diffusers")):
        with pytest.raises(UserError, match=said):
            export(run, to)


def test_a_base_that_is_one_file(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "base")
    weights: dict[str, torch.Tensor] = {}
    for name, write in (("unet", ldm.unet_weights), ("vae", ldm.vae_weights)):
        part = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        weights |= write(part, read_json(folder / name / "config.json"))
    weights |= ldm.clip_weights(load_file(folder / "text_encoder" / "model.safetensors"), "sd")
    save_file(weights, tmp_path / "one.safetensors")
    run = trained(tmp_path / "run", tmp_path / "one.safetensors", f"model.config={folder}").run
    for to in ("diffusers", "kohya"):
        out, check = export(run, to)
        assert check.difference <= 1e-6
        assert check.change > 0.01
    assert '.from_single_file("one.safetensors"' in (out / "README.md").read_text()
    assert (run / "export" / "diffusers" / "tokenizer" / "vocab.json").is_file()

"""`craftune mix`: the sum worked out by hand, loaded as others load it; what cannot be mixed."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import Answer, call
from toy import edit_weights, kept_checkpoint, load_sd, random_checkpoint
from toy_xl import kept_xl

from craftune import models
from craftune.adapters import add_lora, merged
from craftune.config import LoraConfig, ModelConfig
from craftune.records import read_json
from craftune.seeds import stream

BASE = kept_checkpoint()


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Two adapters, alpha twice the rank in one of them; the weights with each added in."""
    found, model = [], load_sd(BASE)
    for seed, alpha in ((1, 2), (2, 4)):
        network = copy.deepcopy(model.denoiser.network)
        add_lora(network, LoraConfig(rank=2, alpha=alpha), model.lora_targets, seed)
        with torch.no_grad():
            for i, weight in enumerate(p for p in network.parameters() if p.requires_grad):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=stream("lora", seed, i)))
        folder = tmp_path_factory.mktemp("lora")
        model.save_lora(folder, network)
        found.append((folder, merged(network).state_dict()))
    return found


def unet(folder: Path) -> dict[str, torch.Tensor]:
    """As diffusers loads it."""
    return StableDiffusionPipeline.from_pretrained(folder).unet.state_dict()


def mix(where: Path, *arguments: object) -> Answer:
    return call(["mix", *arguments, "--out", "made"], where)


def test_two_adapters_are_the_sum_by_hand(
    loras: list[tuple[Path, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    (one, first), (two, second) = loras
    file = two / "pytorch_lora_weights.safetensors"
    answer = mix(tmp_path, BASE, f"{one}=0.5", f"{file}=-0.25")
    assert answer.status == 0, answer.err
    base, found = unet(BASE), unet(tmp_path / "made")
    for name, weight in base.items():
        wanted = weight + 0.5 * (first[name] - weight) - 0.25 * (second[name] - weight)
        torch.testing.assert_close(found[name], wanted, atol=2e-6, rtol=1e-5)
    assert any(not torch.equal(found[name], weight) for name, weight in base.items())
    assert 'from_pretrained("made")' in answer.out
    assert read_json(tmp_path / "made" / "mix.json")["mixed"] == [
        {"model": str(one), "scale": 0.5},
        {"model": str(file), "scale": -0.25},
    ]
    pipe, start = (StableDiffusionPipeline.from_pretrained(x) for x in (tmp_path / "made", BASE))
    for part in ("vae", "text_encoder"):
        kept = getattr(start, part).state_dict()
        assert all(torch.equal(w, kept[k]) for k, w in getattr(pipe, part).state_dict().items())


@pytest.mark.parametrize(("scale", "seed"), [(0, 0), (1, 1)])
def test_the_ends_are_base_and_tuned_bit_for_bit(tmp_path: Path, scale: int, seed: int) -> None:
    other = random_checkpoint(tmp_path / "other", seed=1)
    assert mix(tmp_path, BASE, f"{other}={scale}").status == 0
    found, wanted = unet(tmp_path / "made"), unet(other if seed else BASE)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_the_dtype_is_the_base_s_or_the_one_asked_for(tmp_path: Path) -> None:
    other, half = (random_checkpoint(tmp_path / x, seed=1, dtype=torch.float16) for x in "ab")
    for arguments, wanted in (((), torch.float16), (("--dtype", "float32"), torch.float32)):
        assert mix(tmp_path, half, f"{other}=0.5", *arguments).status == 0
        weights = load_file(tmp_path / "made" / "unet" / "diffusion_pytorch_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {wanted}
        shutil.rmtree(tmp_path / "made")


def trained_run(folder: Path, start: str) -> Path:
    """What `mix` reads of a run whose weights were all trained."""
    run = folder / "run"
    random_checkpoint(run / "6-train" / "model", seed=3)
    (run / "run.json").write_text("{}")
    record = {key: {} for key in ("code", "inputs", "outputs", "counts")}
    config = {"model": {"path": "elsewhere", "path_sha256": start}}
    done = record | {"stage": "train", "seconds": 1.0, "config": config}
    (run / "6-train" / "done.json").write_text(json.dumps(done))
    return run


def test_a_run_takes_part_where_it_was_tuned_from_the_base(tmp_path: Path) -> None:
    run = trained_run(tmp_path, models.weights_sha256(ModelConfig(str(BASE))))
    assert mix(tmp_path, BASE, f"{run}=0.5").status == 0
    found, base, tuned = (unet(x) for x in (tmp_path / "made", BASE, run / "6-train" / "model"))
    for name, weight in found.items():
        torch.testing.assert_close(weight, (base[name] + tuned[name]) / 2)
    shutil.rmtree(tmp_path / "made")
    (run / "6-train" / "stitch.json").write_text("{}")
    assert "P-GRAFT run tunes the noisy part" in mix(tmp_path, BASE, f"{run}=0.5").complaint


def test_what_cannot_be_mixed_is_said_in_one_line(
    loras: list[tuple[Path, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    run = trained_run(tmp_path, "0" * 64)
    lacking = random_checkpoint(tmp_path / "lacking", seed=1)
    edit_weights(lacking / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.bias", None)
    adapted = tmp_path / "both.safetensors"
    save_file({"text_encoder.q.lora_A.weight": torch.zeros(1)}, adapted)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"unet.nowhere.lora_A.weight": torch.ones(2, 4)}, foreign)
    for given, message in (
        (f"{run}=0.5", "was tuned from elsewhere, whose weights are not those of"),
        (f"{kept_xl()}=0.5", "of family 'sdxl', but"),
        (f"{lacking}=0.5", "lacking: unet: lacks the weight 'conv_in.bias'"),
        (f"{adapted}=0.5", "also adapts a text encoder"),
        (f"{foreign}=0.5", "foreign.safetensors"),
        (f"{tmp_path}/none.safetensors=0.5", "none.safetensors: no such file"),
        (f"{tmp_path}/none=0.5", "no such folder"),
        (f"{loras[0][0]}", "expected MODEL=SCALE"),
        (f"{loras[0][0]}=half", "expected MODEL=SCALE"),
        (f"{loras[0][0]}=nan", "expected MODEL=SCALE"),
    ):
        assert message in mix(tmp_path, BASE, given).complaint, given
        assert not list(tmp_path.glob("made*"))
    assert "does not load as a LoRA" in mix(tmp_path, kept_xl(), f"{loras[0][0]}=1").complaint
    (tmp_path / "made").mkdir()
    assert "exists; choose another" in mix(tmp_path, BASE, f"{loras[0][0]}=1").complaint

"""What is fetched from the hub, and what is said where it cannot be."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from toy import kept_checkpoint, load_sd, write_json

from craftune.config import ModelConfig
from craftune.errors import UserError
from craftune.models import checkpoint, family_of
from craftune.models.files import stored_dtype

NAME = "some/model"
PUBLISHED = """
README.md model_index.json v1-5-pruned.ckpt v1-5-pruned.safetensors pipeline.py
scheduler/scheduler_config.json tokenizer/vocab.json tokenizer/merges.txt tokenizer/spiece.model
text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
text_encoder/pytorch_model.bin unet/code.py
unet/config.json unet/diffusion_pytorch_model-00001-of-00002.safetensors
unet/diffusion_pytorch_model-00002-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.json
unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors
unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.bin
vae/config.json vae/diffusion_pytorch_model.safetensors
"""
"""A repository with everything that published ones have in them."""
HUB = PUBLISHED.split()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub of one repository; downloads land in the folder that is returned."""
    cache = tmp_path / "cache"

    def snapshot_download(
        name: str, *, revision: str | None, allow_patterns: Any, ignore_patterns: Any
    ) -> str:
        assert (name, revision) == (NAME, "v2")
        kept = filter_repo_objects(
            HUB, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for path in kept:
            write_json(cache / path, {})
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return cache


def fetched(hub: Path, variant: str | None) -> set[str]:
    config = ModelConfig(path=NAME, revision="v2", variant=variant)
    assert checkpoint(config) == hub
    return {str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()}


def test_data_alone_is_fetched_and_one_set_of_weights(hub: Path) -> None:
    found = fetched(hub, None)
    weights = {path for path in found if path.endswith(".safetensors")}
    assert weights == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    kinds = {".json", ".txt", ".model", ".safetensors"}
    assert {path for path in HUB if Path(path).suffix in kinds - {".safetensors"}} <= found
    assert {Path(path).suffix for path in found} == kinds


def test_a_variant_is_fetched_where_a_part_has_it(hub: Path) -> None:
    weights = set(fnmatch.filter(fetched(hub, "fp16"), "*.safetensors"))
    assert weights == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_a_hub_id_loads_from_the_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the revision counts."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    entry = tmp_path / "models--some--model"
    shutil.copytree(kept_checkpoint(), entry / "snapshots" / "0123abcd")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123abcd")
    assert load_sd(Path(NAME)).family == "sd"
    with pytest.raises(UserError) as caught:
        load_sd(Path(NAME), revision="v9")
    assert f"model.path {NAME!r}: no such folder here" in str(caught.value)
    assert f"it is not in {tmp_path} and HF_HUB_OFFLINE is set" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["my_unet", "MyUNet"]}
    write_json(tmp_path / "model_index.json", index)
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match="'unet' needs code from 'my_unet', which is never run"):
        family_of(ModelConfig(path=str(tmp_path)))
    write_json(tmp_path / "model_index.json", {"_class_name": ["my_pipeline", "MyPipeline"]})
    with pytest.raises(UserError, match="needs code from 'my_pipeline', which is never run"):
        family_of(ModelConfig(path=str(tmp_path)))


def test_configs_are_for_single_files() -> None:
    config = ModelConfig(path=str(kept_checkpoint()), config="some/model")
    with pytest.raises(UserError, match=r"model.config 'some/model': only a single .safetensors"):
        checkpoint(config)


def test_a_variant_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no file of model.variant 'fp16' is there"):
        load_sd(kept_checkpoint(), variant="fp16")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("float16", "float16"), "float16"),
        (("float16", "bfloat16"), "float32"),
        (("float32", "bfloat16"), "float32"),
    ],
)
def test_the_dtype_that_rounds_nothing(
    tmp_path: Path, parts: tuple[str, str], expected: str
) -> None:
    """Counters of positions, which old text encoders store, are no weights."""
    for name, dtype in zip(("unet", "vae"), parts, strict=True):
        (tmp_path / name).mkdir()
        weights = {"a": torch.ones(2, dtype=getattr(torch, dtype)), "ids": torch.arange(3)}
        save_file(weights, tmp_path / name / "model.safetensors")
    assert stored_dtype(tmp_path) == expected
    assert stored_dtype(tmp_path / "vae" / "model.safetensors") == parts[1]
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"vae/model.safetensors: not a whole file"):
        stored_dtype(tmp_path)

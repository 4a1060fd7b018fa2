"""Exports: each is loaded as others load it, and draws what the trained model draws."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from tiny import Tiny, call, files, tiny
from toy import random_checkpoint

from craftune.cli import DTYPES, EXPORTS
from craftune.errors import UserError
from craftune.exporting import NOISE, VISIBLE, Check, export, formats, limit_of
from craftune.exporting.hub import push
from craftune.exporting.trained import Trained, read_lora, read_trained
from craftune.models import foreign
from craftune.records import read_json, write_json

LORA = "train.lora={rank=4, alpha=8}"
VISIBLY = ["train.learning_rate=0.03", "train.warmup_steps=0", "generate.guidance_scale=3.0"]


def trained(folder: Path, *settings: str, **checkpoint: Any) -> Tiny:
    """A tiny run up to its report, on a checkpoint of its own."""
    base = random_checkpoint(folder / "base", **checkpoint)
    job = tiny(folder)
    chosen = [f"model.path={base}", *VISIBLY, *settings]
    answer = call(["run", job.recipe, *(a for s in chosen for a in ("--set", s))], folder)
    assert answer.status == 0, answer.err
    return job


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """All weights trained."""
    return trained(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """LoRA trained, alpha twice the rank."""
    return trained(tmp_path_factory.mktemp("adapted"), LORA)


@pytest.fixture(scope="module")
def made(adapted: Tiny) -> Callable[[str], tuple[Path, Check]]:
    """A format's export of the adapters' run, made once; for looking at only."""
    return functools.cache(lambda to: export(adapted.run, to))


def test_the_command_line_knows_every_format() -> None:
    assert list(EXPORTS) == list(formats.FORMATS)
    assert all(hasattr(torch, name) for name in DTYPES)


@pytest.mark.parametrize("to", formats.FORMATS)
def test_an_export_draws_what_the_trained_model_draws(
    to: str, made: Callable[[str], tuple[Path, Check]]
) -> None:
    out, check = made(to)
    assert check.difference <= 1e-6
    assert check.change > 0.01
    assert check.limit < check.change / 9
    assert read_json(out / "export.json")["check"]["difference"] == check.difference
    assert not list(out.parent.glob("*.partial"))


@pytest.mark.parametrize("to", ["diffusers"])
def test_a_fully_tuned_model_is_exported_whole(to: str, whole: Tiny, tmp_path: Path) -> None:
    _, check = export(whole.run, to, tmp_path / "made")
    assert check.difference == 0
    assert check.change > 0.01


@pytest.mark.parametrize("to", ["lora", "kohya"])
def test_full_weights_are_no_lora(to: str, whole: Tiny, tmp_path: Path) -> None:
    answer = call(["export", whole.run, "--to", to, "--out", "made"], tmp_path)
    assert "rank = 0" in answer.complaint
    assert "--to diffusers" in answer.complaint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "dtype"), [("diffusers", "float32"), ("kohya", "float16"), ("single-file", "bfloat16")]
)
def test_weights_are_of_the_dtype_asked_for(
    to: str, dtype: str, adapted: Tiny, tmp_path: Path
) -> None:
    out, check = export(adapted.run, to, tmp_path / "made", dtype)
    stored = {w.dtype for f in out.rglob("*.safetensors") for w in load_file(f).values()}
    assert stored == {getattr(torch, dtype)}
    assert check.difference <= check.limit


def test_by_default_a_model_has_the_dtype_the_run_saved(whole: Tiny, tmp_path: Path) -> None:
    out, _ = export(whole.run, "single-file", tmp_path / "made")
    assert {w.dtype for w in load_file(out / "tiny.safetensors").values()} == {torch.float16}


def test_a_diffusers_folder_has_what_older_transformers_read(whole: Tiny, tmp_path: Path) -> None:
    """Before 5.6: text_model.* in CLIP; before 5: vocab.json and merges.txt."""
    out, _ = export(whole.run, "diffusers", tmp_path / "made")
    weights = load_file(out / "text_encoder" / "model.safetensors")
    assert "text_model.embeddings.token_embedding.weight" in weights
    assert all(name.startswith("text_model.") for name in weights)
    assert (out / "tokenizer" / "merges.txt").read_text().startswith("#version")
    assert "<|endoftext|>" in read_json(out / "tokenizer" / "vocab.json")
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert not any("_name_or_path" in read_json(f) for f in out.rglob("*.json"))
    assert not any(str(whole.folder) in f.read_text() for f in out.rglob("*.json"))
    kept = pipe.text_encoder.state_dict()
    before = load_file(whole.stage("train") / "model" / "text_encoder" / "model.safetensors")
    assert all(torch.equal(kept[name], weight.float()) for name, weight in before.items())


def test_kohya_names_alphas_and_metadata(made: Callable[[str], tuple[Path, Check]]) -> None:
    out, _ = made("kohya")
    weights, metadata = read_lora(out / "tiny.safetensors")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0"
    assert weights[f"{name}.lora_down.weight"].shape == (4, 8)
    assert weights[f"{name}.lora_up.weight"].shape == (8, 4)
    assert weights[f"{name}.alpha"].item() == 8
    modules = {key.partition(".")[0] for key in weights}
    assert len(weights) == 3 * len(modules) == 3 * 4 * 8  # 4 matrices in each of 8 attentions
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8.0")
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.resolution"] == "16x16"
    assert metadata["modelspec.prediction_type"] == "epsilon"


def test_lora_keeps_the_adapters_and_their_settings(
    adapted: Tiny, made: Callable[[str], tuple[Path, Check]]
) -> None:
    out, _ = made("lora")
    weights, metadata = read_lora(out / "pytorch_lora_weights.safetensors")
    before, _ = read_lora(read_trained(adapted.run).lora)
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 8
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"


# --- an export that is not the model ---------------------------------------------------------


def scaled(form: formats.Format, factor: float) -> formats.Format:
    """The format with a mistake: every `lora_up` is `factor` times what it should be."""

    def write(run: Any, dtype: torch.dtype, out: Path) -> None:
        form.write(run, dtype, out)
        (file,) = out.glob("*.safetensors")
        weights, metadata = read_lora(file)
        wrong = {k: w * factor if ".lora_up." in k else w for k, w in weights.items()}
        save_file(wrong, file, metadata)

    return dataclasses.replace(form, write=write)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, float("nan")])
def test_a_mismatch_is_an_error_that_says_by_how_much(
    factor: float, adapted: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(formats.FORMATS, "kohya", scaled(formats.FORMATS["kohya"], factor))
    answer = call(["export", adapted.run, "--to", "kohya", "--out", tmp_path / "made"], tmp_path)
    assert "does not draw what the trained model draws" in answer.complaint
    assert "differ by 0." in answer.complaint or "differ by nan" in answer.complaint
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_does_not_load_is_an_error(
    adapted: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = dataclasses.replace(
        formats.FORMATS["lora"], write=lambda run, dtype, out: (out / "a.safetensors").touch()
    )
    monkeypatch.setitem(formats.FORMATS, "lora", broken)
    with pytest.raises(UserError, match="does not load with load_lora_weights"):
        export(adapted.run, "lora", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_the_limit_is_far_below_what_training_changed() -> None:
    assert limit_of(0.04) == VISIBLE
    assert limit_of(0.002) == pytest.approx(0.0002)
    assert limit_of(0.0) == NOISE


def test_pictures_are_compared_at_one_precision(adapted: Tiny) -> None:
    """The trained model was saved in half precision: so is what it is compared with."""
    run = read_trained(adapted.run)
    both = [
        foreign.draw(
            pipe,
            ["a red dog"],
            num_steps=2,
            guidance_scale=3.0,
            rounded_to=torch.float16,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for pipe in (
            foreign.open_folder(run.model),
            foreign.with_lora(formats.open_base(run), run.lora),
        )
    ]
    assert torch.equal(*both)


# --- what cannot be exported -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("scheduler/scheduler_config.json", "beta_end", 0.02),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True),
        ("vae/config.json", "scaling_factor", 0.5),
        ("vae/config.json", "_class_name", "AutoencoderTiny"),
        ("unet/config.json", "use_linear_projection", True),
    ],
)
def test_a_single_file_holds_only_what_its_readers_assume(
    file: str, key: str, value: Any, adapted: Tiny, tmp_path: Path
) -> None:
    run = shutil.copytree(adapted.run, tmp_path / "run")
    path = run / "6-train" / "model" / file
    write_json(path, read_json(path) | {key: value})
    complaint = call(["export", run, "--to", "single-file", "--out", "made"], tmp_path).complaint
    assert "--to diffusers" in complaint
    assert key in complaint or "SD1.x" in complaint or str(value) in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_in_several_files_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    write_json(tmp_path / "unet" / "config.json", {"sample_size": 8})
    shards = {"1": {"a": torch.ones(2)}, "2": {"b": torch.zeros(3)}}
    for number, weights in shards.items():
        save_file(weights, tmp_path / "unet" / f"diffusion-0000{number}-of-00002.safetensors")
    found, config = Trained.part(cast(Trained, SimpleNamespace(model=tmp_path)), "unet")
    assert {name: tuple(weight.shape) for name, weight in found.items()} == {"a": (2,), "b": (3,)}
    assert config == {"sample_size": 8}


def test_what_is_no_run_is_named(whole: Tiny, tmp_path: Path) -> None:
    assert "not a run folder" in call(["export", tmp_path, "--to", "lora"], tmp_path).complaint
    write_json(tmp_path / "run.json", read_json(whole.run / "run.json"))
    assert "'train' has not run" in call(["export", tmp_path, "--to", "lora"], tmp_path).complaint


def test_the_same_export_is_taken_and_another_refused(adapted: Tiny, tmp_path: Path) -> None:
    out, check = export(adapted.run, "lora", tmp_path / "made")
    before = files(out)
    assert export(adapted.run, "lora", out) == (out, check)
    assert files(out) == before
    for to, dtype in (("lora", "float16"), ("kohya", None)):
        with pytest.raises(UserError, match="is not this export"):
            export(adapted.run, to, out, dtype)
    assert files(out) == before


# --- the model card ---------------------------------------------------------------------------


def test_the_card_says_what_it_is(adapted: Tiny, made: Callable[[str], tuple[Path, Check]]) -> None:
    out, check = made("lora")
    card = ModelCard.load(out / "README.md")
    header = card.data.to_dict()
    assert header["license"] == "other"
    assert header["library_name"] == "diffusers"
    assert header["pipeline_tag"] == "text-to-image"
    assert {"lora", "craftune"} <= set(header["tags"])
    assert "base_model" not in header  # a local folder is no name of the hub
    text = card.text
    report = read_json(adapted.stage("report") / "report.json")
    assert report["conclusion"] in text
    for name, identity in report["identities"].items():
        assert f"`{name}`" in text
        assert identity["sha256"][:12] in text
    assert "| candidates drawn | 24 |" in text
    assert "train.learning_rate = 0.03" in text
    assert f"{check.change:.2g}" in text
    assert "rank 4, alpha 8" in text
    assert str(adapted.folder) not in text  # nothing of the machine it was made on
    assert text.count("| improved |") + text.count("| worse |") + text.count(
        "| no clear change |"
    ) == 1 + len(report["rewards"])


def test_the_base_gives_its_licence(whole: Tiny) -> None:
    header = "---\nlicense: creativeml-openrail-m\n---\n# A model\n"
    (whole.folder / "base" / "README.md").write_text(header)
    out, _ = export(whole.run, "single-file")
    assert out == whole.run / "export" / "single-file"
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["license"] == "creativeml-openrail-m"
    assert "`creativeml-openrail-m`, as its own card says" in card.text


# --- the hub ----------------------------------------------------------------------------------


class Hub:
    """Stands in for the hub."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.error = error

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> None:
        self.calls.append(("create", (repo_id, exist_ok)))
        if self.error:
            raise self.error

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert commit_message
        self.calls.append(("upload", (repo_id, folder_path)))


def test_an_upload_is_one_commit_of_the_whole_folder(tmp_path: Path) -> None:
    hub = Hub()
    assert push(tmp_path, "me/model", hub) == "https://huggingface.co/me/model"
    assert hub.calls == [("create", ("me/model", True)), ("upload", ("me/model", tmp_path))]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OfflineModeIsEnabled("offline mode is enabled"), "offline mode is enabled"),
        (LocalTokenNotFoundError("no token\nmore"), "hf auth login"),
        (ConnectionError("no route"), "no route"),
        (OSError(), "OSError"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error: Exception, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        push(tmp_path, "me/model", Hub(error))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_the_export_stays_and_the_same_command_goes_on(
    adapted: Tiny, tmp_path: Path
) -> None:
    """conftest sets HF_HUB_OFFLINE; the second call finds the export."""
    command = ["export", adapted.run, "--to", "lora", "--push-to-hub", "me/model"]
    for _ in range(2):
        answer = call(command, tmp_path)
        assert "--push-to-hub 'me/model': the hub did not take it" in answer.complaint
        assert (adapted.run / "export" / "lora" / "export.json").is_file()
    bad = call([*command[:-1], "not a name/of/it"], tmp_path)
    assert "not a name of the hub" in bad.complaint


def test_nothing_is_uploaded_unasked(
    adapted: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> str:
        raise AssertionError

    monkeypatch.setattr("craftune.exporting.hub.push", never)
    answer = call(["export", adapted.run, "--to", "lora"], tmp_path)
    assert answer.status == 0, answer.err
    assert answer.out.splitlines()[0] == str(adapted.run / "export" / "lora")
    assert "differ from the trained model's by" in answer.out

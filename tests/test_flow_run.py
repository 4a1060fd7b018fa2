"""The whole pipeline by its command line on SD3 and FLUX.1, and what is theirs in its stages."""

import contextlib
import functools
import html
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny import Tiny, call, tiny
from toy import load_sd
from toy_flow import kept_flow

from craftune.config import LoraConfig, TrainConfig
from craftune.exporting import export
from craftune.methods.sft import SFT
from craftune.records import read_json, read_table
from craftune.stages.train import ExampleFeed, example_feed, load_examples, train
from craftune.types import Model

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(folder: Path, kind: str, *overrides: str) -> Tiny:
    made = tiny(folder)
    settings = [f"model.path={kept_flow(kind)}", *overrides]
    answer = call(["run", made.recipe, *(a for s in settings for a in ("--set", s))], made.folder)
    assert answer.status == 0, answer.err
    (folder / "stdout").write_text(answer.out)
    return made


@pytest.mark.parametrize("training", ["train.lora.rank=0", "train.lora.rank=2"])
@pytest.mark.parametrize(("kind", "scale"), [("sd3", 2.0), ("flux-dev", 3.5)])
def test_a_whole_run(tmp_path: Path, kind: str, scale: float, training: str) -> None:
    job = run(tmp_path, kind, f"generate.guidance_scale={scale}", training)
    pool = read_table(job.stage("generate").glob("*.parquet"), ["sampler", "guidance_scale"])
    assert set(pool["sampler"].to_pylist()) == {"euler"}
    assert set(pool["guidance_scale"].to_pylist()) == {scale}
    pipe = DiffusionPipeline.from_pretrained(job.stage("train") / "model")
    if training.endswith("2"):
        pipe.load_lora_weights(job.stage("train") / "lora")
    report = read_json(job.stage("report") / "report.json")
    assert len(report["rewards"]) == 2


def test_an_sd3_without_t5_is_loaded_by_the_lines_that_are_shown(tmp_path: Path) -> None:
    settings = ("train.lora.rank=2", "train.learning_rate=0.03", "train.warmup_steps=0")
    job = run(tmp_path, "sd3-no-t5", *settings)
    out, _ = export(job.run, "diffusers")
    page = html.unescape((job.stage("report") / "report.html").read_text())
    (shown,) = re.findall(r"from_pretrained\((.*6-train/model.*)\)", page)
    (told,) = re.findall(r"from_pretrained\((.*)\)", (job.folder / "stdout").read_text())
    carded = re.findall(r"from_pretrained\((.*)\)", (out / "README.md").read_text())[0]
    for arguments in (shown, told, carded.replace("path/to/this/folder", str(out))):
        with contextlib.chdir(job.run):
            pipe = eval(f"DiffusionPipeline.from_pretrained({arguments})", globals())
        assert pipe.text_encoder_3 is None
        assert pipe.transformer is not None


def test_adapters_beside_bfloat16_go_through_the_whole_run_and_out(tmp_path: Path) -> None:
    settings = ("model.dtype=bfloat16", "train.precision=bfloat16", "train.lora.rank=2")
    fast = ("train.learning_rate=0.03", "train.warmup_steps=0", "train.save_dtype=bfloat16")
    job = run(tmp_path, "flux-dev", "generate.guidance_scale=3.5", *settings, *fast)
    start = load_file(kept_flow("flux-dev") / "transformer" / WEIGHTS)
    saved = load_file(job.stage("train") / "model" / "transformer" / WEIGHTS)
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    changed = {k for k in start if not torch.equal(saved[k], start[k].bfloat16())}
    assert changed
    assert not any("norm" in name or "embed" in name for name in changed)
    adapters = load_file(job.stage("train") / "lora" / "pytorch_lora_weights.safetensors")
    assert {weight.dtype for weight in adapters.values()} == {torch.float32}
    _, check = export(job.run, "lora")
    assert check.change > 0.01
    assert check.difference <= 1e-5


def test_dev_is_trained_at_the_scale_that_each_example_was_drawn_with(tmp_path: Path) -> None:
    job = run(tmp_path, "flux-dev", "generate.guidance_scale=2.5", "train.steps=1")
    model = load_sd(kept_flow("flux-dev"))
    selection, pool = job.stage("select") / "selection.parquet", job.stage("generate")
    examples = load_examples(SFT(), model, selection, pool, torch.device("cpu"))
    guidance = examples.cond.tensors["guidance"]
    assert torch.equal(guidance, torch.full((len(examples.weight),), 2.5))

    # Without a branch that is drawn with the empty prompt, dropout changes nothing.
    found = []
    for dropout in (0.0, 0.9):
        config = TrainConfig(steps=2, batch_size=4, prompt_dropout=dropout, lora=LoraConfig(rank=2))
        out = tmp_path / str(dropout)
        out.mkdir()
        feed_of = functools.partial(_feed, config, selection, pool)
        train(config, SFT(), load_sd(kept_flow("flux-dev")), 0, feed_of, out)
        found.append(load_file(out / "lora" / "pytorch_lora_weights.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def _feed(config: TrainConfig, selection: Path, pool: Path, model: Model) -> ExampleFeed:
    return example_feed(config, SFT(), model, 0, selection, pool)

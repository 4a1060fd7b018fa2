"""The stage `train`: the right latents under the right prompts, and a model that loads."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from toy import kept_checkpoint, load_sd, toy_cond, toy_examples

from craftune import processes
from craftune.batches import Examples
from craftune.config import GenerateConfig, LoraConfig, TrainConfig
from craftune.errors import UserError
from craftune.images import decode, to_tensor
from craftune.methods import CRAFT, SFT
from craftune.records import Prompt, Refined, prompt_id, write_rows
from craftune.stages.generate import generate
from craftune.stages.train import ExampleFeed, example_feed, load_examples, train
from craftune.types import Cond, Model

TEXTS = ["two red dogs", "a cat", "a green square"]
CONFIG = TrainConfig(
    steps=4,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=0,
    prompt_dropout=0.25,
    save_every=2,
    save_dtype="float32",
)
CPU = torch.device("cpu")

# --- the feed --------------------------------------------------------------------------------


def numbered_feed(count: int, batch_size: int, dropout: float = 0.0, seed: int = 0) -> ExampleFeed:
    """Examples whose weight, latents and prompt all are their number, counted from 1."""
    number = torch.arange(1.0, count + 1)
    cond = Cond({"tokens": number.view(-1, 1, 1), "pooled": number.view(-1, 1)})
    examples = Examples(number[:, None].expand(-1, 2), cond, number)
    empty = Cond({"tokens": torch.zeros(1, 1, 1), "pooled": torch.zeros(1, 1)})
    return ExampleFeed(examples, empty, batch_size, dropout, seed)


@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (5, 12), (8, 8), (1, 4)])
def test_every_example_is_seen_equally_often(count: int, batch_size: int) -> None:
    """After any whole number of epochs exactly; within one at every step between."""
    feed = numbered_feed(count, batch_size)
    seen = torch.zeros(count)
    for step in range(3 * count):
        seen += torch.bincount(feed(step).weight.long() - 1, minlength=count)
        assert seen.max() - seen.min() <= 1
    assert seen.eq(3 * batch_size).all()


def test_the_order_is_shuffled_anew_every_epoch() -> None:
    feed = numbered_feed(20, 20)
    orders = [tuple(feed(step).weight.tolist()) for step in range(4)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(1, 21)) for order in orders)


def test_a_batch_is_a_function_of_the_step_and_the_seed() -> None:
    one, same, other = (numbered_feed(20, 6, 0.3, seed) for seed in (0, 0, 1))
    one(0)
    for name in ("tokens", "pooled"):
        assert torch.equal(one(5).cond.tensors[name], same(5).cond.tensors[name])
    assert torch.equal(one(5).weight, same(5).weight)
    assert not torch.equal(one(5).weight, other(5).weight)


def test_latents_prompt_and_weight_stay_together() -> None:
    batch = numbered_feed(9, 30)(2)
    assert torch.equal(batch.latents[:, 0], batch.weight)
    assert torch.equal(batch.cond.tensors["tokens"].flatten(), batch.weight)
    assert torch.equal(batch.cond.tensors["pooled"].flatten(), batch.weight)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_stated_share_of_prompts_is_empty(share: float) -> None:
    """5,000 draws, deviation at most 0.0071; latents and weights stay, all of a prompt goes."""
    feed = numbered_feed(50, 50, share)
    batches = [feed(step) for step in range(100)]
    tokens = torch.cat([b.cond.tensors["tokens"].flatten() for b in batches])
    pooled = torch.cat([b.cond.tensors["pooled"].flatten() for b in batches])
    weight = torch.cat([b.weight for b in batches])
    empty = tokens == 0
    places = empty.view(100, 50).float().mean(0)  # of the batch: none is spared, none always hit
    assert (places - share).abs().max() <= (0.25 if 0 < share < 1 else 0)
    assert empty.float().mean().item() == pytest.approx(share, abs=0.036 if 0 < share < 1 else 0)
    assert torch.equal(empty, pooled == 0)
    assert torch.equal(tokens[~empty], weight[~empty])
    assert weight.min() >= 1


# --- examples from selection and pool ---------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts with two rewrites each, in shards of four."""
    out = tmp_path_factory.mktemp("pool")
    prompts = [Prompt(prompt_id(text), text) for text in TEXTS]
    rewrites = [Refined(p.id, j, f"{p.prompt}, {j} dogs", "test") for p in prompts for j in (1, 2)]
    write_rows(out / "prompts.jsonl", prompts)
    write_rows(out / "refined.jsonl", rewrites)
    config = GenerateConfig(num_steps=2, guidance_scale=2.0, shard_size=4)
    model = load_sd(kept_checkpoint())
    generate(config, model, 0, out / "prompts.jsonl", out / "refined.jsonl", out)
    return out


def pool_rows(pool: Path) -> dict[str, dict[str, Any]]:
    rows = [r for path in pool.glob("part-*.parquet") for r in pq.read_table(path).to_pylist()]
    return {row["id"]: row for row in rows}


def write_selection(path: Path, pool: Path, advantages: dict[str, float]) -> Path:
    """All of the pool's rows; those with an advantage are selected."""
    rows = list(pool_rows(pool).values())
    columns = {
        "candidate": [r["id"] for r in rows],
        "prompt": [r["prompt"] for r in rows],
        "advantage": [advantages.get(r["id"], 9.0) for r in rows],
        "selected": [r["id"] in advantages for r in rows],
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def selection(tmp_path: Path, pool: Path) -> Path:
    return select_some(tmp_path, pool)


def select_some(folder: Path, pool: Path) -> Path:
    """Four candidates: two of positive, one of negative advantage, one of none."""
    names = [f"{prompt_id(text)}-{j}-0" for text, j in zip(TEXTS, (2, 1, 2), strict=True)]
    advantages = dict(zip(names, (1.5, -0.7, 0.4), strict=True))
    advantages[f"{prompt_id(TEXTS[0])}-1-0"] = 0.0
    return write_selection(folder / "selection.parquet", pool, advantages)


def test_examples_are_the_pool_s_latents_under_the_original_prompt(
    selection: Path, pool: Path
) -> None:
    """Never the rewrite that drew the image: that is what CRAFT distils."""
    model = load_sd(kept_checkpoint())
    found = load_examples(CRAFT("keep"), model, selection, pool, CPU)
    rows = pool_rows(pool)
    chosen = pq.read_table(selection).to_pylist()
    wanted = [r for r in chosen if r["selected"] and r["advantage"] != 0]
    assert len(found.weight) == len(wanted) == 3
    assert found.weight.tolist() == pytest.approx([r["advantage"] for r in wanted])
    for i, row in enumerate(wanted):
        stored = torch.tensor(rows[row["candidate"]]["latents"]).view(model.latent_shape)
        assert torch.equal(found.latents[i], stored)
        plain = model.encode_prompts([rows[row["candidate"]]["prompt"]]).tensors["tokens"][0]
        torch.testing.assert_close(found.cond.tensors["tokens"][i], plain, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def without_latents(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pool, drawn with keep_latents = false."""
    out = tmp_path_factory.mktemp("without")
    config = GenerateConfig(num_steps=2, guidance_scale=2.0, shard_size=4, keep_latents=False)
    model = load_sd(kept_checkpoint())
    generate(config, model, 0, pool / "prompts.jsonl", pool / "refined.jsonl", out)
    return out


def test_a_pool_without_latents_is_encoded_by_the_vae(
    selection: Path, pool: Path, without_latents: Path
) -> None:
    model = load_sd(kept_checkpoint())
    rows, kept = pool_rows(without_latents), pool_rows(pool)
    assert all(row["latents"] is None for row in rows.values())
    assert all(row["image"] == kept[name]["image"] for name, row in rows.items())
    found = load_examples(SFT(), model, selection, without_latents, CPU)
    chosen = [r["candidate"] for r in pq.read_table(selection).to_pylist() if r["selected"]]
    pictures = to_tensor([decode(rows[name]["image"]["bytes"]) for name in chosen])
    wanted = model.encode_images(pictures)
    assert wanted.std is not None
    assert found.std is not None
    torch.testing.assert_close(found.latents, wanted.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.std, wanted.std, atol=1e-5, rtol=1e-4)
    assert load_examples(SFT(), model, selection, pool, CPU).std is None


def test_encoded_latents_are_drawn_anew_as_a_function_of_the_step() -> None:
    """Mean and deviation as given: 40,000 draws."""
    mean, std = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])
    cond = Cond({"tokens": torch.zeros(1, 1, 1)})
    examples = Examples(mean, cond, torch.ones(1), std)
    feeds = [ExampleFeed(examples, cond, 200, 0.0, seed) for seed in (0, 0, 1)]
    assert torch.equal(feeds[0](3).latents, feeds[1](3).latents)
    assert not torch.equal(feeds[0](3).latents, feeds[2](3).latents)
    drawn = torch.cat([feeds[0](step).latents for step in range(200)])
    assert len(drawn.unique(dim=0)) == 40_000
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.06, rtol=0)
    torch.testing.assert_close(drawn.std(0), std[0], atol=0.05, rtol=0)
    assert feeds[0](0).std is None


def test_training_without_latents_survives_a_kill(
    tmp_path: Path, selection: Path, without_latents: Path
) -> None:
    whole = trained(tmp_path / "whole", selection, without_latents)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "model")
    assert distance(trained(tmp_path / "killed", selection, without_latents), whole) == 0


def test_what_the_method_gives_no_weight_is_left_out(selection: Path, pool: Path) -> None:
    model = load_sd(kept_checkpoint())
    assert sorted(load_examples(CRAFT(), model, selection, pool, CPU).weight.tolist()) == (
        pytest.approx([0.4, 1.5])
    )
    assert load_examples(SFT(), model, selection, pool, CPU).weight.tolist() == [1.0] * 4
    clipped = load_examples(CRAFT("clip"), model, selection, pool, CPU).weight
    assert clipped.min().item() == pytest.approx(-0.5)


def test_nothing_to_train_on_is_told(tmp_path: Path, pool: Path) -> None:
    model = load_sd(kept_checkpoint())
    some = f"{prompt_id(TEXTS[0])}-1-0"
    path = write_selection(tmp_path / "s.parquet", pool, {some: -1.0})
    with pytest.raises(UserError, match="none of the 1 selected candidates has a weight"):
        load_examples(CRAFT(), model, path, pool, CPU)
    path = write_selection(tmp_path / "none.parquet", pool, {})
    with pytest.raises(UserError, match="none of the 0 selected"):
        load_examples(SFT(), model, path, pool, CPU)


def test_a_candidate_that_the_pool_lacks_is_named(tmp_path: Path, pool: Path) -> None:
    path = tmp_path / "s.parquet"
    columns = {"candidate": ["gone-1-0"], "prompt": ["x"], "advantage": [1.0], "selected": [True]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError, match="lacks the selected candidate gone-1-0"):
        load_examples(SFT(), load_sd(kept_checkpoint()), path, pool, CPU)


# --- the whole stage --------------------------------------------------------------------------


def trained(
    out: Path,
    selection: Path,
    pool: Path,
    config: TrainConfig = CONFIG,
    method: Any = None,
    dtype: str = "float32",
) -> dict[str, torch.Tensor]:
    """The stage on a fresh model; returns the saved model's denoiser weights."""
    model = load_sd(kept_checkpoint(), dtype=dtype)
    out.mkdir(parents=True, exist_ok=True)
    exact = None if dtype == "float32" else lambda: load_sd(kept_checkpoint())
    used = method or CRAFT()

    def feed_of(model: Model) -> ExampleFeed:
        return example_feed(config, used, model, 0, selection, pool)

    counts = train(config, used, model, 0, feed_of, out, processes.ALONE, exact)
    assert counts["steps"] == config.steps
    assert not (out / "model.partial").exists()
    return dict(load_sd(out / "model").denoiser.network.state_dict())


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[k] - other[k]).abs().max().item() for k in one)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """CONFIG's own run."""
    out = tmp_path_factory.mktemp("plain")
    return trained(out / "train", select_some(out, pool), pool)


START = dict(load_sd(kept_checkpoint()).denoiser.network.state_dict())


@pytest.mark.parametrize("method", [CRAFT("drop"), CRAFT("anchor"), SFT()], ids=str)
def test_the_full_network_trains_and_loads(
    tmp_path: Path, selection: Path, pool: Path, method: Any
) -> None:
    weights = trained(tmp_path / "train", selection, pool, method=method)
    assert 1e-4 < distance(weights, START) < 0.1
    assert all(not torch.equal(weights[k], START[k]) for k in START)
    rows = metrics(tmp_path / "train")
    assert len(rows) == 4
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert ("reference_error" in rows[0]) == method.needs_reference
    if method.needs_reference:  # the reference is the start: equal before the first update
        assert rows[0]["reference_error"] == pytest.approx(rows[0]["error"], rel=1e-6)
        assert rows[-1]["reference_error"] != pytest.approx(rows[-1]["error"], rel=1e-6)


@pytest.mark.parametrize("method", [CRAFT("drop"), CRAFT("anchor")], ids=str)
def test_lora_trains_and_loads(tmp_path: Path, selection: Path, pool: Path, method: Any) -> None:
    config = replace(CONFIG, lora=LoraConfig(rank=2), ema_decay=0.5)
    out = tmp_path / "train"
    weights = trained(out, selection, pool, config, method)
    changed = {k for k in START if not torch.equal(weights[k], START[k])}
    assert changed
    assert all(any(t in name for t in ("to_q", "to_k", "to_v", "to_out.0")) for name in changed)
    diffusers.utils.logging.set_verbosity_error()
    pipe: Any = StableDiffusionPipeline.from_pretrained(kept_checkpoint())
    pipe.load_lora_weights(out / "lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert distance(dict(pipe.unet.state_dict()), weights) < 1e-5
    if method.needs_reference:
        first = metrics(out)[0]
        assert first["reference_error"] == pytest.approx(first["error"], rel=1e-6)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_train_beside_a_base_in_bfloat16(
    tmp_path: Path, selection: Path, pool: Path, dora: bool
) -> None:
    """The base is rounded in memory alone: what is saved is the exact one, plus the adapters."""
    config = replace(CONFIG, lora=LoraConfig(rank=2, dora=dora), precision="bfloat16")
    out = tmp_path / "train"
    weights = trained(out, selection, pool, config, CRAFT("anchor"), "bfloat16")
    changed = {k for k in START if not torch.equal(weights[k], START[k])}
    assert changed
    assert all(any(t in name for t in ("to_q", "to_k", "to_v", "to_out.0")) for name in changed)
    assert any(not torch.equal(START[k], START[k].bfloat16().float()) for k in START)
    pipe: Any = StableDiffusionPipeline.from_pretrained(kept_checkpoint())
    pipe.load_lora_weights(out / "lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert distance(dict(pipe.unet.state_dict()), weights) < 1e-5
    rows = metrics(out)
    # Fresh adapters; attention has other kernels without a gradient.
    assert rows[0]["reference_error"] == pytest.approx(rows[0]["error"], rel=1e-3)
    assert rows[-1]["reference_error"] != rows[-1]["error"]
    trained(tmp_path / "float32", selection, pool, config, CRAFT("anchor"))
    for row, other in zip(rows, metrics(tmp_path / "float32"), strict=True):
        assert row["error"] == pytest.approx(other["error"], rel=0.01)


def test_the_average_is_what_is_saved(
    tmp_path: Path, selection: Path, pool: Path, plain: dict[str, torch.Tensor]
) -> None:
    """At a decay of nearly 1 the average has hardly left the start."""
    last = plain
    slow = trained(tmp_path / "slow", selection, pool, replace(CONFIG, ema_decay=0.999))
    fast = trained(tmp_path / "fast", selection, pool, replace(CONFIG, ema_decay=1e-6))
    assert distance(fast, last) < 1e-4 * distance(last, START) + 1e-6
    assert distance(slow, START) < 0.01 * distance(last, START)


def test_half_precision_is_a_rounding_of_the_weights(
    tmp_path: Path, selection: Path, pool: Path, plain: dict[str, torch.Tensor]
) -> None:
    full = plain
    half = trained(tmp_path / "half", selection, pool, replace(CONFIG, save_dtype="float16"))
    assert all(torch.equal(half[k], full[k].half().float()) for k in full)


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [(0, "float32"), (2, "float32"), (2, "bfloat16")],
    ids=["full", "lora", "lora-bf16"],
)
def test_a_killed_stage_gives_the_same_model(
    tmp_path: Path,
    selection: Path,
    pool: Path,
    rank: int,
    dtype: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed at step 4 of 4, after checkpoint 2; another process has another global generator."""
    config = replace(CONFIG, lora=LoraConfig(rank=rank), precision=dtype)
    whole = trained(tmp_path / "whole", selection, pool, config, CRAFT("anchor"), dtype)
    call = ExampleFeed.__call__

    def killed(self: ExampleFeed, step: int) -> Examples:
        if step == 3:
            raise KeyboardInterrupt
        return call(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(ExampleFeed, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed", selection, pool, config, CRAFT("anchor"), dtype)
    assert (tmp_path / "killed" / "checkpoint-2" / "done.json").is_file()
    torch.manual_seed(12345)
    again = trained(tmp_path / "killed", selection, pool, config, CRAFT("anchor"), dtype)
    assert distance(again, whole) == 0
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    saved = Path("model", "unet", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "killed" / saved).read_bytes() == (tmp_path / "whole" / saved).read_bytes()


def test_micro_batches_and_checkpointing_change_no_number(
    tmp_path: Path, selection: Path, pool: Path
) -> None:
    """Loss and gradient norm of every step, up to float32's summation order."""
    config = replace(CONFIG, steps=2, learning_rate=1e-5)
    trained(tmp_path / "whole", selection, pool, config)
    parts = replace(config, micro_batch=3, gradient_checkpointing=True)
    trained(tmp_path / "parts", selection, pool, parts)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def test_training_on_images_makes_them_likelier(
    tmp_path: Path, selection: Path, pool: Path
) -> None:
    config = replace(CONFIG, steps=12, learning_rate=5e-3, prompt_dropout=0.0, save_every=100)
    trained(tmp_path / "train", selection, pool, config)
    errors = [row["error"] for row in metrics(tmp_path / "train")]
    assert sum(errors[-4:]) < 0.95 * sum(errors[:4])


def test_the_toy_s_examples_are_what_they_say() -> None:
    one = toy_examples(3)
    assert torch.equal(one.latents, toy_examples(3).latents)
    assert torch.equal(one.cond.tensors["tokens"], toy_cond(3).tensors["tokens"])
    assert copy.deepcopy(one).weight.tolist() == [1.0] * 3

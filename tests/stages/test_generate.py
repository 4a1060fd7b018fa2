"""The stage `generate`: which candidate gets which noise, however the work is cut up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from toy import kept_checkpoint, load_sd

from craftune.config import GenerateConfig
from craftune.images import decode, encode_png, to_pil, to_tensor
from craftune.records import CANDIDATE, Prompt, Refined, prompt_id, write_rows
from craftune.sampling import initial_noise, sample
from craftune.seeds import stream, stream_seed
from craftune.stages.generate import generate
from craftune.types import Model

CONFIG = GenerateConfig(
    sampler="ddim",
    num_steps=3,
    guidance_scale=3.0,
    seeds_per_variant=2,
    batch_size=4,
    shard_size=6,
)
TEXTS = ["two red dogs", "a cat", "a green square"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_sd(kept_checkpoint())


def draw(
    out: Path,
    model: Model,
    config: GenerateConfig = CONFIG,
    seed: int = 0,
    texts: list[str] = TEXTS,
    variants: int = 1,
) -> list[dict[str, Any]]:
    """The stage on these prompts, each with some rewrites; returns the pool's rows."""
    out.mkdir(parents=True, exist_ok=True)
    prompts = [Prompt(prompt_id(text), text, "any") for text in texts]
    rewrites = [
        Refined(prompt.id, j, f"{prompt.prompt} and a dog, {j}", "test")
        for prompt in prompts
        for j in range(1, variants + 1)
    ]
    write_rows(out / "prompts.jsonl", prompts)
    write_rows(out / "refined.jsonl", rewrites)
    counts = generate(config, model, seed, out / "prompts.jsonl", out / "refined.jsonl", out)
    rows = pool(out)
    assert counts == {"prompts": len(texts), "candidates": len(rows)}
    return rows


def pool(out: Path) -> list[dict[str, Any]]:
    return [
        r for path in sorted(out.glob("part-*.parquet")) for r in pq.read_table(path).to_pylist()
    ]


def pixels(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(decode(row["image"]["bytes"])).astype(int)


@pytest.fixture(scope="module")
def rows(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return draw(tmp_path_factory.mktemp("pool"), model)


def test_every_prompt_has_its_plain_candidate_and_every_rewrite_its_own(
    rows: list[dict[str, Any]],
) -> None:
    found = [(r["prompt"], r["variant"], r["sample"], r["refined_prompt"]) for r in rows]
    wanted = []
    for text in TEXTS:
        wanted.append((text, 0, 0, text))
        wanted += [(text, 1, k, f"{text} and a dog, 1") for k in range(2)]
    assert found == wanted
    assert len({r["id"] for r in rows}) == len(rows)
    assert len({r["seed"] for r in rows}) == len(rows)
    for row in rows:
        assert row["id"] == f"{row['prompt_id']}-{row['variant']}-{row['sample']}"
        assert row["prompt_id"] == prompt_id(row["prompt"])
        assert (row["sampler"], row["num_steps"], row["guidance_scale"]) == ("ddim", 3, 3.0)
        assert row["category"] == "any"


def test_a_row_is_the_image_of_its_own_text_and_seed(
    rows: list[dict[str, Any]], model: Model
) -> None:
    """Drawn again, alone, with the sampler: the same latents and the same picture."""
    for row in rows[::4]:
        latents = sample(
            model.denoiser,
            initial_noise([row["seed"]], model.latent_shape),
            model.encode_prompts([row["refined_prompt"]]),
            model.encode_prompts([""]),
            model.grid("ddim", 3),
            sampler="ddim",
            guidance_scale=3.0,
        )
        stored = torch.tensor(row["latents"]).view(1, *model.latent_shape)
        torch.testing.assert_close(stored, latents, atol=1e-3, rtol=1e-4)
        with torch.no_grad():
            alone = np.asarray(to_pil(model.decode(latents))[0]).astype(int)
        assert np.abs(alone - pixels(row)).max() <= 1


def test_the_pool_s_latents_decode_to_the_pool_s_image(
    rows: list[dict[str, Any]], model: Model
) -> None:
    latents = torch.tensor([row["latents"] for row in rows]).view(-1, *model.latent_shape)
    with torch.no_grad():
        images = to_pil(model.decode(latents))
    for image, row in zip(images, rows, strict=True):
        assert np.abs(np.asarray(image).astype(int) - pixels(row)).max() <= 1


def test_images_differ_by_prompt_and_by_seed(rows: list[dict[str, Any]]) -> None:
    for one, other in ((0, 3), (1, 2)):
        assert np.abs(pixels(rows[one]) - pixels(rows[other])).max() > 8


@pytest.mark.parametrize(("batch_size", "shard_size"), [(1, 100), (3, 2), (100, 4)])
def test_batch_and_shard_size_change_no_image(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    model: Model,
    batch_size: int,
    shard_size: int,
) -> None:
    config = replace(CONFIG, batch_size=batch_size, shard_size=shard_size)
    again = draw(tmp_path, model, config)
    assert len(list(tmp_path.glob("part-*.parquet"))) == -(-len(rows) // shard_size)
    for one, other in zip(rows, again, strict=True):
        named = [
            {k: v for k, v in r.items() if k not in ("image", "latents")} for r in (one, other)
        ]
        assert named[0] == named[1]
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_noise_is_the_run_s_the_prompt_s_the_variant_s_and_the_sample_s(
    tmp_path: Path, rows: list[dict[str, Any]], model: Model
) -> None:
    """And nothing else's: not the order, the other prompts, how many variants there are."""
    seeds = {row["id"]: row["seed"] for row in rows}
    for row in rows:
        parts = (row["prompt_id"], row["variant"], row["sample"])
        assert row["seed"] == stream_seed("candidate", 0, *parts)
    more = replace(CONFIG, seeds_per_variant=3, num_steps=1)
    texts = ["something new", *reversed(TEXTS)]
    other = draw(tmp_path / "more", model, more, texts=texts, variants=2)
    shared = {row["id"]: row["seed"] for row in other if row["id"] in seeds}
    assert shared == seeds
    fewer = draw(tmp_path / "seed", model, replace(more, num_steps=1), seed=1, texts=TEXTS[:1])
    assert {r["seed"] for r in fewer}.isdisjoint(seeds.values())


def test_streams_are_their_parts_alone() -> None:
    assert stream_seed("a", 1, 2) == stream_seed("a", "1", 2)
    assert (
        len({stream_seed("candidate", s, p, j) for s in range(5) for p in "ab" for j in (0, 1)})
        == 20
    )
    assert 0 <= stream_seed("x") < 2**63
    assert torch.equal(torch.rand(3, generator=stream(7)), torch.rand(3, generator=stream(7)))


def test_a_killed_run_goes_on_with_the_missing_shards(
    tmp_path: Path, rows: list[dict[str, Any]], model: Model
) -> None:
    draw(tmp_path, model)
    parts = sorted(tmp_path.glob("part-*.parquet"))
    before = [part.read_bytes() for part in parts]
    assert len(parts) == 2
    parts[0].unlink()
    (tmp_path / "part-00000.parquet.partial").write_bytes(b"half a shard")
    kept = parts[1].stat().st_mtime_ns
    assert len(draw(tmp_path, model)) == len(rows)
    assert [part.read_bytes() for part in parts] == before
    assert parts[1].stat().st_mtime_ns == kept


def test_datasets_opens_the_pool_with_an_image_column(tmp_path: Path, model: Model) -> None:
    datasets = pytest.importorskip("datasets")
    rows = draw(tmp_path, model)
    found = datasets.load_dataset(
        "parquet",
        data_files=[str(p) for p in sorted(tmp_path.glob("part-*.parquet"))],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert isinstance(found.features["image"], datasets.Image)
    assert set(found.column_names) == set(CANDIDATE.names)
    assert len(found) == len(rows)
    for row, wanted in zip(found, rows, strict=True):
        assert row["id"] == wanted["id"]
        assert (np.asarray(row["image"]).astype(int) == pixels(wanted)).all()
        np.testing.assert_array_equal(row["latents"], wanted["latents"])


def test_pictures_go_round_without_loss() -> None:
    images = torch.rand(2, 3, 5, 7)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = -1.0, 2.0
    pictures = to_pil(images)
    assert pictures[0].size == (7, 5)
    assert pictures[0].getpixel((0, 0))[0] == 0  # type: ignore[index]
    assert pictures[0].getpixel((1, 0))[0] == 255  # type: ignore[index]
    again = [decode(encode_png(picture)) for picture in pictures]
    assert [p.tobytes() for p in again] == [p.tobytes() for p in pictures]
    assert (to_tensor(again) - images.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    half = torch.full((1, 3, 1, 1), 0.5 / 255 + 1e-4)
    assert to_pil(half)[0].getpixel((0, 0)) == (1, 1, 1)  # to nearest, not down

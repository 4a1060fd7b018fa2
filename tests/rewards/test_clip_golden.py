"""Published CLIP rewards number by number: what the upstream packages gave on the same weights.

tests/golden holds their outputs; the weights, pictures and texts follow from rules.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import (
    head_weights,
    open_clip_shapes,
    open_clip_weights,
    tiny_clip,
    write_tokenizer,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from craftune.rewards import clip, text
from craftune.rewards.aesthetic import NUMBERS, load_head
from craftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, MiddleSquare, normalized
from craftune.rewards.weights import load_strictly

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def pixels(n: int) -> Tensor:
    """Normalised pictures, as the golden numbers were made with."""
    values = np.random.RandomState(1234).standard_normal((n, 3, 224, 224)).astype(np.float32)
    return torch.from_numpy(values)


def unnormalized(values: Tensor) -> Tensor:
    """What `embed_images` takes."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return values * std + mean


def converted(shapes: dict[str, Any], scale: float, act: str, heads: tuple[int, int]) -> Any:
    """Weights by the upstream keys, through our conversion, strictly."""
    weights = clip.from_open_clip(open_clip_weights(shapes, scale), "test")
    config = clip.config_of(weights, act, *heads, "test")
    return load_strictly(lambda: CLIPModel(config), weights, "test", CPU, torch.float32)


def close(found: Tensor, expected: list | float, most: float = 1e-5) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=most)


@torch.no_grad()
def test_hpsv2() -> None:
    d = golden("hpsv2_tiny")
    model = converted(d["keys"], 4.0, "gelu", (32, 12))
    images = clip.embed_images(model, unnormalized(pixels(2)))
    texts = clip.embed_texts(model, torch.tensor(d["input_ids"]))
    close(images, d["image_features"])
    close(texts, d["text_features"])
    close((images * texts).sum(-1), d["score"])
    pick = model.logit_scale.exp() * (images * texts).sum(-1)
    torch.testing.assert_close(pick, torch.tensor(d["pick_style_score"]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_openai_clip() -> None:
    d = golden("openai_clip_tiny")
    shapes = open_clip_shapes(embedding=32, vision=(128, 2), text=(64, 2))
    model = converted(shapes, 4.6052, "quick_gelu", (64, 32))
    images = model.visual_projection(model.vision_model(pixels(2)).pooler_output)
    ids = torch.tensor(d["input_ids"])
    texts = model.text_projection(model.text_model(ids).pooler_output)
    for found, key in ((images, "image_features_raw"), (texts, "text_features_raw")):
        expected = torch.tensor(d[key])
        assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5
    embedded = clip.embed_images(model, unnormalized(pixels(2)))
    close((embedded * clip.embed_texts(model, ids)).sum(-1), d["cosine"])


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """CLIP's tokenizer as far as the golden texts need it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    merges = golden("clip_bpe_part")["merges"]
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary |= {pair.replace(" ", ""): number for pair, number in merges.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return str(folder)


def ends_with_zeros(ids: list[int]) -> list[int]:
    """Upstream pads with 0, which nothing looks at."""
    end = ids.index(clip.END)
    return ids[: end + 1] + [0] * (len(ids) - end - 1)


@pytest.mark.parametrize("case", golden("clip_tokenizer")["cases"], ids=lambda c: c["text"][:20])
def test_token_numbers(tokenizer_folder: str, case: dict[str, Any]) -> None:
    tokenizer = text.clip_tokenizer(tokenizer_folder, "test", text.cleaned)
    (ids,) = tokenizer([case["text"]]).tolist()
    assert ends_with_zeros(ids) == case["ids"]
    assert tokenizer.cuts(case["text"]) == (case["text"].count("word ") > 75)


def test_token_numbers_of_a_batch(tokenizer_folder: str) -> None:
    d = golden("hpsv2_tiny")
    tokenizer = text.clip_tokenizer(tokenizer_folder, "test", text.cleaned)
    ids = tokenizer(d["prompts"]).tolist()
    assert [ends_with_zeros(row) for row in ids] == d["input_ids"]


def test_a_text_of_just_77_tokens_is_read_whole(tokenizer_folder: str) -> None:
    tokenizer = text.clip_tokenizer(tokenizer_folder, "test")
    assert not tokenizer.cuts("word " * 75)  # with start and end
    assert tokenizer.cuts("word " * 76)


def test_only_hps_cleans(tokenizer_folder: str) -> None:
    """A curly quote and an entity: other rewards read them as they are."""
    plain, clean = (
        text.clip_tokenizer(tokenizer_folder, "test", how) for how in (str, text.cleaned)
    )
    for written, read in (("a corgi\u2019s head", "a corgi's head"), ("< &amp;amp;", "< &")):
        assert torch.equal(clean([written]), plain([read]))
        assert not torch.equal(plain([written]), plain([read]))
    entities = 30 * "&amp;"  # 30 tokens once they are read
    assert plain.cuts(entities)
    assert not clean.cuts(entities)


def picture(high: int, wide: int) -> Image.Image:
    base = (np.random.RandomState(high * 10007 + wide).rand(24, 24, 3) * 255).astype("uint8")
    return Image.fromarray(base).resize((wide, high), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("case", golden("preprocess")["cases"], ids=lambda c: str(c["size_hw"]))
@pytest.mark.parametrize(("resize", "key"), [("tensor", "hps_tensor_aa"), ("pil", "pil")])
def test_pixels(case: dict[str, Any], resize: Any, key: str) -> None:
    image = picture(*case["size_hw"])
    shown = MiddleSquare(resize=resize).plan(image.size)(image)
    found = normalized(shown[None], CLIP_MEAN, CLIP_STD)[0]
    close(found[:, ::56, ::56].flatten(), case[key]["probe"], 2e-6)
    close(found.mean(), case[key]["mean"], 1e-5)
    close(found.std(), case[key]["std"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rewards_after_the_first_see_the_same_inputs(dtype: torch.dtype) -> None:
    shared = torch.ones(1, 3, 2, 2, dtype=dtype)
    normalized(shared, CLIP_MEAN, CLIP_STD)
    assert torch.equal(shared, torch.ones_like(shared))


@pytest.mark.parametrize("size", [(224, 224), (512, 768), (832, 1216), (227, 300), (50, 40)])
def test_pixels_of_pickscore_are_those_of_transformers(size: tuple[int, int]) -> None:
    """832 x 1216 is where its middle lies one pixel off the others'."""
    image = picture(*size)
    expected = CLIPImageProcessorPil()(images=image, return_tensors="pt")["pixel_values"]
    shown = MiddleSquare(middle="floor").plan(image.size)(image)
    found = normalized(shown[None], CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    rounded = MiddleSquare().plan(image.size)(image)
    assert torch.equal(rounded, shown) == (size != (832, 1216))


@pytest.mark.parametrize("size", [(3, 1000), (1000, 3)])
def test_of_a_strip_the_middle_is_seen(size: tuple[int, int]) -> None:
    """The square of the whole strip and of its middle part differ by less than a pixel."""
    values = np.linspace(0, 255, max(size)).astype(np.uint8)
    strip = np.broadcast_to(values[:, None] if size[1] > size[0] else values[None], size[::-1])
    image = Image.fromarray(np.ascontiguousarray(strip))
    shown = MiddleSquare(8).plan(size)(image).float()
    assert (shown - 127.5).abs().max() < 2


@pytest.mark.parametrize("resize", ["tensor", "pil"])
def test_the_differentiable_way_is_the_float_one(resize: Any) -> None:
    image = picture(300, 421)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    way = MiddleSquare(resize=resize)
    shown = way.plan(image.size)(image)
    shown = shown / 255 if shown.dtype == torch.uint8 else shown
    apart = (way.differentiable(tensor)[0] - shown).abs() / min(CLIP_STD)
    assert apart.max() < (0.016 if resize == "pil" else 1e-6)


def test_only_what_upstream_keeps_in_bytes_is_cut_to_their_range() -> None:
    """Bicubic overshoots at an edge from black to white."""
    edge = torch.zeros(1, 3, 300, 300)
    edge[..., 150:] = 1
    cut = MiddleSquare(resize="pil").differentiable(edge)
    kept = MiddleSquare(resize="tensor").differentiable(edge)
    assert (cut.min(), cut.max()) == (0, 1)
    assert kept.min() < 0
    assert kept.max() > 1


def folded_head() -> dict[str, Tensor]:
    """The real head in the published layout: its fold in the first layer, handed through."""
    d = golden("aes_head_folded")
    weights = {name: torch.zeros_like(tensor) for name, tensor in head_weights(768).items()}
    for number in NUMBERS:
        weights[f"layers.{number}.weight"][0, 0] = 1.0
    weights["layers.0.weight"][0] = torch.tensor(d["weight"])
    weights["layers.7.bias"][0] = d["bias"]
    return weights


def test_the_real_aesthetic_head(tmp_path: Path) -> None:
    d = golden("aes_head_real")
    torch.save(folded_head(), tmp_path / "head.pth")
    rows = np.random.RandomState(7).standard_normal((5, 768)).astype(np.float32)
    scores = load_head(tmp_path / "head.pth", 768, CPU)(F.normalize(torch.from_numpy(rows)))
    close(scores.squeeze(-1), d["scores"])


def test_layers_of_the_head_in_turn(tmp_path: Path) -> None:
    """By hand: five linear maps, nothing between them."""
    weights = head_weights()
    torch.save(weights, tmp_path / "head.pth")
    x = torch.randn(3, 32)
    found = load_head(tmp_path / "head.pth", 32, CPU)(x)
    for number in NUMBERS:
        x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def full_size() -> dict[str, Tensor]:
    shapes = open_clip_shapes(embedding=1024, vision=(1280, 32), text=(1024, 24))
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_every_key_of_the_full_checkpoints() -> None:
    """HPSv2: 686 upstream keys become the 910 of a ViT-H/14; PickScore has these by itself."""
    published = full_size()
    assert len(published) == 686
    weights = clip.from_open_clip(published, "test")
    config = clip.config_of(weights, "gelu", 80, 64, "test")
    pickscore = CLIPConfig(
        text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                         num_attention_heads=16, hidden_act="gelu", projection_dim=1024),
        vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                           num_attention_heads=16, patch_size=14, hidden_act="gelu",
                           projection_dim=1024),
        projection_dim=1024,
    )  # fmt: skip
    for part in ("text_config", "vision_config"):
        ours, theirs = (getattr(c, part).to_dict() for c in (config, pickscore))
        assert ours == theirs
    with torch.device("meta"):
        expected = CLIPModel(pickscore).state_dict()
    assert len(expected) == 910
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in expected.items()}
    assert sum(v.numel() for v in weights.values()) == 986_109_441


@torch.no_grad()
def test_half_precision_is_near() -> None:
    """The cosine is float32 whatever the towers' dtype, and the scale stays exact."""
    exact = tiny_clip()
    for dtype, apart in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        half = load_strictly(lambda: CLIPModel(exact.config), exact.state_dict(), "", CPU, dtype)
        assert half.logit_scale == exact.logit_scale
        found = clip.embed_images(half, unnormalized(pixels(2)))
        assert found.dtype == torch.float32
        close(found, clip.embed_images(exact, unnormalized(pixels(2))).tolist(), apart)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))


def test_texts_are_encoded_once() -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> Tensor:
        asked.extend(texts)
        return torch.tensor([[float(len(t))] for t in texts])

    embeddings = text.remembered(encode, most=2)
    assert embeddings(["a", "bb", "a"]).flatten().tolist() == [1, 2, 1]
    embeddings(["a"])
    assert asked == ["a", "bb"]
    assert embeddings(["ccc", "a", "bb"]).flatten().tolist() == [3, 1, 2]  # more than are kept
    assert asked == ["a", "bb", "ccc"]
    embeddings(["a", "bb"])  # the last two used
    assert asked == ["a", "bb", "ccc"]
    embeddings(["ccc"])
    assert asked[-1] == "ccc"
    assert len(asked) == 4
    many = [n * "x" for n in range(70)]
    assert text.remembered(encode)(many).flatten().tolist() == list(range(70))

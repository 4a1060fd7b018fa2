"""Published rewards from files to scores: the real loader and command line, and what can fail."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import more_by_hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import (
    CHECKPOINTS,
    head_weights,
    loaded,
    open_clip_shapes,
    open_clip_weights,
    settings_of,
    tiny_clip,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from test_reward_contract import pictures
from tiny import call, tiny
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from craftune import rewards
from craftune.config import ScoreConfig
from craftune.errors import UserError
from craftune.images import decode, encode_png
from craftune.records import CANDIDATE, read_table, write_table
from craftune.rewards import REWARDS, clip, preprocess, text
from craftune.rewards.published import Published
from craftune.rewards.weights import digest, find, parts
from craftune.stages.score import score

PUBLISHED = sorted(name for name, entry in REWARDS.items() if isinstance(entry, Published))
LONG = "a dog and " * 12
"""Of more than 77 tokens."""


def test_each_has_a_tiny_checkpoint() -> None:
    assert set(PUBLISHED) == CHECKPOINTS.keys()


def options(*names: str) -> list[str]:
    """The command line's, for these rewards' tiny weights."""
    return [
        part
        for name in names
        for key, value in settings_of(name).items()
        for part in ("--set", f'reward."{name}".{key}={json.dumps(value)}')
    ]


# --- the command line, against the networks in memory ---------------------------------------


@torch.no_grad()
def by_hand_clip(model: Any, images: list[Image.Image], prompts: list[str]) -> tuple[Tensor, ...]:
    """transformers' own processor, tokenizer and features."""
    shown = CLIPImageProcessorPil()(images=images, return_tensors="pt")["pixel_values"]
    tokenizer = CLIPTokenizer.from_pretrained(settings_of("pickscore")["tokenizer"])
    read = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    image = model.get_image_features(pixel_values=shown).pooler_output
    return F.normalize(image), F.normalize(model.get_text_features(**read).pooler_output)


def by_hand_pickscore(images: list[Image.Image], prompts: list[str]) -> Tensor:
    model = tiny_clip("gelu")
    image, words = by_hand_clip(model, images, prompts)
    return model.logit_scale.exp() * (image * words).sum(1)


def by_hand_clipscore(images: list[Image.Image], prompts: list[str]) -> Tensor:
    image, words = by_hand_clip(tiny_clip(), images, prompts)
    return (image * words).sum(1)


def by_hand_aesthetic(images: list[Image.Image], prompts: list[str]) -> Tensor:
    x, _ = by_hand_clip(tiny_clip(), images, prompts)
    for name, tensor in head_weights().items():
        x = x @ tensor.T if name.endswith("weight") else x + tensor
    return x.squeeze(1)


@torch.no_grad()
def by_hand_hps(images: list[Image.Image], prompts: list[str]) -> Tensor:
    shapes = open_clip_shapes(embedding=32, vision=(160, 2), text=(64, 2), patch=28)
    halves = {k: v.half().float() for k, v in open_clip_weights(shapes, 4.0).items()}
    weights = clip.from_open_clip(halves, "")
    model: Any = CLIPModel(clip.config_of(weights, "gelu", 80, 64, "")).eval()
    model.load_state_dict(weights)
    values = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    shown = torch.from_numpy(values).permute(0, 3, 1, 2)  # squares: nothing is cut off
    shown = F.interpolate(shown, (224, 224), mode="bicubic", antialias=True)
    shown = preprocess.normalized(shown, preprocess.CLIP_MEAN, preprocess.CLIP_STD)
    tokenizer = CLIPTokenizer.from_pretrained(settings_of("hpsv2.1")["tokenizer"])
    cleaned = [text.cleaned(prompt) for prompt in prompts]
    read = tokenizer(cleaned, padding="max_length", truncation=True, max_length=77)
    ids = torch.tensor(read["input_ids"])
    image = model.get_image_features(pixel_values=shown).pooler_output
    return F.cosine_similarity(image, model.get_text_features(input_ids=ids).pooler_output)


BY_HAND: dict[str, Callable[[list[Image.Image], list[str]], Tensor]] = {
    "hpsv2.1": by_hand_hps,
    "hpsv2.0": by_hand_hps,
    "pickscore": by_hand_pickscore,
    "clipscore": by_hand_clipscore,
    "aesthetic": by_hand_aesthetic,
    "imagereward": more_by_hand.imagereward,
    "mps": more_by_hand.mps,
    "vqascore": more_by_hand.vqascore,
}


def test_each_is_computed_by_hand() -> None:
    assert set(PUBLISHED) == BY_HAND.keys()


@pytest.mark.parametrize("name", BY_HAND)
def test_each_scores_as_by_hand(name: str) -> None:
    """Square pictures; a prompt with an entity, a long and an empty one."""
    prompts = ["a dog", "a cat &amp;amp; a dog", LONG, "", "two dogs"]
    values, expected = loaded(name).score(pictures(), prompts), BY_HAND[name](pictures(), prompts)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_a_run_is_scored_as_by_hand(tmp_path: Path) -> None:
    """Published files, PNG pictures, `craftune run`: what the networks in memory give."""
    job = tiny(tmp_path / "job")
    names = tuple(BY_HAND)
    (job.folder / "some.txt").write_text(
        "\n".join(["a dog", "a cat &amp;amp; a dog", LONG, "two dogs", LONG + "!"])
    )
    sets = [
        f"prompts.source={job.folder / 'some.txt'}",
        f"score.rewards={json.dumps(names)}",
        'select.roles={h="hpsv2.1", p="pickscore", a="aesthetic"}',
        'select.filter="none"',
        'method.name="sft"',
        "refine.variants=1",
        "evaluate.num_prompts=1",
    ]
    command = ["run", job.recipe, *(part for text in sets for part in ("--set", text))]
    answer = call([*command, *options(*names)], tmp_path)
    assert answer.status == 0, answer.err

    pool = read_table(sorted(job.stage("generate").glob("part-*.parquet"))).to_pylist()
    scores = read_table(sorted(job.stage("score").glob("part-*.parquet"))).to_pylist()
    images = [decode(row["image"]["bytes"]) for row in pool]
    assert images[0].size == images[0].size[::-1]  # squares: nothing is cut off
    for name, by_hand in BY_HAND.items():
        expected = by_hand(images, [row["prompt"] for row in pool])
        found = {row["candidate"]: row["value"] for row in scores if row["reward"] == name}
        values = torch.tensor([found[row["id"]] for row in pool])
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
        identity = json.loads(next(r["identity"] for r in scores if r["reward"] == name))
        entry = REWARDS[name]
        assert isinstance(entry, Published)
        files = entry.files(entry.configured(name, settings_of(name)))
        assert identity["sha256"] == digest(files)

    distinct = {row["prompt"] for row in pool}
    cut = sum(len(prompt) > 77 for prompt in distinct)
    assert cut
    for name, tokens in (("hpsv2.1", 77), ("pickscore", 77), ("mps", 77), ("imagereward", 35)):
        assert f"{cut} of {len(distinct)} prompts cut at {tokens} tokens by {name}" in answer.err
    assert "by aesthetic" not in answer.err

    moved = tmp_path / "moved"
    settings = copied("hpsv2.1", moved)
    held = torch.load(moved / FILE["hpsv2.1"], weights_only=True)
    held["state_dict"]["visual.proj"] += 1
    torch.save(held, moved / FILE["hpsv2.1"])
    path = ["--set", f'reward."hpsv2.1".path={settings["path"]}']
    said = call([*command, *options(*names), *path], tmp_path).complaint
    assert "was made with reward.hpsv2.1.path = " in said
    assert "--redo score" in said


def test_clipscore_of_another_tower(tmp_path: Path) -> None:
    """Its own size of picture, and a tokenizer that lies elsewhere."""
    tower = tiny_clip(size=112)
    tower.save_pretrained(tmp_path)
    settings = {"path": str(tmp_path), "tokenizer": settings_of("pickscore")["tokenizer"]}
    found = rewards.load("clipscore", settings={"clipscore": settings})
    (shown,) = pictures(1, (112, 112))  # nothing is resized
    pixels = torch.from_numpy(np.asarray(shown) / 255).permute(2, 0, 1)[None].float()
    pixels = preprocess.normalized(pixels, preprocess.CLIP_MEAN, preprocess.CLIP_STD)
    tokenizer = CLIPTokenizer.from_pretrained(settings["tokenizer"])
    with torch.no_grad():
        image = tower.get_image_features(pixel_values=pixels).pooler_output
        words = tower.get_text_features(**tokenizer(["a dog"], return_tensors="pt")).pooler_output
    expected = F.cosine_similarity(image, words)
    torch.testing.assert_close(found.score([shown], ["a dog"]), expected, rtol=1e-5, atol=1e-5)
    assert "at 112" in found.identity["tower"]


def test_how_each_prepares_its_pictures() -> None:
    """As the authors' code does; scores of other ways differ."""
    middle = "RGB, pil bicubic antialias, middle 224"
    tensor = "RGB, tensor bicubic antialias, middle 224 (round)"
    found = {name: loaded(name).identity["preprocessing"] for name in PUBLISHED}
    assert found == {
        "hpsv2.1": tensor,
        "hpsv2.0": tensor,
        "pickscore": f"{middle} (floor)",
        "mps": f"{middle} (floor)",
        "aesthetic": f"{middle} (round)",
        "clipscore": f"{middle} (round)",
        "imagereward": f"{middle} (round)",
        "vqascore": "RGB, padded to a square, pil bicubic antialias, 112",
    }


@pytest.mark.parametrize("name", ["hpsv2.1", "pickscore"])
def test_another_tokenizer_is_another_identity(name: str, tmp_path: Path) -> None:
    """Two letters of its vocabulary change places."""
    settings = copied(name, tmp_path / "w")
    file = Path(settings["tokenizer"]) / "vocab.json"
    words = json.loads(file.read_text())
    file.write_text(json.dumps(words | {"a": words["b"], "b": words["a"]}))
    found = rewards.load(name, settings={name: settings})
    other = dict(loaded(name).identity)
    assert found.identity["tokenizer"] != other.pop("tokenizer")
    assert other.items() <= found.identity.items()


# --- one resizing, one encoding -------------------------------------------------------------


def write_pool(folder: Path, n: int = 6) -> Path:
    folder.mkdir()
    rows = []
    for i, image in enumerate(pictures(n, (70, 70))):
        shown = {"bytes": encode_png(image), "path": None}
        row = {"id": f"c{i}", "image": shown, "prompt": f"prompt {i % 2}"}
        rows.append(dict.fromkeys(CANDIDATE.names) | row)
    write_table(folder / "part-00000.parquet", rows, CANDIDATE)
    return folder


def test_rewards_that_see_the_same_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squares: PIL's square is made once for three rewards, the float one for both HPS."""
    made, resized = [], preprocess.Resized.__call__

    def counted(self: preprocess.Resized, image: Image.Image) -> Tensor:
        made.append(self.resize)
        return resized(self, image)

    monkeypatch.setattr(preprocess.Resized, "__call__", counted)
    (tmp_path / "out").mkdir()
    score(ScoreConfig(tuple(PUBLISHED), 4), write_pool(tmp_path / "pool"), tmp_path / "out", loaded)
    assert sorted(made) == ["pil"] * 6 + ["tensor"] * 6


def test_each_prompt_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    embed = clip.embed_texts

    def counted(model: Any, ids: Tensor) -> Tensor:
        asked.append(len(ids))
        return embed(model, ids)

    monkeypatch.setattr("craftune.rewards.cosine.embed_texts", counted)
    rewards.unload()
    (tmp_path / "out").mkdir()
    score(ScoreConfig(("pickscore",), 2), write_pool(tmp_path / "pool"), tmp_path / "out", loaded)
    rewards.unload()
    assert sum(asked) == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_loaded_once(name: str) -> None:
    assert loaded(name) is loaded(name)
    other = rewards.load(name, settings={name: settings_of(name) | {"dtype": "bfloat16"}})
    assert other is not loaded(name)
    assert other.identity["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in PUBLISHED
        for dtype in ("bfloat16", "float16")
        if (name, dtype) != ("vqascore", "float16")  # T5 overflows; the settings refuse it
    ],
)
def test_gradients_in_half_precision(name: str, dtype: str) -> None:
    """They reach the pixels, finite, in float32 and along the exact ones."""
    settings = {name: settings_of(name) | {"dtype": dtype}}
    grads = []
    for reward in (loaded(name), rewards.load(name, settings=settings)):
        pixels = torch.rand(2, 3, 90, 80, generator=torch.Generator().manual_seed(0))
        pixels.requires_grad_()
        assert reward.gradient is not None
        values = reward.gradient(pixels, ["a", "b"])
        assert values.dtype == torch.float32
        grads.append(torch.autograd.grad(values.sum() * 1e-4, pixels)[0])  # as of a small loss
    assert torch.isfinite(grads[1]).all()
    assert F.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > 0.95
    assert grads[1].norm().item() == pytest.approx(grads[0].norm().item(), rel=0.3)


# --- what can be wrong ----------------------------------------------------------------------


def copied(name: str, folder: Path) -> dict[str, str]:
    """The tiny checkpoint in a folder of its own, to be damaged."""
    given = settings_of(name)
    shutil.copytree(given["path"], folder)
    return {k: v.replace(given["path"], str(folder)) for k, v in given.items()}


def complaint(name: str, settings: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        rewards.load(name, settings={name: settings})
    assert "\n" not in str(caught.value)
    return str(caught.value)


FILE = {
    "hpsv2.1": "HPS_v2.1_compressed.pt",
    "hpsv2.0": "HPS_v2_compressed.pt",
    "pickscore": "model.safetensors",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth",
    "clipscore": "model.safetensors",
    "imagereward": "ImageReward.pt",
    "mps": "MPS_overall_checkpoint.pth",
    "vqascore": "pytorch_model-00002-of-00002.bin",
}


@pytest.mark.parametrize("name", FILE)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    settings = copied(name, tmp_path / "w")
    (tmp_path / "w" / FILE[name]).unlink()
    said = complaint(name, settings)
    assert FILE[name] in said
    assert str(tmp_path / "w") in said
    assert f"reward.{name}." in said or f'reward."{name}".' in said


@pytest.mark.parametrize("name", FILE)
def test_a_truncated_file_is_named(name: str, tmp_path: Path) -> None:
    settings = copied(name, tmp_path / "w")
    path = tmp_path / "w" / FILE[name]
    path.write_bytes(path.read_bytes()[:-1000])
    said = complaint(name, settings)
    assert f"{path}: damaged" in said
    assert "fetch it again" in said


def test_no_weights_and_no_network() -> None:
    """The hub is asked, and the message says what to fetch from where."""
    for name in PUBLISHED:
        said = complaint(name, {})
        assert "the hub did not give it" in said
        assert "https://huggingface.co/" in said


def test_a_hub_that_cannot_be_reached_is_asked_once_and_then_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question takes half a minute of repeated trying."""
    asked = []

    def download(repo: str, name: str, *, local_files_only: bool = False) -> str:
        asked.append((name, local_files_only))
        if name == "b.bin":
            return str(tmp_path / name)
        raise LocalEntryNotFoundError("cannot be reached")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    names = ("a.safetensors", "a.json", "b.bin")
    assert find("some/model", names, "path") == tmp_path / "b.bin"
    assert asked == [("a.safetensors", False), ("a.json", True), ("b.bin", True)]
    with pytest.raises(UserError, match=r"did not give it \(cannot be reached"):
        find("some/model", names[:2], "path")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("visual.proj"), "lacks 'visual_projection.weight'"),
        (lambda w: w.pop("visual.conv1.weight"), "lacks 'vision_model.embeddings.patch"),
        (lambda w: w.update(odd=torch.ones(1)), "has 'odd'"),
        (lambda w: w.update({"ln_final.bias": torch.ones(3)}), r"'.*final_layer_norm.bias' has s"),
        (
            lambda w: w.update({"visual.conv1.weight": torch.ones(96, 3, 28, 28)}),
            "vision tower is 96 wide",
        ),
    ],
)
def test_weights_of_another_network(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    settings = copied("hpsv2.1", tmp_path / "w")
    path = tmp_path / "w" / FILE["hpsv2.1"]
    held = torch.load(path, weights_only=True)
    change(held["state_dict"])
    torch.save(held, path)
    with pytest.raises(UserError, match=said):
        rewards.load("hpsv2.1", settings={"hpsv2.1": settings})


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    settings = copied("hpsv2.1", tmp_path / "w")
    torch.save({"state_dict": Hostile()}, tmp_path / "w" / FILE["hpsv2.1"])
    assert "files that run code are not read" in complaint("hpsv2.1", settings)
    assert not (tmp_path / "ran").exists()


def test_another_model_s_folder(tmp_path: Path) -> None:
    settings = copied("pickscore", tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text('{"model_type": "blip"}')
    assert "config.json says 'blip', expected a CLIP model" in complaint("pickscore", settings)


def test_a_tensor_too_many_or_of_another_shape(tmp_path: Path) -> None:
    settings = copied("clipscore", tmp_path / "w")
    path = tmp_path / "w" / FILE["clipscore"]
    weights = load_file(path)
    save_file(weights | {"extra.weight": torch.ones(1)}, path)
    assert "also holds 'extra.weight'" in complaint("clipscore", settings)
    wrong = {"visual_projection.weight": torch.ones(3, 3)}
    save_file(weights | wrong, path)
    assert "has shape (3, 3), expected (32, 64)" in complaint("clipscore", settings)


def test_weights_in_several_files_are_all_read_and_count(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    one.write_text("1")
    with pytest.raises(UserError, match=r"the folder holds no two\.safetensors"):
        parts(index, str(tmp_path), "key")
    two.write_text("2")
    assert parts(index, str(tmp_path), "key") == [one, two]
    assert parts(one, str(tmp_path), "key") == [one]
    both = digest({"weights 0": one, "weights 1": two})
    two.write_text("changed")
    assert digest({"weights 0": one, "weights 1": two}) not in (both, digest({"weights 0": one}))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"hpsv2": {}}, "reward.hpsv2: unknown reward 'hpsv2'; did you mean 'hpsv2.1'.* quoted"),
        ({"jpeg-compressibility": {}}, "unknown reward 'jpeg-compressibility'"),
        ({"pickscore": {"pth": "x"}}, 'reward."pickscore".pth: .*did you mean .path'),
        ({"pickscore": {"dtype": "int8"}}, 'reward."pickscore".dtype: .*got .int8'),
    ],
)
def test_settings_are_checked_before_anything_loads(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        rewards.check_settings(section)

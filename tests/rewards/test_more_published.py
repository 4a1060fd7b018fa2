"""ImageReward, MPS, VQAScore and the JPEG proxy: pickles, full sizes, settings, what is special."""

import io
import json
import os
import pickle
import posix
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import more_by_hand
import numpy as np
import pytest
import torch
from checkpoints import (
    MED_CONFIG,
    MPS_CLASSES,
    T5_CONFIG,
    TINY_T5,
    head_weights,
    imagereward_shapes,
    loaded,
    mps_cross_shapes,
    mps_weights,
    open_clip_shapes,
    pickled_network,
    settings_of,
    tiny_clip,
    write_imagereward,
    write_mps,
    write_vqascore,
)
from PIL import Image
from safetensors.torch import save_file
from test_reward_contract import PROMPTS, pictures
from torch import Tensor, nn
from transformers import CLIPModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

from craftune import rewards
from craftune.errors import UserError
from craftune.images import to_tensor
from craftune.rewards.aesthetic import head_of
from craftune.rewards.blip import load_text, load_vision, part
from craftune.rewards.clip import from_open_clip
from craftune.rewards.flant5 import AFTER, BEFORE, load_t5
from craftune.rewards.jpeg_proxy import decoded
from craftune.rewards.mps import load_mps
from craftune.rewards.preprocess import PaddedSquare
from craftune.rewards.shells import read_network

META = torch.device("meta")


# --- the pickled network: what is read, and what is refused ---------------------------------


def test_the_pickled_network_gives_its_state(tmp_path: Path) -> None:
    """Parameters and kept buffers by name, of classes that do not exist; float16 as stored."""
    write_mps(tmp_path)
    held = read_network(tmp_path / "MPS_overall_checkpoint.pth", "test")
    expected = mps_weights()
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(held[name]) is Tensor
        assert torch.equal(held[name], tensor)


def calling(function: Any, *arguments: Any) -> Any:
    """An object whose pickle calls a function."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return function, arguments

    return Hostile()


HOSTILE: dict[str, Callable[[str], Any]] = {
    "os.system": lambda ran: calling(os.system, f"touch {ran}"),
    "posix": lambda ran: calling(posix.open, ran, os.O_CREAT),
    "builtins.eval": lambda ran: calling(eval, f"open({ran!r}, 'w')"),
    "builtins.exec": lambda ran: calling(exec, f"open({ran!r}, 'w')"),
    "builtins.open": lambda ran: calling(open, ran, "w"),
    "subprocess": lambda ran: calling(subprocess.check_call, ["touch", ran]),
    "nested": lambda ran: calling(calling, calling(os.system, f"touch {ran}")),
    "getattr": lambda ran: calling(getattr, calling(__import__, "os"), "system"),
    "in a list": lambda ran: [1, {"a": (calling(os.system, f"touch {ran}"),)}],
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_pickle_is_refused(tmp_path: Path, kind: str, protocol: int) -> None:
    """Alone and hidden in a network; nothing that it asks for happens."""
    ran, file = tmp_path / "ran", tmp_path / "w.pth"
    network = nn.Sequential(nn.Linear(2, 2))
    vars(network)["extra"] = HOSTILE[kind](str(ran))
    for held in (HOSTILE[kind](str(ran)), network):
        torch.save(held, file, pickle_protocol=protocol)
        with pytest.raises(UserError) as caught:
            read_network(file, "reward.mps.path")
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not ran.exists()


def replaced(file: Path, data: bytes) -> None:
    """A torch file with another pickle inside."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    buffer.seek(0)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))


@pytest.mark.parametrize(
    "written",
    [
        b"\x80\x02cos\nsystem\nX\x07\x00\x00\x00touch @\x85R.",
        b"\x80\x02ctransformers.x\nos.system\nX\x07\x00\x00\x00touch @\x85R.",
        b"\x80\x02(X\x07\x00\x00\x00touch @ios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93X\x07\x00\x00\x00touch @\x85R.",
        b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}X\x0c\x00\x00\x00__setstate__"
        b"cos\nsystem\nsbX\x07\x00\x00\x00touch @b.",
        b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81X\x07\x00\x00\x00touch @\x85R.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02cos\nsystem\n0ctorch.nn.modules.linear\nLinear\n)\x81.",
    ],
    ids=["reduce", "dotted", "inst", "stack", "setstate", "call", "extension", "dropped"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_written_by_hand_it_is_refused_too(tmp_path: Path, written: bytes) -> None:
    ran, file = tmp_path / "ran", tmp_path / "w.pth"
    command = f"touch {ran}".encode()
    packed = len(command).to_bytes(4, "little") + command
    replaced(file, written.replace(b"\x07\x00\x00\x00touch @", packed))
    with pytest.raises(UserError, match=r"reward\.mps\.path"):
        read_network(file, "reward.mps.path")
    assert not ran.exists()


def test_the_reward_refuses_it(tmp_path: Path) -> None:
    settings = write_mps(tmp_path / "w")
    ran = tmp_path / "ran"
    hostile = calling(os.system, f"touch {ran}")
    torch.save(hostile, tmp_path / "w" / "MPS_overall_checkpoint.pth")
    with pytest.raises(UserError, match=r"reward.mps.path: .*names 'posix.system'.* not read"):
        rewards.load("mps", settings={"mps": settings})
    assert not ran.exists()


def test_these_pickles_would_run_elsewhere(tmp_path: Path) -> None:
    """The same object read by plain pickle does what it asks for, so the tests above bite."""
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(calling(os.system, f"touch {ran}")))
    assert ran.exists()


def test_what_is_allowed_while_reading_is_not_allowed_later(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    write_mps(tmp_path)
    read_network(tmp_path / "MPS_overall_checkpoint.pth", "test")
    assert set(torch.serialization.get_safe_globals()) == before


# --- MPS ------------------------------------------------------------------------------------


def test_the_safetensors_port_scores_the_same(tmp_path: Path) -> None:
    """imscore's names begin with "mps."; its file has no pickle."""
    tokenizer = settings_of("mps")["tokenizer"]
    weights = {f"mps.{name}": tensor for name, tensor in mps_weights().items()}
    save_file(weights, tmp_path / "model.safetensors")
    port = {"path": str(tmp_path), "tokenizer": tokenizer}
    found = rewards.load("mps", settings={"mps": port})
    assert torch.equal(found.score(pictures(), PROMPTS), loaded("mps").score(pictures(), PROMPTS))
    assert found.identity != loaded("mps").identity


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_the_threshold_counts_and_is_recorded(threshold: float) -> None:
    settings = settings_of("mps") | {"threshold": threshold}
    found = rewards.load("mps", settings={"mps": settings})
    assert found.identity["threshold"] == str(threshold)
    expected = more_by_hand.mps(pictures(2), PROMPTS[:2], threshold)
    values = found.score(pictures(2), PROMPTS[:2])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    default = loaded("mps").score(pictures(2), PROMPTS[:2])
    assert torch.equal(values, default) == (threshold == 0.3)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, "a"])
def test_a_threshold_out_of_range(threshold: Any) -> None:
    with pytest.raises(UserError, match=r'reward."mps".threshold'):
        rewards.check_settings({"mps": {"threshold": threshold}})


def test_a_pickled_network_of_another_kind(tmp_path: Path) -> None:
    settings = write_mps(tmp_path)
    file = tmp_path / "MPS_overall_checkpoint.pth"
    weights = mps_weights()
    for change, said in (
        ({"cross_model.odd": torch.ones(1)}, "also holds 'odd'"),
        ({"cross_model.layers.0.0.fn.to_out.weight": torch.ones(3, 3)}, r"has shape \(3, 3\)"),
    ):
        pickled_network(weights | change, MPS_CLASSES, file)
        with pytest.raises(UserError, match=said):
            rewards.load("mps", settings={"mps": settings})
    short = {k: v for k, v in weights.items() if "to_q" not in k}
    pickled_network(short, MPS_CLASSES, file)
    with pytest.raises(UserError, match=r"lacks 'cross_model.layers.0.0.fn.to_q.weight'"):
        rewards.load("mps", settings={"mps": settings})


# --- ImageReward ----------------------------------------------------------------------------


def test_the_config_may_lie_elsewhere(tmp_path: Path) -> None:
    settings = write_imagereward(tmp_path / "w")
    (tmp_path / "w" / "med_config.json").rename(tmp_path / "med_config.json")
    with pytest.raises(UserError, match=r"reward.imagereward.config .*holds no med_config.json"):
        rewards.load("imagereward", settings={"imagereward": settings})
    alone = settings | {
        "path": str(tmp_path / "w" / "ImageReward.pt"),
        "config": str(tmp_path / "med_config.json"),
    }
    found = rewards.load("imagereward", settings={"imagereward": alone})
    expected = loaded("imagereward").score(pictures(), PROMPTS)
    assert torch.equal(found.score(pictures(), PROMPTS), expected)
    (tmp_path / "med_config.json").write_text('{"hidden_size": 24}')
    rewards.unload()
    with pytest.raises(UserError, match=r"med_config.json lacks 'hidden_act'"):
        rewards.load("imagereward", settings={"imagereward": alone})


def test_the_words_past_35_tokens_are_not_read() -> None:
    """[CLS], 33 letters, [SEP]; the reward says which prompts lose some."""
    reward = loaded("imagereward")
    assert reward.limit is not None
    assert reward.limit.tokens == 35
    fits, longer = "a " * 33, "a " * 34
    assert not reward.limit.cuts(fits)
    assert reward.limit.cuts(longer)
    (image,) = pictures(1)
    values = [reward.score([image], [text]).item() for text in (fits, longer, "a " * 32)]
    assert values[0] == values[1] != values[2]


# --- VQAScore -------------------------------------------------------------------------------


def test_a_batch_of_short_and_long_prompts() -> None:
    """Padding is not read: each as if alone."""
    reward = loaded("vqascore")
    prompts = ["a", "two very large yellow dogs on a small green boat " * 3, "a cat"]
    together = reward.score(pictures(3), prompts)
    alone = [reward.score([i], [p]) for i, p in zip(pictures(3), prompts, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-7)
    expected = more_by_hand.vqascore(pictures(3, (112, 112)), prompts)
    found = reward.score(pictures(3, (112, 112)), prompts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_tower_among_the_weights_is_preferred(tmp_path: Path) -> None:
    """As upstream loads it; its entries are named below vision_tower.vision_tower."""
    settings = write_vqascore(tmp_path)
    expected = rewards.load("vqascore", settings={"vqascore": settings}).score(pictures(), PROMPTS)
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    tower = tiny_clip(size=112).vision_model.state_dict()
    own = {f"vision_tower.vision_tower.vision_model.{k}": v for k, v in tower.items()}
    torch.save(own, tmp_path / "own.bin")
    index["weight_map"] |= dict.fromkeys(own, "own.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    rewards.unload()
    same = rewards.load("vqascore", settings={"vqascore": settings}).score(pictures(), PROMPTS)
    assert torch.equal(same, expected)
    torch.save({name: tensor * 1.1 for name, tensor in own.items()}, tmp_path / "own.bin")
    rewards.unload()
    other = rewards.load("vqascore", settings={"vqascore": settings}).score(pictures(), PROMPTS)
    assert not torch.allclose(other, expected)


def test_another_family_s_config(tmp_path: Path) -> None:
    settings = write_vqascore(tmp_path)
    for key, value in (("mm_projector_type", "linear"), ("model_type", "t5")):
        config = T5_CONFIG | TINY_T5 | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"config.json says {key} '{value}', expected"):
            rewards.load("vqascore", settings={"vqascore": settings})


def test_a_question_of_just_2048_tokens_is_read_whole() -> None:
    """System message, one for the picture, question; letters are tokens here."""
    limit = loaded("vqascore").limit
    assert limit is not None
    assert limit.tokens == 2048
    tokenizer = T5Tokenizer.from_pretrained(settings_of("vqascore")["tokenizer"])
    before, empty = (len(tokenizer(part)["input_ids"]) for part in (BEFORE, AFTER.format("a")))
    fits = "a" * (2048 - before - 1 - empty + 1)
    assert not limit.cuts(fits)
    assert limit.cuts(fits + "a")


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (41, 30), (30, 41), (35, 35), (1, 90)])
def test_a_padded_square(size: tuple[int, int]) -> None:
    """At its own size: the picture in the middle, CLIP's mean colour around it."""
    (image,) = pictures(1, size)
    edge = max(size)
    square = PaddedSquare(edge)
    found = square.plan(size)(image).permute(1, 2, 0).numpy()
    left, top = (edge - size[0]) // 2, (edge - size[1]) // 2
    expected = np.full((edge, edge, 3), (122, 116, 104), np.uint8)
    expected[top : top + size[1], left : left + size[0]] = np.asarray(image)
    assert (found == expected).all()
    floats = square.differentiable(to_tensor([image]))[0].permute(1, 2, 0)
    torch.testing.assert_close(floats * 255, torch.from_numpy(expected).float(), rtol=0, atol=1e-3)


# --- full size, on the meta device ----------------------------------------------------------


def bare(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def count(*networks: nn.Module) -> int:
    return sum(p.numel() for network in networks for p in network.parameters())


def test_imagereward_at_full_size() -> None:
    """Every published key, strictly; the image tower has ViT-L/16's 303 M weights."""
    shapes = imagereward_shapes(
        vision=(1024, 24), text=(768, 12), words=30524, patch=16, places=512
    )
    held = bare(shapes)
    with META:
        vision = load_vision(
            part(held, "blip.visual_encoder."), "test", META, torch.float32, head=64
        )
        text = load_text(
            part(held, "blip.text_encoder."), MED_CONFIG, 1024, "test", META, torch.float32
        )
    assert vision.config.num_attention_heads == 16
    assert vision.config.image_size == 224
    assert text.config.encoder_hidden_size == 1024
    assert count(vision) == 303_301_632
    head = head_of(head_weights(768), 768, "test", torch.device("cpu"))
    assert count(head) == 927_969


def test_mps_at_full_size() -> None:
    """Every published key, strictly; the cross module's 118,497,280 weights."""
    clip = open_clip_shapes(embedding=1024, vision=(1280, 32), text=(1024, 24))
    held = {f"model.{name}": tensor for name, tensor in from_open_clip(bare(clip), "").items()}
    held |= bare(mps_cross_shapes(1024, 1024, 4))
    held["model.text_model.embeddings.position_ids"] = torch.empty(1, 77, device="meta")
    with META:
        model, cross = load_mps(held, "test", META, torch.float32)
    assert isinstance(model, CLIPModel)
    assert count(model) == 986_109_441
    norms = 8 * 1024  # biases of zero, buffers upstream
    assert count(cross) - norms == 118_497_280
    assert len(cross.layers) == 4


@pytest.mark.parametrize(("width", "hidden", "heads"), [(4096, 10240, 64), (2048, 5120, 32)])
def test_clip_flant5_at_full_size(width: int, hidden: int, heads: int) -> None:
    """XXL and XL: T5's own names of transformers, the projector's and nothing else."""
    config: dict[str, Any] = T5_CONFIG | {"d_model": width, "d_ff": hidden, "num_heads": heads}
    given = {k: v for k, v in config.items() if not k.startswith(("mm_", "model_"))}
    with META:
        state = T5ForConditionalGeneration(T5Config(**given)).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        shapes |= {"mm_projector.0.weight": (width, 1024), "mm_projector.0.bias": (width,)}
        shapes |= {"mm_projector.2.weight": (width, width), "mm_projector.2.bias": (width,)}
        projector, t5 = load_t5(bare(shapes), config, "test", META, torch.bfloat16)
    assert count(projector) == 1024 * width + width * width + 2 * width
    assert t5.lm_head.weight is not t5.shared.weight


# --- the JPEG proxy -------------------------------------------------------------------------


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * (a - b).square().mean().log10().item()


@pytest.mark.parametrize("quality", [10, 25, 50, 75, 90, 95])
def test_the_proxy_is_near_pillow_s_codec(quality: int) -> None:
    """It is at least 11 dB nearer to what Pillow decodes than that is to the picture."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray((rng.random((24, 24, 3)) * 255).astype(np.uint8))
    image = noise.resize((200, 140), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    real, shown = to_tensor([Image.open(buffer)]), to_tensor([image])
    assert psnr(decoded(shown, quality), real) > psnr(shown, real) + 11


def test_a_plain_picture_loses_nothing() -> None:
    values = loaded("jpeg-proxy").score([Image.new("RGB", (48, 48), (128,) * 3)] * 2, ["", ""])
    assert values.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_the_size_is_pillow_s_at_95() -> None:
    """In kB of 1,000 bytes; smaller is better or worse."""
    shown = [image.resize((90, 70)) for image in pictures(2)]
    sizes = []
    for image in shown:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    for name, sign in (("jpeg-compressibility", -1), ("jpeg-incompressibility", 1)):
        values = loaded(name).score(shown, ["", ""])
        assert values.tolist() == pytest.approx([sign * size for size in sizes])


def test_the_proxy_orders_pictures_as_their_size_does() -> None:
    """From smooth to noisy, both fall with every step."""
    rng = np.random.default_rng(1)
    noise = rng.integers(-60, 60, (64, 64, 3))
    base = np.asarray(pictures(1)[0]).astype(int)
    shown = [
        Image.fromarray((base + share * noise).clip(0, 255).astype(np.uint8))
        for share in (0, 0.1, 0.3, 0.6, 1)
    ]
    for name in ("jpeg-proxy", "jpeg-compressibility"):
        values = loaded(name).score(shown, [""] * 5)
        assert (values.diff() < 0).all()

"""ImageReward, MPS and BLIP number by number: what the upstream code gave on the same weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from checkpoints import weight
from test_clip_golden import CPU, close, golden, pixels, unnormalized
from torch import Tensor
from transformers import BlipConfig, BlipForQuestionAnswering

from craftune.rewards.aesthetic import head_of
from craftune.rewards.blip import first_tokens, load_text, load_vision, part, vision_key
from craftune.rewards.cross import counted, cross_of
from craftune.rewards.imagereward import MEAN, STD
from craftune.rewards.weights import load_strictly


def values(keys: Mapping[str, Any], std: Mapping[str, float]) -> dict[str, Tensor]:
    """By the rule of the golden numbers; `std` by the beginning of a key."""
    found = {}
    for key, shape in keys.items():
        spread = next(value for start, value in std.items() if key.startswith(start))
        found[key] = weight(key, tuple(shape), spread)
    return found


@torch.no_grad()
def test_imagereward() -> None:
    d = golden("imagereward_tiny")
    held = values(d["keys"], {"mlp": 0.1, "blip": 0.2})
    vision = load_vision(part(held, "blip.visual_encoder."), "", CPU, torch.float32, head=16)
    med = {
        "hidden_act": "gelu",
        "hidden_size": 24,
        "intermediate_size": 96,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "vocab_size": 30524,
    }
    text = load_text(part(held, "blip.text_encoder."), med, 32, "", CPU, torch.float32)
    head = head_of(part(held, "mlp."), 24, "", CPU)
    close(vision(pixel_values=pixels(2)).last_hidden_state[:, 0], d["vision_cls"])
    read = torch.stack((torch.tensor(d["input_ids"]), torch.tensor(d["attention_mask"])), 1)
    first = first_tokens(vision, text, unnormalized(pixels(2)), read)
    close(first, d["text_cls"])
    raw = head(first).squeeze(-1)
    close(raw, d["raw"])
    close((raw - MEAN) / STD, d["reward"])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@torch.no_grad()
def test_mps() -> None:
    """Under each threshold, the words that count and the picture's first token."""
    d = golden("mps_cross_tiny")
    held = values(d["keys"], {"cross": 0.15})
    frequencies = 10_000 ** -(torch.arange(0, 64, 2).float() / 64)
    for key in held:
        if key.endswith("norm.bias"):
            held[key] = torch.zeros(32)
        elif key.endswith("inv_freq"):
            held[key] = frequencies
    weights = {k: v for k, v in part(held, "cross_model.").items() if not k.endswith("inv_freq")}
    cross = load_strictly(cross_of(held, ""), weights, "", CPU, torch.float32)
    words, seen, condition = drawn(11, 1, 77, 32), drawn(12, 1, 257, 32), drawn(13, 1, 77, 32)
    whole = drawn(14, 1, 32)
    assert set(d["results"]) == {"0.3", "0.01", "0.6"}
    for threshold, expected in d["results"].items():
        kept = counted(words, condition[0], float(threshold))
        assert kept.sum() == expected["kept"]
        first = cross(seen, words, kept)[:, 0]
        close(F.normalize(first)[0], expected["feature"])
        score = 100 * F.cosine_similarity(first, whole)
        torch.testing.assert_close(
            score, torch.tensor(expected["score_scale100"]), rtol=1e-5, atol=1e-5
        )


def test_each_prompt_has_a_best_word_of_its_own() -> None:
    """One whose words all fit a hundred times less keeps as many."""
    words, condition = drawn(11, 1, 77, 32), drawn(13, 1, 77, 32)
    alone = counted(words, condition[0], 0.6)
    both = counted(torch.cat((words, 0.01 * words)), condition[0], 0.6)
    assert 0 < alone.sum() < 77
    assert torch.equal(both, alone.expand(2, -1))


YES, NO, DECODE = 2748, 2053, 30522


def upstream_key(key: str, vision: Mapping[str, str]) -> str:
    """The original's name of an entry of `BlipForQuestionAnswering`."""
    if key.startswith("vision_model."):
        return "visual_encoder." + vision[key.removeprefix("vision_model.")]
    if key == "text_decoder.cls.predictions.decoder.weight":
        return "text_decoder.bert.embeddings.word_embeddings.weight"
    return key


@torch.no_grad()
def test_blip_answers_questions() -> None:
    """Unpadded, as transformers' cross attention ignores the mask of the question."""
    d = golden("blip_vqa_tiny")
    size = d["config"]
    same = {"num_hidden_layers": size["layers"], "num_attention_heads": size["heads"]}
    width = {"hidden_size": size["dim"], "intermediate_size": 4 * size["dim"]}
    text = {"vocab_size": 30524, "encoder_hidden_size": 24, "layer_norm_eps": 1e-12}
    vision = {"image_size": 480, "patch_size": 16, "layer_norm_eps": 1e-6}
    config = BlipConfig(
        text_config=same | width | text | {"hidden_act": "gelu", "is_decoder": True},
        vision_config=same | width | vision | {"hidden_act": "gelu"},
    )
    model = BlipForQuestionAnswering(config).eval()
    norms = ["norm1", "norm2"]
    linear = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    names = ["cls_token", "pos_embed", "norm.weight", "norm.bias"] + [
        f"{module}.{kind}"
        for module in ["patch_embed.proj"]
        + [f"blocks.{i}.{name}" for i in range(size["layers"]) for name in norms + linear]
        for kind in ("weight", "bias")
    ]
    upstream = {vision_key(name): name for name in names}
    state = {
        key: weight(upstream_key(key, upstream), tuple(tensor.shape), 0.2)
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True)
    seen = np.random.RandomState(1234).standard_normal((2, 3, 480, 480)).astype(np.float32)
    for row, expected in enumerate(d["p_yes_normalised"]):
        ids = torch.tensor(d["input_ids"][row])
        ids = ids[torch.tensor(d["attention_mask"][row]) == 1][None]
        shown = model.vision_model(pixel_values=torch.from_numpy(seen[row : row + 1]))
        asked = model.text_encoder(input_ids=ids, encoder_hidden_states=shown.last_hidden_state)
        answer = model.text_decoder(
            input_ids=torch.tensor([[DECODE]]), encoder_hidden_states=asked.last_hidden_state
        )
        yes, _ = answer.logits[0, 0, [YES, NO]].softmax(0)
        close(yes, expected)

"""ImageReward, MPS and VQAScore of tiny checkpoints, with transformers' own parts, image by image.

The weights are those that tests/checkpoints.py writes; nothing of craftune's networks runs here.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoints import (
    T5_CONFIG,
    TINY_T5,
    imagereward_weights,
    mps_weights,
    settings_of,
    tiny_clip,
    vqascore_weights,
)
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from craftune.rewards.blip import vision_key
from craftune.rewards.clip import config_of


def processed(image: Image.Image, size: int = 224) -> Tensor:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return processor(images=image, return_tensors="pt")["pixel_values"]


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


@torch.no_grad()
def imagereward(images: list[Image.Image], prompts: list[str]) -> Tensor:
    """`(mlp(first token) - mean) / std`."""
    folder = Path(settings_of("imagereward")["path"])
    med = json.loads((folder / "med_config.json").read_text())
    weights = imagereward_weights(med["vocab_size"])
    eye = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=224,
            patch_size=32,
            layer_norm_eps=1e-6,
        )
    ).eval()
    state = under(weights, "blip.visual_encoder.")
    eye.load_state_dict({vision_key(k): v for k, v in state.items()})
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "layer_norm_eps",
    )
    config = BlipTextConfig(
        **{name: med[name] for name in names},
        encoder_hidden_size=64,
        is_decoder=True,
        bos_token_id=None,
        sep_token_id=None,
    )
    reader = BlipTextModel(config, add_pooling_layer=False).eval()
    words = under(weights, "blip.text_encoder.")
    reader.load_state_dict({k: v for k, v in words.items() if "position_ids" not in k})
    tokenizer = BertTokenizer.from_pretrained(folder)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        read = tokenizer(prompt, truncation=True, max_length=35, return_tensors="pt")
        seen = eye(pixel_values=processed(image)).last_hidden_state
        x = reader(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            encoder_hidden_states=seen,
        ).last_hidden_state[:, 0]
        for number in (0, 2, 4, 6, 7):
            layer = under(weights, f"mlp.layers.{number}.")
            x = F.linear(x, layer["weight"], layer["bias"])
        found.append((x.flatten() - 0.16717362830052426) / 1.0333394966054072)
    return torch.cat(found)


def crossed(weights: dict[str, Tensor], x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """MPS's cross module written out: one picture, tokens `[n, width]`, heads one by one."""
    swiglu = lambda v: F.silu(v.chunk(2, -1)[1]) * v.chunk(2, -1)[0]  # noqa: E731
    for number in range(2):
        w = under(weights, f"cross_model.layers.{number}.0.fn.")
        y = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"])
        k, v = (words @ w["to_kv.weight"].T).chunk(2, -1)
        heads = (y @ w["to_q.weight"].T).split(64, -1)
        out = torch.cat([((q / 8) @ k.T + mask).softmax(-1) @ v for q in heads], -1)
        forward = swiglu(y @ w["ff.0.weight"].T) @ w["ff.2.weight"].T
        x = x + out @ w["to_out.weight"].T + forward

        w = under(weights, f"cross_model.layers.{number}.1.fn.")
        y = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"])
        fused = y @ w["fused_attn_ff_proj.weight"].T
        q, k, v, hidden = fused.split((128, 64, 64, fused.shape[-1] - 256), -1)
        turns = torch.outer(torch.arange(len(x)).float(), w["rotary_emb.inv_freq"])
        turn = torch.polar(torch.ones_like(turns), turns)

        def rotated(z: Tensor, turn: Tensor = turn) -> Tensor:
            both = torch.complex(*z.chunk(2, -1)) * turn
            return torch.cat((both.real, both.imag), -1)

        heads = [rotated(q) / 8 for q in q.split(64, -1)]
        out = torch.cat([(q @ rotated(k).T).softmax(-1) @ v for q in heads], -1)
        x = x + out @ w["attn_out.weight"].T + swiglu(hidden) @ w["ff_out.1.weight"].T
    return x


@torch.no_grad()
def mps(images: list[Image.Image], prompts: list[str], threshold: float = 0.3) -> Tensor:
    """`100 cos(prompt, first token of the picture that has read the prompt)`."""
    weights = {k: v.float() for k, v in mps_weights().items() if "position_ids" not in k}
    clip = under(weights, "model.")
    model: Any = CLIPModel(config_of(clip, "gelu", 80, 64, "")).eval()
    model.load_state_dict(clip)
    tokenizer = CLIPTokenizer.from_pretrained(settings_of("mps")["tokenizer"])

    def read(text: str) -> tuple[Tensor, Tensor]:
        ids = tokenizer(text, truncation=True, max_length=77, padding="max_length")["input_ids"]
        out = model.text_model(torch.tensor([ids]))
        project = model.text_projection
        return project(out.last_hidden_state)[0], project(out.pooler_output)[0]

    condition, _ = read(
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
        "structure, instance, texture, quantity, attributes, position, number, location, word, "
        "things."
    )
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        words, whole = read(prompt)
        fit = (words @ condition.T).max(1).values
        mask = torch.where(fit / fit.max() > threshold, 0, -torch.inf)
        states = model.vision_model(processed(image)).last_hidden_state
        first = crossed(weights, model.visual_projection(states)[0], words, mask)[0]
        found.append(model.logit_scale.exp() * F.cosine_similarity(first, whole, dim=0))
    return torch.stack(found)


@torch.no_grad()
def vqascore(images: list[Image.Image], prompts: list[str]) -> Tensor:
    """`exp(-loss)` of T5 on the answer, for square pictures."""
    config = T5_CONFIG | TINY_T5
    weights = vqascore_weights(config)
    t5 = T5ForConditionalGeneration(
        T5Config(**{k: v for k, v in config.items() if not k.startswith(("mm_", "model_"))})
    ).eval()
    t5.load_state_dict({k: weights[k] for k in t5.state_dict()})
    t5.shared.weight = torch.nn.Parameter(weights["shared.weight"])  # Flan-T5's are not tied
    t5.encoder.embed_tokens = t5.decoder.embed_tokens = t5.shared
    t5.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
    assert not torch.equal(t5.lm_head.weight, t5.shared.weight)
    tower = tiny_clip(size=112).vision_model
    tokenizer = T5Tokenizer.from_pretrained(settings_of("vqascore")["tokenizer"])
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        asked = f'Does this figure show "{prompt}"? Please answer yes or no.'
        whole = f"{system} USER: <image>\n{asked} ASSISTANT: "
        before, after = (
            t5.shared(tokenizer(chunk, return_tensors="pt")["input_ids"])
            for chunk in whole.split("<image>")
        )
        states = tower(processed(image, 112), output_hidden_states=True).hidden_states
        x = states[-2][:, 1:]
        w = under(weights, "mm_projector.")
        x = F.gelu(F.linear(x, w["0.weight"], w["0.bias"]))
        x = F.linear(x, w["2.weight"], w["2.bias"])
        labels = tokenizer("Yes", return_tensors="pt")["input_ids"]
        loss = t5(inputs_embeds=torch.cat((before, x, after), 1), labels=labels).loss
        found.append(torch.exp(-loss))
    return torch.stack(found)

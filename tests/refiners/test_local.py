"""The refiner "transformers" with a random chat model of a few thousand weights."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from craftune.config import ChatConfig, RefineConfig
from craftune.errors import UserError
from craftune.records import Prompt, Refined, prompt_id, read_rows, write_rows
from craftune.refiners import local, made_from
from craftune.refiners.chat import Reply, Request
from craftune.refiners.local import draw_tokens
from craftune.stages.refine import refine

TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|model|>{% endif %}"
)
WORDS = [f"w{i}" for i in range(40)] + ["\n"] * 1
REQUESTS = [Request(f"w{i} " * (3 * i + 1), 100 + i) for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published layout: config, weights, tokenizer with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = tmp_path_factory.mktemp("chat")
    special = ["<unk>", "<pad>", "<eos>", "<|user|>", "<|model|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[ ]+"), "removed")
    tokenizer.decoder = decoders.Metaspace()
    # Published ones put a mark before every text; chat templates have their own.
    mark = [("<unk>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<unk> $A", special_tokens=mark)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=special[3:],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(made)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=1,
    )
    LlamaForCausalLM(settings).save_pretrained(made)
    return made


def config(folder: Path, **chat: Any) -> RefineConfig:
    settings = {"model": str(folder), "dtype": "float32", "max_tokens": 24, **chat}
    return RefineConfig(by="transformers", variants=2, chat=ChatConfig(**settings))


def replies(settings: RefineConfig, requests: Sequence[Request] = REQUESTS) -> list[Reply]:
    found = dict(local.complete(settings, "cpu")(requests))
    return [found[i] for i in range(len(requests))]


def test_a_reply_depends_on_its_request_and_seed_alone(folder: Path) -> None:
    """Whatever stands beside it in the batch, in whatever order."""
    together = replies(config(folder, batch_size=5))
    assert replies(config(folder, batch_size=5)) == together
    assert replies(config(folder, batch_size=1)) == together
    assert replies(config(folder, batch_size=2), REQUESTS[::-1])[::-1] == together
    assert len({reply.text for reply in together}) == 5
    other = replies(config(folder), [Request(REQUESTS[0].text, 999)])
    assert other[0].text != together[0].text


def test_a_reply_is_what_was_drawn_token_by_token(folder: Path) -> None:
    """By hand: the network without cache or padding, one uniform number per token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    request, settings = REQUESTS[2], config(folder, temperature=0.7, top_p=0.8)
    text = f"<|user|>{request.text}<|model|>"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked, stream = len(tokens), random.Random(request.seed)
    while len(tokens) < asked + 24 and (len(tokens) == asked or tokens[-1] != 2):
        with torch.no_grad():
            scores = model(torch.tensor([tokens])).logits[:, -1]
        tokens.append(int(draw_tokens(scores, [stream.random()], 0.7, 0.8)))
    (reply,) = replies(settings, [request])
    assert reply.text == tokenizer.decode(tokens[asked:], skip_special_tokens=True)
    assert reply.tokens_in == asked
    assert reply.tokens_out == len(tokens) - asked
    assert reply.whole == (tokens[-1] == 2)


def test_tokens_are_drawn_by_their_probability() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    scores = p.log().expand(1000, 4)
    uniform = [(i + 0.5) / 1000 for i in range(1000)]
    assert draw_tokens(scores, uniform, 1.0, 1.0).bincount().tolist() == [100, 200, 300, 400]
    # Temperature 1/2 squares the odds: 1 : 4 : 9 : 16.
    counts = draw_tokens(scores, uniform, 0.5, 1.0).bincount().tolist()
    assert counts == pytest.approx([1000 * odds / 30 for odds in (1, 4, 9, 16)], abs=1)
    # The likeliest that make up 0.6: 0.4 and 0.3.
    counts = draw_tokens(scores, uniform, 1.0, 0.6).bincount(minlength=4).tolist()
    assert counts == pytest.approx([0, 0, 1000 * 3 / 7, 1000 * 4 / 7], abs=1)
    assert set(draw_tokens(scores, uniform, 1.0, 1e-9).tolist()) == {3}


def test_a_reply_cut_at_the_most_tokens_says_so(folder: Path) -> None:
    found = replies(config(folder, max_tokens=1), [Request("w1", seed) for seed in range(60)])
    assert {reply.whole for reply in found} == {False, True}
    assert all(reply.tokens_out == 1 for reply in found)


def test_a_model_that_babbles_gives_what_is_usable(folder: Path, tmp_path: Path) -> None:
    texts = ["w1 w2", "w3", "w4 w5 w6"]
    write_rows(tmp_path / "prompts.jsonl", [Prompt(prompt_id(text), text) for text in texts])
    settings = config(folder, max_tokens=40)
    counts = refine(settings, 0, tmp_path / "prompts.jsonl", tmp_path)
    rows = read_rows(Refined, tmp_path / "refined.jsonl")
    assert 0 < len(rows) == counts["refined"] <= 6
    assert sum(n for name, n in counts.items() if name.startswith("rejected: ")) > 0
    first = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").unlink()
    refine(settings, 0, tmp_path / "prompts.jsonl", tmp_path)
    assert (tmp_path / "answers.jsonl").read_bytes() == first


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(UserError, match=rf"refine.chat.model '{name}': no such folder"):
        local.complete(config(Path(name), model=name), "cpu")


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"refine.chat.model 'nobody/nothing': cannot be loaded"):
        local.complete(config(Path(), model="nobody/nothing"), "cpu")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("model.safetensors", "torn", "cannot be loaded"),
        ("config.json", "{", "cannot be loaded"),
        ("chat_template.jinja", None, "no chat template"),
    ],
)
def test_a_damaged_model(
    folder: Path, tmp_path: Path, file: str, text: str | None, said: str
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        local.complete(config(tmp_path), "cpu")
    assert "\n" not in str(caught.value)


def test_another_model_in_the_same_folder_is_another_origin(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = made_from(config(tmp_path))
    assert made_from(config(tmp_path)) == before
    (tmp_path / "config.json").write_text("{}")
    assert made_from(config(tmp_path)) != before

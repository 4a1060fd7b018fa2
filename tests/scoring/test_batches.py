"""Threads beside the networks, and each prompt's encoding in one go."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from PIL import Image
from torch import Tensor

from craftune.rewards.network import ON_CPU, network_reward
from craftune.rewards.preprocess import MiddleSquare
from craftune.scoring.batches import Batch, Item, score_batches
from craftune.types import Reward

PICTURES = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in range(12)]


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_workers_have_one_of_torch_s_threads_and_the_networks_keep_theirs() -> None:
    """More threads than cores do not wait awake: each pass of a network took a fifth longer."""
    seen: dict[str, set[int]] = {"worker": set(), "network": set()}

    def prepare(image: Image.Image) -> Tensor:
        seen["worker"].add(torch.get_num_threads())
        return torch.zeros(1)

    class Watched:
        def plan(self, size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
            return prepare

    def score(inputs: Tensor, prompts: list[str]) -> Tensor:
        seen["network"].add(torch.get_num_threads())
        return torch.zeros(len(prompts))

    reward = Reward(
        "watched",
        lambda images, prompts: torch.zeros(len(prompts)),
        {"name": "watched"},
        inputs=Watched(),
        score_inputs=score,
    )
    items = [Item(str(i), "", picture) for i, picture in enumerate(PICTURES)]
    for _ in score_batches([reward], [Batch(0, items[:6]), Batch(1, items[6:])], reject=False):
        pass
    assert seen == {"worker": {1}, "network": {3}}
    assert torch.get_num_threads() == 3
    assert threads_of_a_new_thread() == 3


def test_all_prompts_of_a_batch_are_encoded_before_its_parts() -> None:
    calls: list[tuple[str, int]] = []

    def judge(pictures: Tensor, prompts: list[str]) -> Tensor:
        calls.append(("judge", len(prompts)))
        return torch.zeros(len(prompts))

    reward = network_reward(
        judge,
        MiddleSquare(8),
        {"name": "watched"},
        torch.device("cpu"),
        torch.float32,
        bytes_per_image=1,
        remember=lambda prompts: calls.append(("remember", len(prompts))),
    )
    reward.score(PICTURES, ["a prompt"] * len(PICTURES))
    assert calls == [("remember", 12)] + [("judge", ON_CPU)] * (12 // ON_CPU)

"""Optimizers and the learning rate: sizes worked out by hand, and what a checkpoint must hold."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tiny import call, tiny
from torch import nn

from craftune.config import TrainConfig
from craftune.errors import UserError
from craftune.optimizers import OPTIMIZERS, check_installed, learning_rate
from craftune.recipes import load_recipe

CONFIG = TrainConfig(steps=10, learning_rate=0.1, warmup_steps=3, weight_decay=0.0)
INSTALLED = [
    name
    for name in OPTIMIZERS
    if name != "adamw8bit" or importlib.util.find_spec("bitsandbytes") is not None
]


def test_the_setting_offers_the_table() -> None:
    assert set(get_args(get_type_hints(TrainConfig)["optimizer"])) == set(OPTIMIZERS)


# --- the learning rate -----------------------------------------------------------------------


def rates(**changes: Any) -> list[float]:
    config = replace(CONFIG, **changes)
    return [learning_rate(config, step) for step in range(config.steps)]


def test_constant_after_the_warm_up() -> None:
    assert rates() == pytest.approx([0.025, 0.05, 0.075] + 7 * [0.1])


def test_linear_falls_to_nothing_one_step_after_the_last() -> None:
    assert rates(lr_schedule="linear") == pytest.approx(
        [0.025, 0.05, 0.075] + [0.1 * (7 - i) / 7 for i in range(7)]
    )


def test_cosine_is_at_half_in_the_middle() -> None:
    found = rates(lr_schedule="cosine", steps=11)
    assert found[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert found[7] == pytest.approx(0.05)
    assert found[10] == pytest.approx(0.1 * (1 - math.cos(math.pi / 8)) / 2)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 10, 50])
def test_every_step_moves_and_none_goes_beyond_the_rate(schedule: str, warmup: int) -> None:
    found = rates(lr_schedule=schedule, warmup_steps=warmup)
    assert all(0 < rate <= 0.1 * (1 + 1e-9) for rate in found)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


# --- what each optimizer does ----------------------------------------------------------------


def stepped(config: TrainConfig, grads: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """The weights after these gradients, from 1."""
    weight = nn.Parameter(torch.ones_like(grads[0]))
    optimizer = OPTIMIZERS[config.optimizer](config, [weight])
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach(), optimizer


def test_adamw_takes_its_betas_and_eps() -> None:
    """With betas of 0 a step is the rate times g / (|g| + eps)."""
    config = replace(CONFIG, betas=(0.0, 0.0), eps=0.5)
    found, _ = stepped(config, [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.5])])
    wanted = [1 - 0.1 * (1 / 1.5 + 0.5 / 1.0), 1 - 0.1 * (-2 / 2.5 + 1.5 / 2.0)]
    assert found.tolist() == pytest.approx(wanted)


def test_adafactor_s_first_step_has_the_rate_for_its_size_whatever_the_weights() -> None:
    """Like AdamW's, so a rate means the same; torch's own would scale it by the weights."""
    for scale in (1.0, 1e-3):
        weight = nn.Parameter(scale * torch.ones(4))
        optimizer = OPTIMIZERS["adafactor"](replace(CONFIG, optimizer="adafactor"), [weight])
        weight.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
        optimizer.step()
        moved = weight.detach() - scale
        torch.testing.assert_close(moved, 0.1 * torch.tensor([-1.0, 1, -1, 1]))


def test_adafactor_keeps_rows_and_columns_of_a_matrix_alone() -> None:
    _, optimizer = stepped(replace(CONFIG, optimizer="adafactor"), [torch.randn(64, 32)] * 2)
    (state,) = optimizer.state.values()
    assert sum(torch.as_tensor(value).numel() for value in state.values()) < 64 + 32 + 3


@pytest.mark.parametrize("name", INSTALLED)
def test_weight_decay_is_decoupled_and_times_the_rate(name: str) -> None:
    config = replace(CONFIG, optimizer=name, weight_decay=0.5)  # type: ignore[arg-type]
    grads = [torch.randn(64, 128, generator=torch.Generator().manual_seed(0))]
    with_decay, _ = stepped(config, grads)
    without, _ = stepped(replace(config, weight_decay=0.0), grads)
    torch.testing.assert_close(without - with_decay, torch.full_like(without, 0.1 * 0.5 * 1.0))


@pytest.mark.parametrize("name", INSTALLED)
def test_a_rate_of_zero_changes_no_weight(name: str) -> None:
    """The trial that measures memory takes such a step."""
    weight = nn.Parameter(torch.randn(64, 128))
    before = weight.detach().clone()
    optimizer = OPTIMIZERS[name](replace(CONFIG, optimizer=name), [weight])  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    weight.grad = torch.randn(64, 128)
    optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", INSTALLED)
def test_the_state_goes_through_a_file_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = replace(CONFIG, optimizer=name)  # type: ignore[arg-type]
    grads = [torch.randn(64, 128, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    wanted, _ = stepped(config, grads)
    half, optimizer = stepped(config, grads[:3])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    weight = nn.Parameter(half)
    again = OPTIMIZERS[name](config, [weight])
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for grad in grads[3:]:
        weight.grad = grad.clone()
        again.step()
    assert torch.equal(weight, wanted)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.skipif("adamw8bit" in INSTALLED, reason="bitsandbytes is here")
def test_a_missing_library_is_told_before_anything_runs(tmp_path: Path) -> None:
    for name in INSTALLED:
        check_installed(name)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_installed("adamw8bit")
    job = tiny(tmp_path)
    answer = call(["check", job.recipe, "--set", "train.optimizer=adamw8bit"], tmp_path)
    assert "train.optimizer 'adamw8bit' needs bitsandbytes: pip install" in answer.complaint


@pytest.mark.parametrize("change", ["train.betas=[0.9, 0.99]", "train.eps=1e-6"])
def test_adafactor_has_neither_betas_nor_eps(tmp_path: Path, change: str) -> None:
    job = tiny(tmp_path)
    assert load_recipe(job.recipe, [change]).train.optimizer == "adamw"
    with pytest.raises(UserError, match=r"train.betas and train.eps are AdamW's"):
        load_recipe(job.recipe, [change, "train.optimizer=adafactor"])

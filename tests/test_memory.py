"""How a step is cut up: what fits by what is measured, and no number changes with it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyDenoiser, kept_checkpoint, load_sd, toy, toy_examples

from craftune import memory
from craftune.batches import Examples
from craftune.config import TrainConfig
from craftune.memory import Fit, available_ram, largest
from craftune.methods import SFT
from craftune.seeds import stream
from craftune.training import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = TrainConfig(steps=4, batch_size=8, learning_rate=1e-2, warmup_steps=0, save_every=2)
DATA = toy_examples(20)


def feed(step: int) -> Examples:
    return DATA.rows(torch.randperm(20, generator=stream("feed", step))[:8])


def run(out: Path, config: TrainConfig = CONFIG, method: Any = None, data: Any = feed) -> Any:
    policy = toy()
    network, fit = train(method or SFT(), policy, None, data, config, 0, out)
    return ToyDenoiser(policy.schedule, network), fit


def rows_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def with_ram(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(memory, "available_ram", lambda: int(size))


# --- how many fit ----------------------------------------------------------------------------


def measured(monkeypatch: pytest.MonkeyPatch, fixed: float, each: float, room: float) -> None:
    """A device on which a pass of n examples takes fixed + n * each bytes."""

    def peak(attempt: Callable[[int], None], n: int, device: torch.device) -> float:
        attempt(n)
        return fixed + n * each

    monkeypatch.setattr(memory, "_peak", peak)
    monkeypatch.setattr(memory, "_room", lambda device: room)


@pytest.mark.parametrize(
    ("room", "fits"), [(100, 1), (139, 1), (141, 2), (300, 10), (319, 10), (320, 11), (9e9, 64)]
)
def test_the_line_through_one_and_two_tells(
    monkeypatch: pytest.MonkeyPatch, room: float, fits: int
) -> None:
    """100 + 20 n bytes in the room, at most 64 examples."""
    measured(monkeypatch, 100, 20, room)
    assert largest(lambda n: None, 64, CPU) == fits
    assert largest(lambda n: None, 1, CPU) == 1


@pytest.mark.parametrize(("real", "fits"), [(64, 40), (30, 20), (9, 5), (3, 2), (1, 1), (0, 0)])
def test_a_device_that_holds_less_than_the_line_says_halves(
    monkeypatch: pytest.MonkeyPatch, real: int, fits: int
) -> None:
    measured(monkeypatch, 0, 1, 40)

    def attempt(n: int) -> None:
        if n > real:
            raise torch.OutOfMemoryError

    assert largest(attempt, 64, CUDA) == fits


def unet_attempt(policy: Any, cond: Any, shape: Any) -> Callable[[int], None]:
    def attempt(n: int) -> None:
        x_t, t = torch.randn(n, *shape), torch.full((n,), 500)
        policy(x_t, t, cond.rows(torch.zeros(n, dtype=torch.long))).square().mean().backward()

    return attempt


@pytest.fixture(scope="module")
def unet() -> tuple[torch.nn.Module, Callable[[int], None]]:
    model = load_sd(kept_checkpoint())
    network = model.denoiser.network.requires_grad_(True).train()
    cond = model.encode_prompts(["a dog"])
    return network, unet_attempt(model.denoiser, cond, model.latent_shape)


def peak(attempt: Callable[[int], None], n: int) -> float:
    return memory._peak(attempt, n, CPU)


def test_on_the_cpu_what_is_kept_grows_linearly_and_less_when_recomputed(unet: Any) -> None:
    network, attempt = unet
    network.disable_gradient_checkpointing()
    one, two, nine = (peak(attempt, n) for n in (1, 2, 9))
    assert nine - one == pytest.approx(8 * (two - one), rel=0.02)
    network.enable_gradient_checkpointing()
    assert 0 < peak(attempt, 2) - peak(attempt, 1) < 0.5 * (two - one)
    network.disable_gradient_checkpointing()


def test_each_tensor_that_is_kept_counts_once_and_the_pass_as_much_again() -> None:
    def attempt(n: int) -> None:
        x = torch.randn(n, 1000, requires_grad=True)
        (x * x + x.square()).sum().backward()

    assert peak(attempt, 3) == 2 * 3 * 4000


def settled(unet: Any, room_for: int, batch_size: int = 32, **settings: Any) -> Fit:
    """With so much memory that just so many examples fit without recomputing."""
    network, attempt = unet
    network.disable_gradient_checkpointing()
    with pytest.MonkeyPatch.context() as patch:
        with_ram(patch, 1.001 * peak(attempt, room_for) / memory.MARGIN)
        chosen: dict[str, Any] = {"micro_batch": "auto", "checkpointing": "auto"} | settings
        fit = Fit(**chosen)
        fit.settle(network, torch.optim.AdamW(network.parameters()), attempt, batch_size)
    assert network.is_gradient_checkpointing == fit.checkpointing
    return fit


def test_recomputing_only_where_fewer_than_four_fit(unet: Any) -> None:
    assert settled(unet, 40) == Fit(32, False)
    assert settled(unet, 4) == Fit(4, False)
    tight = settled(unet, 3)
    assert tight.checkpointing is True
    assert int(tight.micro_batch) > 3
    assert settled(unet, 3, batch_size=3) == Fit(3, False)


def test_what_the_recipe_sets_stays(unet: Any) -> None:
    assert settled(unet, 6, micro_batch=6) == Fit(6, False)
    assert settled(unet, 6, micro_batch=8) == Fit(8, True)
    assert settled(unet, 1, checkpointing=False) == Fit(1, False)
    assert settled(unet, 40, checkpointing=True) == Fit(32, True)
    assert settled(unet, 1, micro_batch=8, checkpointing=False) == Fit(8, False)


def test_parts_are_of_one_size(unet: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert settled(unet, 7, batch_size=10).micro_batch == 5
    assert settled(unet, 9, batch_size=10).micro_batch == 5
    assert "micro-batch 5 of 10, gradient checkpointing off" in capsys.readouterr().err


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "CGROUP", ((str(limit), str(used)),))
    machine = available_ram()
    assert machine > 1e6
    used.write_text("600000\n")
    limit.write_text("1000000\n")
    assert available_ram() == 400_000
    limit.write_text("max\n")
    assert available_ram() > 1e6


# --- the trial leaves nothing behind ---------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_the_trial_changes_no_weight_and_leaves_the_optimizer_fresh(value: float) -> None:
    network = toy().network
    before = [p.clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5, fused=True)

    def attempt(n: int) -> None:
        (value * network(torch.randn(n, 2), torch.ones(n), torch.ones(n, 1, 2)).sum()).backward()

    Fit("auto", "auto").settle(network, optimizer, attempt, 8)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
    assert all(p.grad is None for p in network.parameters())
    assert not optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


def test_auto_where_all_fits_is_the_whole_batch_to_the_bit(tmp_path: Path) -> None:
    auto, fit = run(tmp_path / "auto")
    whole, _ = run(tmp_path / "whole", replace(CONFIG, micro_batch=8))
    assert fit.micro_batch == 8
    for a, b in zip(auto.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)


# --- in the loop -----------------------------------------------------------------------------


class Small:
    """A method on a device that holds two examples from a step's second pass on."""

    needs_reference = False
    draw = staticmethod(SFT().draw)
    check = staticmethod(SFT().check)

    def __init__(self, holds: int = 2, until: int = 4) -> None:
        self.holds, self.calls, self.until = holds, 0, until

    def loss(self, policy: Any, reference: Any, batch: Any, draws: Any) -> Any:
        self.calls += 1
        if self.calls > self.until and len(batch.weight) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SFT().loss(policy, reference, batch, draws)


def test_out_of_memory_in_a_step_halves_and_does_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step's first pass went well: its gradient must not count twice."""
    monkeypatch.setattr(memory, "largest", lambda attempt, limit, device: 4)
    _, fit = run(tmp_path / "small", method=Small())
    assert fit.micro_batch == 2
    assert "out of memory: micro-batch 2 from here" in capsys.readouterr().err
    run(tmp_path / "plain")
    for one, other in zip(rows_of(tmp_path / "small"), rows_of(tmp_path / "plain"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_micro_batch_of_the_recipe_s_own_is_not_changed(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, replace(CONFIG, micro_batch=4), Small())


def test_one_example_too_many_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, method=Small(holds=0))


def test_a_resumed_run_is_cut_up_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed on a machine with room for three; the next one has more."""

    def stopped(step: int) -> Examples:
        if step == 3:
            raise KeyboardInterrupt
        return feed(step)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "largest", lambda attempt, limit, device: 3)
        whole, fit = run(tmp_path / "whole")
        assert fit.micro_batch == 3
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", data=stopped)
    again, fit = run(tmp_path / "killed")
    assert fit.micro_batch == 3
    for a, b in zip(again.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")

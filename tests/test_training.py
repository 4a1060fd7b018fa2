"""The one loop: equal to a loop written out by hand, however it is cut up, killed and resumed."""

import copy
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from toy import ToyDenoiser, flat_grad, toy, toy_cond, toy_examples

from craftune import training
from craftune.batches import Examples
from craftune.config import TrainConfig
from craftune.errors import UserError
from craftune.methods import CRAFT, SFT
from craftune.methods.denoising import squared_error
from craftune.processes import Processes
from craftune.seeds import stream
from craftune.training import train
from craftune.training_state import Average, Trainable, latest, prune, save, stop_requests
from craftune.types import Cond

CONFIG = TrainConfig(
    steps=7,
    batch_size=8,
    learning_rate=1e-2,
    warmup_steps=3,
    weight_decay=0.1,
    max_grad_norm=0.3,
    ema_decay=0.8,
    save_every=2,
    keep_checkpoints=0,
)
DATA = toy_examples(20)
Feed = Callable[[int], Examples]


def feed(step: int) -> Examples:
    """8 of 20 examples, by the step."""
    return DATA.rows(torch.randperm(20, generator=stream("feed", step))[:8])


def rows_of(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl, which has no times in it: equal runs give equal bytes."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(
    out: Path,
    config: TrainConfig = CONFIG,
    method: Any = None,
    seed: int = 0,
    data: Feed = feed,
    policy: ToyDenoiser | None = None,
) -> ToyDenoiser:
    """Train a fresh toy; returns the policy with the network that the loop gave back."""
    policy = policy or toy()
    reference = copy.deepcopy(policy)
    found, _ = train(method or SFT(), policy, reference, data, config, seed, out)
    return ToyDenoiser(policy.schedule, found)


def weights(policy: ToyDenoiser) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.network.parameters()])


# --- the loop is AdamW on the method's loss ---------------------------------------------------


def by_hand(config: TrainConfig, seed: int = 0) -> tuple[ToyDenoiser, ToyDenoiser, list[float]]:
    """Last weights, averaged weights, gradient norms: the loop, written out without tricks."""
    policy, method = toy(), SFT()
    parameters = list(policy.network.parameters())
    average = copy.deepcopy(policy)
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    norms = []
    for step in range(config.steps):
        batch = feed(step)
        draws = method.draw(policy.schedule, batch, stream("draws", seed, step))
        loss, _ = method.loss(policy, None, batch, draws)
        grads = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        norms.append(norm)
        rate = config.learning_rate * min(1, (step + 1) / (config.warmup_steps + 1))
        with torch.no_grad():
            for p, grad, m, v in zip(parameters, grads, first, second, strict=True):
                grad = grad * min(1, config.max_grad_norm / norm)
                p.mul_(1 - rate * config.weight_decay)
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.999).add_(0.001 * grad.square())
                unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                p.sub_(rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
            for mean, p in zip(average.network.parameters(), parameters, strict=True):
                mean.copy_(config.ema_decay * mean + (1 - config.ema_decay) * p)
    return policy, average, norms


def test_it_is_adamw_with_warm_up_clipping_decay_and_averaging(tmp_path: Path) -> None:
    averaged = run(tmp_path)
    plain = run(tmp_path / "plain", replace(CONFIG, ema_decay=0.0))
    last, average, norms = by_hand(CONFIG)
    assert max(norms) > CONFIG.max_grad_norm
    torch.testing.assert_close(weights(plain), weights(last), atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(weights(averaged), weights(average), atol=2e-6, rtol=1e-4)
    assert (weights(averaged) - weights(plain)).abs().max() > 1e-3
    found = rows_of(tmp_path)
    assert [row["grad_norm"] for row in found] == pytest.approx(norms, rel=1e-4)
    assert [row["step"] for row in found] == list(range(1, 8))
    rates = [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01]
    assert [row["learning_rate"] for row in found] == pytest.approx(rates)


def test_without_averaging_the_last_weights_come_back(tmp_path: Path) -> None:
    config = replace(CONFIG, ema_decay=0.0, warmup_steps=0, weight_decay=0.0, max_grad_norm=1e9)
    found = run(tmp_path, config)
    last, _, _ = by_hand(config)
    torch.testing.assert_close(weights(found), weights(last), atol=2e-6, rtol=1e-4)
    assert not found.network.training


def test_the_log_has_the_loss_of_the_step_s_own_draws(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, steps=1), seed=5)
    policy, method = toy(), SFT()
    draws = method.draw(policy.schedule, feed(0), stream("draws", 5, 0))
    loss, _ = method.loss(policy, None, feed(0), draws)
    loss.backward()
    (row,) = rows_of(tmp_path)
    assert row["loss"] == row["error"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(flat_grad(policy.network).norm().item(), rel=1e-5)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    run(tmp_path)
    files = list((tmp_path / "tensorboard").glob("events.*"))
    assert files
    assert sum(file.stat().st_size for file in files) > 7 * 40


def test_the_seed_matters_and_decides(tmp_path: Path) -> None:
    one, same, other = (run(tmp_path / str(i), seed=s) for i, s in enumerate((1, 1, 2)))
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))
    assert rows_of(tmp_path / "0") == rows_of(tmp_path / "1")


def test_it_learns_in_a_second(tmp_path: Path) -> None:
    """CRAFT on a good and a bad image per prompt: the good becomes likelier than the bad."""
    side = torch.tensor([1.0, -1.0]).repeat(16)
    examples = Examples(torch.stack([side, 0 * side], 1), toy_cond(32), side.clamp(min=0))
    config = TrainConfig(
        steps=120, batch_size=32, learning_rate=1e-2, warmup_steps=0, save_every=1000
    )
    start, policy, method = toy(), toy(), CRAFT()
    train(method, policy, None, lambda _: examples, config, 0, tmp_path)
    draws = method.draw(policy.schedule, examples, stream("held-out"))
    x_t = policy.schedule.add_noise(examples.latents, draws.noise, draws.t)
    error, before = (
        squared_error(who(x_t, draws.t, examples.cond), draws.noise) for who in (policy, start)
    )
    assert error[side > 0].mean() < 0.6 * before[side > 0].mean()
    assert error[side > 0].mean() < error[side < 0].mean()
    losses = [row["loss"] for row in rows_of(tmp_path)]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


# --- micro-batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SFT(), CRAFT("keep", guard=1e9), CRAFT("anchor")], ids=str)
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_accumulation_equals_the_big_batch(tmp_path: Path, micro_batch: int, method: Any) -> None:
    """Every metric and the gradient norm of every step; 3 does not divide 8."""
    weight = torch.randn(20, generator=stream("weight"))

    def weighted(step: int) -> Examples:
        index = torch.randperm(20, generator=stream("feed", step))[:8]
        return replace(DATA, weight=weight).rows(index)

    config = replace(CONFIG, steps=3, learning_rate=1e-4)
    run(tmp_path / "whole", config, method, data=weighted)
    parts = replace(config, micro_batch=micro_batch)
    run(tmp_path / "parts", parts, method, data=weighted)
    for whole, part in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"), strict=True):
        assert part.keys() == whole.keys()
        for name, value in whole.items():
            assert part[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_no_gradient_is_left_from_the_step_before(tmp_path: Path) -> None:
    """At a learning rate of next to nothing, the same batch gives the same norm every step."""
    config = replace(CONFIG, learning_rate=1e-12, weight_decay=0.0, steps=4)
    method = SFT()

    class SameDraws:
        needs_reference = False
        loss = staticmethod(method.loss)
        check = staticmethod(method.check)

        def draw(self, schedule: Any, batch: Any, rng: Any) -> Any:
            return method.draw(schedule, batch, stream("same"))

    run(tmp_path, config, SameDraws(), data=lambda _: feed(0))
    norms = [row["grad_norm"] for row in rows_of(tmp_path)]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)


def test_bfloat16_keeps_the_gradient_of_a_method_that_first_looks_without_one(
    tmp_path: Path,
) -> None:
    """In older torch, autocast's cache hands on the weights cast under no_grad."""
    method = SFT()

    class LooksFirst:
        needs_reference = False
        draw = staticmethod(method.draw)
        check = staticmethod(method.check)

        def loss(self, policy: Any, reference: Any, batch: Any, draws: Any) -> Any:
            with torch.no_grad():
                method.loss(policy, None, batch, draws)
            return method.loss(policy, None, batch, draws)

    config = replace(CONFIG, precision="bfloat16", steps=1)
    run(tmp_path / "plain", config)
    run(tmp_path / "looks", config, LooksFirst())
    assert rows_of(tmp_path / "looks") == rows_of(tmp_path / "plain")
    run(tmp_path / "float32", replace(config, precision="float32"))
    (low,), (full,) = rows_of(tmp_path / "plain"), rows_of(tmp_path / "float32")
    assert low["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.05)
    assert low["grad_norm"] != full["grad_norm"]


# --- resume ----------------------------------------------------------------------------------


def checkpoint(out: Path, step: int) -> dict[str, Any]:
    return torch.load(out / f"checkpoint-{step}" / "state.pt", weights_only=True)


def assert_same_state(one: Any, other: Any) -> None:
    """Bit for bit, whatever the nesting."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same_state(a, b)
    else:
        assert one == other


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, weights(run(out))


def killed_at(step: int, uninterrupted: Path, out: Path, torn: str = "") -> None:
    """What a process killed some time after checkpoint `step` leaves behind."""
    shutil.copytree(uninterrupted / f"checkpoint-{step}", out / f"checkpoint-{step}")
    lines = (uninterrupted / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[: step + 1]) + torn)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resume_is_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, uninterrupted: tuple[Path, torch.Tensor], step: int
) -> None:
    whole, wanted = uninterrupted
    killed_at(step, whole, tmp_path, torn='{"step": 4, "lo')
    found = run(tmp_path)
    assert torch.equal(weights(found), wanted)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for later in range(step, 7, 2):
        assert_same_state(checkpoint(tmp_path, later), checkpoint(whole, later))


def test_a_run_stopped_by_an_error_goes_on_where_it_was(
    tmp_path: Path, uninterrupted: tuple[Path, torch.Tensor]
) -> None:
    def interrupted(step: int) -> Examples:
        if step == 5:
            raise KeyboardInterrupt
        return feed(step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=interrupted)
    assert len(rows_of(tmp_path)) == 5
    seen: list[int] = []

    def watched(step: int) -> Examples:
        seen.append(step)
        return feed(step)

    assert torch.equal(weights(run(tmp_path, data=watched)), uninterrupted[1])
    assert seen == [4, 5, 6]
    assert rows_of(tmp_path) == rows_of(uninterrupted[0])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no mark", "no state", "empty mark"])
def test_a_broken_checkpoint_is_passed_over_with_a_line(
    tmp_path: Path,
    uninterrupted: tuple[Path, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    whole, wanted = uninterrupted
    killed_at(2, whole, tmp_path)
    killed_at(6, whole, tmp_path)
    folder = tmp_path / "checkpoint-6"
    data = (folder / "state.pt").read_bytes()
    if damage == "truncated":
        (folder / "state.pt").write_bytes(data[:-100])
    elif damage == "flipped":
        middle = len(data) // 2
        (folder / "state.pt").write_bytes(
            data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        )
    elif damage == "empty mark":
        (folder / "done.json").write_text("")
    else:
        (folder / ("done.json" if damage == "no mark" else "state.pt")).unlink()
    assert torch.equal(weights(run(tmp_path)), wanted)
    said = capsys.readouterr().err
    assert "checkpoint-6 is incomplete" in said
    assert "going on from checkpoint-2" in said
    assert rows_of(tmp_path) == rows_of(whole)


def test_a_partial_folder_is_no_checkpoint(
    tmp_path: Path, uninterrupted: tuple[Path, torch.Tensor]
) -> None:
    whole, wanted = uninterrupted
    killed_at(2, whole, tmp_path)
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4.partial")
    network = Trainable(toy().network)
    optimizer = torch.optim.AdamW(network.network.parameters(), fused=True)
    average = Trainable(toy().network)
    stateful = {"network": network, "optimizer": optimizer, "average": average}
    assert latest(tmp_path, stateful) == 2
    assert torch.equal(weights(run(tmp_path)), wanted)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, steps=12, keep_checkpoints=2))
    left = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert left == ["checkpoint-10", "checkpoint-8"]
    prune(tmp_path, 0)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    prune(tmp_path, 1)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    with pytest.raises(UserError, match=r"a checkpoint needs .* GB but .* are free"):
        run(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_saving_twice_replaces(tmp_path: Path) -> None:
    policy = toy()
    for _ in range(2):
        save(tmp_path / "checkpoint-3", 3, {"network": Trainable(policy.network)})
    assert latest(tmp_path, {"network": Trainable(policy.network)}) == 3


# --- signals -----------------------------------------------------------------------------------


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Signals that reach the handlers from before, which do not raise."""
    found: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda n, _: found.append(n)) for number in numbers]
    yield found
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def work(heard: list[int], *signals: int) -> None:
    """Work that gets these signals and then is done, which counts as 0."""
    with stop_requests():
        for number in signals:
            signal.raise_signal(number)
        heard.append(0)


def test_a_signal_takes_effect_in_the_end_and_the_second_at_once(heard: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        work(heard, signal.SIGTERM)
    assert heard == [0, signal.SIGTERM]
    heard.clear()
    with pytest.raises(KeyboardInterrupt):
        work(heard, signal.SIGINT, signal.SIGTERM)
    assert heard == [signal.SIGTERM, 0, signal.SIGINT]


def test_an_ignored_signal_stays_ignored(heard: list[int]) -> None:
    """nohup ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(heard, signal.SIGINT)
    except KeyboardInterrupt:
        pytest.fail("it was heard")
    assert heard == [0]


# --- what is not finite ----------------------------------------------------------------------


def poisoned(at: int, value: float) -> Feed:
    def data(step: int) -> Examples:
        batch = feed(step)
        if step == at:
            latents = batch.latents.clone()
            latents[3, 1] = value
            return replace(batch, latents=latents)
        return batch

    return data


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("micro_batch", ["auto", 2])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    tmp_path: Path, value: float, micro_batch: Any
) -> None:
    config = replace(CONFIG, micro_batch=micro_batch, ema_decay=0.0)
    policy = toy()
    with pytest.raises(FloatingPointError, match=r"step 4 is not finite.*learning_rate"):
        run(tmp_path / "bad", config, data=poisoned(3, value), policy=policy)
    three = toy()
    run(tmp_path / "good", replace(config, steps=3), policy=three)
    assert torch.equal(weights(policy), weights(three))
    assert rows_of(tmp_path / "bad") == rows_of(tmp_path / "good")
    assert (tmp_path / "bad" / "checkpoint-2").is_dir()


def test_the_guard_stops_before_the_weights_change(tmp_path: Path) -> None:
    """Also under micro-batches: it looks at the whole batch."""
    found = []
    for micro_batch in (100, 1):
        policy = toy()
        config = replace(CONFIG, learning_rate=0.5, warmup_steps=0, micro_batch=micro_batch)
        config = replace(config, steps=40, ema_decay=0.0, save_every=100)
        out = tmp_path / str(micro_batch)
        with pytest.raises(FloatingPointError, match="guard"):
            train(
                CRAFT("keep"),
                policy,
                toy(),
                lambda step: replace(feed(step), weight=torch.tensor([1.0, -1.0] * 4)),
                config,
                0,
                out,
            )
        found.append(len(rows_of(out)))
    assert found[0] == found[1] < 40


# --- what trains -----------------------------------------------------------------------------


def test_frozen_weights_stay_and_are_not_stored(tmp_path: Path) -> None:
    policy = toy()
    policy.network.layers.requires_grad_(False)
    before = copy.deepcopy(policy.network.state_dict())
    found = run(tmp_path, policy=policy)
    for name, value in found.network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("layers")
    state = checkpoint(tmp_path, 6)
    assert set(state["network"]) == set(state["average"]) == {"out.weight", "out.bias"}


def test_a_checkpoint_of_another_network_is_not_taken(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-3", 3, {"network": Trainable(toy(width=8).network)})
    with pytest.raises((AssertionError, RuntimeError)):
        latest(tmp_path, {"network": Trainable(toy().network)})


def test_a_checkpoint_of_other_weights_is_not_taken(tmp_path: Path) -> None:
    """As when adapters were trained before, and now all weights are."""
    part = toy().network
    part.layers.requires_grad_(False)
    whole = toy().network
    for of in (Trainable, lambda network: Average.of(network, 0.5)):
        save(tmp_path / "checkpoint-3", 3, {"it": of(part)})
        with pytest.raises(AssertionError, match="another network"):
            latest(tmp_path, {"it": of(whole)})


def test_processes_that_see_other_checkpoints_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process goes on from step 2, this one from the start."""
    monkeypatch.delattr(Processes, "_all_reduce")  # would wait for the main process
    store = HashStore()
    store.set("0/told", "2")
    with pytest.raises(UserError, match="not all processes see the same checkpoints"):
        train(SFT(), toy(), None, feed, CONFIG, 0, tmp_path, Processes(1, 2, 1, store))


def test_the_loop_hands_the_method_the_reference(tmp_path: Path) -> None:
    reference = toy(seed=5)
    method = SFT()
    seen: list[object] = []

    class Looks:
        needs_reference = True
        draw = staticmethod(method.draw)
        check = staticmethod(method.check)

        def loss(self, policy: Any, reference: Any, batch: Any, draws: Any) -> Any:
            seen.append(reference)
            return method.loss(policy, None, batch, draws)

    config = replace(CONFIG, steps=2, micro_batch=8)
    train(Looks(), toy(), reference, feed, config, 0, tmp_path)
    assert seen == [reference, reference]
    assert training.__doc__


def test_the_empty_batch_row_order_is_kept() -> None:
    """Rows of a batch: latents, prompts and weights stay together."""
    batch = replace(DATA, weight=torch.arange(20.0)).rows(torch.tensor([7, 2, 7]))
    assert batch.weight.tolist() == [7.0, 2.0, 7.0]
    assert torch.equal(batch.latents[1], DATA.latents[2])
    assert torch.equal(batch.cond.tensors["tokens"][0], DATA.cond.tensors["tokens"][7])
    assert len(Cond.cat([batch.cond, batch.cond])) == 6

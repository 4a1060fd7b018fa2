"""The one training loop. It knows steps, gradients and checkpoints; methods know losses.

Nothing here depends on how a step is cut into micro-batches or on where a run was killed: the
batch and all its randomness are functions of the step's number, drawn before the batch is split.
"""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from craftune.config import TrainConfig
from craftune.errors import UserError
from craftune.memory import Fit
from craftune.optimizers import OPTIMIZERS, learning_rate
from craftune.processes import ALONE, Processes
from craftune.progress import track
from craftune.records import write_text
from craftune.seeds import stream
from craftune.training_state import Average, Trainable, latest, prune, save, stop_requests
from craftune.types import Denoiser, Method


def train(
    method: Method[Any, Any],
    policy: Denoiser,
    reference: Denoiser | None,
    feed: Callable[[int], Any],
    config: TrainConfig,
    seed: int,
    out: Path,
    processes: Processes = ALONE,
) -> tuple[nn.Module, Fit]:
    """Fine-tune `policy.network` in place; write metrics.jsonl and checkpoint-N/ under `out`.

    Goes on from the newest complete checkpoint in `out`, with the same weights bit for bit (on
    the CPU) as a run that was never stopped. SIGTERM and SIGINT take effect after the step, with
    a checkpoint of it.

    Args:
        reference: the frozen starting network, where `method.needs_reference`.
        feed: step number, counted from 0 -> the whole batch of that step.
        processes: those that share each batch; each calls this function, the main one writes.

    Returns:
        The trained network, with its averaged weights where `config.ema_decay` > 0; and how the
        steps were cut up.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the optimizer has not stepped.
    """
    network = policy.network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[config.optimizer](config, parameters)
    average = Average.of(network, config.ema_decay) if config.ema_decay > 0 else None
    fit = Fit(config.micro_batch, config.gradient_checkpointing)
    stateful = {"network": Trainable(network), "optimizer": optimizer, "fit": fit}
    if average is not None:
        stateful["average"] = average
    first = latest(out, stateful)
    if first != processes.told(lambda: first):
        raise UserError(f"{out}: not all processes see the same checkpoints; run again")

    def trial(examples: int) -> None:
        batch, draws = _step(method, policy, feed, seed, 0)
        rows = slice(0, examples)
        _backward(method, policy, reference, batch.rows(rows), draws.rows(rows), config, 1.0)

    mine = processes.part(config.batch_size)
    fit.settle(network, optimizer, trial, len(mine))
    with (
        _metrics_log(out, first) if processes.main else _no_log() as log,
        stop_requests() as stops,
    ):
        for step in track(range(first, config.steps), "train", config.steps - first, "step"):
            started = time.perf_counter()
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            own = _gradients(method, policy, reference, feed, config, seed, step, fit, mine)
            metrics = processes.totals(own)
            processes.add_up(p.grad for p in parameters if p.grad is not None)
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            _require_finite(step, metrics, norm.item())
            method.check(metrics)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update(network)
            row = {"step": step + 1, **metrics, "grad_norm": norm.item(), "learning_rate": rate}
            log(row, time.perf_counter() - started)
            due = (step + 1) % config.save_every == 0 and step + 1 < config.steps
            stopping = processes.any(bool(stops))
            if (due or stopping) and processes.main:
                save(out / f"checkpoint-{step + 1}", step + 1, stateful)
                prune(out, config.keep_checkpoints)
            if stopping:
                processes.follow()
                stops += [] if stops else [signal.SIGTERM]  # another process's
                break
    if average is not None:
        average.put_into(network)
    return network.eval(), fit


def _step(
    method: Method[Any, Any], policy: Denoiser, feed: Callable[[int], Any], seed: int, step: int
) -> tuple[Any, Any]:
    """The whole batch of a step and all its randomness."""
    batch = feed(step)
    return batch, method.draw(policy.schedule, batch, stream("draws", seed, step))


def _gradients(
    method: Method[Any, Any],
    policy: Denoiser,
    reference: Denoiser | None,
    feed: Callable[[int], Any],
    config: TrainConfig,
    seed: int,
    step: int,
    fit: Fit,
    mine: range,
) -> dict[str, float]:
    """Accumulate these rows' part of the gradient of one step's mean loss, and of its metrics."""
    batch, draws = _step(method, policy, feed, seed, step)
    size = config.batch_size
    while True:
        try:
            totals: dict[str, float] = {}
            part = int(fit.micro_batch)
            for start in range(mine.start, mine.stop, part):
                rows = slice(start, min(start + part, mine.stop))
                share = (rows.stop - rows.start) / size
                metrics = _backward(
                    method, policy, reference, batch.rows(rows), draws.rows(rows), config, share
                )
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + value * share
            return totals
        except torch.OutOfMemoryError:
            if not fit.halve():
                raise
        policy.network.zero_grad(set_to_none=True)  # and once more, in smaller parts


def _backward(
    method: Method[Any, Any],
    policy: Denoiser,
    reference: Denoiser | None,
    batch: Any,
    draws: Any,
    config: TrainConfig,
    share: float,
) -> dict[str, float]:
    """Add the gradient of `share` times a micro-batch's mean loss; returns its mean metrics."""
    device = next(policy.network.parameters()).device
    # Without its cache: older torch reuses weights cast under no_grad where a gradient is due.
    with torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=config.precision == "bfloat16",
        cache_enabled=False,
    ):
        loss, metrics = method.loss(policy, reference, batch, draws)
    torch.autograd.backward(loss * share)
    return metrics


def _require_finite(step: int, metrics: dict[str, float], norm: float) -> None:
    values = {**metrics, "grad_norm": norm}
    if all(torch.isfinite(torch.tensor(list(values.values())))):
        return
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    raise FloatingPointError(
        f"step {step + 1} is not finite ({shown}); the weights are as before it. Lower "
        "train.learning_rate, use train.precision = 'float32', or check the selected images"
    )


@contextlib.contextmanager
def _metrics_log(
    out: Path, first: int
) -> Iterator[Callable[[dict[str, float | int], float], None]]:
    """metrics.jsonl and TensorBoard; rows after the checkpoint that training goes on from go.

    The seconds go to TensorBoard alone: metrics.jsonl is the same bytes whenever the training is.
    """
    from torch.utils.tensorboard import SummaryWriter

    out.mkdir(parents=True, exist_ok=True)
    path = out / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:first] if path.is_file() else []
    write_text(path, "".join(kept))  # whole or not at all: a kill must not lose these rows
    with (
        path.open("a") as file,
        SummaryWriter(str(out / "tensorboard"), purge_step=first + 1) as board,
    ):

        def log(row: dict[str, float | int], seconds: float) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            for name, value in {**row, "seconds": seconds}.items():
                board.add_scalar(name, value, int(row["step"]))

        yield log


@contextlib.contextmanager
def _no_log() -> Iterator[Callable[[dict[str, float | int], float], None]]:
    """The main process writes for all."""
    yield lambda row, seconds: None

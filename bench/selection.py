"""Selection's cost beside the arithmetic it cannot do without and a plain Python loop.

    python bench/selection.py [--rows 50000 5000000] [--repeat 3] [--out selection.json]

Rows are images, five to a group (N = 4), with three float32 rewards. Each line comes from a fresh
process: best wall and CPU time of some repeats, the peak memory of the process (VmHWM, interpreter
and input included) and how far that is above what it held before `select`. Goals, in wall time on
an idle machine: 50,000 rows in 0.05 s, 5,000,000 in 2 s and 300 MB. Linux, one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from craftune.select_config import SelectConfig
from craftune.selection import select

COLUMNS = 5
LOOP_ROWS = 10_000
GOALS = {50_000: (0.05, None), 5_000_000: (2.0, 300.0)}


def main() -> None:
    """Measure every contender at every size, print a line each, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(GOALS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.repeat)))
        return
    plan = [("loop", LOOP_ROWS)]
    plan += [(name, rows) for rows in args.rows for name in CONTENDERS if name != "loop"]
    results = [run_alone(name, rows, args.repeat) for name, rows in plan]
    for line in results:
        seconds, peak = GOALS.get(line["rows"], (None, None))
        if line["contender"].startswith("select") and seconds:
            line["meets_goal"] = line["seconds"] <= seconds and line["peak_mb"] <= (peak or 1e9)
        print("  ".join(f"{key} {value}" for key, value in line.items()))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def run_alone(name: str, rows: int, repeat: int) -> dict:
    """`measure` in a process of its own, so that peaks do not add up."""
    threads = {key: "1" for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--repeat", str(repeat), "--one", name, str(rows)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **threads, "PYTHONPATH": path}
    return json.loads(subprocess.check_output(command, env=environment, text=True))


def measure(name: str, rows: int, repeat: int) -> dict:
    """Best seconds and peak MB of one contender on one pool of random scores."""
    rng = np.random.default_rng(0)
    scores = np.empty((3, rows // COLUMNS, COLUMNS), np.float32)
    for reward in scores:  # a common part, as rewards agree in practice
        rng.standard_normal(out=reward, dtype=np.float32)
    scores[1:] += scores[0]
    contender = CONTENDERS[name]()
    before, seconds, cpu, selected = _memory_mb("VmRSS"), [], [], 0
    for _ in range(repeat):
        start, cpu_start = time.perf_counter(), time.process_time()
        selected = contender(scores)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    peak = _memory_mb("VmHWM")
    return {
        "contender": name,
        "rows": rows,
        "seconds": round(min(seconds), 4),
        "cpu_seconds": round(min(cpu), 4),
        "us_per_row": round(min(seconds) / rows * 1e6, 3),
        "peak_mb": round(peak),
        "growth_mb": round(peak - before),
        "selected": selected,
    }


def _memory_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _select(**changes: object) -> Callable:
    config = SelectConfig(**changes)  # type: ignore[arg-type]
    return lambda scores: int(select(config, ("h", "p", "a"), scores).selected.sum())


def _floor() -> Callable:
    """Filter, min-max composite, advantage and top 100, no options, checks or ranks."""

    def run(scores: np.ndarray) -> int:
        better = (scores[..., 1:] > scores[..., :1]).all(axis=0)
        low, high = scores.min(axis=(1, 2)), scores.max(axis=(1, 2))
        factors = np.array([0.4, 0.4, 0.2], np.float32) / (high - low)
        total = np.einsum("r,rgc->gc", factors, scores[..., 1:])
        mean, std = total.mean(axis=1, keepdims=True), total.std(axis=1, keepdims=True)
        advantage = (total - mean) / (std + 1e-6)
        top = np.argpartition(np.where(better, total, -np.inf).ravel(), -100)[-100:]
        return int(np.isfinite(advantage.ravel()[top]).sum())

    return run


def _loop() -> Callable:
    """What one would write first: a loop over the groups."""

    def run(scores: np.ndarray) -> int:
        found = []
        for group in scores.transpose(1, 2, 0).tolist():
            base, *images = group
            if not any(all(x > b for x, b in zip(im, base, strict=True)) for im in images):
                continue
            totals = [0.4 * h + 0.4 * p + 0.2 * a for h, p, a in images]
            mean = sum(totals) / len(totals)
            std = (sum((t - mean) ** 2 for t in totals) / len(totals)) ** 0.5
            found.append(max((t, (t - mean) / (std + 1e-6)) for t in totals))
        return len(sorted(found, reverse=True)[:100])

    return run


CONTENDERS: dict[str, Callable[[], Callable]] = {
    "loop": _loop,
    "floor": _floor,
    "select": _select,
    "select no filter": lambda: _select(filter="none", per_prompt_cap=2),
    "select groups low": lambda: _select(mode="group", strategy="low", rank_by="gain"),
}

if __name__ == "__main__":
    main()

"""Training speed on the CPU, beside diffusers' own script and beside the bare modules.

    python bench/training.py --baselines ../shared/bench --script train_text_to_image.py

Contenders on the same random-weight Stable Diffusion pipeline, same dtype, batch, threads:

    floor      `b0_floor.py`: forward, backward and AdamW of the bare UNet, eager, nothing else
    clipping   the same, its gradients clipped before each step, as the other two clip theirs
    craftune   `craftune train`, the command itself, on a pool that `craftune select` made here
    diffusers  huggingface/diffusers' examples/text_to_image/train_text_to_image.py, unmodified

Each run is a process of its own; a hook on the optimizer takes the time of every step, in wall and
in CPU seconds, and the contenders take turns, so that a machine whose speed drifts slows all three
alike. A ratio is the median over the rounds of the ratio within a round. On a busy machine the
ratios of CPU seconds (one thread) are the steadier ones. Neither the script nor the baselines are
part of this repository: the first is found in huggingface/diffusers, the second is a folder with
common.py (the fixture), b0_floor.py and b1_diffusers_t2i.py.
"""

import argparse
import itertools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WARM = 2
"""Steps at the start of a run that are not counted."""
GOALS = {"speed-up over diffusers": 1.45, "share of the floor": 0.95, "start-up ratio": 1.0}
CLIP = "--clip"
"""Of a child: clip gradients to norm 1 before each optimizer step."""
RECIPE = """
[run]
name = "training"
out = {out!r}
device = "cpu"
[model]
path = {model!r}
[prompts]
source = {prompts!r}
limit = 16
[refine]
variants = 1
[generate]
num_steps = 1
guidance_scale = 1.0
[score]
rewards = ["jpeg-compressibility"]
[select]
filter = "none"
weights = {{ "jpeg-compressibility" = 1.0 }}
k = 16
[method]
name = "sft"
[train]
steps = {steps}
batch_size = {batch}
micro_batch = {batch}
gradient_checkpointing = false
save_every = 100000
"""


def main() -> None:
    """Run the rounds, print the ratios, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baselines", type=Path, required=True, help="folder of b0_floor.py")
    parser.add_argument("--script", type=Path, required=True, help="train_text_to_image.py")
    parser.add_argument("--scale", default="mini", help="of the fixture: mini or nano")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="per run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep the fixture in")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="craftune-bench-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        found = measure(args, work)
    print_summary(found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every contender in every round."""
    environment = os.environ | {
        "BENCH_ROOT": str(work),
        "BENCH_THREADS": str(args.threads),
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(args.baselines.resolve())]),
    }
    contenders = prepare(args, work, environment)
    rounds = []
    for number in range(args.rounds):
        rounds.append({name: run() for name, run in contenders.items()})
        line = "  ".join(
            f"{name} {r['wall']:.3f} s ({r['cpu']:.3f} CPU)" for name, r in rounds[-1].items()
        )
        print(f"round {number + 1}: {line}", flush=True)
    settings = {k: getattr(args, k) for k in ("scale", "steps", "batch", "threads")}
    return {"settings": settings | machine(), "rounds": rounds, "ratios": ratios(rounds)}


def prepare(
    args: argparse.Namespace, work: Path, environment: dict[str, str]
) -> dict[str, Callable[[], dict[str, float]]]:
    """The fixture, a pool of our own drawing, and how each contender runs."""
    build = f"import common; common.build({str(work)!r}, {args.scale!r})"
    subprocess.run([sys.executable, "-c", build], env=environment, check=True)
    fixture, recipe = work / args.scale, work / f"{args.scale}.toml"
    recipe.write_text(
        RECIPE.format(
            out=str(work / "runs" / args.scale),
            model=str(fixture / "pipe"),
            prompts=str(fixture / "prompts.txt"),
            steps=args.steps,
            batch=args.batch,
        )
    )
    for stage in ("prompts", "refine", "generate", "score", "select"):
        command = [sys.executable, "-m", "craftune", stage, str(recipe)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    common = ["--scale", args.scale, "--batch", str(args.batch)]
    floor = [str(args.baselines / "b0_floor.py"), *common, "--reps", str(args.steps - WARM)]
    script = [str(args.baselines / "b1_diffusers_t2i.py"), *common]
    script += ["--steps", str(args.steps), "--script", str(args.script.resolve())]
    ours = ["craftune", "train", str(recipe), "--redo"]
    # b0 steps its optimizer alone first, then trains, then trains with checkpointing: as many each.
    trained = slice(args.steps - WARM + 1, 2 * (args.steps - WARM + 1))
    return {
        "floor": lambda: timed(floor, environment, trained),
        "clipping": lambda: timed([*floor, CLIP], environment, trained),
        "craftune": lambda: timed(ours, environment, slice(WARM - 1, None)),
        "diffusers": lambda: timed(script, environment, slice(WARM - 1, None)),
    }


def timed(target: list[str], environment: dict[str, str], counted: slice) -> dict[str, float]:
    """Median seconds between the counted optimizer steps of one process, and its start-up."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as stamps:
        command = [sys.executable, __file__, "--child", stamps.name, *target]
        started = time.time()
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        if found.returncode:
            sys.exit(f"{' '.join(target)} failed:\n{found.stderr[-3000:]}")
        steps = [json.loads(line) for line in Path(stamps.name).read_text().splitlines()]
    kept = steps[counted]
    gaps = {
        clock: [b[clock] - a[clock] for a, b in itertools.pairwise(kept)]
        for clock in ("wall", "cpu")
    }
    return {
        **{clock: statistics.median(values) for clock, values in gaps.items()},
        "start_wall": steps[0]["wall"] - started,
        "start_cpu": steps[0]["cpu"],
    }


def child(stamps: str, target: str, arguments: list[str]) -> None:
    """Run a contender in this process and note when its optimizer has stepped."""
    from torch.nn.utils import clip_grad_norm_
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    def clip(optimizer: Any, *_: object) -> None:
        clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)

    if CLIP in arguments:
        arguments.remove(CLIP)
        register_optimizer_step_pre_hook(clip)
    with Path(stamps).open("w") as file:

        def note(*_: object) -> None:
            file.write(json.dumps({"wall": time.time(), "cpu": time.process_time()}) + "\n")
            file.flush()

        register_optimizer_step_post_hook(note)
        sys.argv = [target, *arguments]
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            from craftune.cli import main as craftune

            assert craftune(arguments) == 0


def ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest ratio over the rounds, per clock."""
    pairs = {
        "speed-up over diffusers": ("diffusers", "craftune", ""),
        "share of the floor": ("floor", "craftune", ""),
        "share of the floor that clips": ("clipping", "craftune", ""),
        "start-up ratio": ("craftune", "diffusers", "start_"),
    }
    found = {}
    for name, (above, below, prefix) in pairs.items():
        for clock in ("wall", "cpu"):
            values = [r[above][prefix + clock] / r[below][prefix + clock] for r in rounds]
            found[f"{name}, {clock}"] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import diffusers
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0]} | {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def print_summary(found: dict[str, Any]) -> None:
    """The ratios, with their goals."""
    for name, r in found["ratios"].items():
        goal = GOALS.get(name.partition(",")[0])
        sign = "<=" if "start-up" in name else ">="
        shown = f"{r['median']:.3f} [{r['min']:.3f}, {r['max']:.3f}]"
        print(f"{name:<36} {shown:<24} {f'goal {sign} {goal}' if goal else ''}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main()

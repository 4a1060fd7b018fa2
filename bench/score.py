"""Scoring speed and memory on the CPU: `craftune score` beside a loop of one image at a time.

    python bench/score.py --out docs/results/score-bench.json

Three rewards (hpsv2.1, pickscore, aesthetic) from files in the published formats, with random
weights and towers whose costs relate as those of the real ones; the same weights for all:

    floor      the networks alone: prepared pictures in batches, each prompt once
    craftune   what `craftune score` does with a folder, networks loaded
    loop       the model cards' way: reward by reward, image by image, PNG opened anew, prompt
               encoded anew
    reload     the same, with the HPS checkpoint loaded once per prompt, as hpsv2.score does

They take turns, so that a machine whose speed drifts slows all alike; a ratio is the median over
the rounds of the ratio within a round. Wall seconds and CPU seconds (of all threads) are both
given: on a busy machine the latter are the steadier. Memory is the peak of a process of its own
that scores a folder, with few and with many small images.

The towers are a hundredth of the real ones, in GFLOP of one forward pass (counted):

                    HPS image, text    PickScore image, text    aesthetic    HPS file per GFLOP
    here            3.27, 0.45         3.31, 0.47               1.65         19 MB
    real            334.6, 47.1        334.6, 47.1              162          6 MB

so images and texts cost as in the real ones against each other, and the file that `reload` reads
weighs three times as much as it should: the vocabulary does not shrink. A CPU cannot show a GPU's
proportions: there the real towers take a few ms an image (831 GFLOP), less than opening the file
thrice, and far less than reading 2 GB. The ratios to the loop are those of a CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import (  # noqa: E402
    head_weights,
    open_clip_shapes,
    open_clip_weights,
    settings_of,
    write_tokenizer,
)

from craftune import rewards  # noqa: E402
from craftune.rewards.clip import embed_images, embed_texts  # noqa: E402
from craftune.rewards.hps import load_hps  # noqa: E402
from craftune.rewards.network import ON_CPU  # noqa: E402
from craftune.rewards.text import clip_tokenizer  # noqa: E402
from craftune.scoring.scores import score_source  # noqa: E402
from craftune.scoring.sources import open_source  # noqa: E402
from craftune.types import Reward  # noqa: E402

NAMES = ("hpsv2.1", "pickscore", "aesthetic")
PER_PROMPT = 5
CPU = torch.device("cpu")
Work = Callable[[list[str]], None]
"""Score all images, given their prompts."""
GOALS = {"loop / craftune": 1.5, "reload / craftune": 3.0, "floor / craftune": 0.9}


def main() -> None:
    """Run the rounds and the two memory processes; print, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40)
    sizes = {"type": int, "nargs": "+", "default": [256, 512, 1024]}
    parser.add_argument("--size", **sizes, help="pixels of an image's edge")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--few", type=int, default=1_000, help="images of the memory runs")
    parser.add_argument("--many", type=int, default=20_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        _measured(args.measure)
        return
    found: dict[str, Any] = {"command": " ".join(["python bench/score.py", *sys.argv[1:]])}
    found |= {"cpus": os.cpu_count(), "used": len(os.sched_getaffinity(0))}
    found["load at the start"] = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(prefix="craftune-bench-") as folder:
        found["speed"] = {f"{n} px": _speed(args, Path(folder, str(n)), n) for n in args.size}
        found["memory"] = _memory(args, Path(folder))
    found["load at the end"] = round(os.getloadavg()[0], 1)
    text = json.dumps(found, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def _speed(args: argparse.Namespace, folder: Path, size: int) -> dict[str, Any]:
    settings = _towers(folder)
    _write_images(folder / "images", args.images, size)
    contenders: dict[str, Work] = {
        "floor": _floor(folder, args.images),
        "craftune": _craftune(folder, [rewards.load(name, CPU, settings) for name in NAMES]),
        "loop": _loop(folder, reload=False),
        "reload": _loop(folder, reload=True),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(args.rounds + 1):  # the first warms up
        for name, work in contenders.items():
            prompts = [f"thing {n // PER_PROMPT} for {name} {number}" for n in range(args.images)]
            _write_prompts(folder / "images", prompts)
            wall, cpu = time.perf_counter(), time.process_time()
            work(prompts)
            if number:
                spent = (time.perf_counter() - wall, time.process_time() - cpu)
                seconds[name].append(spent)
                shown = f"{spent[0]:.2f} s wall, {spent[1]:.2f} s CPU"
                print(f"{size} px {number} {name:<9} {shown}", flush=True)
    ratios = {}
    for goal, least in GOALS.items():
        over, under = goal.split(" / ")
        for k, kind in enumerate(("wall", "CPU")):
            each = [a[k] / b[k] for a, b in zip(seconds[over], seconds[under], strict=True)]
            ratios[f"{goal}, {kind}"] = {
                "median": round(statistics.median(each), 3),
                "rounds": [round(one, 3) for one in each],
                "goal": least,
            }
    medians = {
        name: {
            kind: round(args.images / statistics.median(one[k] for one in spent), 2)
            for k, kind in enumerate(("wall", "CPU"))
        }
        for name, spent in seconds.items()
    }
    return {"images": args.images, "threads": args.threads} | {
        "images per second": medians,
        "ratios of seconds": ratios,
    }


def _towers(folder: Path) -> dict[str, dict[str, str]]:
    """Published files at the cost ratios of the real ones, and the same for the loop."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    folder.mkdir()
    tokenizer = write_tokenizer(folder / "tok")
    (folder / "hps").mkdir()
    shapes = open_clip_shapes(embedding=128, vision=(240, 9), text=(128, 15))
    checkpoint = folder / "hps" / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": open_clip_weights(shapes, 4.6)}, checkpoint)
    load_hps(checkpoint, "hps", CPU, torch.float32).save_pretrained(folder / "hps")
    for name, (wide, deep, heads) in {"pick": (256, 8, 4), "aes": (192, 7, 3)}.items():
        text = {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 10}
        text |= {"num_attention_heads": 5, "eos_token_id": 49407}
        vision = {"hidden_size": wide, "intermediate_size": 4 * wide, "num_hidden_layers": deep}
        vision |= {"num_attention_heads": heads, "patch_size": 14, "image_size": 224}
        both = {"projection_dim": 128}
        config = CLIPConfig(text_config=text | both, vision_config=vision | both, **both)
        CLIPModel(config).save_pretrained(folder / name)
    torch.save(head_weights(128), folder / "aes" / "sac+logos+ava1-l14-linearMSE.pth")
    spoken = {"tokenizer": tokenizer}
    return {
        "hpsv2.1": {"path": str(checkpoint)} | spoken,
        "pickscore": {"path": str(folder / "pick")} | spoken,
        "aesthetic": {"path": str(folder / "aes"), "head": str(folder / "aes")},
    }


def _write_images(folder: Path, count: int, size: int) -> None:
    """Smooth colours and some noise, which make PNG files as large as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        pixels = np.asarray(colours.resize((size, size)), np.int16)
        noisy = np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:06d}.png")


def _write_prompts(folder: Path, prompts: list[str]) -> None:
    """Prompts of a round's own: embeddings of an earlier round's must not be at hand."""
    rows = [{"file_name": f"{n:06d}.png", "text": prompt} for n, prompt in enumerate(prompts)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _craftune(folder: Path, loaded: list[Reward]) -> Work:
    def work(prompts: list[str]) -> None:
        source = open_source(folder / "images", None)
        outcome = score_source(source, loaded, folder / "s.parquet", 64, again=True)
        assert outcome.images == len(prompts)

    return work


def _floor(folder: Path, n: int) -> Work:
    """The networks alone, on inputs and tokens that are there already but for the prompts'."""
    hps = load_hps(folder / "hps" / "HPS_v2.1_compressed.pt", "hps", CPU, torch.float32)
    pick, aes = (_clip(folder / name) for name in ("pick", "aes"))
    tokenizer = clip_tokenizer(str(folder / "tok"), "tok")
    pixels = torch.rand(n, 3, 224, 224)

    @torch.no_grad()
    def work(prompts: list[str]) -> None:
        for model in (hps, pick, aes):
            for start in range(0, n, ON_CPU):
                embed_images(model, pixels[start : start + ON_CPU])
        ids = tokenizer(list(dict.fromkeys(prompts)))
        for model in (hps, pick):
            embed_texts(model, ids)

    return work


def _loop(folder: Path, *, reload: bool) -> Work:
    """Reward by reward, image by image."""
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    models = {name: _clip(folder / name) for name in ("hps", "pick", "aes")}
    prepare, tokenizer = CLIPImageProcessorPil(), CLIPTokenizer.from_pretrained(folder / "tok")
    state = folder / "reload.pt"
    torch.save(models["hps"].state_dict(), state)

    @torch.no_grad()
    def work(prompts: list[str]) -> None:
        for name, model in models.items():
            for number, prompt in enumerate(prompts):
                if reload and name == "hps" and number % PER_PROMPT == 0:
                    model.load_state_dict(torch.load(state))
                picture = Image.open(folder / "images" / f"{number:06d}.png").convert("RGB")
                pixels = prepare(images=picture, return_tensors="pt")["pixel_values"]
                if name == "aes":
                    model.get_image_features(pixel_values=pixels).pooler_output.mean().item()
                    continue
                ids = tokenizer(
                    [prompt],
                    padding="max_length",
                    truncation=True,
                    max_length=77,
                    return_tensors="pt",
                )
                model(pixel_values=pixels, **ids).logits_per_image[0, 0].item()

    return work


def _clip(folder: Path) -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder).eval()


def _memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak of a process that scores few and of one that scores many images of 16 x 16."""
    peaks = {}
    for count in (args.few, args.many):
        images = folder / f"small-{count}"
        _write_images(images, count, 16)
        _write_prompts(images, [f"thing number {n % 1000}" for n in range(count)])
        command = [sys.executable, __file__, "--measure", str(images)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[count] = json.loads(answer.stdout.splitlines()[-1])
        print(f"{count:,} images: {peaks[count]}", flush=True)
    ratio = peaks[args.many]["peak MB"] / peaks[args.few]["peak MB"]
    return {f"{count:,} images": peak for count, peak in peaks.items()} | {
        "ratio": round(ratio, 3),
        "goal": 1.1,
    }


def _measured(images: Path) -> None:
    """Score a folder with the tests' tiny networks; print the peak."""
    settings = {name: settings_of(name) for name in NAMES}
    loaded = [rewards.load(name, CPU, settings) for name in NAMES]
    before = _peak()
    started = time.perf_counter()
    source = open_source(images, None)
    outcome = score_source(source, loaded, images.with_suffix(".parquet"), 64)
    found = {"peak MB": _peak(), "loaded MB": before, "seconds": time.perf_counter() - started}
    assert outcome.images == source.total
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


def _peak() -> float:
    """MB that this process has held at the most; `ru_maxrss` would begin with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()

"""The paper's fine-tuning stage and sampling on one GPU, on random weights of the real shapes.

    python bench/gpu.py --out docs/results/gpu.json     one GPU, under 10 minutes
    python bench/gpu.py --tiny                          tiny networks on the CPU, seconds

For SD1.5 and SDXL: the micro-batch that trains fastest among those that fit, then `craftune`'s own
training loop on batches of 128 (bf16 autocast, float32 weights and AdamW), at least 20 timed
updates, extrapolated to the paper's 120 and 200; then images a second at 20 steps of DPM-Solver++
with guidance, decoded, in bf16. Speed does not depend on what the weights are. MFU counts the
forward pass three times, no recomputation, against --peak.
"""

import argparse
import gc
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler

from craftune.batches import Examples
from craftune.config import LoraConfig, TrainConfig
from craftune.methods import SFT
from craftune.models.counting import drawing
from craftune.models.discrete import discrete_grid, discrete_schedule
from craftune.models.published import PUBLISHED, Parts, published
from craftune.models.sd import UNetDenoiser
from craftune.models.sdxl import SDXLDenoiser
from craftune.sampling import sample
from craftune.training import train
from craftune.types import Cond, Denoiser

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
JOBS: dict[str, dict[str, Any]] = {
    SD15: {"updates": 120, "goal": 156, "paper": 6840, "micro": (8, 16, 32, 64), "draw": 16},
    SDXL: {"updates": 200, "goal": 1640, "paper": 14400, "micro": (2, 4, 8, 16), "draw": 4},
}
"""Updates of the paper; GPU-seconds aimed at and reported by it; sizes to try."""
TIMED = 20
NUM_STEPS = 20
SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
SMALL_VAE = {"block_out_channels": [32, 32], "layers_per_block": 1} | {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def main() -> None:
    """Measure both models and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--peak", type=float, default=790e12, help="dense bf16 FLOP/s of the GPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny else "cuda")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    found: dict[str, Any] = {"device": gpu, **versions, "tiny": args.tiny, "peak": args.peak}
    for name, job in JOBS.items():
        found[name] = measure(name, job, device, args)
        print(name, json.dumps(found[name], indent=1), flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(
    name: str, job: dict[str, Any], device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """One model: training, then drawing."""
    free(device)
    parts = PUBLISHED[name]
    if args.tiny:
        parts = {"unet": parts["unet"] | SMALL_UNET, "vae": parts["vae"] | SMALL_VAE}
    counted = published(name, LoraConfig(), False)
    if args.tiny or counted is None:
        counted = drawing({key: parts[key] for key in ("unet", "vae")})
    batch = 4 if args.tiny else 128
    denoiser = build(parts, device)
    sizes, timed = ((1, 2), 2) if args.tiny else (job["micro"], TIMED)
    found = training(denoiser, parts, batch, sizes, timed)
    seconds = found["seconds_per_update"]
    found |= {
        "gpu_seconds": seconds * job["updates"],
        "goal_gpu_seconds": job["goal"],
        "paper_gpu_seconds": job["paper"],
        "mfu": 3 * counted.forward_flops * batch / seconds / args.peak,
    }
    denoiser.network.requires_grad_(False).eval().to(torch.bfloat16)
    denoiser.network.zero_grad(set_to_none=True)
    free(device)
    images, num_steps = (2, 3) if args.tiny else (job["draw"], NUM_STEPS)
    drawn = draw(denoiser, parts, images, num_steps, device)
    per_image = 2 * num_steps * counted.forward_flops + counted.decode_flops
    drawn["mfu"] = drawn["images_per_s"] * per_image / args.peak
    return {"fine-tuning": found, "drawing": drawn}


def training(
    denoiser: Denoiser, parts: Parts, batch: int, sizes: tuple[int, ...], timed: int
) -> dict[str, Any]:
    """The fastest micro-batch that fits, and the seconds of an update in craftune's loop."""
    device = next(denoiser.network.parameters()).device
    denoiser.network.requires_grad_(True)
    rates = {}
    for size in sizes:
        try:
            rates[size] = batch / updates(denoiser, parts, batch, size, 2)[-1]
        except torch.OutOfMemoryError:
            break
        finally:
            denoiser.network.zero_grad(set_to_none=True)
            free(device)
    micro = max(rates, key=lambda size: rates[size])
    gaps = updates(denoiser, parts, batch, micro, 2 + timed)[2:]  # after two to warm up
    return {
        "batch": batch,
        "micro_batch": micro,
        "samples_per_s_by_micro_batch": rates,
        "timed_updates": len(gaps),
        "seconds_per_update": statistics.median(gaps),
        "samples_per_s": batch / statistics.median(gaps),
        "peak_gib": peak_gib(device),
    }


def updates(denoiser: Denoiser, parts: Parts, batch: int, micro: int, steps: int) -> list[float]:
    """Seconds of each step of the loop, from batch to batch."""
    device = next(denoiser.network.parameters()).device
    examples = Examples(
        latents=torch.randn(batch, *latent_shape(parts), device=device),
        cond=prompts(parts, batch, device),
        weight=torch.ones(batch, device=device),
    )
    config = TrainConfig(
        steps=steps,
        batch_size=batch,
        micro_batch=micro,
        gradient_checkpointing=False,
        precision="bfloat16",
    )
    times: list[float] = []

    def feed(_: int) -> Examples:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return examples

    with tempfile.TemporaryDirectory() as out:
        train(SFT(), denoiser, None, feed, config, 0, Path(out))
        feed(steps)
    return [b - a for a, b in itertools.pairwise(times)]


@torch.no_grad()
def draw(
    denoiser: Denoiser, parts: Parts, batch: int, num_steps: int, device: torch.device
) -> dict[str, Any]:
    """Images a second, sampled with guidance and decoded."""
    vae: Any = network(parts["vae"], device).to(torch.bfloat16)
    cond = prompts(parts, batch, device)
    grid = discrete_grid(pipe(), "dpm++2m", num_steps)

    def once() -> float:
        start = time.perf_counter()
        noise = torch.randn(batch, *latent_shape(parts), device=device)
        latents = sample(denoiser, noise, cond, cond, grid, guidance_scale=7.5)
        vae.decode(latents.to(vae.dtype)).sample.float().sum().item()
        return time.perf_counter() - start

    seconds = [once() for _ in range(4)][1:]
    return {
        "num_steps": num_steps,
        "batch": batch,
        "images_per_s": batch / statistics.median(seconds),
        "peak_gib": peak_gib(device),
    }


def build(parts: Parts, device: torch.device) -> Denoiser:
    """The family's denoiser over a network of random weights."""
    schedule = discrete_schedule(pipe(), Path())
    kind = SDXLDenoiser if "addition_embed_type" in parts["unet"] else UNetDenoiser
    return kind(network(parts["unet"], device), schedule)


def network(config: dict[str, Any], device: torch.device) -> Any:
    """A diffusers network from its configuration, float32."""
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device(device):
        return getattr(diffusers, config["_class_name"]).from_config(settings)


def pipe() -> Any:
    """What the noise levels of SD1.5 and SDXL are read from."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return SimpleNamespace(scheduler=DDIMScheduler(**settings, steps_offset=1))


def prompts(parts: Parts, batch: int, device: torch.device) -> Cond:
    """Encoded prompts of the right shapes."""
    unet = parts["unet"]
    tensors = {"tokens": torch.randn(batch, 77, unet["cross_attention_dim"], device=device)}
    if "addition_embed_type" in unet:
        times = 6 * unet["addition_time_embed_dim"]
        pooled = unet["projection_class_embeddings_input_dim"] - times
        side = float(8 * unet["sample_size"])
        tensors["pooled"] = torch.randn(batch, pooled, device=device)
        tensors["time_ids"] = torch.tensor([[side, side, 0, 0, side, side]] * batch, device=device)
    return Cond(tensors)


def latent_shape(parts: Parts) -> tuple[int, int, int]:
    """Of one image."""
    side = parts["unet"]["sample_size"]
    return (parts["unet"]["in_channels"], side, side)


def free(device: torch.device) -> None:
    """Give memory back before the next contender, and forget the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float | None:
    """Most memory held since `free`."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


if __name__ == "__main__":
    main()

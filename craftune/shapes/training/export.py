"""Stage `export`: the pipeline into the package, in half precision."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline


def export_model(pipeline: StableDiffusionPipeline, out: Path) -> float:
    """Write an fp16 safetensors checkpoint to `out`, replacing it. Returns its size in MB."""
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(partial, safe_serialization=True)
    _write_vocabulary(partial / "tokenizer")
    _clean(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6


def _write_vocabulary(folder: Path) -> None:
    """Add vocab.json and merges.txt, which transformers 4 reads; transformers 5 does not."""
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in bpe["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def _clean(folder: Path) -> None:
    """Drop from every config what only the machine that trained the model knew.

    `block_out_channels` is written by AutoencoderTiny and then warned about when it is read. The
    text encoder's `dtype` would have transformers 5 load it in half precision while diffusers
    loads the rest in full; a plain `from_pretrained` must run.
    """
    for path in folder.rglob("*.json"):
        if path.name == "vocab.json":
            continue
        config = json.loads(path.read_text())
        known = {k: v for k, v in config.items() if k not in ("_name_or_path", "is_local")}
        if known.get("_class_name") == "AutoencoderTiny":
            del known["block_out_channels"]
        if "dtype" in known:
            known["dtype"] = "float32"
        path.write_text(json.dumps(known, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)

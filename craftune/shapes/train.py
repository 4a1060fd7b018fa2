"""Train the embedded model from scratch: all stages, each resumable.

    python -m craftune.shapes.train --work DIR [--stage STAGE] [--steps N] [--threads N]

| stage | writes | two CPU cores |
|---|---|---|
| vae | DIR/vae/vae | 10 min |
| text | DIR/text/{tokenizer,text_encoder} | 1 min |
| latents | DIR/latents.pt | 5 min |
| base | DIR/base/state.pt | hours |
| decoder | DIR/decoder/vae | 5 min |
| judged | DIR/judged-{h,p,i}.pt | 5 min |
| towers | towers/{h,p,i} in the package | 10 min each |
| export | model/ in the package | seconds |

Without --stage all of them run in this order; a stage whose output exists is skipped, and one
that was interrupted goes on where it stopped. A larger --steps extends a finished base.
"""

import argparse
from pathlib import Path

from diffusers import AutoencoderTiny
from transformers import CLIPTextModel, CLIPTokenizer

from craftune.shapes.towers import FOLDER as TOWERS
from craftune.shapes.training.base import BATCH, Scenes, load_average, train_base
from craftune.shapes.training.common import Pace, prepare
from craftune.shapes.training.curve import draw_curve
from craftune.shapes.training.data import encode_scenes
from craftune.shapes.training.export import export_model
from craftune.shapes.training.judged import draw_judged
from craftune.shapes.training.text import sample_captions, train_text, train_tokenizer
from craftune.shapes.training.towers import TASTES, train_tower
from craftune.shapes.training.vae import polish_decoder, train_vae

STAGES = ("vae", "text", "latents", "base", "decoder", "judged", "towers", "export")
SEED = 0
VAE_CHUNKS = range(12)
BASE_CHUNKS = range(1000, 1090)
BASE_STEPS = 16_000
JUDGED = {"h": 1500, "p": 3000, "i": 1500}
"""Pictures per tower."""
TOWER_STEPS = {"h": 2400, "p": 2000, "i": 1500}
PACKAGE = Path(__file__).parent


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(prog="python -m craftune.shapes.train")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--stage", choices=STAGES, help="only this stage")
    parser.add_argument("--steps", type=int, default=BASE_STEPS, help="of the base, in total")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tower", choices=("h", "p", "i"), help="only this tower")
    parser.add_argument("--out", type=Path, default=PACKAGE / "model", help="of the export")
    options = parser.parse_args()
    prepare(options.threads, SEED)
    for stage in [options.stage] if options.stage else STAGES:
        _run(stage, options)


def _run(stage: str, options: argparse.Namespace) -> None:
    work: Path = options.work
    if stage == "vae":
        if not (work / "vae/vae").exists():
            train_vae(work / "vae", Pace(2250, 1.2e-3, decay_from=0.3), VAE_CHUNKS)
    elif stage == "text":
        if not (work / "text/text_encoder").exists():
            tokenizer = train_tokenizer(sample_captions(20_000, SEED), work / "text/tokenizer")
            train_text(tokenizer, work / "text", Pace(300, 2e-3), SEED + 1)
    elif stage == "latents":
        if not (work / "latents.pt").exists():
            encode_scenes(_vae(work), BASE_CHUNKS, work / "latents.pt")
    elif stage == "base":
        _train_base(work, options.steps)
    elif stage == "decoder":
        if not (work / "decoder/vae").exists():
            polish_decoder(
                _vae(work), work / "decoder", Pace(620, 1e-3, decay_from=0.3), VAE_CHUNKS
            )
    elif stage == "judged":
        pipeline = load_average(work / "base", work / "text", _vae(work))
        pipeline.set_progress_bar_config(disable=True)
        for name, taste in TASTES.items():
            if not (work / f"judged-{name}.pt").exists():
                draw_judged(pipeline, JUDGED[name], taste.seed, work / f"judged-{name}.pt")
    elif stage == "towers":
        for name in [options.tower] if options.tower else ("h", "p", "i"):
            train_tower(
                name,
                _vae(work),
                work / f"judged-{name}.pt",
                work / f"tower-{name}",
                TOWERS / name,
                Pace(TOWER_STEPS[name], 2e-3),
            )
    else:
        pipeline = load_average(work / "base", work / "text", _vae(work, "decoder"))
        print(f"{options.out}: {export_model(pipeline, options.out):.1f} MB")
        draw_curve(work / "base/log.jsonl", BATCH, options.out.parent / "loss_curve.png")


def _train_base(work: Path, steps: int) -> None:
    train_base(
        Scenes.load(work / "latents.pt"),
        CLIPTokenizer.from_pretrained(work / "text/tokenizer"),
        CLIPTextModel.from_pretrained(work / "text/text_encoder"),
        _vae(work),
        work / "base",
        Pace(steps, 1.2e-3),
        SEED + 2,
    )


def _vae(work: Path, stage: str = "vae") -> AutoencoderTiny:
    vae = AutoencoderTiny.from_pretrained(work / stage / "vae")
    return vae.eval().requires_grad_(False)


if __name__ == "__main__":
    main()

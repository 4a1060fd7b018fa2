"""The command line: one sub-command per stage, `run` for all of them, and a few that look."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

STAGE_HELP = {
    "prompts": "read, de-duplicate and draw the prompts; set the evaluation prompts apart",
    "refine": "rewrite every prompt N times",
    "generate": "draw the candidates",
    "score": "score every candidate with every reward; or any images, without a recipe",
    "select": "filter by the rewards and take the best",
    "train": "fine-tune on what was selected",
    "evaluate": "draw and score held-out prompts with base and tuned",
    "report": "write report.html and report.json",
}
TABLES = ("rewards", "methods", "families", "filters", "refiners", "settings")
EXPORTS = {
    "diffusers": "a folder for from_pretrained",
    "lora": "adapters for load_lora_weights",
    "kohya": "adapters for ComfyUI and A1111",
    "single-file": "one file for ComfyUI, A1111 and from_single_file",
}
DTYPES = ("float32", "float16", "bfloat16")
EXAMPLES = """examples:
  craftune doctor                                       is this machine ready?
  craftune plan recipes/craft-sdxl.toml                 what will it need, before you pay?
  craftune run recipes/demo.toml                        everything; again: only what is missing
  craftune run recipes/demo.toml --set train.steps=300 --set run.name=longer
  craftune select recipes/demo.toml --redo              one stage, anew
  craftune explain runs/demo --prompt "a red circle"    why its images were chosen or not
  craftune score photos/ --rewards aesthetic            any images; see craftune score --help
  craftune export runs/demo --to single-file            the tuned model as others load it
  craftune mix BASE runs/a=0.7 runs/b=0.3 --out both    two tunings of BASE as one model
"""


SCORE = """The stage of a recipe:
  craftune score my.toml
Any images: a folder, with or without metadata.jsonl (file_name, prompt or text);
a Parquet file with images; a run folder:
  craftune score photos/ --rewards aesthetic
  craftune score set/ --rewards hpsv2.1,pickscore --out scores.parquet
  craftune score set/ --rewards hpsv2.1 --set reward.'"hpsv2.1"'.path=HPS_v2.1_compressed.pt
Killed or stopped, the same command goes on. The exit status is 1 where images were
rejected, 2 where nothing could be scored.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 for an input that cannot work (one line on standard error); 130 or 143 when stopped
        by a signal.
    """
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # prompts hold what not every terminal can show
    with _stoppable() as received:
        try:
            status = _run(options, received)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            again = "the same command without --redo" if options.redo else "the same command again"
            print(f"craftune: stopped; finished work is kept, run {again}", file=sys.stderr)
            return 128 + (received or [signal.SIGINT])[0]
        except BrokenPipeError:  # of `craftune list rewards | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _run(options: argparse.Namespace, received: list[int]) -> int:
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # importing them remarks on absent torchvision
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from craftune import commands
    from craftune.errors import EndedElsewhere, UserError

    try:
        return commands.COMMANDS[options.command](options)
    except EndedElsewhere:
        return 2
    except (UserError, FloatingPointError) as error:
        message = str(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = (
            f"{where}{error.strerror or error}; finished work is kept, mend this and run the same "
            "command again"
        )
    if received:  # a library that was stopped while it read a file calls the file damaged
        raise KeyboardInterrupt
    print("craftune: " + " ".join(message.split("\n")), file=sys.stderr)
    return 2


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """SIGTERM, as batch systems send it, stops as Ctrl-C does; yields the signals received.

    What is ignored, as Ctrl-C is under nohup, stays ignored.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        raise KeyboardInterrupt

    heeded = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        heeded.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="craftune",
        description="Align a text-to-image diffusion model with reward models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(redo=None, stage=None)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    whole = commands.add_parser("run", help="all stages: prompts to report")
    _add_recipe(whole)
    _add_resume(whole).add_argument(
        "--redo", choices=STAGE_HELP, metavar="STAGE", help="make this stage and later ones anew"
    )
    for name, text in STAGE_HELP.items():
        stage = commands.add_parser(name, help=text)
        _add_recipe(stage)
        group = _add_resume(stage) if name == "train" else stage
        group.add_argument(
            "--redo", action="store_const", const=name, help="make it and later ones anew"
        )
        stage.set_defaults(command="run", stage=name)
        if name == "score":
            _add_score(stage)
    check = commands.add_parser("check", help="say what is wrong with a recipe, load nothing")
    _add_recipe(check)
    plan = commands.add_parser("plan", help="estimate memory, disk and GPU-hours, load no weights")
    _add_recipe(plan)
    doctor = commands.add_parser("doctor", help="check this machine and say how to mend it")
    doctor.add_argument("--out", type=Path, default=Path("runs"), help="where runs will be written")
    explain = commands.add_parser("explain", help="why a candidate was or was not chosen")
    explain.add_argument("run", type=Path, help="a run folder, e.g. runs/demo")
    which = explain.add_mutually_exclusive_group()
    which.add_argument("--candidate", help="its id, <prompt id>-<variant>-<sample>")
    which.add_argument("--prompt", help="a prompt's id or text")
    verify = commands.add_parser(
        "verify-reward", help="compare a reward's scores with published or given ones"
    )
    verify.add_argument("name", help="see craftune list rewards")
    verify.add_argument("--golden", type=Path, metavar="FILE", help="JSON; see docs/rewards.md")
    verify.add_argument("--images", type=Path, metavar="FOLDER", help="where the images lie")
    _add_set(verify)
    _add_export(commands.add_parser("export", help="hand the tuned model on in another format"))
    _add_mix(commands.add_parser("mix", help="several tunings of a model as one, each scaled"))
    _add_serve(commands.add_parser("serve-reward", help="one reward behind an HTTP address"))
    names = commands.add_parser("list", help="the names and settings that recipes may use")
    names.add_argument("table", choices=TABLES, metavar="table", help=", ".join(TABLES))
    return parser


def _add_score(parser: argparse.ArgumentParser) -> None:
    """The same command for images without a recipe."""
    parser.set_defaults(command="score")
    parser.description = SCORE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rewards", metavar="NAME,NAME", help="images: see craftune list rewards")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="images: table of file_name and prompt"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="images: Parquet file; default: scores.parquet"
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reward", help="see craftune list rewards")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8765, help="default: 8765; 0 takes a free one")
    _add_set(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder, e.g. runs/demo")
    parser.add_argument(
        "--to", required=True, choices=EXPORTS, metavar="FORMAT", help=_listed(EXPORTS)
    )
    parser.add_argument("--out", type=Path, help="new folder; default: <run>/export/<format>")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: as the run saved them"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the export; token from HF_TOKEN or login",
    )


def _add_mix(parser: argparse.ArgumentParser) -> None:
    parser.description = "BASE + sum of SCALE * (MODEL - BASE), as a diffusers folder."
    parser.add_argument("base", help="a diffusers folder, hub id or .safetensors file")
    parser.add_argument(
        "tunings",
        nargs="+",
        metavar="MODEL=SCALE",
        help="a run folder, LoRA or model tuned from BASE, and its scale: 0 is BASE, 1 is MODEL",
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as BASE has them")


def _listed(table: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in table.items())


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a TOML file, see recipes/")
    _add_set(parser)


def _add_resume(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """For those who look for it: it changes nothing."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--resume",
        choices=("latest",),
        help="from the newest whole checkpoint, past broken ones; so it is without this, too",
    )
    return group


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override one setting; may be repeated (craftune list settings)",
    )


if __name__ == "__main__":
    sys.exit(main())

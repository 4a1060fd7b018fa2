"""The command line: one sub-command per stage, `run` for all of them, and a few that look."""

import argparse
import sys
from pathlib import Path

STAGE_HELP = {
    "prompts": "read, de-duplicate and draw the prompts; set the evaluation prompts apart",
    "refine": "rewrite every prompt N times",
    "generate": "draw the candidates",
    "score": "score every candidate with every reward",
    "select": "filter by the rewards and take the best",
    "train": "fine-tune on what was selected",
    "evaluate": "draw and score held-out prompts with base and tuned",
    "report": "write report.html and report.json",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 for an input that cannot work (one line on stderr)."""
    options = _parser().parse_args(arguments)
    from craftune import commands
    from craftune.errors import UserError

    try:
        return getattr(commands, options.function)(options)
    except (UserError, FloatingPointError) as error:
        print(f"craftune: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"craftune: {where}{error.strerror or error}; finished work is kept, mend this and run "
            "the same command again",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("craftune: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="craftune", description="Align a text-to-image diffusion model with reward models."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    whole = commands.add_parser("run", help="all stages: prompts to report")
    _add_recipe(whole)
    whole.add_argument("--redo", choices=STAGE_HELP, help="make this stage and later ones anew")
    whole.set_defaults(function="run", stage=None)
    for name, text in STAGE_HELP.items():
        stage = commands.add_parser(name, help=text)
        _add_recipe(stage)
        stage.add_argument(
            "--redo", action="store_const", const=name, help="make it and later ones anew"
        )
        stage.set_defaults(function="run", stage=name)
    check = commands.add_parser("check", help="say what is wrong with a recipe, load nothing")
    _add_recipe(check)
    check.set_defaults(function="check")
    explain = commands.add_parser("explain", help="why a candidate was or was not chosen")
    explain.add_argument("run", type=Path, help="a run folder")
    which = explain.add_mutually_exclusive_group()
    which.add_argument("--candidate", help="its id, <prompt id>-<variant>-<sample>")
    which.add_argument("--prompt", help="a prompt's id or text")
    explain.set_defaults(function="explain")
    names = commands.add_parser("list", help="the names that recipes may use")
    tables = ("rewards", "methods", "families", "filters", "refiners")
    names.add_argument("table", choices=tables)
    names.set_defaults(function="list_names")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a TOML file, see recipes/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override one setting; may be repeated",
    )


if __name__ == "__main__":
    sys.exit(main())

"""Stage `report`: the run folder -> report.html, report.json and costs.json."""

from pathlib import Path
from typing import Any

from craftune.records import write_json, write_text
from craftune.reporting.page import render
from craftune.reporting.read import Run, read_run
from craftune.reporting.summary import summarise


def report(run: Path, out: Path) -> dict[str, int]:
    """Compare base and tuned, and write it down for people and for programs.

    Args:
        run: a run folder whose stages up to `evaluate` are done.
        out: an existing folder; receives report.html (self-contained), report.json (every number;
            the same bytes whenever the stages made the same files) and costs.json (seconds).

    Raises:
        UserError: a stage is not done, or its files are damaged or do not fit together.
    """
    loaded = read_run(run)
    summary = summarise(
        loaded, loaded.recipe["evaluate"]["resamples"], loaded.recipe["run"]["seed"]
    )
    spent = costs(loaded)
    write_json(out / "report.json", summary)
    write_json(out / "costs.json", spent)
    write_text(out / "report.html", render(loaded, summary, spent))
    evaluation = loaded.evaluation
    return {"prompts": len(evaluation.ids), "image_pairs": len(evaluation.prompt)}


def costs(run: Run) -> dict[str, Any]:
    """Seconds of each stage. They differ from run to run, so report.json has none of them."""
    total = sum(record["seconds"] for record in run.stages.values())
    return {
        "seconds": round(total, 3),
        "stages": [
            {
                "stage": name,
                "seconds": record["seconds"],
                "share": round(record["seconds"] / total, 6) if total else 0.0,
                "device": record["device"],
                "counts": record["counts"],
            }
            for name, record in run.stages.items()
        ],
    }

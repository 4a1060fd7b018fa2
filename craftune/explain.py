"""Why a candidate was or was not selected, in words."""

from craftune.select_config import SelectConfig, filter_rows, joined, sub_filters
from craftune.selection import Selection, Status, joint


def explain(
    selection: Selection, config: SelectConfig, group: int, column: int | None = None
) -> str:
    """Why a candidate, or each one of a group, was or was not selected: some lines of text.

    Args:
        selection: what `select` returned for `config`.
        config: the same.
        group: position of the prompt in the pool.
        column: of the candidate, 0 = the baseline; None = the whole group.

    Raises:
        ValueError: the pool has no such cell.
    """
    groups, columns = selection.status.shape
    if not (0 <= group < groups and 0 <= (column or 0) < columns):
        raise ValueError(f"no candidate ({group}, {column}) in a pool of {groups} x {columns}")
    asked = range(columns) if column is None else [column]
    numbers = (selection.composite, selection.gain, selection.advantage)
    width = max(13, *(len(name) + 2 for name in selection.names))
    heads = [*selection.names, "composite", "gain", "advantage"]
    lines = [
        f"group {group}: {_verdict(selection, config, group)}",
        "   j" + "".join(f"{head:>{width}}" for head in heads) + "   (> beats the baseline)",
    ]
    for j in sorted({0, *asked}):
        pairs = zip(selection.wins[:, group, j], selection.scores[:, group, j], strict=True)
        cells = [f"{'> ' if win else ''}{score:.5g}" for win, score in pairs]
        cells += [f"{values[group, j]:+.4f}".replace("+nan", "-") for values in numbers]
        lines.append(f"{j:4d}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join([*lines, *(f"{j:4d} {reason(selection, config, group, j)}" for j in asked)])


def _verdict(selection: Selection, config: SelectConfig, group: int) -> str:
    """The filter on one group, in words."""
    usable = selection.status[group : group + 1] >= Status.BASELINE.value
    if not usable.any():
        return "dropped before the filter"
    won = selection.wins[:, group : group + 1]
    counts = ", ".join(
        f"{joined(selection.names, part)} {joint([won[row] for row in part], usable).sum()}"
        for part in sub_filters(filter_rows(config, selection.names))
    )
    verdict = "kept" if selection.passes[group] else "removed"
    return f"{verdict} by filter {config.filter}; winners of {usable[:, 1:].sum()}: {counts}"


def reason(selection: Selection, config: SelectConfig, group: int, column: int) -> str:
    """The one reason why this candidate was or was not selected."""
    rank, counts = selection.rank[group, column], selection.funnel
    place = f"rank {rank} of {counts['eligible']} by {config.rank_by}"
    drawn = f"{config.strategy} {counts['selected']}, select.mode {config.mode}"
    if config.mode == "image":
        drawn += f", select.per_prompt_cap {config.per_prompt_cap}"
    if config.accept.rule != "off":
        drawn = f"{counts['selected']} accepted by rule {config.accept.rule}"
        place += f", log kappa {selection.log_kappa[group, column]:.3g}"
    return {
        Status.ABSENT: "not there: its group has fewer images",
        Status.DROPPED_NO_BASELINE: "not selected: its group has no baseline",
        Status.DROPPED_NAN: "not selected: a score in its group is NaN or infinite",
        Status.BASELINE: "never selected: it is the baseline, the plain prompt's image",
        Status.REMOVED_BY_FILTER: f"not selected: filter {config.filter} removed its group",
        Status.NOT_A_WINNER: "not selected: does not win itself, as select.image_level asks",
        Status.CUT_BY_CAP: f"not selected: {place}, behind others of its prompt ({drawn})",
        Status.CUT_BY_K: f"not selected: {place}, not among the {drawn}",
        Status.NOT_ACCEPTED: f"not selected: {place}, not among the {drawn}",
        Status.SELECTED: f"selected: {place}, among the {drawn}",
    }[Status(selection.status[group, column])]

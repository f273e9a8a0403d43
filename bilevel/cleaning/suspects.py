"""The rows in the order of suspicion, over all runs, and the data without those that are flagged."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilevel.cleaning.outcome import Outcome, Run
from bilevel.cli.output import write_text

__all__ = ["Suspect", "suspects", "write_cleaned", "write_suspects"]


@dataclass(frozen=True)
class Suspect:
    """A training row.

    Parameters
    ----------
    row
        Its number in the data.
    given, suggested
        Class numbers: the label that was examined, and what the cleaned classifiers say most often.
    weight
        Mean over the runs that examined it.
    flagged_in, runs
        How many runs flagged it, of how many that examined it.
    true
        The true class number where labels were made wrong on the spot, else None.
    """

    row: int
    given: int
    suggested: int
    weight: float
    flagged_in: int
    runs: int
    true: int | None

    @property
    def flagged(self) -> bool:
        """Whether more than half of the runs flagged it."""
        return 2 * self.flagged_in > self.runs


def reported_runs(outcome: Outcome) -> tuple[Run, ...]:
    """Return the runs whose rows are listed: all, or the first where each run made other labels wrong."""
    return outcome.runs if outcome.settings.corrupt == 0 else outcome.runs[:1]


def suspects(outcome: Outcome) -> list[Suspect]:
    """Return the examined rows, the most suspicious first: those that most runs flagged, and of these the smallest mean weight."""
    seen: dict[int, list[tuple[int, int, float, bool]]] = {}
    for run in reported_runs(outcome):
        columns = run.split.training, run.given, run.cleaned.suggested, run.cleaned.weights, run.cleaned.flagged
        for row, *rest in zip(*(column.tolist() for column in columns), strict=True):
            seen.setdefault(row, []).append(tuple(rest))
    true = outcome.data.labels.tolist() if outcome.settings.corrupt > 0 else None
    listed = [_suspect(row, entries, None if true is None else true[row]) for row, entries in seen.items()]
    return sorted(listed, key=lambda each: (-each.flagged_in / each.runs, each.weight, each.row))


def _suspect(row: int, entries: Sequence[tuple[int, int, float, bool]], true: int | None) -> Suspect:
    suggested = Counter(entry[1] for entry in entries).most_common(1)[0][0]
    weight = sum(entry[2] for entry in entries) / len(entries)
    return Suspect(row, entries[0][0], suggested, weight, sum(entry[3] for entry in entries), len(entries), true)


def write_suspects(outcome: Outcome, path: Path) -> None:
    """Write the examined rows in the order of suspicion as CSV.

    Raises
    ------
    bilevel.cli.output.OutputError
        If the file cannot be written.
    """
    data = outcome.data
    header = ["rank", "row", "given", "suggested", "weight", "flagged", "flagged_in_runs", "runs"]
    known = outcome.settings.corrupt > 0
    lines = [header + ["true"] * known]
    for rank, each in enumerate(suspects(outcome), 1):
        cells = [
            str(rank), data.rows[each.row], data.classes[each.given], data.classes[each.suggested], f"{each.weight:.6g}",
            "yes" if each.flagged else "no", str(each.flagged_in), str(each.runs),
        ]  # fmt: skip
        lines.append(cells + ([data.classes[each.true]] if each.true is not None else []))
    write_text(_csv(lines), path)


def write_cleaned(outcome: Outcome, path: Path) -> None:
    """Write the data without the flagged rows as CSV, in the columns that they came in.

    Where labels were made wrong on the spot, these are the training rows of the first run, with the labels that they had there, and its
    trusted rows.

    Raises
    ------
    bilevel.cli.output.OutputError
        If the file cannot be written.
    """
    data = outcome.data
    examined = {each.row: each for each in suspects(outcome)}
    rows: Sequence[int] = range(len(data.labels))
    if outcome.settings.corrupt > 0:
        rows = sorted([*examined, *outcome.runs[0].split.trusted.tolist()])
    lines = [list(data.header)]
    for row in rows:
        cells = list(data.cells[row])
        if row in examined:
            if examined[row].flagged:
                continue
            cells[data.target] = data.classes[examined[row].given]
        lines.append(cells)
    write_text(_csv(lines), path)


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()

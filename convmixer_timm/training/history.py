"""The history of a run: ``summary.csv``, which ``train.py`` writes."""

import csv
import io
from pathlib import Path

__all__ = ["as_csv", "read_history"]


def read_history(file: Path) -> list[dict[str, str]]:
    """A row for each epoch; none where there is no such file.

    A run that goes on from an earlier epoch repeats those after it. The older ones' weights are gone.
    """
    if not file.exists():
        return []
    rows: list[dict[str, str]] = []
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        for row in csv.DictReader(lines):
            if (row.get("epoch") or "").isdigit():  # older train.py repeats the header, too
                rows = [*(other for other in rows if int(other["epoch"]) < int(row["epoch"])), row]
    return rows


def as_csv(rows: list[dict[str, str]]) -> str:
    """Rows as one table, with the columns of all of them: validation may have begun or ended meanwhile."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row if name)
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

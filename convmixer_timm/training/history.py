"""The history of a run: ``summary.csv``, which ``train.py`` writes."""

import csv
import io
import math
from pathlib import Path

__all__ = ["as_csv", "figure", "read_history"]


def read_history(file: Path) -> list[dict[str, str]]:
    """A row for each epoch; none where there is no such file.

    A run that goes on from an earlier epoch repeats those after it. The older ones' weights are gone. A last line
    that doesn't end, as a full disk leaves it, is left out: nobody can tell a figure from the half of one.
    """
    if not file.exists():
        return []
    rows: list[dict[str, str]] = []
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        for row in csv.DictReader(line for line in lines if line.endswith(("\n", "\r"))):
            if (row.get("epoch") or "").isdigit():  # older train.py repeats the header, too
                rows = [*(other for other in rows if int(other["epoch"]) < int(row["epoch"])), row]
    return rows


def figure(row: dict[str, str], name: str) -> float | None:
    """A row's figure; None where it has none, or one that is no finite number, as after a training that diverged.

    Raises:
        ValueError: If something else stands there.
    """
    text = row.get(name) or ""
    try:
        value = float(text or "nan")
    except ValueError:
        raise ValueError(f"epoch {row['epoch']} has the {name} {text!r}, which is no number") from None
    return value if math.isfinite(value) else None


def as_csv(rows: list[dict[str, str]]) -> str:
    """Rows as one table, with the columns of all of them: validation may have begun or ended meanwhile."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row if name)
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

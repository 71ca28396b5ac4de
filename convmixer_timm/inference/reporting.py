"""Predictions as text: a table, JSON or CSV."""

import csv
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import printable

__all__ = ["FORMATS"]

Results = Iterable[tuple[Path, list[tuple[str, float]]]]


def _table(results: Results) -> None:
    rows = [(printable(path), classes) for path, classes in results]
    width = max((len(path) for path, _ in rows), default=0)
    for path, classes in rows:
        print(f"{path:{width}}  " + "  ".join(f"{name} {p:.3f}" for name, p in classes))


def _json(results: Results) -> None:
    rows = [{"path": str(path), "classes": [{"label": n, "prob": p} for n, p in classes]} for path, classes in results]
    print(json.dumps(rows, indent=2))


def _csv(results: Results) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "rank", "label", "prob"])
    for path, classes in results:
        writer.writerows([path, rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(classes, 1))


FORMATS: dict[str, Callable[[Results], None]] = {"table": _table, "json": _json, "csv": _csv}

"""Predictions as text: a table, JSON or CSV."""

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import printable

__all__ = ["FORMATS"]

Result = tuple[Path, list[tuple[str, float]]]
Results = Iterable[Result]


@contextlib.contextmanager
def _all(results: Results) -> Iterator[list[Result]]:
    """All of them; after Ctrl-C, which then goes on, those that there are."""
    rows: list[Result] = []
    try:
        rows.extend(results)
    except KeyboardInterrupt:
        yield rows
        raise
    yield rows


def _table(results: Results) -> None:
    with _all(results) as rows:
        width = max((len(printable(path)) for path, _ in rows), default=0)
        for path, classes in rows:
            print(f"{printable(path):{width}}  " + "  ".join(f"{printable(name)} {p:.3f}" for name, p in classes))


def _json(results: Results) -> None:
    with _all(results) as rows:
        shown = [
            {"path": str(path), "classes": [{"label": n, "prob": p} for n, p in classes]} for path, classes in rows
        ]
        print(json.dumps(shown, indent=2))


def _csv(results: Results) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "rank", "label", "prob"])
    for path, classes in results:
        writer.writerows([path, rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(classes, 1))


FORMATS: dict[str, Callable[[Results], None]] = {"table": _table, "json": _json, "csv": _csv}

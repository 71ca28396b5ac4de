"""Pictures of what was trained, with matplotlib (``pip install 'convmixer-timm[plot]'``)."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

from .files import atomic_path

__all__ = ["draw_curve"]


def draw_curve(summary: Path, target: Path) -> None:
    """Draws a run's loss and validation accuracy by epoch.

    Args:
        summary: ``summary.csv`` of timm's ``train.py``.
        target: PNG to write.

    Raises:
        ValueError: If the file has no finished epoch.
    """
    with summary.open() as file:
        rows = list(csv.DictReader(file))
    if not rows or "epoch" not in rows[0]:
        raise ValueError(f"{summary} has no finished epoch")
    epochs = [int(row["epoch"]) + 1 for row in rows]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    loss = figure.subplots()
    for column, label, style in (("train_loss", "loss, training", "-"), ("eval_loss", "loss, validation", "--")):
        if rows[0].get(column):
            loss.plot(epochs, [float(row[column]) for row in rows], style, color="tab:blue", label=label)
    loss.set(xlabel="epoch", ylabel="loss")
    if rows[0].get("eval_top1"):
        top1 = [float(row["eval_top1"]) for row in rows]
        accuracy = loss.twinx()
        accuracy.plot(epochs, top1, color="tab:orange", label=f"top-1, validation (last {top1[-1]:.2f} %)")
        accuracy.set_ylabel("top-1 in %")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=120)

"""Prints the study's tables as Markdown and draws its plots, from what ``run.py`` and ``robustness.py`` wrote.

python benchmarks/study/report.py
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from run import rows_of

HERE = Path(__file__).parent
BASE = "ConvMixer-128/8, kernel 5, patch 4"
# Each question with the runs that answer it, and what to call them.
QUESTIONS = {
    "residual": {
        "base": "around spatial mixing (the paper's)",
        "residual_both": "around both",
        "residual_none": "around none",
    },
    "norm": {
        "base": "BatchNorm, after the activation (the paper's)",
        "norm_first": "BatchNorm, before the activation",
        "layernorm": "LayerNorm over channels",
        "groupnorm": "GroupNorm(1)",
    },
    "mixing": {
        "base": "ConvMixer",
        "mixer": "MLP-Mixer",
        "vit": "ViT",
        "base_equal_time": "ConvMixer, in the others' time",
    },
    "channel_mixing": {
        "base": "one layer (the paper's)",
        "mlp_narrow": "two, 64 wide between",
        "mlp_shallow": "two, 144 wide between, half the depth",
    },
    "kernel": {"kernel_3": "kernel 3", "base": "kernel 5", "kernel_7": "kernel 7", "kernel_9": "kernel 9"},
    "patch": {
        "base": "patch 4",
        "patch_2": "patch 2",
        "patch_4_short": "patch 4, 3 epochs",
        "patch_2_short": "patch 2, 3 epochs",
        "patch_1_short": "patch 1, 3 epochs",
    },
    "shape": {"wide": "184 wide, 4 deep", "base": "128 wide, 8 deep", "deep": "86 wide, 16 deep"},
    "shuffled": {
        "base": "ConvMixer",
        "base_shuffled": "ConvMixer, shuffled",
        "mixer": "MLP-Mixer",
        "mixer_shuffled": "MLP-Mixer, shuffled",
        "vit": "ViT",
        "vit_shuffled": "ViT, shuffled",
    },
}


def mean(rows: list[dict], key: str) -> float:
    return statistics.mean(float(row[key]) for row in rows)


def table(runs: dict[str, str], rows: dict[str, list[dict]]) -> str:
    """One question's table; accuracies are means over seeds, with their standard deviation where there are several.

    Images a second are the first seed's, as later ones may have run on another machine.
    """
    lines = [
        "| run | parameters | multiply-adds | epochs | learning rate | images/s | held out | test (seeds) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, label in runs.items():
        if not (own := rows.get(name)):
            continue
        test = [float(row["test_top1"]) for row in own]
        spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
        cells = [
            label,
            f"{int(own[0]['parameters']):,}",
            f"{float(own[0]['multiply_adds_M']):.1f} M",
            own[0]["epochs"],
            own[0]["lr"],
            own[0]["images_per_second"],
            f"{mean(own, 'held_out_top1'):.2f}",
            f"{mean(own, 'test_top1'):.2f}{spread} ({len(test)})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_question(name: str, runs: dict[str, str], rows: dict[str, list[dict]], folder: Path) -> None:
    """A dot for each seed."""
    runs = {run: label for run, label in runs.items() if run in rows}
    figure, axes = plt.subplots(figsize=(6.4, 0.7 + 0.38 * len(runs)), layout="constrained")
    for y, run in enumerate(runs):
        values = [float(row["test_top1"]) for row in rows[run]]
        axes.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.6)
        axes.text(statistics.mean(values), y - 0.16, f"{statistics.mean(values):.1f}", ha="center", va="bottom", size=8)
    axes.set_yticks(range(len(runs)), list(runs.values()))
    axes.set_ylim(len(runs) - 0.5, -0.75)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("top-1 on CIFAR-10's test images, %")
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)


def draw_robustness(rows: list[dict], folder: Path) -> None:
    labels = {
        "noise": "noise, standard deviation (grey levels)",
        "blur": "blur, standard deviation (pixels)",
        "contrast": "contrast, factor",
        "jpeg": "JPEG, quality",
        "shift": "shift (pixels)",
        "size": "input size (pixels)",
    }
    # What leaves the images as they are; nothing does for a quality, and a size is one of the curve's own.
    untouched = {"noise": 0, "blur": 0, "contrast": 1, "shift": 0}
    figure, grid = plt.subplots(2, 3, figsize=(9.6, 5.4), sharey=True, layout="constrained")
    for axes, (corruption, label) in zip(grid.flat, labels.items(), strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            (clean,) = (float(row["top1"]) for row in own if row["corruption"] == "none")
            points = [(float(row["degree"]), float(row["top1"])) for row in own if row["corruption"] == corruption]
            if corruption in untouched:
                points.append((untouched[corruption], clean))
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=model)
        axes.axhline(clean, color="grey", linewidth=0.8, linestyle=":")
        if corruption in ("contrast", "jpeg"):
            axes.invert_xaxis()
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("top-1, %")
    grid[0, 0].legend(fontsize=8)
    figure.savefig(folder / "robustness.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the tables; plots go below it")
    args = parser.parse_args()
    matplotlib.use("agg")
    rows = defaultdict(list)
    for row in rows_of(args.results / "results.csv"):
        rows[row["name"]].append(row)
    if not rows:
        raise SystemExit(f"{args.results} has no results.csv: run.py writes it")
    plots = args.results / "plots"
    plots.mkdir(exist_ok=True)
    for name, runs in QUESTIONS.items():
        if len([run for run in runs if run in rows]) > 1:
            print(f"## {name}\n\n{table(runs, rows)}\n")
            draw_question(name, runs, rows, plots)
    if robustness := rows_of(args.results / "robustness.csv"):
        draw_robustness(robustness, plots)


if __name__ == "__main__":
    main()

"""Trains the models of the study: what each choice of ConvMixer's architecture is worth, at equal cost.

    python benchmarks/study/run.py --data-dir cifar10

runs every file below ``runs/``, or those that are named, over timm's ``train.py`` by this package's launcher: two
epochs at each of three learning rates, the better two of them to the end, and of these the one that is better on the
images held out, measured once on the test images. A row each goes to ``results.csv``, and a row for every training to
``trials.csv``; what has its row is not repeated. ``--quick`` takes a few images and steps, without choosing a learning
rate but for the base, and goes on to ``robustness.py`` and ``report.py``: all in a few minutes, into the output folder.

``cifar10`` has ``train``, ``validation`` and ``test``, as ``benchmarks/cifar_folders.py`` makes them.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import models  # noqa: F401  registers them
import timm
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from arguments import missing_folders  # noqa: E402  of the benchmarks beside this folder
from train_step import append_rows  # noqa: E402

LEARNING_RATES = (0.01, 0.03, 0.1)
EPOCHS_TO_CHOOSE = 2
SPLITS = ("train", "validation", "test")


def settings_of(name: str) -> dict:
    """What a run is: base.yaml with the lines of its own file."""
    base, own = (yaml.safe_load(p.read_text()) or {} for p in (HERE / "base.yaml", HERE / "runs" / f"{name}.yaml"))
    return {**base, **own}


def cost_of(settings: dict) -> dict:
    """Parameters of a run's model and multiply-adds of one image's forward pass, in millions."""
    model = timm.create_model(settings["model"], num_classes=10, **settings.get("model_kwargs", {})).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *settings["input_size"]))
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "multiply_adds_M": round(counter.get_total_flops() / 2e6, 2)}


def launch(*args: str) -> float:
    """Runs the launcher on one thread and returns its seconds of processor time, which don't count what else runs."""
    environment = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    )
    command = [sys.executable, "-m", "convmixer_timm", *args]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if code := os.waitstatus_to_exitcode(status):
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read().decode(errors='replace')[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def train(settings: dict, folder: Path, data: Path) -> tuple[float, float]:
    """One run of ``train.py``: top-1 on the held-out images after its last epoch, and seconds."""
    shutil.rmtree(folder, ignore_errors=True)  # a run that was cut off
    folder.mkdir(parents=True)
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    where = ("--data-dir", str(data), "--output", str(folder.parent), "--experiment", folder.name)
    seconds = launch("train", str(config), *where, "--device", "cpu", "--device-modules", "models")
    with (folder / "summary.csv").open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["eval_top1"]), seconds


def test(folder: Path, data: Path) -> float:
    """Top-1 of a run's last weights on the test images."""
    results = folder / "test.json"
    where = ("--data-dir", str(data), "--split", "test", "--device", "cpu")
    launch(
        "run", "validate", "--checkpoint", str(folder / "last.pth.tar"), *where, "--channels-last", "--amp",
        "--amp-dtype", "bfloat16", "--workers", "1", "--results-file", str(results), "--results-format", "json",
    )  # fmt: skip
    return json.loads(results.read_text())["top1"]


def rows_of(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Study:
    """What is trained, on which data, and the tables of what was.

    Args:
        data: Folder with train, validation and test.
        output: Where ``train.py`` writes.
        results: Folder of the tables.
        quick: One epoch each, and a learning rate chosen for the base only.
    """

    def __init__(self, data: Path, output: Path, results: Path, quick: bool):
        self.data, self.output, self.quick = data, output, quick
        self.trials, self.results = results / "trials.csv", results / "results.csv"

    def folder(self, name: str, lr: float, epochs: int, seed: int) -> Path:
        return self.output / name / f"lr-{lr}-epochs-{epochs}-seed-{seed}"

    def trial(self, name: str, lr: float, epochs: int, seed: int) -> dict:
        """One training's row, with its accuracy on the images held out."""
        key = {"name": name, "lr": str(lr), "epochs": str(epochs), "seed": str(seed)}
        for row in rows_of(self.trials):
            if key.items() <= row.items():
                return row
        settings = {**settings_of(name), "lr": lr, "epochs": epochs, "seed": seed}
        settings.pop("lr_of", None)
        held_out, seconds = train(settings, self.folder(name, lr, epochs, seed), self.data)
        row = {**key, "held_out_top1": round(held_out, 2), "seconds": round(seconds)}
        append_rows(self.trials, [row])
        return row

    def epochs(self, name: str) -> int:
        return 1 if self.quick else settings_of(name)["epochs"]

    def learning_rate(self, name: str) -> float:
        """Of those that were tried to the end the best one on the images held out."""
        if self.quick and name != "base":
            return LEARNING_RATES[0]

        def best(rates: tuple[float, ...], epochs: int) -> list[float]:
            found = {lr: float(self.trial(name, lr, epochs, 0)["held_out_top1"]) for lr in rates}
            return sorted(found, key=lambda lr: -found[lr])

        epochs = self.epochs(name)
        return best(tuple(best(LEARNING_RATES, min(EPOCHS_TO_CHOOSE, epochs))[:2]), epochs)[0]

    def run(self, name: str, seed: int) -> None:
        """Trains and measures one run, if it has no row yet."""
        if any(row["name"] == name and row["seed"] == str(seed) for row in rows_of(self.results)):
            return
        settings, epochs = settings_of(name), self.epochs(name)
        lr = self.learning_rate(settings.get("lr_of", name))
        trial = self.trial(name, lr, epochs, seed)
        images, seconds = epochs * sum(1 for _ in (self.data / "train").glob("*/*")), int(trial["seconds"])
        row = {
            "name": name,
            "seed": seed,
            "model": settings["model"],
            "model_kwargs": json.dumps(settings.get("model_kwargs", {})),
            "epochs": epochs,
            "lr": lr,
            **cost_of(settings),
            "held_out_top1": trial["held_out_top1"],
            "test_top1": test(self.folder(name, lr, epochs, seed), self.data),
            "seconds": seconds,
            "images_per_second": round(images / seconds),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        }
        append_rows(self.results, [row])
        print(f"{name}, seed {seed}: {row['test_top1']} on the test images", flush=True)


def few_images(data: Path, target: Path, per_class: int = 26) -> Path:
    """Links to a few images of each class and part."""
    for part in SPLITS:
        for folder in (data / part).iterdir():
            (target / part / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:per_class]:
                (target / part / folder.name / file.name).symlink_to(file.resolve())
    return target


def main() -> None:
    every = sorted(p.stem for p in (HERE / "runs").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"runs, else all: {', '.join(every)}")
    parser.add_argument("--data-dir", type=Path, default=Path("cifar10"), help="folder with train, validation and test")
    parser.add_argument("--output", type=Path, default=Path("output/study"), help="where train.py writes")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="few images, one epoch, into the output folder")
    args = parser.parse_args()
    if unknown := set(args.names) - set(every):
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    if missing := missing_folders(args.data_dir, *SPLITS):
        parser.error(f"{missing}: benchmarks/cifar_folders.py makes them")
    with tempfile.TemporaryDirectory() as few:
        data = few_images(args.data_dir, Path(few)) if args.quick else args.data_dir
        results = args.output if args.quick else args.results
        if args.quick:
            shutil.rmtree(args.output, ignore_errors=True)
        study = Study(data, args.output, results, args.quick)
        for seed in args.seeds:
            for name in args.names or every:
                study.run(name, seed)
        if args.quick:
            subprocess.run(
                [sys.executable, HERE / "robustness.py", "--data-dir", data, "--results", results, "--images", "40"],
                check=True,
            )
            subprocess.run([sys.executable, HERE / "report.py", "--results", results], check=True)


if __name__ == "__main__":
    main()

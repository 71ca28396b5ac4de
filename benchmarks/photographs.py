"""What an epoch on photographs of a phone's size takes: timm's ``train.py`` alone, and through this package's launcher.

    python benchmarks/photographs.py DATA

DATA has train/CLASS/IMAGE and val/CLASS/IMAGE; a part of its images is made as large as a phone's, 12 megapixels, with
some noise, and the recipe `finetune` trains on those, by turns. An epoch's seconds, with its validation, are what two
more epochs take after the first one, in which the launcher fills its memory.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from arguments import existing_folder, missing_folders, named_errors, positive
from PIL import Image

from convmixer_timm.training.launch import RECIPES
from convmixer_timm.training.scripts import find_script


def make(data: Path, target: Path, count: int) -> int:
    """Makes photographs of some images, `count` of each class and split; says how many."""
    noise = np.random.default_rng(0).normal(0, 6, (3024, 4032, 3)).astype(np.float32)
    made = 0
    for folder in sorted(path for path in data.glob("*/*") if path.is_dir()):
        (target / folder.relative_to(data)).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:count]:
            large = np.asarray(Image.open(file).convert("RGB").resize((4032, 3024), Image.Resampling.LANCZOS))
            name = (target / file.relative_to(data)).with_suffix(".jpg")
            Image.fromarray((large + noise).clip(0, 255).astype(np.uint8)).save(name, quality=90)
            made += 1
    return made


def seconds(command: list[str], data: Path, epochs: int) -> float:
    """How long a training takes."""
    with tempfile.TemporaryDirectory() as folder:
        args = ["--data-dir", str(data), "--output", folder, *"--val-split val --num-classes 2 --device cpu".split()]
        start = time.perf_counter()
        done = subprocess.run([*command, *args, "--epochs", str(epochs)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=existing_folder)
    parser.add_argument("--count", type=positive, default=40, help="images of each class and split (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=3)
    args = parser.parse_args()
    if missing := missing_folders(args.data, "train", "val"):
        parser.error(missing)
    with named_errors(parser):
        script = find_script("train")
    alone = [sys.executable, str(script), "--config", str(RECIPES / "finetune.yaml")]
    commands = {
        "train.py": [*alone, "--device-modules", "convmixer_timm"],
        "convmixer-timm train": [sys.executable, "-m", "convmixer_timm", "train", "finetune"],
    }
    with tempfile.TemporaryDirectory() as folder:
        images = make(args.data, Path(folder), args.count)
        if not images:
            parser.error(f"no images in {args.data}/train/CLASS and {args.data}/val/CLASS")
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(args.repeats):
            for name, command in commands.items():
                first, more = (seconds(command, Path(folder), epochs) for epochs in (1, 3))
                taken[name].append((more - first) / 2)
    for name, values in taken.items():
        spread = f"({min(values):.1f} to {max(values):.1f})"
        print(f"{name:22}{statistics.median(values):6.1f} {spread} seconds an epoch of {images} photographs")
    print(f"torch {torch.__version__}, timm {timm.__version__}")

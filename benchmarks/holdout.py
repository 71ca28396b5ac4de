"""Splits a training folder into train and validation by links, so that settings can be chosen without test images.

    python benchmarks/holdout.py cifar10/train cifar10-holdout --per-class 500

makes ``cifar10-holdout/{train,validation}/CLASS/IMAGE``; the same seed always takes the same images.
"""

import argparse
import random
from pathlib import Path

from arguments import existing_folder, missing_folders, new_folder


def split(source: Path, target: Path, per_class: int, seed: int, classes: list[str] | None = None) -> None:
    for folder in sorted(p for p in source.iterdir() if p.is_dir() and p.name in (classes or [p.name])):
        files = sorted(folder.iterdir())
        if len(files) <= per_class:
            raise SystemExit(f"{folder} has {len(files)} images, no more than the {per_class} to hold out")
        random.Random(seed).shuffle(files)
        for name, part in (("validation", files[:per_class]), ("train", files[per_class:])):
            (target / name / folder.name).mkdir(parents=True, exist_ok=True)
            for file in part:
                (target / name / folder.name / file.name).symlink_to(file.resolve())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=existing_folder)
    parser.add_argument("target", type=new_folder)
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="(all)")
    args = parser.parse_args()
    if missing := missing_folders(args.source, *args.classes or ()):
        parser.error(missing)
    split(args.source, args.target, args.per_class, args.seed, args.classes)

"""Writes CIFAR-10 or CIFAR-100 as folders of PNG files, with images held out of the training set to choose settings by.

    python benchmarks/cifar_folders.py DIR cifar10 --per-class 250

makes ``cifar10/{train,validation,test}/CLASS/NUMBER.png`` of torchvision's files in DIR, numbered in the official
order; the same images are always held out (see ``holdout.py``), and with ``--per-class 0`` none. ``--padding 4`` gives
the training images a border, for crops of 32 pixels out of 40: ``--input-size 3 32 32 --scale 0.64 0.64 --ratio 1 1``.
"""

import argparse
from pathlib import Path

from arguments import existing_folder, new_folder
from holdout import split
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.functional import pad


def write(images: CIFAR10, folder: Path) -> None:
    for name in images.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (image, target) in enumerate(images):
        image.save(folder / images.classes[target] / f"{i:05}.png")


def add_border(folder: Path, padding: int, mode: str) -> None:
    for file in folder.glob("*/*.png"):
        image = pad(Image.open(file).convert("RGB"), padding, padding_mode=mode)
        file.unlink()  # it may be a link to the image that is kept as it is
        image.save(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=existing_folder, help="as for --dataset torch/cifar10 --data-dir DIR")
    parser.add_argument("target", type=new_folder)
    parser.add_argument("--per-class", type=int, default=250)
    parser.add_argument("--cifar100", action="store_true")
    parser.add_argument("--padding", type=int, default=0, help="pixels around each training image")
    parser.add_argument("--padding-mode", choices=("constant", "reflect"), default="reflect", help="constant: black")
    args = parser.parse_args()
    dataset = CIFAR100 if args.cifar100 else CIFAR10
    try:
        test, train = (dataset(args.source, train=train) for train in (False, True))
    except RuntimeError:
        parser.error(f"{args.source} has no {dataset.base_folder} as torchvision downloads it")
    write(test, args.target / "test")
    write(train, args.target / ("all" if args.per_class else "train"))
    if args.per_class:
        split(args.target / "all", args.target, args.per_class, seed=0)
    if args.padding:
        add_border(args.target / "train", args.padding, args.padding_mode)

"""Lays out Tiny-ImageNet as folders of classes, with images held out of the training set to choose settings by.

    python benchmarks/tiny_imagenet.py tiny-imagenet-200 tiny --without ants_bees

makes ``tiny/{train,validation,test}/CLASS/IMAGE`` of links: its 10,000 validation images are ``test``, since those of
its test have no classes; 10 of each class of the training images are held out as ``validation``. Pictures that are in
a folder given by ``--without`` too, on which a model is to be fine-tuned and measured, are not trained on (see
``near_duplicates.py``). ``tiny/labels.txt`` has the classes' names in the order of their folders.
"""

import argparse
from pathlib import Path

from arguments import existing_folder, missing_folders, new_folder
from holdout import split
from near_duplicates import pairs

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", type=existing_folder, help="with train, val, wnids.txt and words.txt, as its archive has it"
    )
    parser.add_argument("target", type=new_folder)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--without", type=existing_folder, metavar="FOLDER")
    parser.add_argument("--above", type=float, default=0.96, metavar="CORRELATION")
    args = parser.parse_args()
    if missing := missing_folders(args.source, "train", "val"):
        parser.error(f"{missing}, as Tiny-ImageNet's archive has them")

    def link(name: str, file: Path, part: str) -> None:
        folder = args.target / part / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).symlink_to(file.resolve())

    known = {file.name for _, _, file in pairs(args.without, args.source / "train", args.above)} if args.without else ()
    for name in (args.source / "wnids.txt").read_text().split():
        for file in (args.source / "train" / name / "images").iterdir():
            if file.name not in known:
                link(name, file, "all")
    for line in (args.source / "val" / "val_annotations.txt").read_text().splitlines():
        file, name = line.split("\t")[:2]
        link(name, args.source / "val" / "images" / file, "test")
    split(args.target / "all", args.target, args.per_class, seed=0)
    words = dict(line.split("\t") for line in (args.source / "words.txt").read_text().splitlines())
    names = sorted(folder.name for folder in (args.target / "all").iterdir())
    (args.target / "labels.txt").write_text("".join(f"{words[name]}\n" for name in names))
    print(f"left out: {len(known)} images that {args.without} has too" if args.without else "none left out")

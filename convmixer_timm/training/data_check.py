"""A data set looked at before the first step, by the very readers of timm that will feed the training."""

import hashlib
import io
import itertools
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.data.readers.img_extensions import add_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.reader_image_tar import ReaderImageTar
from timm.utils import natural_key
from torch.utils.data import IterableDataset

from ..errors import one_line
from ..files import as_text
from ..images import known_extensions, load_in_mode

__all__ = ["Data", "Split", "check_evaluation_data", "check_training_data", "compare_names", "left_out", "names_repeat"]

_SAMPLE = 100  # images a split that are read
_STATS = 100_000  # files a split whose sizes are asked for: on a network's disk each costs a round trip


@dataclass(frozen=True)
class Split:
    """One split as it was found.

    Attributes:
        where: The folder, or the reader's name with the split.
        images: None where the reader doesn't tell.
        digest: Of the images' names and sizes and of a sample's contents; empty where the reader doesn't tell.
    """

    where: str
    images: int | None
    digest: str


@dataclass(frozen=True)
class Data:
    """A data set as it was found.

    Attributes:
        name: The data set's as timm takes it, or the folder's of one of the user's own.
        classes: Their names in the order of their indices; None where the reader doesn't tell.
        splits: 'train', and 'validation' unless there is none.
        val_split: What ``train.py`` calls the split to validate on.
        num_classes: None where the reader doesn't tell.
    """

    name: str
    classes: list[str] | None
    splits: dict[str, Split]
    val_split: str
    num_classes: int | None

    def __str__(self) -> str:
        where = ", ".join(
            f"{'?' if split.images is None else f'{split.images:,}'} images in {split.where}"
            for split in self.splits.values()
        )
        return f"{where}; {self._classes()}"

    def described(self) -> str:
        """The same without the folders of this machine."""
        images = (f"{name}: {split.images or 'unknown'} images" for name, split in self.splits.items())
        return f"{self.name}, {', '.join(images)}; {self._classes()}"

    def _classes(self) -> str:
        if self.classes is None:
            return "class names not checked, as its reader doesn't tell them"
        return f"{len(self.classes)} classes: {_listed(self.classes)}"


def check_training_data(args: Namespace, processes: int = 1) -> Data:
    """Looks at what a training would read.

    The splits have to be there (validation may be called ``val`` or ``test``) and to have the same classes, the images
    to be in ``SPLIT/CLASS/IMAGE`` with nothing hidden among them, readable as far as a sample tells, and at least one
    batch. How much of that is checked depends on what the reader tells.

    Args:
        args: Arguments of ``train.py``.
        processes: How many train together.

    Raises:
        ValueError: With one line that names what is wrong.
    """
    check_root(args)
    train = _Reading(args, args.train_split)
    if train.in_root:
        raise ValueError(
            f"{args.data_dir} has no folder {args.train_split}: images are looked for in "
            f"{args.data_dir}/{args.train_split}/CLASS and {args.data_dir}/{args.val_split or 'validation'}/CLASS"
        )
    readings, val_split = {"train": train}, args.val_split
    if val_split:
        readings["validation"], val_split = _split(args, val_split)
        if readings["validation"].in_root:
            raise ValueError(
                f"{args.data_dir} has no folder {', '.join(_names(val_split))} to validate on: put images that are not "
                "trained on there, or name another folder by --val-split"
            )
        if val_split == args.train_split or os.path.realpath(readings["validation"].place) == os.path.realpath(
            train.place
        ):
            raise ValueError(
                f"{train.where} is to be trained and validated on: name other images by --val-split, or none by ''"
            )
    for reading in readings.values():
        reading.check_layout()
    if val_split:
        _compare_classes(train, readings["validation"])
    for reading in readings.values():
        reading.check_classes()
    if train.count == 1:
        raise ValueError(f"{train.where} has one class only: {_listed(train.classes or ['0'])}")
    _check_count(args, train)
    if train.count is None and args.num_classes is None:
        raise ValueError(f"{train.where} doesn't tell how many classes it has: give --num-classes N")
    batch = args.batch_size * processes
    if train.images is not None and not train.iterable and train.images < batch:
        raise ValueError(
            f"{train.where} has {train.images} images, fewer than one batch of {batch}: give -b a number up to "
            f"{max(1, train.images // processes)}"
        )
    return Data(
        name=as_text(_name(args)),
        classes=train.classes,
        splits={name: Split(as_text(r.place), r.images, r.digest()) for name, r in readings.items()},
        val_split=val_split,
        num_classes=train.count,
    )


def left_out(data: Data) -> list[str]:
    """What lies among a set's images and is not taken: lines for files that are no images by their names, and for
    folders that a class map doesn't name."""
    notes, endings = [], tuple(known_extensions())
    for split in data.splits.values():
        if os.path.isdir(split.where):
            others = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(split.where, followlinks=True)
                for name in names
                if not (name.startswith(".") or name.lower().endswith(endings))
            ]
            if others:
                notes.append(
                    f"{split.where}: {len(others):,} files are no images by their names, {as_text(others[0])} say"
                )
            unnamed = sorted(set(map(as_text, _folders(split.where))) - set(data.classes or ()))
            if data.classes and unnamed:
                notes.append(f"{split.where}: the class map leaves out {_listed(unnamed)}")
    return notes


def check_evaluation_data(
    args: Namespace, classes: list[str] | None, recorded: bool = True, split: str = ""
) -> tuple[str, str]:
    """Looks at what ``validate.py`` would measure on: layout, and the classes by name where the model's are known.

    Args:
        args: Arguments of ``validate.py``.
        classes: What the model calls its classes; None where nobody knows.
        recorded: Those are the names of the folders that it was trained on, not what a publisher wrote for people.
        split: What the training validated on, where that is known.

    Returns:
        The split to measure on, chosen as for a training where there is none of the default's name; and what could not
        be compared, to be said, or nothing.

    Raises:
        ValueError: With one line that names what is wrong.
    """
    check_root(args)
    reading, found = _split(args, args.split, split)
    try:
        reading.check_layout()
    except ValueError as error:
        if not reading.in_root:
            raise
        raise ValueError(f"{args.data_dir} has no folder {args.split}: give --split NAME ({error})") from error
    harm = "its accuracy would be that of wrong names"
    unsure = bool(args.class_map) or not recorded
    return found, compare_names(reading.where, reading.classes, "the model", classes, harm, unsure)


def compare_names(
    where: str, names: list[str] | None, model: str, classes: list[str] | None, harm: str, renamed: bool = True
) -> str:
    """Compares a data set's classes with a model's, as far as both are known.

    Args:
        where: What to call the data.
        names: The data's classes.
        model: What to call the model.
        classes: The model's classes.
        harm: What comes of a difference.
        renamed: Whether as many, of which not one is the same, may be the same ones under other names.

    Returns:
        That they are taken for the same, to be said; or nothing.

    Raises:
        ValueError: If they differ.
    """
    if not classes or not names or names == classes:
        return ""
    if renamed and len(classes) == len(names) and not set(classes) & set(names):
        told = f"{where} calls its classes {_listed(names)}, and {model} {_listed(classes)}"
        return f"{told}: taken for the same, in this order"
    order = "--class-map FILE, a line a class, gives the model's order"
    raise ValueError(f"{_difference(where, names, model, classes)}: {harm}; {order}")


class _Reading:
    """A split opened by timm's reader, or torchvision's data set, with what it tells of itself."""

    def __init__(self, args: Namespace, split: str):
        self.kind = args.dataset.partition("/")[0].lower() if "/" in args.dataset else ""
        self.where = f"{args.dataset} ({split})" if args.dataset else str(args.data_dir)
        self.place = self.where
        self.mapped = bool(args.class_map)
        self.given = getattr(args, "num_classes", None)
        self.dataset: Any = _open(args, split, self.where)
        self.reader: Any = getattr(self.dataset, "reader", self.dataset)
        if self.kind and isinstance(self.reader, (ReaderImageFolder, ReaderImageInTar, ReaderImageTar)):
            raise ValueError(
                f"--dataset {args.dataset}: timm has no reader {args.dataset.partition('/')[0]}/, and would read "
                f"{args.data_dir} as a folder of images: leave it out for that; there are torch/, hfds/, hfids/, tfds/ "
                "and wds/"
            )
        self.iterable = isinstance(self.dataset, IterableDataset)
        if self.kind == "hfds":
            told = [getattr(args, name, None) for name in ("input_key", "target_key")]
            self._check_columns(told[0] or "image", told[1] or "label")
        self.in_root = False
        self.samples: list[tuple[str, int]] = []
        if self.kind == "" or args.dataset.lower() in ("torch/image_folder", "torch/folder"):
            root = str(getattr(self.reader, "root", None) or args.data_dir)
            self.in_root = os.path.realpath(root) == os.path.realpath(args.data_dir)
            self.where, self.place = root, os.path.abspath(root)
            if os.path.isdir(root):
                self.samples = self.reader.samples
        try:
            self.images: int | None = len(self.reader)
        except TypeError:
            self.images = None
        self.classes, self.count = _class_names(self.reader)

    def _check_columns(self, images: str, targets: str) -> None:
        """Raises ValueError where a set of Hugging Face's datasets has no such columns."""
        rows = self.reader.dataset
        absent = [name for name in targets.split(",") if name.partition(".")[0] not in rows.column_names]
        option = "--target-key"
        if len(rows) and rows[0][images] is None:  # datasets adds a column that it is asked to read
            absent, option = [images], "--input-key"
        if absent:
            there = _listed([name for name in rows.column_names if name != absent[0]])
            raise ValueError(f"{self.where} has no column {absent[0]}, it has {there}: name the right one by {option}")

    def _parts(self, path: str) -> list[str]:
        return path[len(self.where) :].strip(os.sep).split(os.sep)

    def check_layout(self) -> None:
        if self.mapped and (index := getattr(self.reader, "class_to_idx", None)):
            if "" in index:
                raise ValueError("the class map has an empty line: remove it")
            if len(index) != 1 + max(index.values()):
                raise ValueError("the class map has a name twice: leave one")
        by_folder = self.kind == "" and not self.mapped
        alike: dict[Any, str] = {}
        for name in (self.classes or []) if by_folder else []:
            other = alike.setdefault(tuple(natural_key(name)), name)
            if other != name:  # timm sorts a set by this, so they would change places from process to process
                raise ValueError(f"{self.where} has the classes {other} and {name}, which timm can't order: rename one")
        for path, _ in self.samples:
            parts = self._parts(path)
            hidden = next((i for i, part in enumerate(parts) if part.startswith(".")), None)
            if hidden is not None:
                raise ValueError(
                    f"{Path(self.where, *parts[: hidden + 1])} is hidden, and would be read as images: remove it"
                )
            if by_folder and len(parts) != 2:
                told = "in no class's folder" if len(parts) == 1 else "deeper than its class's folder"
                raise ValueError(f"{path} is {told}: images are looked for in {self.where}/CLASS/IMAGE")

    def check_classes(self) -> None:
        """Raises ValueError for a class's folder without images, which makes no class."""
        if not self.samples or self.kind:
            return
        folders = _folders(self.where)
        if self.mapped:
            used = {target for _, target in self.samples}
            missed = [name for i, name in enumerate(self.classes or []) if i not in used]
            others = sorted(map(as_text, folders - set(self.classes or folders)))
            if missed and others:  # one without the other may be meant
                raise ValueError(
                    f"the class map names {_listed(missed)}, of which {self.where} has no image, and lacks "
                    f"{_listed(others)}, which is there: mend its names"
                )
            return
        if empty := sorted(folders - {self._parts(path)[0] for path, _ in self.samples}):
            names = _listed([as_text(name) for name in empty])
            raise ValueError(
                f"{self.where} has no image, by its name's ending, of {names}: put some there or remove the folder"
            )

    def digest(self) -> str:
        """Reads a sample of the images, and tells this data from other data."""
        digest = hashlib.sha256(repr((self.images, self.classes)).encode())
        for i, (path, target) in enumerate(self.samples):
            size = os.path.getsize(path) if i < _STATS else 0
            digest.update(repr((self._parts(path), target, size)).encode())
        if self.iterable:
            samples = self._read("", lambda: list(itertools.islice(self.dataset, 8)))
            if not samples:
                raise ValueError(f"{self.where} has no image that can be read")
            targets = [target for _, target, *_ in samples]
            digest.update(b"".join(image.tobytes() for image, *_ in samples))
        else:
            targets = []
            for i in _spread(len(self.reader)):
                name = self.samples[i][0] if self.samples else f"image {i} of {self.where}"
                content, target = self._read(name, lambda i=i: self._item(i))
                digest.update(content)
                targets.append(target)
        if named := [t for t in targets if isinstance(t, str)]:
            raise ValueError(
                f"{self.where} names its classes, {named[0]} say, where numbers are needed: name a column of numbers "
                "by --target-key, or write the images into folders"
            )
        count = self.count or self.given
        beyond = [t for t in targets if count and isinstance(t, int) and not 0 <= t < count]
        if beyond:
            raise ValueError(f"{self.where} has an image of class {beyond[0]}, where there are {count} classes")
        return digest.hexdigest()

    def _item(self, i: int) -> tuple[bytes, Any]:
        if self.reader is self.dataset and not self.samples:  # torchvision's, which decodes by itself
            image, target = self.dataset[i][:2]
            return image.tobytes(), target
        if self.samples:
            path, target = self.samples[i]
            load_in_mode(path, "RGB", enough=1)  # as fast as that shows whether it can be read
            return Path(path).read_bytes(), target
        file, target = self.reader[i][:2]
        with file:
            content = file.read()
        load_in_mode(io.BytesIO(content), "RGB", enough=1)
        return content, target

    def _read(self, name: str, read) -> Any:
        try:
            return read()
        except Exception as error:  # every reader has its own
            reason = _reason(error).removeprefix(f"{name}: ").removeprefix("image: ")
            raise ValueError(f"{name or self.where} can't be read: {reason}") from error


def _folders(where: str) -> set[str]:
    with os.scandir(where) as entries:
        return {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}


def check_root(args: Namespace) -> None:
    """Raises ValueError where a script's arguments name no data, or a folder that isn't there."""
    args.data_dir = args.data_dir or args.data
    if args.data_dir is None and args.dataset.partition("/")[0].lower() not in ("hfds", "hfids", "tfds"):
        raise ValueError("no data: give --data-dir DIR")
    if not args.dataset and not os.path.exists(args.data_dir):
        raise ValueError(f"no such folder: {args.data_dir}")


def names_repeat(args: Namespace) -> bool:
    """Whether images in different ones of a folder's folders have the same name.

    Raises:
        ValueError: If the folder can't be read, or a name can't be written to a table.
    """
    if args.dataset:
        return False
    dataset = _open(args, args.split, args.data_dir)
    if odd := [name for name in dataset.filenames() if as_text(name) != name]:
        raise ValueError(f"{as_text(odd[0])} has a name that is no text in this locale, as a table needs it: rename it")
    names = dataset.filenames(basename=True)
    return len(set(names)) < len(names)


def _name(args: Namespace) -> str:
    """The data set's name, or its folder's where it is one of the user's own."""
    _, _, rest = args.dataset.partition("/")
    if rest and os.path.exists(rest):
        return Path(rest).resolve().name
    own = args.dataset.lower() in ("", "torch/image_folder", "torch/folder")
    return Path(args.data_dir).resolve().name if own else args.dataset


def _open(args: Namespace, split: str, where: str) -> Any:
    told = ("class_map", "input_key", "target_key", "seed")
    training = split == getattr(args, "train_split", None)
    add_img_extensions(sorted(known_extensions()))  # those of the training's reader
    numbers = "num_samples", "train_num_samples" if training else "val_num_samples"
    try:
        return create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            download=getattr(args, "dataset_download", False),
            trust_remote_code=getattr(args, "dataset_trust_remote_code", False),
            num_samples=next((value for name in numbers if (value := getattr(args, name, None))), None),
            **{name: value for name in told if (value := getattr(args, name, None)) is not None},
        )
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        raise ValueError(f"{where} needs the package {package}: pip install {package}") from error
    except Exception as error:  # every reader has its own
        mapped = f" by the class map {args.class_map}, which names a folder a line" if args.class_map else ""
        cause = f": {_reason(error.__cause__)}" if error.__cause__ else ""
        raise ValueError(f"{where} can't be read{mapped}: {_reason(error)}{cause}") from error


def _reason(error: BaseException) -> str:
    reason = one_line(error) or type(error).__name__
    return reason.replace("You can use download=True to download it", "--dataset-download downloads it")


def _names(split: str, other: str = "") -> list[str]:
    """What the split to validate on may be called; the scripts' default, ``validation``, has other names too."""
    return list(filter(None, [split, other, "val", "test"])) if split == "validation" else [split]


def _split(args: Namespace, split: str, other: str = "") -> tuple[_Reading, str]:
    """The first of these that is there, with its name; where a folder has none of them, itself (`in_root`)."""
    problem: ValueError | None = None
    root: _Reading | None = None
    for name in _names(split, other):
        if root and not os.path.isdir(os.path.join(args.data_dir, name)):  # it would be read once more
            continue
        try:
            reading = _Reading(args, name)
        except ValueError as error:
            if not args.dataset:
                raise
            problem = problem or error  # of other readers the one way to say that there is no such split
            continue
        if not reading.in_root:
            return reading, name
        root = root or reading
    if root:
        return root, split
    assert problem is not None  # there is a name at least
    raise problem


def _class_names(reader: Any) -> tuple[list[str] | None, int | None]:
    """Names in the order of their indices, and how many there are; None for what the reader doesn't tell."""
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if index:
        count = 1 + max(index.values())
        names = sorted(index, key=index.__getitem__)
        if len(names) != count:  # ImageNet's classes have several names each
            names = getattr(reader, "classes", [])
        told = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
        told = [as_text(name) for name in told]
        return (told, count) if len(told) == count else (None, count)
    if hasattr(reader, "iter_targets"):
        targets = [target for target in reader.iter_targets() if isinstance(target, int)]
        return None, 1 + max(targets) if targets else None
    return None, None


def _compare_classes(train: _Reading, validation: _Reading) -> None:
    if train.classes and validation.classes and train.classes != validation.classes:
        raise ValueError(
            f"{_difference(validation.where, validation.classes, train.where, train.classes)}: both need the same "
            "classes, each with an image"
        )


def _difference(where: str, names: list[str], other: str, others: list[str]) -> str:
    """What one list of classes lacks of another, and has beyond it."""
    lacking = [name for name in others if name not in names]
    beyond = [name for name in names if name not in others]
    told = []
    if lacking:
        told.append(f"{where} lacks {_listed(lacking)} of {other}'s classes")
    if beyond:
        told.append(f"{where} has {_listed(beyond)}, which {other} lacks")
    return " and ".join(told) or f"{where} has the classes of {other} in another order"


def _check_count(args: Namespace, train: _Reading) -> None:
    if None not in (train.count, args.num_classes) and train.count != args.num_classes:
        raise ValueError(
            f"{train.where} has {train.count} classes ({_listed(train.classes or [])}), and the number given is "
            f"{args.num_classes}: give --num-classes {train.count}"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)})" if len(names) > 8 else "")


def _spread(n: int) -> list[int]:
    """Indices below `n`, at most a sample's, from the first to the last."""
    return list(range(n)) if n <= _SAMPLE else [i * (n - 1) // (_SAMPLE - 1) for i in range(_SAMPLE)]

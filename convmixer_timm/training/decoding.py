"""The images that timm's scripts train and validate on, read by this package's one reader, and once where they fit.

So that a model predicts on the pixels that it learned from: timm's own reading leaves photographs lying on their sides
and cuts 16-bit values off. Decoding an image takes longer than all that an epoch does to it afterwards, and of a
photograph from a phone many times as long; what no crop of it needs isn't kept.
"""

import contextlib
import ctypes
import functools
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, dataset_factory
from timm.data.readers.img_extensions import add_img_extensions
from timm.data.transforms import CenterCropOrPad, RandomResizedCropAndInterpolation
from timm.utils.distributed import world_info_from_env
from torchvision.transforms import CenterCrop, Compose, Resize

from ..errors import RunError, os_reason
from ..images import ImageError, known_extensions, load_in_mode

try:
    import fcntl
except ImportError:  # Windows, where nothing is kept
    fcntl = None  # type: ignore[assignment]

__all__ = ["use_one_reader"]


# Bytes of decoded images to keep at most. CIFAR-10 takes 0.2 GB, Tiny-ImageNet 1.3 GB.
_MOST = 2 << 30
_SAMPLE = 8  # images that tell how large the others are

# Of a transform what makes the same of an image in each epoch.
_FIXED = (Resize, CenterCrop, CenterCropOrPad)


def _memory() -> int:
    """Bytes of this machine's memory, or as many of them as its container or job may take."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kind, group = line.split(":", 2)
            if kind in ("", "memory"):  # of version 2, of version 1
                name, root = "memory.limit_in_bytes" if kind else "memory.max", Path("/sys/fs/cgroup", kind)
                for inner in (Path(group[1:]), *Path(group[1:]).parents):
                    with contextlib.suppress(OSError, ValueError):  # without a limit it says "max"
                        limits.append(int((root / inner / name).read_text(encoding="ascii")))
    return min(limits)


def _room() -> int:
    """How many bytes of images this process may keep."""
    return min(_MOST, _memory() // 8) // int(os.environ.get("LOCAL_WORLD_SIZE", world_info_from_env()[2]))


def _memory_file() -> int:
    """A new file in memory."""
    # Python's own os.memfd_create isn't in builds for systems older than this one may be, as conda's are.
    number: int = ctypes.CDLL(None, use_errno=True).memfd_create(b"images", 1)  # MFD_CLOEXEC
    if number < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return number


class _Kept:
    """Images with their targets in memory that a loader's workers share: whichever reads one first, for all.

    A file in memory: neither the size of /dev/shm nor a full disk counts, and a worker that is no fork opens it by its
    name. Pages come when they are written.

    Args:
        count: How many images there are.
        mode: Pillow's, of all of them.
        size: Bytes to keep; what comes when they are full isn't kept.
        name: The file that another process made; by default a new one.

    Raises:
        AttributeError, TypeError: If this system has no such files.
        OSError: If there is no such memory.
    """

    def __init__(self, count: int, mode: str, size: int, name: str | None = None):
        self._args = count, mode, size
        self._mode = mode
        self._file = open(name or _memory_file(), "r+b", buffering=0)  # noqa: SIM115
        before = 8 + 40 * count
        if not name:
            self._file.truncate(before + size)
        memory = mmap.mmap(self._file.fileno(), before + size)
        self._used = np.frombuffer(memory, np.int64, 1)
        # Of each image its end, 0 where it isn't there, then its start, width, height and target.
        self._table = np.frombuffer(memory, np.int64, 5 * count, 8).reshape(count, 5)
        self._pixels = memoryview(memory)[before:]

    def __reduce__(self) -> tuple[Any, ...]:
        number = self._file.fileno()
        return _of_another_process, (_identity(number), *self._args, f"/proc/{os.getpid()}/fd/{number}")

    def get(self, index: int) -> tuple[Image.Image, int] | None:
        """A new image of what was kept, and its target; or None."""
        end, start, width, height, target = self._table[index].tolist()
        if not end:
            return None
        return Image.frombytes(self._mode, (width, height), self._pixels[start:end]), target

    def keep(self, index: int, image: Image.Image, target: Any) -> None:
        """Keeps an image, if there is room for it."""
        if not isinstance(target, int):
            return
        pixels = image.tobytes()
        with contextlib.suppress(OSError):  # of a system without locks
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                start = int(self._used[0])
                end = start + len(pixels)
                # One that has a width is another worker's, which may be writing it.
                if self._table[index, 2] or end > len(self._pixels):
                    return
                self._used[0] = end
                self._table[index, 1:] = start, *image.size, target
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)
            self._pixels[start:end] = pixels
            self._table[index, 0] = end  # last, as others may look meanwhile


def _identity(file: int | str) -> tuple[int, int]:
    told = os.stat(file)
    return told.st_dev, told.st_ino


def _of_another_process(identity: tuple[int, int], *args: Any) -> _Kept | None:
    with contextlib.suppress(OSError):  # it has ended, or its files are not to be seen
        if _identity(args[-1]) == identity:
            return _Kept(*args)
    return None


class _Image:
    """What timm's dataset takes for an image file and reads: here what comes out is decoded already."""

    def __init__(self, read: Callable[[], Image.Image]):
        self.read = read


class _Reader:
    """One of timm's readers, which gives `_Image` instead of bytes to decode; otherwise as it was.

    Args:
        reader: timm's.
        mode: Pillow's mode of the images that it is to give.
        training: Keep images in memory, if they fit, and let timm take the next image in place of one that can't be
            read. Where predictions are measured or written, the next would count twice, or stand under two names: there
            the script ends.
    """

    def __init__(self, reader: Any, mode: str, training: bool):
        self._reader, self._mode, self.training = reader, mode, training
        self._enough: int | None = None
        self._prepare: Callable[[Image.Image], Image.Image] | None = None
        self._kept: _Kept | None = None

    def begin(self, prepare: Callable[[Image.Image], Image.Image] | None, enough: int | None) -> None:
        """Settles what becomes of each image before it is kept.

        Args:
            prepare: What is the same in each epoch.
            enough: How many pixels a side may stay, as for `load_in_mode`.
        """
        self._prepare, self._enough, self._kept = prepare, enough, None
        # An archive's reader would stay open, and workers read from one place in one file; pixels have no palette.
        if type(self._reader).__name__ not in ("ReaderImageFolder", "ReaderHfds") or self._mode in ("P", "PA"):
            return
        count = len(self._reader)
        sample = {}
        for index in range(0, count, count // _SAMPLE + 1):
            with contextlib.suppress(OSError):  # told of when its turn comes
                file, *rest = self._reader[index]
                if len(rest) == 1:  # no features beside the target
                    sample[index] = self._load(file), *rest
        if not sample:
            return
        expected = count * max(len(image.tobytes()) for image, _ in sample.values())
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # not here, or no such memory
            if expected <= (room := _room()):
                self._kept = _Kept(count, self._mode, min(room, 2 * expected))
                for index, (image, target) in sample.items():
                    self._kept.keep(index, image, target)

    def _load(self, file: Any) -> Image.Image:
        image = load_in_mode(file, self._mode, self._enough)
        return self._prepare(image) if self._prepare else image

    def _load_and_keep(self, index: int, file: Any, target: Any) -> Image.Image:
        image = self._load(file)  # an ImageError is an OSError, which timm's dataset says, and takes the next image
        if self._kept:
            self._kept.keep(index, image, target)
        return image

    def __getitem__(self, index: int) -> tuple:
        if self._kept and (kept := self._kept.get(index)):
            image, target = kept
            return _Image(lambda: image), target
        if not self.training:  # here, as older timm takes the next image whatever `read` raises
            with _ending():
                file, *rest = self._reader[index]
                image = self._load(file)
            return (_Image(lambda: image), *rest)
        file, *rest = self._reader[index]
        return (_Image(lambda: self._load_and_keep(index, file, rest[0])), *rest)

    def __len__(self) -> int:
        return len(self._reader)

    def __getattr__(self, name: str) -> Any:
        if name == "_reader":  # not there yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self._reader, name)


def _split(transform: Any) -> tuple[Compose | None, Any, int | None]:
    """Of a transform what makes the same of an image in each epoch, the rest, and how many pixels a side are enough.

    Those are twice what the smallest of timm's random crops needs, so that it is still made smaller.
    """
    parts = transform.transforms if type(transform) is Compose else []
    fixed = next((i for i, part in enumerate(parts) if type(part) not in _FIXED), len(parts))
    if fixed:
        return Compose(parts[:fixed]), Compose(parts[fixed:]), None
    if not parts or type(crop := parts[0]) is not RandomResizedCropAndInterpolation or not min(crop.scale):
        return None, transform, None
    narrowest = max(*crop.ratio, *(1 / ratio for ratio in crop.ratio))
    return None, transform, math.ceil(2 * max(crop.size) * math.sqrt(narrowest / min(crop.scale)))


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Ends the script by a `RunError` for a file that can't be opened or read."""
    try:
        yield
    except OSError as error:
        reason = str(error) if isinstance(error, ImageError) else f"{error.filename or 'an image'}: {os_reason(error)}"
        raise RunError(f"{reason}: mend the file, or move it away") from error


def _load_or_end(file: Any) -> Image.Image:
    with _ending():
        return load_in_mode(file, "RGB")


class OneReaderDataset(ImageDataset):
    """timm's dataset of image files, decoded by `load_image`.

    A class of this package's, so that it is the same in a loader's worker however that was started.
    """

    def __init__(self, *args: Any, training: bool = False, mode: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.load_bytes:  # else the bytes are wanted
            self.reader: Any = _Reader(self.reader, mode or self.input_img_mode or "RGB", training)
            self.load_bytes = True  # timm: "take what `read` gives"

    @property
    def transform(self) -> Any:
        """What is made of the images that the reader gives."""
        return self._transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        # timm's loader sets it before its workers start, and by then it is known what can be kept.
        self._transform = transform
        if isinstance(reader := getattr(self, "reader", None), _Reader) and reader.training:
            prepare, self._transform, enough = _split(transform)
            reader.begin(prepare, enough)


def use_one_reader(training: bool = False, mode: str | None = None) -> None:
    """Let `timm.data.create_dataset` make datasets that find and read images as everything in this package does.

    Folders, archives, Hugging Face's datasets and torchvision's ``torch/image_folder`` and ``torch/imagenet`` are;
    TensorFlow's and webdataset's streams decode for themselves.

    Args:
        training: The script reads the same images every epoch: they are decoded once and kept in memory, if they fit,
            and one that can't be read is passed over. Any other script ends there, by a `RunError`.
        mode: Pillow's of the images, for a script that doesn't tell timm one; timm's default is RGB.
    """
    add_img_extensions(sorted(known_extensions()))
    factory: Any = dataset_factory
    factory.ImageDataset = functools.partial(OneReaderDataset, training=training, mode=mode)
    for name in ("ImageFolder", "ImageNet"):
        if isinstance(folder := getattr(factory, name, None), type):
            setattr(factory, name, functools.partial(folder, loader=_load_or_end))

"""The images that timm's scripts train and validate on, read by this package's one reader, small ones once.

So that a model predicts on the pixels that it learned from: timm's own reading leaves photographs lying on their sides
and cuts 16-bit values off. Decoding a small image takes longer than all that an epoch does to it afterwards.
"""

import contextlib
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, dataset_factory
from timm.data.readers.img_extensions import add_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.distributed import world_info_from_env

from ..errors import RunError, os_reason
from ..images import ImageError, known_extensions, load_in_mode

__all__ = ["use_one_reader"]


# Bytes of decoded images to keep at most. CIFAR-10 takes 0.2 GB, Tiny-ImageNet 1.3 GB.
_MOST = 2 << 30


class _Pixels:
    """Memory for decoded images of one size and mode, shared by a loader's workers: whichever decodes one first.

    Args:
        count: How many images there are.
        image: One of them; those of another size aren't kept.

    Raises:
        ValueError: If that would be too much for this machine, or its bytes alone don't tell the image.
    """

    def __init__(self, count: int, image: Image.Image):
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or Image.fromarray(pixels).mode != image.mode:
            raise ValueError(f"images of mode {image.mode} are not kept")
        self._count, self._shape, self._size = count, pixels.shape, pixels.nbytes
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_info_from_env()[2]))
        if (size := count * (1 + self._size)) > min(_MOST, physical // 8) // processes:
            raise ValueError(f"{count} images of {self._size} bytes are too much to keep")
        # Of no file, so that neither the size of /dev/shm nor a full disk counts; pages come when they are written.
        self._memory = mmap.mmap(-1, size)

    def get(self, index: int) -> Image.Image | None:
        """A new image of what was kept, or None."""
        if not self._memory[index]:
            return None
        start = self._count + index * self._size
        pixels = np.frombuffer(self._memory[start : start + self._size], np.uint8)
        return Image.fromarray(pixels.reshape(self._shape))

    def keep(self, index: int, image: Image.Image) -> None:
        """Keeps an image, if it is of the right size."""
        pixels = np.asarray(image)
        if pixels.shape == self._shape:
            start = self._count + index * self._size
            self._memory[start : start + self._size] = pixels.tobytes()
            self._memory[index] = 1  # last, as another worker may look meanwhile


class _Image:
    """What timm's dataset takes for an image file and reads: here what comes out is decoded already."""

    def __init__(self, read: Callable[[], Image.Image]):
        self.read = read


class _Reader:
    """One of timm's readers, which gives `_Image` instead of bytes to decode; otherwise as it was.

    Args:
        reader: timm's.
        mode: Pillow's mode of the images that it is to give.
        training: Keep small images of a folder in memory, decoded, and let timm take the next image in place of one
            that can't be read. Where predictions are measured or written, the next would count twice, or stand under
            two names: there the script ends.
    """

    def __init__(self, reader: Any, mode: str, training: bool):
        self._reader, self._mode, self._training = reader, mode, training
        self._pixels: _Pixels | None = None
        if training and isinstance(reader, ReaderImageFolder):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # too large, or no sysconf here
                self._pixels = _Pixels(len(reader), self._load(reader[0][0]))

    def _load(self, file: Any) -> Image.Image:
        return load_in_mode(file, self._mode)

    def _load_and_keep(self, index: int, file: Any) -> Image.Image:
        image = self._load(file)  # an ImageError is an OSError, which timm's dataset says, and takes the next image
        if self._pixels:
            self._pixels.keep(index, image)
        return image

    def __getitem__(self, index: int) -> tuple:
        if self._pixels and (kept := self._pixels.get(index)):
            return _Image(lambda: kept), self._reader.samples[index][1]
        if not self._training:  # here, as older timm takes the next image whatever `read` raises
            with _ending():
                file, *rest = self._reader[index]
                image = self._load(file)
            return (_Image(lambda: image), *rest)
        file, *rest = self._reader[index]
        return (_Image(lambda: self._load_and_keep(index, file)), *rest)

    def __len__(self) -> int:
        return len(self._reader)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # only a forked worker shares the memory

    def __getattr__(self, name: str) -> Any:
        if name == "_reader":  # not there yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self._reader, name)


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

    def __init__(self, *args: Any, training: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.load_bytes:  # else the bytes are wanted
            self.reader: Any = _Reader(self.reader, self.input_img_mode or "RGB", training)
            self.load_bytes = True  # timm: "take what `read` gives"


def use_one_reader(training: bool = False) -> None:
    """Let `timm.data.create_dataset` make datasets that find and read images as everything in this package does.

    Folders, archives, Hugging Face's datasets and torchvision's ``torch/image_folder`` and ``torch/imagenet`` are;
    TensorFlow's and webdataset's streams decode for themselves.

    Args:
        training: The script reads the same images every epoch: small ones of a folder are decoded once and kept in
            memory, and one that can't be read is passed over. Any other script ends there, by a `RunError`.
    """
    add_img_extensions(sorted(known_extensions()))
    factory: Any = dataset_factory
    factory.ImageDataset = functools.partial(OneReaderDataset, training=training)
    for name in ("ImageFolder", "ImageNet"):
        if isinstance(folder := getattr(factory, name, None), type):
            setattr(factory, name, functools.partial(folder, loader=_load_or_end))

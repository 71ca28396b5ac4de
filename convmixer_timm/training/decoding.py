"""The images that timm's scripts train and validate on, read by this package's one reader.

So that a model predicts on the pixels that it learned from: timm's own reading leaves photographs lying on their sides
and cuts 16-bit values off.
"""

import functools
from typing import Any

from PIL import Image
from timm.data import ImageDataset, dataset_factory

from ..images import known_extensions, load_image

__all__ = ["use_one_reader"]


class _File:
    """An image file whose content is the image in it."""

    def __init__(self, file: Any, mode: str):
        self.file, self.mode = file, mode

    def read(self) -> Image.Image:
        # An ImageError is an OSError, which timm's dataset says, and takes the next image instead.
        return load_image(self.file, channels=1 if self.mode == "L" else 3).convert(self.mode)


class _Reader:
    """One of timm's readers, which gives `_File` instead of bytes to decode; otherwise as it was."""

    def __init__(self, reader: Any, mode: str):
        self._reader, self._mode = reader, mode

    def __getitem__(self, index: int) -> tuple:
        file, *rest = self._reader[index]
        return (_File(file, self._mode), *rest)

    def __len__(self) -> int:
        return len(self._reader)

    def __getattr__(self, name: str) -> Any:
        if name == "_reader":  # not there yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self._reader, name)


class OneReaderDataset(ImageDataset):
    """timm's dataset of image files, decoded by `load_image`.

    A class of this package's, so that it is the same in a loader's worker however that was started.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.load_bytes:  # else the bytes are wanted
            self.reader: Any = _Reader(self.reader, self.input_img_mode or "RGB")
            self.load_bytes = True  # timm: "take what `read` gives"


def use_one_reader() -> None:
    """Let `timm.data.create_dataset` make datasets that find and read images as everything in this package does.

    Folders, archives, Hugging Face's datasets and torchvision's ``torch/image_folder`` and ``torch/imagenet`` are;
    TensorFlow's and webdataset's streams decode for themselves.
    """
    known_extensions()
    factory: Any = dataset_factory
    factory.ImageDataset = OneReaderDataset
    for name in ("ImageFolder", "ImageNet"):
        if isinstance(folder := getattr(factory, name, None), type):
            setattr(factory, name, functools.partial(folder, loader=load_image))

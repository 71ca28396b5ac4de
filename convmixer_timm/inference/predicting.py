"""Images to class names and probabilities."""

import numbers
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from PIL import Image

from ..errors import one_line
from ..images import ImageError, find_images, image_loader
from .labels import class_names
from .loading import check_finite, check_model, evaluating
from .reading import readings

__all__ = ["predict", "predict_files"]

Classes = list[tuple[str, float]]
Prediction = tuple[Path, Classes]


def predict(
    model: nn.Module,
    images: Any,
    topk: int = 5,
    batch_size: int = 64,
    on_error: Callable[[Any, ImageError], None] | None = None,
) -> Iterator[tuple[Any, Classes]]:
    """Classifies images, as many at a time as `batch_size`.

        for image, classes in predict(model, ["cat.jpg", Image.open("dog.png"), frame]):
            name, probability = classes[0]

    Args:
        model: From `load_model` or `optimize`, or any classifier of timm's; it is run in evaluation mode and left in
            the mode that it was in.
        images: One image or any iterable of them, of one kind or mixed: paths (a folder stands for all images in it),
            a file's content as bytes, PIL images, and arrays [H, W, 3] of integers (0…255; 0…65535 of uint16) or floats
            (0…1 or 0…255), also [H, W] in grey and [H, W, 4] with alpha; an array [N, H, W, 3] is N images. All are
            seen as `convmixer_timm.images.load_image` sees them: EXIF rotation applied, brought to the model's size.
        topk: How many classes to give for each, at most all.
        batch_size: Images at a time.
        on_error: Called with each image that can't be read, which is then left out; without it the error is raised.

    Yields:
        Each image, as it was given (a folder's as paths), with its (class name, probability) pairs, most probable
        first.

    Raises:
        ImageError: If a file can't be read; an OSError of one line that names it.
        ValueError: If something is no image, the model is no classifier of two classes or more or gives no
            finite numbers, or `topk` or `batch_size` is less than 1.
    """
    check_model(model)
    if not all(isinstance(n, numbers.Integral) and n > 0 for n in (topk, batch_size)):
        raise ValueError(f"topk and batch_size must be whole numbers, 1 or more, got {topk!r} and {batch_size!r}")
    load = image_loader(model)
    names = class_names(model)
    if len(names) == 1:
        raise ValueError("the model has one class only: there is nothing to choose, and its softmax is always 1")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))  # device and precision

    def run(batch: list[tuple[Any, torch.Tensor]]) -> Iterator[tuple[Any, Classes]]:
        with torch.inference_mode(), evaluating(model):
            logits = model(torch.stack([image for _, image in batch]).to(like))
        if logits.shape[1:] != (len(names),):
            raise ValueError(
                f"no classifier: the model gives {list(logits.shape[1:])} an image, for {len(names)} classes"
            )
        check_finite(logits)
        probabilities, indices = logits.float().softmax(-1).cpu().topk(int(min(topk, len(names))))
        for (image, _), ps, ids in zip(batch, probabilities.tolist(), indices.tolist(), strict=True):
            yield image, [(names[i], p) for i, p in zip(ids, ps, strict=True)]

    batch = []
    ahead = isinstance(images, str | os.PathLike | list | tuple)  # an iterator may write its files as they are read
    for image, read in readings(load, _each(images), ahead):
        try:
            batch.append((image, read()))
        except ImageError as error:
            if on_error is None:
                raise
            on_error(image, error)
        if len(batch) == batch_size:
            yield from run(batch)
            batch = []
    if batch:
        yield from run(batch)


def _each(images: Any) -> Iterator[Any]:
    one = isinstance(images, str | bytes | bytearray | os.PathLike | Image.Image) or hasattr(images, "read")
    one = one or getattr(images, "ndim", 1) in (0, 2, 3)
    if not one and not isinstance(images, Iterable):
        raise ValueError(f"images are paths, PIL images or arrays [H, W, 3], got a {type(images).__name__}")
    for image in [images] if one else images:
        if isinstance(image, str | os.PathLike) and os.path.isdir(image):
            yield from find_images([Path(image)])
        elif isinstance(image, list):  # of numbers, whose rows would be taken for images
            raise ValueError("an image is a path, a PIL image or an array [H, W, 3], got a list")
        else:
            yield image


def predict_files(
    model: nn.Module, patterns: list[str], topk: int = 5, batch_size: int = 64
) -> tuple[Iterator[Prediction], list[Path]]:
    """Classifies what files, folders and globs name, with a progress bar where somebody watches.

    Returns:
        The predictions as they come, and a list that fills with the files that can't be read: of each a line on stderr
        says why; of a name that matches no image too.
    """
    paths = find_images(patterns)
    failed: list[Path] = []

    def report(path: Path, error: ImageError) -> None:
        failed.append(path)
        progress.update()
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)

    def results() -> Iterator[Prediction]:
        with progress:
            for result in predict(model, paths, topk, batch_size, on_error=report):
                progress.update()
                yield result

    watched = sys.stderr is not None and sys.stderr.isatty() and len(paths) > batch_size
    progress = tqdm(total=len(paths), unit="img", disable=not watched)
    return results(), failed

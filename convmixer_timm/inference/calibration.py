"""Real images to choose int8's scales by."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import one_line
from ..images import ImageError, data_config, find_images, image_loader
from .reading import readings

__all__ = ["calibration_batches", "check_calibration", "spread"]

_logger = logging.getLogger(__name__)
_ENOUGH = 300


def check_calibration(source: Any, precision: str) -> None:
    """Raises ValueError for calibration images that nothing would be done with."""
    if source is not None and precision != "int8":
        raise ValueError(f"calibration images are for int8, and this is {precision}: leave out one of them")


def spread(length: int, most: int) -> list[int]:
    """Indices of at most so many, from first to last: of every class, as folders list one after the other."""
    count = min(length, most)
    return [i * length // count for i in range(count)]


def calibration_batches(
    model: Any, source: Iterable[Any] | str | Path | None, size: tuple[int, ...] | None = None, batch: int | None = None
) -> Iterator[torch.Tensor]:
    """The first few hundred images of a folder or of an iterable, in batches as the model takes them.

    Args:
        model: Whose transform images that aren't batches yet go through. Those of a folder that can't be read are left
            out, and a warning names them.
        source: Folder, file or glob, or a list of them; or an iterable or a dataset of batches, of single images as the
            model takes them (tensors, or pairs and mappings that have them first), or of images as
            `convmixer_timm.images.load_image` reads them; or one of these.
        size: (in_chans, H, W), to which images are brought and which batches must have; by default the model's.
        batch: Images in every batch, where it can't be any number; too few images for one are repeated.

    Raises:
        ValueError: If there are none, or they are something else, not finite or of another size.
    """
    if source is None:
        raise ValueError("int8 needs calibration images: a folder, or batches of images")
    enough = max(_ENOUGH, batch or 0)
    named = isinstance(source, list | tuple) and all(isinstance(item, str | os.PathLike) for item in source)
    if isinstance(source, str | Path) or named:
        batches: Iterable[Any] = _from_files(model, source if named else [source], size, enough)
    elif getattr(source, "ndim", 0) == 4 or isinstance(source, bytes | bytearray | Image.Image):
        batches = [source]
    elif isinstance(source, Iterable):
        batches = source
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):  # a dataset
        batches = (source[i] for i in spread(len(source), enough))
    else:
        raise ValueError(f"calibration images are a folder or batches of images, got a {type(source).__name__}")
    load = image_loader(model, size)
    count, lowest = 0, math.inf
    waiting: list[torch.Tensor] = []
    for item in batches:
        images = _as_batch(item, load)
        if size is not None and tuple(images.shape[1:]) != size:
            raise ValueError(f"calibration images must be [N, {', '.join(map(str, size))}], got {list(images.shape)}")
        if not images.isfinite().all():
            raise ValueError("calibration images must be of finite numbers")
        count += len(images)
        lowest = min([lowest, *(image.min().item() for image in images)])
        if batch is None:
            yield images
        else:
            *full, rest = torch.cat([*waiting, images]).split(batch)
            waiting = [] if len(rest) == batch else [rest]
            yield from full + [rest] * (len(rest) == batch)
        if count >= enough:
            break
    if not count:
        raise ValueError(f"no calibration images in {source if isinstance(source, str | Path) else 'the iterable'}")
    if waiting and batch is not None and count < batch:
        yield torch.cat(waiting * -(-batch // count))[:batch]
    if lowest >= 0 and min(data_config(model)["mean"]) > 0:
        _logger.warning("no calibration image has a value below 0: are they normalised, as the model takes them?")


def _as_batch(item: Any, load: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """One item of an iterable as images [N, in_chans, H, W]."""
    given = item
    if isinstance(item, Mapping):
        item = next((value for value in item.values() if getattr(value, "ndim", 0) == 4), None)
    elif isinstance(item, tuple | list) and item:
        item = item[0]
    if isinstance(item, np.ndarray) and item.ndim == 4:
        item = torch.from_numpy(item)
    if isinstance(item, torch.Tensor):
        if not item.is_floating_point():
            raise ValueError(f"calibration images in tensors must be as the model takes them, got {item.dtype}")
        images = item.detach().float().resolve_neg()
        return images[None] if images.ndim == 3 else images
    if isinstance(item, str | bytes | os.PathLike | Image.Image | np.ndarray):
        return load(item)[None]
    raise ValueError(f"calibration images must be batches or images, got a {type(given).__name__} without any")


def _from_files(model: Any, sources: Any, size: tuple[int, ...] | None, enough: int) -> Iterator[torch.Tensor]:
    load = image_loader(model, size)
    paths = find_images(sources)
    for _, read in readings(load, (paths[i] for i in spread(len(paths), enough))):
        try:
            yield read()[None]
        except ImageError as error:
            _logger.warning("left out of the calibration: %s", one_line(error))

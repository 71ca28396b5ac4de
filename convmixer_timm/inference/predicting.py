"""Image files to class names and probabilities."""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm

from ..images import find_images, image_loader
from .loading import class_names

__all__ = ["predict", "predict_files"]

Prediction = tuple[Path, list[tuple[str, float]]]


def predict(
    model: nn.Module,
    paths: Iterable[Path],
    topk: int = 5,
    batch_size: int = 64,
    on_error: Callable[[Path, OSError], None] | None = None,
) -> Iterator[Prediction]:
    """Classifies images, as many at a time as `batch_size`.

    Args:
        model: From `load_model`.
        paths: Image files.
        topk: How many classes to give for each, at most all.
        batch_size: Images at a time.
        on_error: Called with each file that can't be read, which is then left out; without it the error is raised.

    Yields:
        Each path with its (class name, probability) pairs, most probable first.
    """
    load = image_loader(model)
    names = class_names(model)
    device = next(model.parameters()).device

    @torch.inference_mode()
    def run(batch):
        images = torch.stack([image for _, image in batch]).to(device)
        probabilities, indices = model(images).float().softmax(-1).cpu().topk(min(topk, len(names)))
        for (path, _), ps, ids in zip(batch, probabilities.tolist(), indices.tolist(), strict=True):
            yield path, [(names[i], p) for i, p in zip(ids, ps, strict=True)]

    batch = []
    for path in paths:
        try:
            batch.append((path, load(path)))
        except OSError as error:
            if on_error is None:
                raise
            on_error(path, error)
        if len(batch) == batch_size:
            yield from run(batch)
            batch = []
    if batch:
        yield from run(batch)


def predict_files(
    model: nn.Module, patterns: list[str], topk: int = 5, batch_size: int = 64
) -> tuple[list[Prediction], int]:
    """Classifies what files, folders and globs name, with a progress bar where somebody watches.

    Returns:
        The predictions, and how many files could not be read: of each a line on stderr says why.

    Raises:
        ValueError: If the names match no image.
    """
    paths = find_images(patterns)
    if not paths:
        raise ValueError(f"no images found in {' '.join(patterns)}")
    failed = 0

    def report(path: Path, error: OSError) -> None:
        nonlocal failed
        failed += 1
        tqdm.write(f"error: {path}: {error}", file=sys.stderr)

    watched = sys.stderr.isatty() and len(paths) > batch_size
    progress = tqdm(paths, unit="img", disable=not watched)
    return list(predict(model, progress, topk, batch_size, on_error=report)), failed

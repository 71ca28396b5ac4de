"""Image files to class names and probabilities."""

import glob
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config

from .hub import download
from .packing import load_folder

__all__ = ["class_names", "find_images", "image_loader", "load_image", "load_model", "predict"]


def find_images(patterns: Iterable[str]) -> list[Path]:
    """Image files named by files, folders (searched through) and globs, in the order given.

    A name that matches nothing stays in the list: loading it tells what is wrong.
    """
    from timm.data.readers.img_extensions import get_img_extensions

    extensions = get_img_extensions(as_set=True)
    found: dict[Path, None] = {}  # a set that keeps the order
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in extensions and p.is_file())
        elif path.exists():
            paths = [path]
        else:
            paths = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file()) or [path]
        found.update(dict.fromkeys(paths))
    return list(found)


def load_image(path: Path, channels: int = 3) -> Image.Image:
    """Reads an image of any mode the way a person sees it.

    Rotation in the EXIF data is applied, 16-bit values are scaled to 8 bits (Pillow alone cuts them off), and
    every mode becomes RGB, or greyscale for a one-channel model.

    Raises:
        OSError: If there is no such file, or it is no image, damaged, or larger than Pillow's limit against
            decompression bombs. The message is one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)  # which loads it
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise OSError(f"too large, more than {limit:,} pixels are not read") from error
    except FileNotFoundError as error:
        raise OSError("no such file") from error
    except Image.UnidentifiedImageError as error:
        raise OSError("not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's readers raise on damaged files
        raise OSError(f"damaged image ({error})") from error
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float32)
        top = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
        image = Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def image_loader(model: nn.Module) -> Callable[[Path], torch.Tensor]:
    """A function that reads an image file as `model` takes it in evaluation, [in_chans, H, W]; see `load_image`."""
    config = resolve_model_data_config(model)
    transform: Any = create_transform(**config, is_training=False)
    return lambda path: transform(load_image(path, channels=config["input_size"][0]))


def load_model(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """A pretrained model, ready to predict.

    Args:
        name: A registered model with weights ('convmixer_…'), ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``.
        device: Where to run it.

    Raises:
        ValueError: If the name is unknown or has no weights, or its weights don't fit its description.
        OSError: If the weights can't be downloaded.
    """
    scheme, _, location = name.rpartition(":")
    if not scheme and name not in timm.list_models(pretrained=True) and not timm.models.is_model_pretrained(name):
        arch = name.split(".")[0]
        known = timm.list_pretrained(f"{arch}*" if timm.is_model(arch) else "convmixer*")
        problem = "has no weights" if timm.is_model(arch) and "." not in name else "is not a known model"
        raise ValueError(f"{name!r} {problem}. With weights there are: {', '.join(known) or 'none'}.")
    cfg = None if scheme else timm.get_pretrained_cfg(name)
    if scheme == "local-dir":
        return load_folder(Path(location).expanduser()).eval().to(device)
    if scheme in ("hf-hub", "hf_hub"):
        download(location)
    elif cfg and cfg.hf_hub_id and not cfg.file:
        download(str(cfg.hf_hub_id), config=False)
    try:
        return timm.create_model(name, pretrained=True).eval().to(device)
    except RuntimeError as error:  # PyTorch's, for tensors of other names or sizes
        raise ValueError(f"{name}: its weights don't fit its description: {error}") from error


def class_names(model: Any) -> list[str]:
    """The model's classes: from its pretrained config, else ImageNet's where the number fits, else numbers."""
    names = model.pretrained_cfg.get("label_names")
    if names and len(names) == model.num_classes:
        return list(names)
    subset = timm.data.infer_imagenet_subset(model)
    if subset:
        info = timm.data.ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [str(i) for i in range(model.num_classes)]


def predict(
    model: nn.Module,
    paths: Iterable[Path],
    topk: int = 5,
    batch_size: int = 64,
    on_error: Callable[[Path, OSError], None] | None = None,
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
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

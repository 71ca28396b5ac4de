"""Image files, found and read: one reader for everything that looks at pictures."""

import glob
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers.img_extensions import get_img_extensions

__all__ = ["find_images", "image_loader", "load_image"]


def find_images(patterns: Iterable[str]) -> list[Path]:
    """Image files named by files, folders (searched through) and globs, in the order given.

    A name that matches nothing stays in the list: loading it tells what is wrong.
    """
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

"""Images, found and read: one reader for everything that looks at pictures, training by timm's scripts included."""

import contextlib
import functools
import glob
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from timm.data.readers.img_extensions import get_img_extensions

from .errors import one_line, os_reason

__all__ = [
    "ImageError",
    "data_config",
    "find_images",
    "fit_channels",
    "image_loader",
    "known_extensions",
    "load_image",
    "load_in_mode",
]

# What Pillow opens but this package doesn't: EPS runs Ghostscript, the others need Windows or a handler of one's own.
_NOT_READ = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
# Phones' and cameras' pictures, which Pillow reads only with a plugin that the user registers. In a folder they are
# named as unreadable, where other files are passed over.
_PICTURES = set(".heic .heif .hif .jxl .dng .cr2 .cr3 .nef .arw .orf .raf .rw2".split())
# Longer side by shorter. A model's transform brings the shorter side to the model's size, whatever becomes of the
# longer one: a 1 x 300,000 PNG of a kilobyte would take gigabytes.
_MAX_RATIO = 100

# Of metadata that nobody asked for. `warnings.catch_warnings` around each image would not be safe from threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageError(OSError):
    """An image that can't be read: which, and why, in one line."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in _NOT_READ]


def known_extensions() -> set[str]:
    """The names' endings that tell an image: those of timm's readers, and of all that `load_image` reads."""
    formats = set(_formats())
    own = {extension for extension, name in Image.registered_extensions().items() if name in formats}
    return own | get_img_extensions(as_set=True)


def find_images(patterns: Iterable[str | Path]) -> list[Path]:
    """Image files named by files, folders (searched through, links too) and globs, in the order given.

    Of a folder those that are pictures by their names, also such as Pillow can't read.

    A name that matches nothing stays in the list, as does a folder without images or that can't be listed: loading it
    tells what is wrong.
    """
    found: dict[Path, None] = {}  # a set that keeps the order
    for pattern in patterns:
        if not isinstance(pattern, str | os.PathLike):
            raise ValueError(f"images are named by files, folders and globs, got a {type(pattern).__name__}")
        if not str(pattern):
            raise ValueError("the name of an image is empty")
        if str(pattern).startswith(("http://", "https://")):
            raise ValueError(f"{pattern}: images are read from files, so download it first")
        paths = [Path(pattern)]
        if not os.path.lexists(pattern):
            paths = sorted(map(Path, glob.glob(str(pattern), recursive=True))) or paths
        for path in paths:
            # Not by Path.is_dir, which raises where a folder above may not be entered.
            found.update(dict.fromkeys(_search(path) if os.path.isdir(path) else [path]))
    return list(found)


def _search(folder: Path) -> list[Path]:
    extensions = known_extensions() | _PICTURES
    found: list[Path] = []
    seen = set()

    def unlisted(error: OSError) -> None:
        found.append(Path(error.filename))

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unlisted):
        seen.add(os.path.realpath(root))
        # A link to a folder above it would never end.
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        found.extend(Path(root, name) for name in files if os.path.splitext(name)[1].lower() in extensions)
    return sorted(found) or [folder]


def load_image(source: Any, channels: int = 3) -> Image.Image:
    """Reads an image of any mode the way a person sees it.

    Rotation in the EXIF data is applied, deeper values are scaled to 8 bits by the range that the file states, else
    by the smallest usual one that holds them (0…1 and 0…255 of floats, 8, 16 and 32 bits of integers), and every mode
    becomes RGB, or greyscale for a one-channel model.

    Args:
        source: A path, an open binary file, a file's content as bytes, a PIL image, or an array of integers, booleans
            or floats, [H, W, 3] (or [H, W] and [H, W, 1] for grey, [H, W, 4] with an alpha channel, which is left out).
        channels: 3 or 1.

    Raises:
        ImageError: If a file or PIL image can't be read: it isn't there, is no image, damaged, larger than Pillow's
            limit against decompression bombs, or more than 100 times as long as it is wide. An OSError of one line.
        ValueError: If an array has another shape or holds something else (what is normalised already, say), or
            `channels` is another number.
    """
    if channels not in (1, 3):
        raise ValueError(f"images are read in 1 or 3 channels, and the model takes {channels}")
    return load_in_mode(source, "L" if channels == 1 else "RGB")


def load_in_mode(source: Any, mode: str, enough: int | None = None) -> Image.Image:
    """The same in any of Pillow's modes, with what of the image that has: ``RGBA`` keeps its transparency.

    Where its shorter side has twice as many pixels as are `enough`, or more, a file's image is made smaller by a whole
    number, to no fewer than that: of a JPEG while it is decoded, which takes a third of the time.
    """
    if isinstance(source, Image.Image):
        image = _read(source, getattr(source, "filename", "") or "PIL image")
    elif isinstance(source, bytes | bytearray):
        image = _open(io.BytesIO(source), enough)
    elif isinstance(source, str | os.PathLike) or hasattr(source, "read"):
        image = _open(source, enough)
    else:
        image = _from_array(source)
    image = image if image.mode == mode and image is not source else image.convert(mode)
    times = min(image.size) // enough if enough and mode in ("L", "RGB", "RGBA", "CMYK") else 1
    return image.reduce(times) if times > 1 else image


def _open(source: str | os.PathLike | BinaryIO, enough: int | None = None) -> Image.Image:
    path = source if isinstance(source, str | os.PathLike) else None
    name = str(getattr(source, "name", "image") if path is None else path)
    try:
        if path is not None:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                os.listdir(path)  # raises, without the right to
                raise ImageError(name, "no images found in this folder")
            if not stat.S_ISREG(mode):  # a pipe would be waited for
                raise ImageError(name, "not a regular file")
        # Never by its name: Pillow would map the file, and reads one that is to be turned by its turned size then.
        with contextlib.ExitStack() as stack:
            file: Any = source if path is None else stack.enter_context(open(path, "rb"))
            return _read(stack.enter_context(Image.open(file, formats=_formats())), name, enough)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, _too_large()) from error
    except Image.UnidentifiedImageError as error:
        empty = False
        with contextlib.suppress(OSError, ValueError):  # what can't be sought in, or is closed
            empty = (file.seek(0, io.SEEK_END) if path is None else os.stat(path).st_size) == 0
        raise ImageError(name, "an empty file" if empty else "not an image that Pillow can read") from error
    except Exception as error:  # each of Pillow's readers has its own for what is damaged
        raise ImageError(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os_reason(error)
    return f"damaged image ({one_line(error) or type(error).__name__})"


def _too_large() -> str:
    return f"too large, more than {Image.MAX_IMAGE_PIXELS:,} pixels are not read"


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < 1:
        raise ValueError("no pixels")
    if long > _MAX_RATIO * short:
        raise ValueError(f"too narrow: {width:,} x {height:,} pixels, more than {_MAX_RATIO} to 1 is not read")
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(_too_large())


def _check_offset(image: Any) -> None:
    """Raises ValueError for a FITS file of unsigned integers, stored with an offset, which Pillow ignores."""
    if image.format != "FITS" or not image.fp or not image.tile:
        return
    image.fp.seek(0)
    header = image.fp.read(image.tile[0].offset)
    for card in (header[i : i + 80] for i in range(0, len(header), 80)):
        if card.startswith(b"BZERO   =") and float(card[10:].split(b"/")[0].replace(b"D", b"E")):
            raise ValueError(f"its pixels have an offset ({card[:30].decode().strip()}), which Pillow doesn't read")


def _read(image: Image.Image, name: str, enough: int | None = None) -> Image.Image:
    """The pixels of an opened image, upright, in 8 bits; of a JPEG perhaps fewer, `enough` a side."""
    try:
        _check_size(*image.size)  # before anything is decoded
        _check_offset(image)
    except ValueError as error:
        raise ImageError(name, str(error)) from error
    try:
        if enough and (times := min(image.size) // enough) > 1:
            image.draft(None, (image.width // times, image.height // times))  # type: ignore[arg-type]
        image.load()
        tags: Any = getattr(image, "tag_v2", {})
        stated, negative = _stated_range(image), tags.get(262) == 0  # white is zero
        # Pillow has no mode for 32 bits without a sign.
        unsigned = image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,))[0] == 1
        with contextlib.suppress(Exception):  # damaged EXIF data around a sound picture
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image)
            pixels = _eight_bits(values.view(np.uint32) if unsigned else values, stated)
            image = Image.fromarray(255 - pixels if negative else pixels)
        if image.mode in ("RGBa", "La"):  # alpha multiplied in already: Pillow goes no other way
            image = image.convert(f"{image.mode[:-1]}A")
        # What a transparent pixel hides shows too, as in every other reader.
        return image.convert("RGBA") if "transparency" in image.info else image
    except Exception as error:
        raise ImageError(name, _reason(error)) from error


def _stated_range(image: Image.Image) -> tuple[float, float] | None:
    """Black and white of deep pixels as the file states them; None where it doesn't."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(258) or (16,)  # BitsPerSample
    if image.mode.startswith("I;16"):
        return 0.0, 2.0 ** bits[0] - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # scaled to 16 bits by Pillow
        return 0.0, 65535.0
    if image.mode in ("I", "F") and 340 in tags and 341 in tags:  # SMinSampleValue, SMaxSampleValue
        return float(np.min(tags[340])), float(np.max(tags[341]))
    return None


def _extent(values: np.ndarray, finite: np.ndarray) -> tuple[float, float]:
    """The least and the greatest of the finite numbers and 0."""
    return float(values.min(where=finite, initial=0)), float(values.max(where=finite, initial=0))


def _eight_bits(values: np.ndarray, stated: tuple[float, float] | None = None) -> np.ndarray:
    """Numbers of any type and range as bytes."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "buif":
        raise ValueError(f"pixels must be numbers, got {values.dtype}")
    if values.dtype == bool:
        stated = (0.0, 1.0)
    elif values.dtype == np.uint16 and stated is None:
        stated = (0.0, 65535.0)
    numbers = values.astype(np.float32)
    finite = np.isfinite(numbers)
    if not finite.any():
        raise ValueError("no finite pixels")
    if stated is None or not np.isfinite(stated).all() or stated[0] == stated[1]:
        # Floats may reach beyond their range a little, as resampling does.
        tops, slack = ((1, 255, 65535), 1.5) if values.dtype.kind == "f" else ((255, 65535, 2**31 - 1, 2**32 - 1), 1)
        least, most = _extent(numbers, finite)
        top = next((top for top in tops if max(-least, most) <= top * slack), max(-least, most))
        stated = (-top if least < -top / 2 else 0.0, top)
    black, white = stated
    np.nan_to_num(numbers, copy=False, nan=black, posinf=max(stated), neginf=min(stated))
    numbers -= black  # in place, as a large image has some hundred megabytes
    numbers *= 255 / (white - black)
    return numbers.round(out=numbers).clip(0, 255, out=numbers).astype(np.uint8)


def _from_array(source: Any) -> Image.Image:
    if isinstance(source, torch.Tensor):
        try:
            source = source.detach().cpu().resolve_neg().resolve_conj()
            source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
        except (RuntimeError, TypeError) as error:  # meta, sparse, of 8-bit floats
            raise ValueError(f"not a tensor of pixels: {one_line(error)}") from error
    try:
        values = np.asarray(source)
    except ValueError as error:  # a pair of image and label, as loaders and torchvision's datasets give them
        hint = ": give the images alone" if isinstance(source, tuple | list) else ""
        raise ValueError(
            f"an image is a path, a PIL image or an array [H, W, 3], got a {type(source).__name__}{hint}"
        ) from error
    if values.ndim not in (2, 3) or values.shape[2:] not in ((), (1,), (3,), (4,)):
        got = f"{list(values.shape)}" if values.ndim else f"a {type(source).__name__}"
        hint = ""
        if values.shape[-3:-2] in ((1,), (3,)):
            one = "" if values.ndim > 3 else "; permute(1, 2, 0) makes it of a tensor [3, H, W]"
            hint = f"{one}; a batch that is preprocessed goes to the model itself"
        raise ValueError(f"an image is a path, a PIL image or an array [H, W, 3], got {got}{hint}")
    _check_size(values.shape[1], values.shape[0])
    _check_range(values)
    values = _eight_bits(values)
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def _check_range(values: np.ndarray) -> None:
    """Raises ValueError for floats that are neither about 0…1, -1…1 nor 0…255: normalised ones would come out black."""
    if values.dtype.kind != "f" or not values.size:
        return
    least, most = _extent(values, np.isfinite(values))
    if max(-least, most) > 1.5 and -least > most / 3:
        raise ValueError(
            f"pixels are 0…1 or 0…255, got {least:.3g} to {most:.3g}: give the image before it is normalised"
        )


def data_config(model: nn.Module, size: tuple[int, ...] | None = None) -> dict[str, Any]:
    """What a model's images are like, as timm's `resolve_model_data_config` says, in the channels that the model has.

    A model that was made with other `in_chans` than its weights had still has the others' description. Of another
    `size` (in_chans, H, W) where it is given.
    """
    # Without the model itself: timm asks for its truth, and a compiled one has none.
    config: dict[str, Any] = resolve_data_config({"in_chans": None}, getattr(model, "pretrained_cfg", None))
    channels, *sides = config["input_size"]
    config["input_size"] = size or (getattr(model, "in_chans", None) or channels, *sides)
    return fit_channels(config)


def fit_channels(config: dict[str, Any]) -> dict[str, Any]:
    """A description of images with as many numbers of ``mean`` and ``std`` as channels: else their average, as timm's
    loader takes it."""
    channels = config["input_size"][0]
    fitting = {
        key: values if len(values := config[key]) == channels else (sum(values) / len(values),) * channels
        for key in ("mean", "std")
    }
    return {**config, **fitting}


def image_loader(model: nn.Module, size: tuple[int, ...] | None = None) -> Callable[[Any], torch.Tensor]:
    """A function that reads an image as `model` takes it in evaluation, [in_chans, H, W]; see `load_image`.

    Of another `size` (in_chans, H, W) where it is given.
    """
    config = data_config(model, size)
    transform: Any = create_transform(**config, is_training=False)
    return lambda source: transform(load_image(source, channels=config["input_size"][0]))

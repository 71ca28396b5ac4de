"""How a checkpoint's accuracy falls as CIFAR-10's test images get worse: noise, blur, contrast, JPEG, shifts, sizes.

    python benchmarks/study/robustness.py --data-dir cifar10 --models convmixer_256_8.e100_cifar10

writes a row for each degree of each corruption to ``robustness.csv``. Noise, blur, contrast, JPEG and shift change the
32 x 32 pixels that the model's own transform then gets; a size resizes what it crops to more or fewer pixels.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageEnhance, ImageFilter
from timm.data import create_transform, resolve_model_data_config
from torchvision.datasets import ImageFolder

import convmixer_timm  # noqa: F401  registers the variants

sys.path.append(str(Path(__file__).parent.parent))
from arguments import existing_folder, missing_folders, named_errors, positive, pretrained_model


def noise(image: Image.Image, degree: float) -> Image.Image:
    """Gaussian noise of a standard deviation in grey levels; the same image always gets the same."""
    pixels = np.asarray(image)
    generator = np.random.default_rng(int(pixels.sum()))
    return Image.fromarray((pixels + generator.normal(0, degree, pixels.shape)).round().clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, degree: float) -> Image.Image:
    """A Gaussian blur of a standard deviation in pixels."""
    return image.filter(ImageFilter.GaussianBlur(degree))


def contrast(image: Image.Image, degree: float) -> Image.Image:
    """Differences from the mean grey, times a factor."""
    return ImageEnhance.Contrast(image).enhance(degree)


def jpeg(image: Image.Image, degree: float) -> Image.Image:
    """JPEG of a quality, with Pillow's own halving of the colours."""
    image.save(file := io.BytesIO(), "JPEG", quality=int(degree))
    return Image.open(file).convert("RGB")


def shift(image: Image.Image, degree: float) -> Image.Image:
    """Moved right by pixels; what comes in at the left is a mirror image."""
    pixels, width = np.asarray(image), int(degree)
    return Image.fromarray(np.pad(pixels, ((0, 0), (width, 0), (0, 0)), "reflect")[:, : pixels.shape[1]])


CORRUPTIONS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], list[float]]] = {
    "noise": (noise, [2, 5, 10, 20, 30]),
    "blur": (blur, [0.25, 0.5, 0.75, 1.0, 1.5]),
    "contrast": (contrast, [0.8, 0.6, 0.4, 0.2, 0.1]),
    "jpeg": (jpeg, [95, 85, 75, 50, 25, 10]),
    "shift": (shift, [1, 2, 3, 4]),
}
SIZES = [24, 28, 32, 40, 48, 64]


def corrupted(transform: Callable, corruption: Callable, degree: float, image: Image.Image) -> torch.Tensor:
    return transform(corruption(image, degree))


def conditions(model: torch.nn.Module) -> Iterator[tuple[str, float | str, Callable]]:
    """A corruption's name, its degree, and the transform of an image to the model's input."""
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    yield "none", "", transform
    for name, (function, degrees) in CORRUPTIONS.items():
        for degree in degrees:
            yield name, degree, partial(corrupted, transform, function, degree)
    for size in SIZES:
        yield "size", size, create_transform(**{**config, "input_size": (3, size, size)})


@torch.inference_mode()
def top1(model: torch.nn.Module, images: list[tuple[Image.Image, int]], transform: Callable, batch: int = 250) -> float:
    correct = 0
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        logits = model(torch.stack([transform(image) for image, _ in part]))
        correct += int((logits.argmax(1) == torch.tensor([target for _, target in part])).sum())
    return 100 * correct / len(images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=existing_folder, default=Path("cifar10"), help="folder with test")
    parser.add_argument("--models", type=pretrained_model, nargs="+", default=["convmixer_256_8.e100_cifar10"])
    parser.add_argument("--results", type=existing_folder, default=Path(__file__).parent, help="folder of the table")
    parser.add_argument("--images", type=positive, help="take few images of all (to try it)")
    args = parser.parse_args()
    if missing := missing_folders(args.data_dir, "test"):
        parser.error(missing)
    with named_errors(parser):
        folder = ImageFolder(str(args.data_dir / "test"))
    step = max(1, len(folder) // args.images) if args.images else 1
    images = [folder[i] for i in range(0, len(folder), step)]
    rows = []
    for name in args.models:
        model = timm.create_model(name, pretrained=True).eval()
        for corruption, degree, transform in conditions(model):
            row = {"model": name, "corruption": corruption, "degree": degree, "images": len(images)}
            rows.append({**row, "top1": round(top1(model, images, transform), 2)})
            print(*rows[-1].values(), sep="  ", flush=True)
    with (args.results / "robustness.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

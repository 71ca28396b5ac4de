"""Measures the page that `convmixer-timm page` writes, in headless Chromium, against PyTorch on the same machine.

    python benchmarks/page.py --runtime FOLDER --images DIR --csv benchmarks/results/page.csv
    python benchmarks/page.py --runtime FOLDER --screenshots benchmarks/plots

Needs Debian's chromium and chromium-driver, selenium, and npm's onnxruntime-web (FOLDER). For each model: the weight of
what a visitor loads, as it is and as gzip sends it; seconds from opening the page to the first answer, with an empty
cache; images per second, one at a time and from file to answer (PyTorch: Pillow's reading, timm's transform, the
model), the median and the fastest. And on the images of DIR, which need a resize, how far the page's logits are from
PyTorch's, and how often both name the same class, for the page's own resampling and for the browser's (a canvas with
smoothing of high quality).
"""

import argparse
import base64
import gzip
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from arguments import existing_folder, named_errors, positive, registered_model
from PIL import Image
from train_step import append_rows, machine

import convmixer_timm
from convmixer_timm import load_model
from convmixer_timm.images import find_images, image_loader, load_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.web.browser import Browser

CANVAS = """
const [place, done] = arguments;
(async () => {
  const bitmap = await createImageBitmap(document.getElementById("given-file").files[0]);
  const canvas = new OffscreenCanvas(place.size[0], place.size[1]);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, place.size[0], place.size[1]);
  const { data } = context.getImageData(place.left, place.top, place.width, place.height);
  let text = "";
  for (const byte of data) text += String.fromCharCode(byte);
  done(btoa(text));
})();
"""


def source(name: str, folder: Path) -> str:
    """The model by a name that `page` takes; an untrained one where the weights aren't on this machine."""
    if name in timm.list_pretrained("convmixer*_cifar10"):
        return name
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model(name), str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


def weigh(files: list[Path]) -> tuple[float, float]:
    """MB of files, and of what gzip makes of them."""
    contents = [file.read_bytes() for file in files]
    return sum(map(len, contents)) / 1e6, sum(len(gzip.compress(content, 6)) for content in contents) / 1e6


def first_answer(url: str, image: Path) -> float:
    """Seconds from opening the page to an answer, in a browser that has never been there."""
    browser = Browser()
    try:
        start = time.perf_counter()
        browser.open(url)
        browser.give("drop", image)
        browser.answers(1, 300)
        return time.perf_counter() - start
    finally:
        browser.close()


def rates(name: str, seconds: list[float]) -> dict[str, float]:
    """Images per second: the median, and the fastest, which other work on the machine disturbed least."""
    return {f"{name}_images_s": 1 / statistics.median(seconds), f"{name}_fastest": 1 / min(seconds)}


def by_page(browser: Browser, images: list[Path]) -> tuple[dict[str, dict], list[float]]:
    """Answers by file, and seconds for each."""
    answers: dict[str, dict] = {}
    for at in range(0, len(images), 20):
        browser.give("drop", *images[at : at + 20])
        answers |= browser.answers(len(images[at : at + 20]), 600)
    return answers, [sum(answer["milliseconds"].values()) / 1000 for answer in answers.values()]


def by_pytorch(model, images: list[Path], threads: int) -> list[float]:
    """Seconds for each image."""
    load = image_loader(model)
    torch.set_num_threads(threads)
    taken = []
    with torch.inference_mode():
        for path in [images[0], *images]:
            start = time.perf_counter()
            model(load(path)[None])
            taken.append(time.perf_counter() - start)
    return taken[1:]


def by_canvas(browser: Browser, model, path: Path, place: dict) -> torch.Tensor:
    """PyTorch's logits of an image that the browser resized."""
    from selenium.webdriver.common.by import By

    browser.driver.execute_script(
        """document.getElementById("given-file")?.remove();
        document.body.append(Object.assign(document.createElement("input"), { type: "file", id: "given-file" }));"""
    )
    browser.driver.find_element(By.ID, "given-file").send_keys(str(path))
    pixels = np.frombuffer(base64.b64decode(browser.driver.execute_async_script(CANVAS, place)), np.uint8)
    image = torch.tensor(pixels.reshape(place["height"], place["width"], 4)[..., :3].copy()).permute(2, 0, 1) / 255
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return model(((image - mean) / std)[None])[0]


@torch.inference_mode()
def agreement(browser: Browser, model, images: list[Path], answers: dict[str, dict]) -> dict[str, float]:
    """Greatest difference of a logit, and share of images with the same class."""
    load = image_loader(model)
    expected = torch.stack([model(load(path)[None])[0] for path in images])
    page = torch.tensor([answers[path.name]["logits"] for path in images])
    canvas = torch.stack([by_canvas(browser, model, path, answers[path.name]["place"]) for path in images])
    row = {}
    for name, found in (("page", page), ("canvas", canvas)):
        row[f"{name}_difference"] = (found - expected).abs().max().item()
        row[f"{name}_agreement"] = (found.argmax(1) == expected.argmax(1)).float().mean().item()
    return row


def screenshots(runtime: str, target: Path) -> None:
    """The README's: a light one, and one of a phone in the dark."""
    root = Path(__file__).parent.parent.absolute()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "page"
        convmixer_timm.page("convmixer_256_8.e100_cifar10", folder, runtime=runtime, title="What is in the picture?")
        browser = Browser()
        try:
            url = browser.serve(folder)
            shots = {
                "page_light": ([root / "tests/images/frog/0001.png", root / "weights/images/ship.png"], (1100, 960)),
                "page_phone": ([root / "weights/images/horse.png"], (375, 812)),
            }
            for name, (images, size) in shots.items():
                browser.open(url, *size, dark=name == "page_phone")
                browser.give("drop", *images)
                browser.answers(len(images))
                where = "block: 'end'" if name == "page_phone" else "block: 'nearest'"
                browser.driver.execute_script(
                    f"document.querySelector('article:last-of-type').scrollIntoView({{{where}}})"
                )
                time.sleep(0.5)  # until it is drawn
                shot = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
                shot.save(target / f"{name}.webp", quality=88, method=6)
        finally:
            browser.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", type=existing_folder, required=True, help="npm's onnxruntime-web")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="only draw the README's, there")
    parser.add_argument("--images", help="photographs, each of another name")
    parser.add_argument("--count", type=positive, default=100, help="images (%(default)s)")
    models = ["convmixer_128_4.e25_cifar10", "convmixer_256_8.e100_cifar10"]
    parser.add_argument("--models", type=registered_model, nargs="+", default=models)
    parser.add_argument("--calibration", type=existing_folder, help="images for int8, which is then measured too")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.screenshots:
        return screenshots(args.runtime, args.screenshots)
    if not args.images:
        parser.error("--images or --screenshots")
    with named_errors(parser):
        found = [path.absolute() for path in find_images([args.images])]
        load_image(found[0])
    images = found[:: max(1, len(found) // args.count)][: args.count]
    threads = torch.get_num_threads()
    for name in args.models:
        for precision in ("fp32", *(["int8"] if args.calibration else [])):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "page"
                model_name = source(name, Path(temporary) / "model")
                calibration = args.calibration if precision == "int8" else None
                convmixer_timm.page(
                    model_name, folder, precision=precision, calibration=calibration, runtime=args.runtime
                )
                row = {"model": name, "precision": precision, "images": len(images)}
                parts = {
                    "page": [folder / file for file in ("index.html", "page.js", "page.css")],
                    "model": [folder / "model.onnx"],
                    "wasm": list(folder.glob("runtime/*.wasm.bundle*")) + list(folder.glob("runtime/*threaded.wasm")),
                    "webgpu": list(folder.glob("runtime/*webgpu*")) + list(folder.glob("runtime/*asyncify*")),
                }
                for part, files in parts.items():
                    row[f"{part}_mb"], row[f"{part}_gzip_mb"] = weigh(files)
                browser = Browser()
                try:
                    url = browser.serve(folder)
                    row["first_answer_s"] = statistics.median(first_answer(url, images[0]) for _ in range(3))
                    browser.open(url)
                    answers, seconds = by_page(browser, images)
                    row |= rates("page", seconds)
                    model = load_model(model_name)
                    for count in sorted({1, threads}):
                        row |= rates(f"pytorch_{count}", by_pytorch(model, images, count))
                    row |= agreement(browser, model, images, answers)
                finally:
                    browser.close()
            row |= machine()
            print(
                *(
                    f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}"
                    for key, value in row.items()
                )
            )
            if args.csv:
                append_rows(args.csv, [row])


if __name__ == "__main__":
    main()

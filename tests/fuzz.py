"""Damaged files of every kind that users hand in: only documented errors may come of them.

    python -m tests.fuzz images --seconds 600 --seed 1

Each case is a sound file with a few random changes. A case that raises anything else, takes too long, or makes a
command say more than its one line is kept in a folder, and ends the run. The process may take 4 GiB more than it starts
with, so that a file that asks for more is found too.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MEMORY = 4 << 30
SLOW = 20.0  # seconds for a case
IMAGES = Path(__file__).parent / "images"
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
VALUES = [None, True, 0, 1, -1, 3, 0.5, 1e308, 10**30, 99999999, float("nan"), "", "x", "\udcff", "9" * 1000]
VALUES += [[], {}, [[]], [None], [1, 2, 3], [10**9] * 3, {"a": {"b": []}}, "bicubic", "convmixer_128_4", "resnet18"]

Case = Callable[[random.Random, Path], str]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Some bytes of a file changed, lost, repeated or moved."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not data:
            break
        # Headers are at the front, where a change reaches further.
        at = rng.randrange(min(len(data), rng.choice([16, 64, 512, 1 << 30])))
        length = rng.choice([1, 2, 4, 8, 64])
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            width = rng.choice([1, 2, 4])
            order = rng.choice(["little", "big"])
            data[at : at + width] = (rng.choice(INTERESTING) & (256**width - 1)).to_bytes(width, order)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        elif kind == 5:
            data[at:at] = bytes(length)
        else:
            del data[rng.randrange(len(data)) :]
    return bytes(data)


def mutated_json(content: Any, rng: random.Random) -> bytes:
    """Some values of a JSON document changed or lost, or its bytes."""
    text = json.dumps(content)
    if rng.random() < 0.3:
        return mutated(text.encode(), rng)
    content = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 3])):
        spots = list(_spots(content))
        if not spots:
            break
        holder, key = rng.choice(spots)
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(content).encode() if rng.random() < 0.98 else json.dumps(rng.choice(VALUES)).encode()


def _spots(content: Any) -> Iterator[tuple[Any, Any]]:
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _spots(content[key])


def command(*args: Any) -> str:
    """Runs a command, which has to succeed, or to fail with one line for each thing that it names."""
    from convmixer_timm.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, args)))
    said = [line for line in err.getvalue().splitlines() if line]
    assert code in (0, 1), f"exit code {code}"
    if code:
        assert len(said) == 1 or args[0] == "verify", f"not one line: {said}"
    return "accepted" if code == 0 else "refused"


def images(folder: Path) -> Case:
    """Every kind of file that Pillow writes here, in every mode that it takes; read as predicting reads it."""
    import numpy as np
    import timm
    from PIL import Image

    from convmixer_timm.images import ImageError, image_loader

    Image.init()
    rgb = Image.open(IMAGES / "cat/0000.png").convert("RGB")
    grey = np.asarray(rgb.convert("L")).astype(int)
    pictures = {mode: rgb.convert(mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "LAB")}
    pictures["I;16"] = Image.fromarray((grey * 257).astype(np.uint16))
    pictures["I"] = Image.fromarray((grey * 257).astype(np.int32))
    pictures["F"] = Image.fromarray((grey / 255).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, list[dict]] = {
        "JPEG": [{}, {"exif": exif}, {"progressive": True}],
        "PNG": [{}, {"exif": exif}],
        "TIFF": [{}, *({"compression": c} for c in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4"))],
        "WEBP": [{}, {"lossless": True}, {"save_all": True, "append_images": [rgb]}],
        "GIF": [{}, {"save_all": True, "append_images": [rgb]}],
        "DDS": [{}, {"pixel_format": "DXT1"}, {"pixel_format": "DXT5"}, {"pixel_format": "BC5"}],
    }
    seeds = []
    for format in sorted(set(Image.SAVE) - {"PDF", "EPS", "PALM", "XBM"}) + ["XBM"]:
        for option in options.get(format, [{}]):
            for mode, picture in pictures.items():
                file = io.BytesIO()
                with contextlib.suppress(Exception):  # a mode or an option that the format doesn't have
                    picture.save(file, format, **option)
                    seeds.append((f"{format}-{mode}", file.getvalue()))
    formats = sorted({name.split("-")[0] for name, _ in seeds})
    assert {"JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "DDS"} <= set(formats), formats
    print(f"{len(seeds)} sound files of {len(formats)} formats")
    load = image_loader(timm.create_model("convmixer_128_4"))

    def case(rng: random.Random, target: Path) -> str:
        format = rng.choice(formats)
        name, content = rng.choice([seed for seed in seeds if seed[0].startswith(f"{format}-")])
        path = target / f"{name.replace(';', '')}.image"
        path.write_bytes(mutated(content, rng))
        try:
            tensor = load(path)
        except ImageError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
            return "refused"
        assert tensor.shape == (3, 32, 32) and bool(tensor.isfinite().all())
        return "accepted"

    return case


def checkpoints(folder: Path) -> Case:
    """Pickles and safetensors in every layout that trainers write, converted."""
    import timm
    import torch
    from safetensors.torch import save

    weights = timm.create_model("convmixer_128_4", depth=1, dim=8, num_classes=2).state_dict()
    seeds = [("x.safetensors", save(weights))]
    for content in (
        weights,
        {"state_dict": weights, "epoch": 1, "args": argparse.Namespace(model="x"), "optimizer": {"lr": [0.1]}},
        {"net": {f"module.{k}": v for k, v in weights.items()}, "acc": 90.0},
        {"state_dict": {f"model.{k}": v for k, v in weights.items()}, "pytorch-lightning_version": "2.0"},
        [weights],
    ):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            seeds.append(("x.pth", file.getvalue()))

    def case(rng: random.Random, target: Path) -> str:
        name, content = rng.choice(seeds)
        (target / name).write_bytes(mutated(content, rng))
        return command("convert", target / name, target / "out" / "y.safetensors")

    return case


def _packed(folder: Path) -> tuple[Any, bytes]:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("convmixer_128_4", depth=1, dim=8, num_classes=2)
    args = {"depth": 1, "dim": 8, "num_classes": 2}
    save_for_hf(model, str(folder), model_config={"label_names": ["a", "b"]}, model_args=args, safe_serialization=True)
    return json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()


def configs(folder: Path) -> Case:
    """Packed models whose description or weights are damaged, used to predict, and label files."""
    config, weights = _packed(folder)
    labels = "ünï\nbee\n".encode("utf-8-sig")
    image = IMAGES / "cat/0000.png"

    def case(rng: random.Random, target: Path) -> str:
        if rng.random() < 0.1:
            from convmixer_timm.inference.labels import check_labels, read_labels

            (target / "labels.txt").write_bytes(mutated(labels, rng))
            try:
                check_labels(read_labels(target / "labels.txt"), 2)
            except ValueError:
                return "refused"
            return "accepted"
        damaged = rng.random() < 0.8
        (target / "config.json").write_bytes(mutated_json(config, rng) if damaged else json.dumps(config).encode())
        (target / "model.safetensors").write_bytes(weights if damaged else mutated(weights, rng))
        return command("predict", image, "--model", f"local-dir:{target}", "--format", "json")

    return case


def caches(folder: Path) -> Case:
    """What this package and huggingface_hub remember on the disk: remembered choices, and downloaded checkpoints."""
    import timm
    import torch

    from convmixer_timm.inference import optimize as module

    config, weights = _packed(folder)
    model = timm.create_model("convmixer_128_4", depth=1, dim=8)
    example = torch.randn(1, 3, 32, 32)
    engine: Any = lambda network, *_: network  # noqa: E731
    module.BACKENDS = {"inductor": (engine, ("fp32",))}  # that takes no time to make
    module._TIMING_SECONDS = 0.0
    module._key = lambda *_: "key"  # type: ignore[assignment]
    choice = {"key": {"chosen": ["inductor", False, None], "times": {"inductor": 0.1, "inductor, folded": 0.2}}}

    def case(rng: random.Random, target: Path) -> str:
        if rng.random() < 0.5:
            file = target / "inference.json"
            module._choices = lambda: file
            file.write_bytes(mutated_json(choice, rng))
            assert module.optimize(model, example)(example).shape == (1, 10)
            return "accepted"
        hub = Path(os.environ["HF_HUB_CACHE"])
        shutil.rmtree(hub, ignore_errors=True)
        repo = hub / "models--ann--x"
        snapshot = repo / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir()
        damaged = rng.random() < 0.7
        (repo / "refs/main").write_bytes(b"a" * 40 if rng.random() < 0.9 else mutated(b"a" * 40, rng))
        (snapshot / "config.json").write_bytes(mutated_json(config, rng) if damaged else json.dumps(config).encode())
        (snapshot / "model.safetensors").write_bytes(weights if damaged else mutated(weights, rng))
        shutil.copytree(hub, target / "hub", symlinks=True)
        return command(*rng.choice([("verify",), ("predict", IMAGES / "cat/0000.png", "--model", "hf-hub:ann/x")]))

    return case


def runs(folder: Path) -> Case:
    """Output folders of train.py, as they are published, without the pictures, which take seconds."""
    import timm
    import torch
    import yaml

    from convmixer_timm.hub import packing

    packing.draw_pictures = lambda *_: {}  # type: ignore[assignment]
    source = Path(__file__).parents[1] / "weights/convmixer_128_4.e25_cifar10"
    args = yaml.safe_load((source / "args.yaml").read_text())
    args |= {"num_classes": 2, "model_kwargs": {"depth": 1, "dim": 8}, "data_dir": str(IMAGES)}
    model = timm.create_model("convmixer_128_4", num_classes=2, **args["model_kwargs"])
    file = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "epoch": 9, "args": argparse.Namespace(**args)}, file)
    sound = {
        "args.yaml": json.dumps(args).encode(),  # which is YAML
        "summary.csv": (source / "summary.csv").read_bytes(),
        "last.pth.tar": file.getvalue(),
    }

    def case(rng: random.Random, target: Path) -> str:
        damaged = rng.choice(["args.yaml", "args.yaml", "summary.csv", "last.pth.tar"])
        for name, content in sound.items():
            (target / name).write_bytes(content)
        changed = mutated_json(args, rng) if damaged == "args.yaml" else mutated(sound[damaged], rng)
        (target / damaged).write_bytes(changed)
        (target / "labels.txt").write_text("a\nb\n")
        return command("publish", target, "--repo-id", "a/b", "--labels", target / "labels.txt", "--dry-run")

    return case


KINDS = {"images": images, "checkpoints": checkpoints, "configs": configs, "caches": caches, "runs": runs}


def run(kind: str, seconds: float, seed: int, keep: Path) -> int:
    """Runs cases of one kind until the time is over; gives the exit code."""
    import convmixer_timm  # noqa: F401  registers the variants; only now, as the cache's place is read with it

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        case = KINDS[kind](Path(folder))
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        counts = {"accepted": 0, "refused": 0}
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            target = Path(folder) / "case"
            target.mkdir()
            start = time.monotonic()
            try:
                counts[case(random.Random(f"{kind}-{seed}-{number}"), target)] += 1
                assert time.monotonic() - start < SLOW, f"took {time.monotonic() - start:.1f} s"
            except BaseException:
                kept = keep / f"{kind}-{seed}-{number}"
                shutil.copytree(target, kept, dirs_exist_ok=True, symlinks=True)
                print(f"case {number}, kept in {kept}\n{traceback.format_exc()}")
                return 1
            shutil.rmtree(target)
            number += 1
    print(f"{kind}, seed {seed}: {number} cases, {counts}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz"))
    args = parser.parse_args()
    home = tempfile.mkdtemp()
    os.environ.update(HF_HUB_CACHE=f"{home}/hub", HF_HUB_OFFLINE="1", XDG_CACHE_HOME=home, OMP_NUM_THREADS="1")
    try:
        sys.exit(run(args.kind, args.seconds, args.seed, args.keep.absolute()))
    finally:
        shutil.rmtree(home, ignore_errors=True)

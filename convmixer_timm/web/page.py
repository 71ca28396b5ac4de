"""A static page that classifies pictures in the visitor's browser, from any checkpoint: `page`."""

import base64
import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, constants, hf_hub_download
from huggingface_hub.errors import HTTPError
from PIL import Image

from ..convmixer import CIFAR10_LABELS, WEIGHTS_DIR
from ..errors import file_in_place_of
from ..files import as_text, atomic_path, files_below
from ..images import data_config, find_images, load_image
from ..inference.class_map import has_class_map
from ..inference.export import export
from ..inference.loading import split_name
from ..training.trained import load_model

__all__ = ["ONNXRUNTIME_WEB", "is_part", "page"]

# The version that the page was tested with, and the SHA-384 of its files in the npm package, which the CDN serves as
# they are. Each engine has a script and a binary.
ONNXRUNTIME_WEB = "1.30.0"
_CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{ONNXRUNTIME_WEB}/dist/"
_ENGINES = {
    "webgpu": {"module": "ort.webgpu.bundle.min.mjs", "binary": "ort-wasm-simd-threaded.asyncify.wasm"},
    "wasm": {"module": "ort.wasm.bundle.min.mjs", "binary": "ort-wasm-simd-threaded.wasm"},
}
_INTEGRITY = {
    "ort.webgpu.bundle.min.mjs": "sha384-1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f",
    "ort-wasm-simd-threaded.asyncify.wasm": "sha384-EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
_SOURCES = ("index.html", "page.js", "page.css")
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
_MARK = '<meta name="generator" content="convmixer-timm">'
_EXAMPLE_PIXELS = 1024  # the longer side of an example image


def page(
    name: str,
    folder: str | Path = "page",
    *,
    precision: str = "fp32",
    calibration: Iterable[Any] | str | Path | None = None,
    title: str | None = None,
    examples: Iterable[str | Path] | str | Path | None = None,
    runtime: str | Path | None = None,
    link: str | None = None,
) -> dict[str, int]:
    """Writes a folder that any web server can serve: a page that runs the model on its visitors' own devices.

    Args:
        name: The model, as for `load_model`.
        folder: Folder to make, whole or not at all. An older page is replaced; a folder that holds anything else stays.
        precision: 'fp32', or 'int8', a quarter of the size.
        calibration: For int8, as for `convmixer_timm.optimize`.
        title: Of the page; the model's name by default.
        examples: Images for visitors to try, by files, folders and globs; by default the package's own for a model of
            CIFAR-10, else none. They are written anew, without what cameras add to them, and at most 1024 pixels wide.
        runtime: Folder of the npm package ``onnxruntime-web``, to be part of the page, which then works offline; by
            default it comes from a public CDN. Either way the browser compares its files with their hashes.
        link: Address of the model's own page (https://…); by default the Hub's for a model from there.

    Returns:
        Size in bytes of each file, by its path in the folder.

    Raises:
        ValueError: If the model can't be had or is no classifier of one or three channels, the folder holds something
            else, `link` is no address, or `runtime` isn't the version that it should be.
        OSError: If a file can't be read or written.
        RuntimeError: As from `convmixer_timm.export`.
    """
    target = Path(folder).expanduser().resolve()  # where a link leads
    _check_target(target)
    if link is not None and not link.startswith(("https://", "http://")):
        raise ValueError(f"the link must be an address, https://…, got {link!r}")
    engines = _runtime_files(Path(runtime).expanduser()) if runtime is not None else {}
    given = None if examples is None else find_images([examples] if isinstance(examples, str | Path) else examples)
    model: Any = load_model(name)
    _check_classifier(name, model)
    with atomic_path(target) as temporary:
        temporary.mkdir()
        maps = has_class_map(model)
        metadata = export(model, temporary / "model.onnx", "onnx", precision, calibration=calibration, class_map=maps)
        if metadata["interpolation"] not in _INTERPOLATIONS:
            known = ", ".join(_INTERPOLATIONS)
            raise ValueError(f"{name} wants images resized by {metadata['interpolation']!r}; a page can by {known}")
        if engines:
            (temporary / "runtime").mkdir()
            for file in engines.values():
                shutil.copyfile(file, temporary / "runtime" / file.name)
        shown = _write_examples(_own_examples(metadata) if given is None else given, temporary)
        height, width = metadata["input_size"][1:]
        settings = {
            **{key: metadata[key] for key in ("precision", "input_size", "interpolation", "crop_mode", "mean", "std")},
            "scale": [math.floor(side / metadata["crop_pct"]) for side in (height, width)],
            "labels": metadata["label_names"],
            "model": {"file": "model.onnx", "bytes": (temporary / "model.onnx").stat().st_size},
            "runtime": {
                "base": "runtime/" if engines else _CDN,
                **{
                    engine: {kind: {"file": file, "integrity": _INTEGRITY[file]} for kind, file in parts.items()}
                    for engine, parts in _ENGINES.items()
                },
            },
            "examples": shown,
        }
        title = " ".join(as_text(str(title or "")).split()) or _default_title(name)
        facts = _facts(name, model, metadata, link)
        html = Template(_source("index.html")).substitute(
            title=escape(title),
            lede=escape(_lede(metadata["label_names"], maps)),
            # In a script element nothing is escaped, and `<` could end it.
            settings=json.dumps(settings).replace("<", "\\u003c"),
            facts="\n".join(f"      <div><dt>{escape(term)}</dt><dd>{value}</dd></div>" for term, value in facts),
        )
        (temporary / "index.html").write_text(html, encoding="utf-8", errors="backslashreplace")
        for source in _SOURCES[1:]:
            (temporary / source).write_text(_source(source), encoding="utf-8")
        return {name: path.stat().st_size for name, path in files_below(temporary).items()}


def is_part(name: str) -> bool:
    """Whether a path in a page's folder is one that `page` writes; a folder's ends in a slash."""
    folder, _, file = name.rpartition("/")
    if not folder:
        return name in (*_SOURCES, "model.onnx")
    if folder == "examples":
        return re.fullmatch(r"(\d+\.(png|jpg))?", file) is not None
    return folder == "runtime" and file in ("", *_INTEGRITY)


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _check_target(target: Path) -> None:
    if blocker := file_in_place_of(target):
        raise ValueError(f"{blocker} is a file: name a folder for the page")
    if not target.exists():
        return
    index = target / "index.html"
    ours = index.is_file() and _MARK in index.read_text(encoding="utf-8", errors="replace")
    there = sorted(target.rglob("*") if ours else target.iterdir())  # somebody's own may hold any number
    within = (path.relative_to(target).as_posix() + "/" * path.is_dir() for path in there)
    if other := next((name for name in within if not (ours and is_part(name))), None):
        raise ValueError(f"{target} holds {other}, which is no part of an earlier page: name a new folder")
    if target == Path.cwd():
        raise ValueError("the page replaces its folder as a whole: name another one than the current")


def _runtime_files(folder: Path) -> dict[str, Path]:
    """The files of the engines in a copy of the npm package, checked, by their names."""
    if not folder.is_dir():
        raise ValueError(f"--runtime {folder} is no folder")
    where = folder / "dist" if (folder / "dist").is_dir() else folder
    found = {name: where / name for name in _INTEGRITY}
    for name, file in found.items():
        if not file.is_file():
            raise ValueError(f"--runtime {folder} has no {name}: it takes npm's onnxruntime-web {ONNXRUNTIME_WEB}")
        if _integrity(file) != _INTEGRITY[name]:
            raise ValueError(f"{file} is not that of npm's onnxruntime-web {ONNXRUNTIME_WEB}, which the page needs")
    return found


def _integrity(file: Path) -> str:
    """The hash of a file as browsers take it."""
    return "sha384-" + base64.b64encode(hashlib.sha384(file.read_bytes()).digest()).decode()


def _check_classifier(name: str, model: Any) -> None:
    channels, height, width = data_config(model)["input_size"]
    if channels not in (1, 3):
        raise ValueError(f"{name} takes images of {channels} channels; a browser's have 3, or 1 when made grey")
    with torch.inference_mode():
        shape = tuple(model(torch.zeros(1, channels, height, width)).shape)
    if model.num_classes < 2 or shape != (1, model.num_classes):
        values = "x".join(map(str, shape[1:]))
        raise ValueError(f"{name} is no classifier of two classes or more: for an image it gives {values} values")


def _own_examples(metadata: dict[str, Any]) -> list[Path]:
    """The bundled images, for a model of their classes."""
    return sorted((WEIGHTS_DIR / "images").glob("*")) if metadata["label_names"] == list(CIFAR10_LABELS) else []


def _write_examples(paths: Iterable[Path], folder: Path) -> list[dict[str, str]]:
    shown = []
    for number, path in enumerate(paths, 1):
        image = load_image(path)
        image.info.clear()  # a comment or a colour profile, which Pillow would write again
        exact = max(image.size) <= 96  # small ones as they are
        image.thumbnail((_EXAMPLE_PIXELS, _EXAMPLE_PIXELS), Image.Resampling.LANCZOS)
        file = f"examples/{number}.{'png' if exact else 'jpg'}"
        (folder / "examples").mkdir(exist_ok=True)
        image.save(folder / file, **({"optimize": True} if exact else {"quality": 88}))
        shown.append({"file": file, "name": path.stem})
    return shown


def _default_title(name: str) -> str:
    scheme, location = split_name(name)
    if scheme == "local-dir":
        location = str(Path(location).expanduser().resolve())
    else:
        location = location.partition("@")[0]
    return as_text(location.rpartition("/")[2])


def _lede(labels: list[str], maps: bool) -> str:
    if 1 < len(labels) <= 12:
        knows = f"tells {', '.join(labels[:-1])} and {labels[-1]} apart"
    else:
        knows = f"knows {len(labels):,} class{'es' * (len(labels) != 1)}"
    looks = ", and shows where it looks" if maps else ""
    return f"It {knows}{looks}. It runs in your browser: your pictures stay on your device."


def _facts(name: str, model: Any, metadata: dict[str, Any], link: str | None) -> list[tuple[str, str]]:
    """What the page says of the model: terms with their values as HTML."""
    card = _card(name, model)
    data = card.data if card else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = metadata["input_size"][1:]
    facts = [
        ("Architecture", escape(str(metadata["architecture"] or type(model).__name__))),
        ("Parameters", f"{parameters / 1e6:.2f} million, in {escape(metadata['precision'])}"),
        ("Looks at", f"{width} &times; {height} pixels"),
    ]
    datasets = getattr(data, "datasets", None)
    if datasets:
        several = datasets if isinstance(datasets, list) else [datasets]
        facts.append(("Learned from", escape(", ".join(map(str, several)))))
    top1 = next((r for r in getattr(data, "eval_results", None) or () if r.metric_name == "Top 1 Accuracy"), None)
    if top1:
        facts.append(("Top-1 accuracy", escape(f"{top1.metric_value} %, on {top1.dataset_name}")))
    licence = getattr(data, "license", None) or model.pretrained_cfg.get("license")
    if licence:
        facts.append(("Licence", escape(str(licence))))
    link = link or _hub_address(name, model)
    if link:
        facts.append(("Card", f'<a href="{escape(link)}">{escape(link.partition("://")[2])}</a>'))
    return facts


def _hub_id(name: str, model: Any) -> tuple[str, str]:
    """OWNER/NAME and revision of a model that came from the Hub; empty where it didn't, or none was asked for."""
    scheme, location = split_name(name)
    if scheme == "hf-hub":
        repo_id, _, revision = location.partition("@")
        return repo_id, revision
    cfg = model.pretrained_cfg
    return "" if scheme == "local-dir" or cfg.get("file") else cfg.get("hf_hub_id") or "", ""


def _hub_address(name: str, model: Any) -> str | None:
    repo_id, revision = _hub_id(name, model)
    if not repo_id:
        return None
    return f"{constants.ENDPOINT}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def _card(name: str, model: Any) -> ModelCard | None:
    """The model's card; None where it has none that can be read."""
    scheme, location = split_name(name)
    repo_id, revision = _hub_id(name, model)
    # What people wrote at its top may be anything.
    with contextlib.suppress(OSError, HTTPError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        if repo_id:
            card: ModelCard = ModelCard.load(hf_hub_download(repo_id, "README.md", revision=revision or None))
            return card
        local = scheme == "local-dir"
        folder = Path(location).expanduser() if local else Path(model.pretrained_cfg.get("file") or "").parent
        return ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    return None

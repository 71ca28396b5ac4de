"""Pictures of a model and of its training, with matplotlib."""

import csv
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .convmixer import ConvMixer
from .errors import one_line
from .files import atomic_path
from .images import ImageError, data_config, image_loader
from .inference.loading import evaluating

try:
    from matplotlib.figure import Figure
except ImportError as error:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("matplotlib"):
        raise RuntimeError("pictures need matplotlib: pip install matplotlib") from error
    raise RuntimeError(f"pictures need matplotlib, which can't be imported: {one_line(error)}") from error

__all__ = ["draw", "draw_curve", "draw_depthwise_kernels", "draw_heat_map", "draw_patch_filters"]


def draw(
    model: Any,
    names: list[str],
    folder: Path,
    layers: list[int] | None = None,
    images: Iterable[Path] = (),
    on_error: Callable[[ImageError], None] | None = None,
) -> Iterator[str]:
    """Draws a model's filters and kernels, and a heat map for each image, as PNG files in a folder.

    Args:
        model: A ConvMixer.
        names: Of its classes.
        folder: Made where it isn't there.
        layers: As for `draw_depthwise_kernels`.
        images: Image files. A heat map has its image's name; of images with the same name in different folders, the
            folder's too.
        on_error: Called with the error of each image that can't be read, which is then left out; without it the error
            is raised.

    Yields:
        A line for each file written.

    Raises:
        ImageError: See `on_error`.
        ValueError: If `model` is no ConvMixer or has no such layer.
    """
    if not isinstance(model, ConvMixer):
        raise ValueError(f"a {type(model).__name__} is no ConvMixer, whose filters and kernels these are")
    layers = _chosen(model, layers)
    draw_patch_filters(model, folder / "patch_filters.png")
    yield str(folder / "patch_filters.png")
    draw_depthwise_kernels(model, folder / "depthwise_kernels.png", layers)
    yield str(folder / "depthwise_kernels.png")
    load = image_loader(model)
    images = list(images)
    for path, name in zip(images, _distinct_names(images), strict=True):
        target = folder / f"heat_map_{name}.png"
        try:
            image = load(path)
        except ImageError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        yield f"{target}  {draw_heat_map(model, image, names, target)}"


def _distinct_names(paths: list[Path]) -> list[str]:
    """The files' names without endings, with as much before them as tells them apart."""
    stems = Counter(path.stem for path in paths)
    names: list[str] = []
    for path in paths:
        name = base = path.stem if stems[path.stem] == 1 else f"{path.absolute().parent.name}_{path.stem}"
        number = 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names


def draw_curve(summary: Path, target: Path) -> None:
    """Draws a run's loss and validation accuracy by epoch.

    Args:
        summary: ``summary.csv`` of timm's ``train.py``.
        target: PNG to write.

    Raises:
        ValueError: If the file has no finished epoch.
    """
    with summary.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "epoch" not in rows[0]:
        raise ValueError(f"{summary} has no finished epoch")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    loss = figure.subplots()
    for column, label, style in (("train_loss", "loss, training", "-"), ("eval_loss", "loss, validation", "--")):
        if values := _column(rows, column):
            loss.plot(*zip(*values, strict=True), style, color="tab:blue", label=label)
    loss.set(xlabel="epoch", ylabel="loss")
    if top1 := _column(rows, "eval_top1"):
        accuracy = loss.twinx()
        label = f"top-1, validation (last {top1[-1][1]:.2f} %)"
        accuracy.plot(*zip(*top1, strict=True), color="tab:orange", label=label)
        accuracy.set_ylabel("top-1 in %")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    _save(figure, target)


def _column(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    """A column's values by epoch, counted from 1; not every epoch need have one."""
    return [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row.get(name)]


def draw_patch_filters(model: Any, target: Path) -> None:
    """Draws the patch embedding's filters as images, as the paper's figures do.

    Each of the stem's dim filters [in_chans, p, p] becomes one tile, scaled to its own range about grey; other numbers
    of channels than three are averaged. They are sorted by `_order`.
    """
    filters = model.stem[0].weight.detach().float().cpu()
    if filters.shape[1] != 3:
        filters = filters.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    tiles = 0.5 + 0.5 * _scaled(filters[_order(filters)])
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(_grid(tiles, fill=1.0).permute(1, 2, 0).numpy(), interpolation="nearest")
    size = "x".join(map(str, filters.shape[-2:]))
    axes.set_title(f"patch embedding: {len(filters)} filters of {size}", fontsize="medium")
    axes.axis("off")
    _save(figure, target)


def _chosen(model: Any, layers: list[int] | None) -> list[int]:
    """Indices into its blocks; by default the first, the middle and the last."""
    depth = len(model.blocks)
    layers = layers or sorted({0, depth // 2, depth - 1})
    if wrong := [layer for layer in layers if not 0 <= layer < depth]:
        raise ValueError(f"no layer {', '.join(map(str, wrong))}: this model's are 0 to {depth - 1}")
    return layers


def draw_depthwise_kernels(model: Any, target: Path, layers: list[int] | None = None) -> None:
    """Draws the depthwise kernels of some layers, one tile a channel, blue below zero and red above.

    Args:
        model: A ConvMixer.
        target: PNG to write.
        layers: Indices into its blocks; by default the first, the middle and the last.

    Raises:
        ValueError: If there is no such layer.
    """
    layers, depth = _chosen(model, layers), len(model.blocks)
    figure = Figure(figsize=(5 * len(layers), 5.4), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        kernels = model.blocks[layer][0].fn[0].weight.detach().float().cpu()  # [dim, 1, k, k]
        grid = _grid(_scaled(kernels[_order(kernels)]), fill=float("nan"))[0]
        axes.imshow(grid.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"layer {layer} of {depth}, sorted", fontsize="medium")
        axes.axis("off")
    _save(figure, target)


def draw_heat_map(model: Any, image: torch.Tensor, names: list[str], target: Path) -> str:
    """Draws where an image speaks for its most probable class (Grad-CAM, arXiv 1610.02391, on the last layer).

    Args:
        model: With a classifier; it is run in evaluation mode and left in the mode that it was in.
        image: As the model takes it, [in_chans, H, W].
        names: Of the classes.
        target: PNG to write: the image as the model sees it, and the map over it.

    Returns:
        The class that it is for, with its probability.
    """
    with evaluating(model), torch.enable_grad():
        features = model.forward_features(image[None])
        logits = model.forward_head(features)[0]
        if logits.shape != (len(names),):
            raise ValueError(f"no classifier: the model gives {list(logits.shape)} an image, for {len(names)} classes")
        label = int(logits.argmax())
        (gradient,) = torch.autograd.grad(logits[label], features)
    weights = gradient.mean((2, 3), keepdim=True)
    heat = (weights * features.detach()).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat, image.shape[-2:], mode="bilinear")[0, 0]
    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    shown = (image * std + mean).clamp(0, 1)
    if len(shown) != 3:
        shown = shown.mean(0, keepdim=True).expand(3, -1, -1)
    said = f"{names[label]} {logits.softmax(-1)[label]:.3f}"
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    for axes, title in zip(figure.subplots(1, 2), ("image", said), strict=True):
        axes.imshow(shown.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize="medium", parse_math=False)  # a class may be called US$
        axes.axis("off")
    axes.imshow(heat.numpy(), cmap="inferno", alpha=0.6)
    _save(figure, target)
    return said


def _scaled(tiles: torch.Tensor) -> torch.Tensor:
    """Each tile of [N, C, H, W] divided by its own largest absolute value."""
    return tiles / tiles.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)


def _order(tiles: torch.Tensor) -> torch.Tensor:
    """An order of [N, …] in which neighbours look alike: by the angle in their first two principal components."""
    flat = F.normalize(tiles.flatten(1), dim=1)
    u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    first, second = (u * s)[:, 0], (u * s)[:, min(1, len(s) - 1)]
    return torch.atan2(second, first).argsort()


def _grid(tiles: torch.Tensor, fill: float) -> torch.Tensor:
    """[N, C, H, W] as one picture [C, …] with a pixel of `fill` between tiles, nearly square."""
    n, channels, height, width = tiles.shape
    columns = max(1, round((n * height / width) ** 0.5))
    rows = -(-n // columns)
    padded = torch.full((rows * columns, channels, height + 1, width + 1), fill)
    padded[:n, :, :height, :width] = tiles
    grid = padded.view(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * (height + 1), columns * (width + 1))[:, :-1, :-1]


def _save(figure: Figure, target: Path) -> None:
    with atomic_path(target) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # in a class's name, which shows as an empty box
        figure.savefig(temporary, dpi=120)

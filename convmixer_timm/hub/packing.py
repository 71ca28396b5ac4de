"""A trained model, packed into a folder as timm and the Hugging Face Hub read it.

The folder holds ``model.safetensors`` and ``config.json``, which timm's ``local-dir:`` and ``hf-hub:`` load, and the
card, ``README.md``; of a run of ``train.py`` also ``args.yaml`` with every setting (itself a ``train.py --config``),
``summary.csv`` with the history, and that as a curve.
"""

import csv
import functools
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import timm
import torch.nn as nn
import yaml
from timm.data import create_dataset, resolve_data_config

from ..checkpoints import check_sizes, checkpoint_filter_fn, read_checkpoint
from ..convmixer import CIFAR10_LABELS, ConvMixer
from ..files import as_text, atomic_path
from ..images import known_extensions
from ..inference.loading import check_labels, load_folder
from .cards import Evaluation, Training, adopt_card, make_card, rename_in_card

__all__ = ["pack", "pack_checkpoint", "pack_run"]

# What a packed folder may hold. Nothing else of a source is taken along, pickles least of all.
FILES = ("README.md", "args.yaml", "config.json", "model.safetensors", "summary.csv")
PICTURES = ".png"

_PATHS = ("data", "data_dir", "output", "config", "initial_checkpoint", "pretrained_path", "class_map")


P = ParamSpec("P")
T = TypeVar("T")


def _saying_damage(packing: Callable[P, T]) -> Callable[P, T]:
    """Lets what a damaged source breaks in reading it be the source's error: a ValueError."""

    @functools.wraps(packing)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return packing(*args, **kwargs)
        except (OSError, ValueError, RuntimeError):
            raise
        except Exception as error:  # of YAML, of values that are missing or of another type
            raise ValueError(f"{args[0]} is damaged: {type(error).__name__}: {error}") from error

    return checked


@_saying_damage
def pack(
    source: Path,
    target: Path,
    load_name: str,
    architecture: str | None = None,
    labels: list[str] | None = None,
) -> nn.Module:
    """Packs whatever holds a trained model.

    Args:
        source: A packed folder, the output folder of a run of ``train.py``, or a checkpoint file.
        target: Folder to make; its name is the card's title.
        load_name: What `timm.create_model` will load it by, for the card.
        architecture: Registered name, for a checkpoint file that has no run around it.
        labels: Names of the classes; without them those that the source has.

    Returns:
        The source's model, to compare with the folder's.

    Raises:
        FileNotFoundError: If there is no such source, or something is missing in it.
        ValueError: If it is none of the three, or doesn't fit `architecture` or `labels`.
    """
    if not source.exists():
        raise FileNotFoundError(f"no such folder or file: {source}")
    if (source / "config.json").is_file():
        return _pack_folder(source, target, load_name, labels)
    if (source / "args.yaml").is_file():
        return pack_run(source, target, load_name=load_name, labels=labels)
    if source.is_dir():
        raise ValueError(f"{source} has neither config.json, as a packed model, nor args.yaml, as a train.py run")
    if architecture is None and (source.parent / "args.yaml").is_file():
        return pack_run(source.parent, target, load_name=load_name, labels=labels, checkpoint=source.name)
    if architecture is None:
        raise ValueError(f"{source} doesn't tell its architecture: name it with --model")
    return pack_checkpoint(source, target, load_name, architecture, labels)


def _pack_folder(source: Path, target: Path, load_name: str, labels: list[str] | None) -> nn.Module:
    if labels:
        raise ValueError(f"{source} is packed already: its class names are in its config.json")
    model = load_folder(source)
    if not isinstance(model, ConvMixer):
        raise ValueError(f"{source} holds a {type(model).__name__}, which is no ConvMixer")
    with atomic_path(target) as folder:
        folder.mkdir()
        for path in sorted(source.iterdir()):
            if path.name in FILES or path.suffix == PICTURES:
                shutil.copy(path, folder)
            else:
                print(f"left out: {path.name}", file=sys.stderr)
        card = folder / "README.md"
        text = make_card(model, target.name, load_name)
        if card.exists():
            text = adopt_card(rename_in_card(card.read_text(encoding="utf-8"), source.resolve().name, load_name), text)
        card.write_text(text, encoding="utf-8")
    return model


def pack_checkpoint(
    file: Path, target: Path, load_name: str, architecture: str, labels: list[str] | None = None
) -> nn.Module:
    """Packs a checkpoint file of any layout that `convmixer_timm.checkpoints` reads. See `pack`."""
    if not timm.is_model(architecture.split(".")[0]) or not architecture.startswith("convmixer"):
        known = ", ".join(timm.list_models("convmixer*"))
        raise ValueError(f"no ConvMixer variant {architecture!r}; there are {known}")
    variant: Any = timm.create_model(architecture)
    state_dict = checkpoint_filter_fn(read_checkpoint(file), variant)
    model: Any = timm.create_model(
        architecture, num_classes=len(state_dict["head.bias"]), in_chans=state_dict["stem.0.weight"].shape[1]
    )
    model.load_state_dict(state_dict)
    if labels is None and model.num_classes == variant.num_classes:
        labels = model.pretrained_cfg.get("label_names")
    with atomic_path(target) as folder:
        folder.mkdir()
        _save(model, folder, labels, {})
        card = make_card(model, target.name, load_name, pictures=draw_pictures(model, folder))
        (folder / "README.md").write_text(as_text(card), encoding="utf-8")
    return model


def _portable(args: dict) -> dict:
    """A run's arguments without the folders of the machine that it ran on, and as for a run from the start."""
    return {k: as_text(Path(v).name) if k in _PATHS and v else v for k, v in args.items()} | {"resume": ""}


def pack_run(
    run: Path,
    target: Path,
    *,
    load_name: str | None = None,
    labels: list[str] | None = None,
    checkpoint: str | None = None,
    ema: bool | None = None,
    evaluation: Evaluation | None = None,
    train_data: str | None = None,
    cost: str = "",
    again: str | None = None,
) -> nn.Module:
    """Packs a run of timm's ``train.py``.

    Args:
        run: The run's output folder.
        target: Folder to make, whose name is the card's title; one that exists is replaced as a whole.
        load_name: What `timm.create_model` will load it by, for the card; the title by default.
        labels: Names of the classes; by default those of the data folder, where that is still there.
        checkpoint: Which of the run's files; by default ``model_best.pth.tar``, else ``last.pth.tar``.
        ema: Take the averaged weights; by default where there are any, which are those that ``train.py`` measured.
        evaluation: For the card; by default what the run measured on its validation images.
        train_data: For the card; by default the data folder's name.
        cost: Hours and machine, for the card.
        again: How to repeat the run, for the card, where ``args.yaml`` alone doesn't.

    Raises:
        FileNotFoundError: If the run has no such checkpoint, no ``args.yaml`` or no ``summary.csv``.
        ValueError: If the labels don't fit, or there are no averaged weights to take.
    """
    if checkpoint is None:
        checkpoint = "model_best.pth.tar" if (run / "model_best.pth.tar").is_file() else "last.pth.tar"
    for name in (checkpoint, "args.yaml", "summary.csv"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} is no train.py run that finished an epoch: it has no {name}")
    args = yaml.safe_load((run / "args.yaml").read_text(encoding="utf-8"))
    stored: dict[str, Any] = read_checkpoint(run / checkpoint)
    averaged = stored.get("state_dict_ema") if ema in (True, None) else None
    if ema and averaged is None:
        raise ValueError(f"{run} has no averaged weights")
    model_args = {**args["model_kwargs"], **({"global_pool": args["gp"]} if args["gp"] else {})}
    sizes = {"num_classes": args["num_classes"], "in_chans": args["in_chans"], **args["model_kwargs"]}
    check_sizes(sizes, averaged or stored["state_dict"], run / "args.yaml")
    model: Any = timm.create_model(
        args["model"].split(".")[0], num_classes=args["num_classes"], in_chans=args["in_chans"], **model_args
    )
    model.load_state_dict(checkpoint_filter_fn(averaged or stored["state_dict"], model))
    model.pretrained_cfg.update(resolve_data_config(args, model=model))  # as the run's validation saw the images
    if labels is None:
        labels = _class_names(args)

    with (run / "summary.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    dataset = args["dataset"].split("/")[-1] or Path(args["data_dir"] or args["data"] or "images").name
    weights = f"those of epoch {stored['epoch'] + 1} of {len(rows)}" + ", averaged (EMA)" * bool(averaged)
    measured = f"{dataset}, {args['val_split']}"
    if checkpoint.startswith("model_best"):
        weights += ", the best on the validation images"
        measured += " (which chose the epoch)"
    if evaluation is None:
        row = next((row for row in rows if int(row["epoch"]) == stored["epoch"]), {})
        if row.get("eval_top1"):
            evaluation = Evaluation(float(row["eval_top1"]), float(row["eval_top5"]), measured)
    with atomic_path(target) as folder:
        folder.mkdir()
        _save(model, folder, labels, model_args)
        (folder / "args.yaml").write_text(yaml.safe_dump(_portable(args)), encoding="utf-8")
        shutil.copy(run / "summary.csv", folder)
        training = Training(
            args=args,
            epochs=len(rows),
            weights=weights,
            data=train_data or dataset,
            dataset="cifar10" if labels == list(CIFAR10_LABELS) else dataset,
            cost=cost,
            start=args["model"] if args["pretrained"] else Path(args["initial_checkpoint"] or "").name,
            **({"again": again} if again else {}),
        )
        card = make_card(
            model, target.name, load_name or target.name, training, evaluation, draw_pictures(model, folder)
        )
        (folder / "README.md").write_text(as_text(card), encoding="utf-8")
    return model


def _class_names(args: dict) -> list[str] | None:
    """The classes of a run in the order that it learned them, from its data where that can be read here."""
    if args["dataset"].removeprefix("torch/").removeprefix("hfds/") == "cifar10":
        return list(CIFAR10_LABELS)
    root = args["data_dir"] or args["data"]
    known_extensions()
    try:
        data = create_dataset(args["dataset"], root=root, split=args["train_split"], class_map=args["class_map"])
        index: dict[str, int] = data.reader.class_to_idx
    except Exception:  # every reader of timm has its own
        print(f"no class names: the training data, {root}, can't be read here; --labels gives them", file=sys.stderr)
        return None
    return [as_text(name) for name in sorted(index, key=index.__getitem__)]


def _save(model: Any, folder: Path, labels: list[str] | None, model_args: dict) -> None:
    """Weights and configuration, by timm; `model_args` are what `model` differs in from its variant."""
    if labels is not None:
        check_labels(labels, model.num_classes)
    # The variant's tag and class names say nothing of what this model learned.
    architecture, _, tag = folder.name.partition(".")
    model.pretrained_cfg["tag"] = tag if architecture == model.pretrained_cfg["architecture"] else ""
    model.pretrained_cfg.pop("label_names", None)
    # Newer timm remembers arguments by itself, and takes only what JSON can hold.
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"label_names": list(labels)} if labels else None,
        model_args=model_args or None,
        safe_serialization=True,
    )


def draw_pictures(model: nn.Module, folder: Path) -> dict[str, str]:
    """Draws what a card shows; gives file names and what they show."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures in the card: pip install 'convmixer-timm[plot]' draws them", file=sys.stderr)
        return {}
    from ..plots import draw_curve, draw_depthwise_kernels, draw_patch_filters

    pictures = {}
    if (folder / "summary.csv").exists():
        draw_curve(folder / "summary.csv", folder / "curve.png")
        pictures["curve.png"] = "Loss and accuracy by epoch"
    draw_patch_filters(model, folder / "patch_filters.png")
    draw_depthwise_kernels(model, folder / "depthwise_kernels.png")
    return {
        **pictures,
        "patch_filters.png": "Filters of the patch embedding",
        "depthwise_kernels.png": "Depthwise kernels of the first, the middle and the last layer",
    }

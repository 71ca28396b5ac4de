"""What holds a trained model, read: a packed folder, the output folder of a run of ``train.py``, a checkpoint file."""

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import yaml

from ..checkpoints import read_checkpoint, to_timm_layout
from ..convmixer import ConvMixer
from ..files import as_text
from ..images import data_config
from ..inference.labels import check_labels
from ..inference.loading import load_folder, split_name
from ..training.history import as_csv, figure, read_history
from ..training.record import Record, is_run
from ..training.trained import make_model, read_trained, saying_damage
from .cards import Evaluation, Training

__all__ = ["Source", "read_checkpoint_file", "read_run", "read_source"]

# What a packed folder may hold. Nothing else of a source is taken along, pickles least of all.
FILES = ("README.md", "args.yaml", "config.json", "model.safetensors", "summary.csv")
PICTURES = ".png"

_PATHS = (
    "data", "data_dir", "train_split", "val_split", "output", "experiment", "config", "initial_checkpoint",
    "pretrained_path", "class_map",
)  # fmt: skip
_READERS = ("hfds", "hfids", "tfds", "torch", "wds")
# Where the Hub keeps torchvision's data sets.
_ON_HUB = {
    "torch/cifar10": "uoft-cs/cifar10",
    "torch/cifar100": "uoft-cs/cifar100",
    "torch/fashion_mnist": "zalando-datasets/fashion_mnist",
    "torch/imagenet": "ILSVRC/imagenet-1k",
    "torch/mnist": "ylecun/mnist",
}


@dataclass(frozen=True)
class Source:
    """A trained model and what is known of it.

    Attributes:
        model: With its weights.
        labels: Names of its classes; None where nobody tells.
        model_args: What it differs in from its variant.
        training: The run that it is from, if any.
        evaluation: Its accuracy, if it was measured.
        files: Files to take along, by name.
        card: Its own card, if it has one.
        left_out: Files of its folder that are not taken along.
    """

    model: Any
    labels: list[str] | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    training: Training | None = None
    evaluation: Evaluation | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    card: str = ""
    left_out: tuple[str, ...] = ()


@saying_damage
def read_source(path: Path, architecture: str | None = None, labels: list[str] | None = None) -> Source:
    """Reads whatever holds a trained model.

    Args:
        path: A packed folder, the output folder of a run of ``train.py``, or a checkpoint file.
        architecture: Registered name, for a checkpoint file that has no run around it; of others it has to be theirs.
        labels: Names of the classes; without them those that the source has.

    Raises:
        FileNotFoundError: If there is no such source, or something is missing in it.
        ValueError: If it is none of the three, or doesn't fit `architecture` or `labels`.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such folder or file: {path}")
    if architecture:
        _check_variant(architecture)
    if path.name == "model.safetensors" and (path.parent / "config.json").is_file():
        path = path.parent
    if (path / "config.json").is_file():
        source = _read_folder(path, labels)
    elif is_run(path):
        source = read_run(path, labels=labels)
    elif path.is_dir():
        raise ValueError(f"{path} has neither config.json, as a packed model, nor args.yaml, as a train.py run")
    elif is_run(path.parent):
        source = read_run(path.parent, checkpoint=path.name, labels=labels)
    elif architecture is None:
        raise ValueError(f"{path} doesn't tell its architecture: name it with --model")
    else:
        return read_checkpoint_file(path, architecture, labels)
    found = source.model.pretrained_cfg["architecture"]
    if architecture and architecture.partition(".")[0] != found:
        raise ValueError(f"{path} is a {found}, and --model says {architecture}: leave that out")
    return source


def _read_folder(folder: Path, labels: list[str] | None) -> Source:
    if labels:
        raise ValueError(f"{folder} is packed already: its class names are in its config.json")
    model = load_folder(folder)
    if not isinstance(model, ConvMixer):
        raise ValueError(f"{folder} holds a {type(model).__name__}, which is no ConvMixer")
    files = {path.name: path for path in sorted(folder.iterdir())}
    taken = {name: path for name, path in files.items() if name in FILES or path.suffix == PICTURES}
    card = taken.pop("README.md", None)
    try:
        text = card.read_text(encoding="utf-8-sig") if card else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{card} is no text in UTF-8, mend it first") from error
    return Source(
        model,
        files={name: path.read_bytes() for name, path in taken.items()},
        card=text,
        left_out=tuple(sorted(files.keys() - taken.keys() - {"README.md"})),
    )


def _check_variant(architecture: str) -> None:
    if not timm.is_model(architecture.split(".")[0]) or not architecture.startswith("convmixer"):
        known = ", ".join(timm.list_models("convmixer*"))
        raise ValueError(f"no ConvMixer variant {architecture!r}; there are {known}")


def read_checkpoint_file(file: Path, architecture: str, labels: list[str] | None = None) -> Source:
    """Reads a checkpoint file of any layout that `convmixer_timm.checkpoints` reads. See `read_source`."""
    _check_variant(architecture)
    state_dict, _ = to_timm_layout(read_checkpoint(file))
    model = make_model(file, architecture, {}, state_dict)
    config = data_config(model)
    model.pretrained_cfg.update({key: config[key] for key in ("input_size", "mean", "std")})
    return Source(model, _fitting(labels, model))


@saying_damage
def read_run(
    run: Path,
    *,
    labels: list[str] | None = None,
    checkpoint: str | None = None,
    ema: bool | None = None,
) -> Source:
    """Reads a run of timm's ``train.py``: its record where the launcher wrote one, else its arguments.

    Args:
        run: The run's output folder.
        labels: Names of the classes; by default those of the record.
        checkpoint: Which of the run's files; by default ``model_best.pth.tar``, else ``last.pth.tar``.
        ema: Take the averaged weights; by default where there are any, which are those that ``train.py`` measured.

    Raises:
        FileNotFoundError: If the run has no such checkpoint, no ``args.yaml`` or no ``summary.csv``.
        ValueError: If one of them can't be understood, the labels don't fit, or there are no averaged weights to take.
    """
    if not (run / "summary.csv").is_file():
        raise FileNotFoundError(f"{run} is no train.py run that finished an epoch: it has no summary.csv")
    trained = read_trained(run, checkpoint, ema)
    model, args, epoch, checkpoint = trained.model, trained.args, trained.epoch, trained.checkpoint
    record, newest = trained.record, trained.newest
    rows = read_history(run / "summary.csv")
    if not rows:
        raise ValueError(f"{run / 'summary.csv'} has no finished epoch: a line whose column 'epoch' is a whole number")
    own = next((row for row in rows if int(row["epoch"]) == epoch), None)
    row = own if own and trained.measured else {}
    epochs = 1 + max(int(rows[-1]["epoch"]), epoch or 0)
    if epoch is None:
        weights = f"those of {checkpoint}, which tells no epoch"
    else:
        weights = f"those of epoch {epoch + 1} of {epochs}" + ", averaged (EMA)" * trained.averaged
    chosen = checkpoint.startswith("model_best")
    alike = [other for other in rows if not (newest and record) or newest.at(int(other["epoch"])).alike(record)]
    try:
        for other in rows:  # all of which the curve shows
            for name in other:
                if str(name).startswith(("train_", "eval_")):
                    figure(other, name)
        best = chosen and _is_best(row, alike, args)
        top1, top5 = figure(row, "eval_top1"), figure(row, "eval_top5")
    except ValueError as error:
        raise ValueError(f"{run / 'summary.csv'}: {error}") from error
    training = Training(
        args=args,
        epochs=epochs,
        weights=weights + ", the best on the validation images" * best,
        data=_data(record, args, "train"),
        dataset=_hub_data_set(record.data.name if record else args["dataset"]),
        start=_start(args),
        teacher=_without_folders(args.get("kd_model_name") or ""),
        base_model=_hub_model(args),
        resumed=_resumed(record),
        processes=record.processes if record else 1,
    )
    evaluation = None
    if top1 is not None:
        evaluation = Evaluation(
            top1=top1,
            top5=top5 if model.num_classes > 5 else None,
            data=_data(record, args, "validation") + " (which chose the epoch)" * chosen,
        )
    labels = _fitting(trained.labels if labels is None else labels, model)
    if epoch is not None and own is None:
        missing = f"{run / 'summary.csv'} has no whole line of epoch {epoch}, that of {checkpoint}"
        print(f"{missing}: the card tells no accuracy", file=sys.stderr)
    return Source(
        model,
        labels,
        trained.described.args,
        training,
        evaluation,
        files={
            "args.yaml": yaml.safe_dump(_portable(args), allow_unicode=True).encode(),
            "summary.csv": as_csv(rows).encode(),
        },
    )


def _fitting(labels: list[str] | None, model: Any) -> list[str] | None:
    if labels is not None:
        check_labels(labels, model.num_classes)
    return labels


def _start(args: dict[str, Any]) -> str:
    """What weights a run began with, without the folders of the machine; nothing for random ones."""
    # Which train.py loads in the place of the model's own, the second one with --pretrained only.
    for name in ("initial_checkpoint", *["pretrained_path"] * bool(args["pretrained"])):
        if args.get(name):
            return Path(args[name]).name
    if args.get("resume") and args.get("start_epoch") == 0:
        return "/".join(Path(args["resume"]).parts[-2:])
    if args["pretrained"] and (file := _overlay(args).get("file")):
        return Path(file).name
    return _without_folders(args["model"]) if args["pretrained"] else ""


def _overlay(args: dict[str, Any]) -> dict[str, Any]:
    """What --model-kwargs say of the weights to start from."""
    told = (args.get("model_kwargs") or {}).get("pretrained_cfg_overlay")
    return told if isinstance(told, dict) else {}


def _without_folders(model: str) -> str:
    scheme, location = split_name(model)
    return f"local-dir:{as_text(Path(location).resolve().name)}" if scheme == "local-dir" else model


def _is_best(row: dict[str, str], rows: list[dict[str, str]], args: dict[str, Any]) -> bool:
    """Whether an epoch's row has the best figure of all."""
    metric = f"eval_{args.get('eval_metric') or 'top1'}"
    own, figures = figure(row, metric), [value for other in rows if (value := figure(other, metric)) is not None]
    best = min if metric == "eval_loss" else max
    return own is not None and bool(figures) and own == best(figures)


def _portable(args: dict[str, Any]) -> dict[str, Any]:
    """A run's arguments without the folders of the machine that it ran on, and as for a run from the start."""
    short = {k: as_text(Path(str(v)).name) if k in _PATHS and v else v for k, v in args.items()}
    if file := _overlay(args).get("file"):
        overlay = {**_overlay(args), "file": Path(file).name}
        short["model_kwargs"] = {**args["model_kwargs"], "pretrained_cfg_overlay": overlay}
    short |= {k: _without_folders(args[k]) for k in ("model", "kd_model_name") if args.get(k)}
    return short | {"resume": ""}


def _data(record: Record | None, args: dict[str, Any], split: str) -> str:
    """What was trained or measured on, in words."""
    name = record.data.name if record else args["dataset"]
    reader, _, rest = name.partition("/")
    name = (rest if reader in _READERS else name) or Path(args["data_dir"] or args["data"] or "").name or "images"
    # Of these torchvision gives the test images for whatever is not called training.
    part = Path(args["val_split"]).name
    if reader == "torch" and name.lower().endswith(("cifar10", "cifar100", "mnist")) and "train" not in part:
        part = "test"
    told = f"{name}, {part}" if split == "validation" else name
    images = record.data.splits[split].images if record and split in record.data.splits else None
    return told if images is None else f"{told}, {images:,} images"


def _hub_data_set(name: str) -> str:
    """A data set as the Hub names it; empty for one that isn't there."""
    reader, _, rest = name.partition("/")
    if reader in ("hfds", "hfids"):
        return rest if re.fullmatch(r"\w[\w.-]*/[\w.-]+", rest) else ""
    return _ON_HUB.get(name.lower(), "")


def _hub_model(args: dict[str, Any]) -> str:
    """The model that a run began with as the Hub names it; empty for one that isn't there."""
    if not args["pretrained"] or args.get("initial_checkpoint") or args.get("pretrained_path"):
        return ""
    if {"file", "url", "state_dict"} & _overlay(args).keys():
        return ""
    scheme, location = split_name(args["model"])
    if scheme:
        return location.partition("@")[0] if scheme == "hf-hub" else ""
    cfg = timm.get_pretrained_cfg(args["model"])
    return str(cfg.hf_hub_id) if cfg and cfg.hf_hub_id and not cfg.file else ""


def _resumed(record: Record | None) -> str:
    """What a run did in its first epochs, where its arguments don't tell."""
    if record is None or not record.first_epoch:
        return ""
    told = "of which nothing is known"
    if record.before:
        mine, theirs = (replace(r, args=_portable(r.args)) for r in (record, record.before))
        told = "; ".join(mine.differences(theirs, places=False))
    return f"Up to epoch {record.first_epoch} it was another run ({told}), so that `args.yaml` doesn't repeat it."

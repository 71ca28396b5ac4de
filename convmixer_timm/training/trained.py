"""A trained model, by its name or from the output folder of a run of ``train.py``."""

import functools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import timm
import torch
import torch.nn as nn
import yaml

from ..checkpoints import (
    Shape,
    StateDict,
    check_sizes,
    checkpoint_filter_fn,
    not_finite,
    read_checkpoint,
    to_timm_layout,
)
from ..convmixer import CIFAR10_LABELS
from ..errors import one_line
from ..inference import loading
from .record import FILE, Model, Record, describe_model, is_run

__all__ = ["Trained", "load_model", "make_model", "read_trained", "saying_damage"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """A run's model, and what is known of it.

    Attributes:
        model: With its weights.
        described: What rebuilds it.
        labels: Names of its classes; None where nobody tells.
        args: The arguments of ``train.py``.
        checkpoint: The file that the weights are from.
        epoch: Its epoch, counted from 0; None where it tells none.
        averaged: Whether the weights are the averaged ones.
        measured: Whether they are those that ``train.py`` measured.
        record: What the launcher wrote, as it held at that epoch; None without.
        newest: The same, as it holds now.
    """

    model: Any
    described: Model
    labels: list[str] | None
    args: dict[str, Any]
    checkpoint: str
    epoch: int | None
    averaged: bool
    measured: bool
    record: Record | None
    newest: Record | None


def saying_damage(read: Callable[P, T]) -> Callable[P, T]:
    """Lets what a damaged source, the first argument, breaks in reading it be the source's error: a ValueError."""

    @functools.wraps(read)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (OSError, ValueError, RuntimeError):
            raise
        except Exception as error:  # of YAML and CSV, of values that are missing or of another type
            raise ValueError(f"{args[0]} is damaged: {type(error).__name__}: {error}") from error

    return checked


def load_model(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """A trained model, ready to predict.

    Args:
        name: A registered model with weights ('convmixer_…'), ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``: a packed
            model's folder, or the output folder of a run of ``train.py``, whose best epoch it takes, as `publish` does.
        device: Where to run it.

    Raises:
        ValueError: If the name is unknown or has no weights, its weights don't fit its description, or the device
            can't be used here.
        OSError: If the weights can't be downloaded.
    """
    scheme, location = loading.split_name(name) if isinstance(name, str) else ("", "")
    folder = Path(location).expanduser()
    if scheme != "local-dir" or (folder / "config.json").is_file() or not is_run(folder):
        return loading.load_pretrained(name, device)
    device = loading.usable_device(device)
    trained = read_trained(folder)
    if trained.labels:
        trained.model.pretrained_cfg["label_names"] = trained.labels
    model: nn.Module = trained.model.eval().to(device)
    return model


@saying_damage
def read_trained(run: Path, checkpoint: str | None = None, ema: bool | None = None) -> Trained:
    """Reads the model of a run of timm's ``train.py``: by its record where the launcher wrote one, else its arguments.

    Args:
        run: The run's output folder.
        checkpoint: Which of the run's files; by default ``model_best.pth.tar``, else ``last.pth.tar``.
        ema: Take the averaged weights; by default where there are any, which are those that ``train.py`` measured.

    Raises:
        FileNotFoundError: If the run has no such checkpoint, or neither record nor ``args.yaml``.
        ValueError: If one of them can't be understood, or there are no averaged weights to take.
    """
    if checkpoint is None:
        checkpoint = "model_best.pth.tar" if (run / "model_best.pth.tar").is_file() else "last.pth.tar"
    newest = record = Record.read(run)
    for name in (checkpoint, *([] if record else ["args.yaml"])):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} is no train.py run that finished an epoch: it has no {name}")
    stored: dict[str, Any] = read_checkpoint(run / checkpoint)
    epoch = stored["epoch"] if isinstance(stored.get("epoch"), int) else None
    if record:
        record = record.at(record.first_epoch if epoch is None else epoch)
    args = record.args if record else _arguments(run / "args.yaml")
    if (mode := args.get("input_img_mode")) not in (None, "", "RGB", "L", "RGBA"):
        raise ValueError(f"{run} was trained on images in {mode}, and who loads a published model reads RGB")
    holds_average = isinstance(stored.get("state_dict_ema"), dict)
    if ema and not holds_average:
        raise ValueError(f"{run} has no averaged weights")
    # Those that it averages on another device train.py doesn't measure.
    measures_average = holds_average and not args.get("model_ema_force_cpu")
    averaged = measures_average if ema is None else ema
    # Other scripts' output, avg_checkpoints' say, is the weights alone.
    weights: Any = stored["state_dict_ema"] if averaged else stored.get("state_dict", stored)
    state_dict, _ = to_timm_layout(weights)
    sizes, where = (record.model.args, FILE) if record else (args["model_kwargs"], "args.yaml")
    check_sizes(sizes, state_dict, run / where)  # before a model is made by them
    described = record.model if record else _described(run / "args.yaml", args)
    model = make_model(run / checkpoint, described.architecture, described.args, state_dict)
    model.pretrained_cfg.update(described.preprocessing)
    loading.check_preprocessing(model, str(run))
    return Trained(
        model=model,
        described=described,
        labels=record.data.classes if record else _classes_of_data_set(args["dataset"]),
        args=args,
        checkpoint=checkpoint,
        epoch=epoch,
        averaged=averaged,
        measured=averaged == measures_average,
        record=record,
        newest=newest,
    )


def make_model(file: Path, name: str, args: dict[str, Any], state_dict: StateDict) -> Any:
    """A model of that name with the weights of `file`: its classes and channels are theirs.

    Raises:
        ValueError: If they are no classifier's, diverged, or are of another model.
    """
    # What --split-bn has beside, for strongly augmented images, nothing uses after the training.
    state_dict = {key: value for key, value in state_dict.items() if ".aux_bn." not in key}
    shape = Shape.of(state_dict)
    if "head.weight" not in state_dict or "head.bias" not in state_dict:
        raise ValueError(
            f"{file} has no classifier (head.weight and head.bias): it is a backbone, and classifies nothing"
        )
    if odd := not_finite(state_dict):
        raise ValueError(f"{file} has values that are no finite numbers in {odd[0]}: its training diverged")
    try:
        model = timm.create_model(name.split(".")[0], num_classes=shape.num_classes, in_chans=shape.in_chans, **args)
        model.load_state_dict(checkpoint_filter_fn(state_dict, model))
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{file} doesn't fit {name}: {one_line(error)}") from error
    return model


def _arguments(file: Path) -> dict[str, Any]:
    """Arguments of a run without a record."""
    try:
        args = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(args, dict) or not isinstance(args.get("model"), str):
        raise ValueError(f"{file} has no arguments of train.py: it names no model")
    defaults: dict[str, Any] = dict.fromkeys(
        ("data", "data_dir", "num_classes", "in_chans", "gp", "pretrained", "seed")
    )
    defaults |= {"dataset": "", "initial_checkpoint": "", "val_split": "validation", "train_split": "train"}
    return defaults | args | {"dataset": args.get("dataset") or "", "model_kwargs": args.get("model_kwargs") or {}}


def _described(file: Path, args: dict[str, Any]) -> Model:
    try:
        return describe_model(Namespace(**args))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _classes_of_data_set(name: str) -> list[str] | None:
    """The classes of a data set whose very name tells them."""
    return list(CIFAR10_LABELS) if name in ("torch/cifar10", "hfds/cifar10", "hfds/uoft-cs/cifar10") else None

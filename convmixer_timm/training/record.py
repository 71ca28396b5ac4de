"""What a run is: written down beside timm's ``args.yaml`` when it starts.

Everything later (going on, validating, publishing) takes names, sizes and settings from here, never from what lies on
the disk by then.
"""

import contextlib
import functools
import json
import os
from argparse import Namespace
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_model_config_from_hf

from ..convmixer import ConvMixer
from ..errors import DISK, NETWORK, HubError, RunError, alike, hub_reason, one_line, os_reason
from ..files import atomic_path
from ..images import fit_channels
from ..inference.loading import split_name
from .data_check import Data, Split

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Model",
    "Record",
    "describe_model",
    "is_run",
    "reserve",
    "stored_config",
    "stored_names",
    "write_when_it_starts",
]

FILE = "run.json"

# What changes where, how fast or how loudly a run goes, and not what it learns. Where its data lie is told by `Data`.
_INCIDENTAL = set(
    """checkpoint_hist data data_dir dataset_download device device_modules experiment fuser grad_checkpointing
    local_rank log_interval log_wandb no_prefetcher no_resume_opt output pin_mem recovery_interval resume save_images
    start_epoch synchronize_step torchcompile torchcompile_mode use_multi_epochs_loader validation_batch_size
    wandb_project wandb_resume_id wandb_tags workers""".split()
)


# Arguments of `timm.create_model` that tell what weights to load, and not what the model is.
_LOADING = {"cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}


@dataclass(frozen=True)
class Model:
    """What rebuilds a run's model, and how it sees images.

    Attributes:
        architecture: Registered name, without a tag.
        args: What it differs in from its variant.
        preprocessing: ``input_size``, ``mean``, ``std``, ``crop_pct``, …, as the validation used them.
        num_classes: Classes of its classifier.
    """

    architecture: str
    args: dict[str, Any]
    preprocessing: dict[str, Any]
    num_classes: int


@dataclass(frozen=True)
class Record:
    """A run, from its first epoch under these settings on.

    Attributes:
        recipe: The recipe's name or file; empty where ``train.py`` was called without.
        args: All arguments of ``train.py``.
        model: The model.
        data: The data.
        processes: How many train together.
        first_epoch: Counted from 0; more where a run was gone on with, on purpose, with other settings.
        before: Those other settings.
    """

    recipe: str
    args: dict[str, Any]
    model: Model
    data: Data
    processes: int = 1
    first_epoch: int = 0
    before: "Record | None" = field(default=None)

    @classmethod
    def of(cls, args: Namespace, data: Data, recipe: str = "", processes: int = 1) -> "Record":
        """The record of a run that is about to start.

        Raises:
            ValueError: If its model can't be made.
        """
        return cls(recipe, dict(vars(args)), describe_model(args), data, processes)

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """The record of a run's output folder; None where it has none.

        Raises:
            ValueError: If it can't be understood.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            return cls._from(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(
                f"{file} is no record of a run that this version understands ({reason}): move it away to go on without"
            ) from error

    @classmethod
    def _from(cls, told: dict[str, Any]) -> "Record":
        data = told["data"]
        splits = {name: Split(**split) for name, split in data["splits"].items()}
        for name in ("input_size", "mean", "std", "crop_pct", "interpolation"):
            told["model"]["preprocessing"][name]  # raises where it lacks
        told["model"]["preprocessing"] = fit_channels(told["model"]["preprocessing"])
        return cls(
            **{
                **told,
                "model": Model(**told["model"]),
                "data": Data(**{**data, "splits": splits}),
                "before": cls._from(told["before"]) if told["before"] else None,
            }
        )

    def write(self, folder: Path) -> None:
        """Writes it into a run's output folder, whole or not at all."""
        with atomic_path(folder / FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n", encoding="utf-8")

    def at(self, epoch: int) -> "Record":
        """The record that held when an epoch, counted from 0, was trained."""
        record = self
        while epoch < record.first_epoch and record.before:
            record = record.before
        return record

    def going_on_from(self, before: "Record | None", epoch: int) -> "Record":
        """The same, gone on with on purpose with `epoch`, from a run of other settings or of unknown ones."""
        if before:
            before = before.at(epoch)  # what came later is trained anew
            if not self.differences(before):
                return before
        return replace(self, first_epoch=epoch, before=before.at(epoch - 1) if before else None)

    @property
    def validates_average(self) -> bool:
        """Whether ``train.py`` measures the averaged weights (EMA), and not those that it trains."""
        return bool(self.args.get("model_ema")) and not self.args.get("model_ema_force_cpu")

    def alike(self, other: "Record") -> bool:
        """Whether both were validated on the same images by the same metric, so that their figures can be compared."""
        told = []
        for record in (self, other):
            validation = record.data.splits.get("validation")
            metric = record.args.get("eval_metric")
            preprocessing = json.dumps(record.model.preprocessing, default=str)
            told.append((validation and validation.digest, record.data.classes, metric, preprocessing))
        return told[0] == told[1]

    def alike_since(self) -> int:
        """The epoch since which the run was validated alike."""
        record = self
        while record.before and record.alike(record.before):
            record = record.before
        return record.first_epoch

    def other_arguments(self, other: "Record") -> dict[str, tuple[Any, Any]]:
        """What another run was given otherwise: by name, the value there and the one here."""
        # JSON knows neither tuples nor the types that YAML makes.
        mine, theirs = (json.loads(json.dumps(record.args, default=str)) for record in (self, other))
        names = sorted(mine.keys() | theirs.keys())
        return {n: (theirs.get(n), mine.get(n)) for n in names if theirs.get(n) != mine.get(n)}

    def differences(self, other: "Record", places: bool = True) -> list[str]:
        """What another run did otherwise, each as 'NAME is OTHER'S there and OWN here'.

        Args:
            other: The other run's record.
            places: Say where on this machine the data are.
        """
        out = []
        digests = [{name: s.digest for name, s in record.data.splits.items()} for record in (self, other)]
        if digests[0] != digests[1] or self.data.classes != other.data.classes:
            there, here = (str(record.data) if places else record.data.described() for record in (other, self))
            if there == here:
                out.append(f"its data ({here}) has files of other names, sizes or contents there")
            else:
                out.append(f"its data is ({there}) there and ({here}) here")
        for name, (there, here) in self.other_arguments(other).items():
            if name not in _INCIDENTAL:
                out.append(f"{name} is {there!r} there and {here!r} here")
        if self.processes != other.processes:
            out.append(f"it has {other.processes} processes there and {self.processes} here")
        if out and self.recipe != other.recipe:
            out.append(f"its recipe is {other.recipe or 'none'} there and {self.recipe or 'none'} here")
        return out


def describe_model(args: Namespace) -> Model:
    """The model that ``train.py`` makes of its arguments, without its weights.

    Raises:
        ValueError: If there is no such model or it doesn't take the arguments, or images are smaller than its patches.
        HubError: If its description is on the Hub and can't be had.
    """
    given = vars(args)
    input_size = given.get("input_size")
    kwargs = given.get("model_kwargs") or {}
    norm = {name: given[name] for name in ("bn_momentum", "bn_eps") if given.get(name) is not None}
    rates = {f"{name}_rate": given[name] for name in ("drop", "drop_path", "drop_block") if given.get(name) is not None}
    pooling = {"global_pool": given["gp"]} if given.get("gp") else {}
    try:
        stored = _stored_args(args.model)
        with torch.device("meta"):
            model: Any = timm.create_model(
                args.model,
                num_classes=given.get("num_classes"),
                in_chans=given.get("in_chans") or (input_size[0] if input_size else None),
                **{**rates, **pooling, **norm, **kwargs},
            )
    except NETWORK as error:
        if args.model.startswith("local-dir:"):
            raise ValueError(f"--model {args.model} can't be read: {one_line(error)}") from error
        raise HubError(f"{args.model}: {hub_reason(error)}: try again later, or check the name") from error
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        known = [] if ":" in args.model or timm.is_model(args.model) else timm.list_models()
        raise ValueError(f"--model {args.model} can't be made: {one_line(error)}{alike(args.model, known)}") from error
    try:
        preprocessing = fit_channels(resolve_data_config(given, model=model))
    except AssertionError as error:
        numbers = f"{given.get('mean')} and {given.get('std')}"
        raise ValueError(f"--mean and --std take a number, or one for each channel: got {numbers}") from error
    if isinstance(model, ConvMixer):
        stem: Any = model.stem
        patch = stem[0].kernel_size[0]
        side = min(*preprocessing["input_size"][1:], *(given.get("train_img_sizes") or ()))
        if side < patch:
            raise ValueError(f"images of {side} pixels are smaller than a patch of {args.model}, {patch}")
    return Model(
        architecture=model.pretrained_cfg["architecture"],
        args={**stored, **pooling, **norm, **{k: v for k, v in kwargs.items() if k not in _LOADING}},
        preprocessing=preprocessing,
        num_classes=model.num_classes,
    )


def is_run(folder: Path) -> bool:
    """Whether ``train.py`` wrote into a folder."""
    return any((folder / name).is_file() for name in (FILE, "args.yaml"))


def stored_config(name: str) -> dict[str, Any]:
    """The pretrained configuration of a registered model, one of the Hub or a packed folder, with its arguments.

    Raises:
        OSError: If it can't be had.
        ValueError: If it is no such configuration.
    """
    scheme, location = split_name(name)
    if not scheme:
        cfg = timm.get_pretrained_cfg(name)
        return cfg.to_dict() if cfg else {}
    if scheme == "local-dir":
        file = Path(location) / "config.json"
        if not file.is_file() and is_run(file.parent):
            raise ValueError(
                f"{location} is the output of a training: give its variant as --model, and one of its checkpoints by "
                "--checkpoint to measure it, or by --pretrained --pretrained-path to train on from it"
            )
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            return {**config, **config.get("pretrained_cfg", {})}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} describes no model: {one_line(error)}") from error
    cfg, _, args = load_model_config_from_hf(location)
    return {**cfg, "model_args": args}


def stored_names(name: str) -> list[str] | None:
    """What a pretrained model calls its classes; None where it doesn't tell, or can't be reached."""
    try:
        names: Any = stored_config(name).get("label_names")
    except NETWORK:
        return None  # which the script will meet itself
    told = list(map(str, names)) if isinstance(names, list | tuple) else []
    return None if told == [str(i) for i in range(len(told))] else told


def _stored_args(name: str) -> dict[str, Any]:
    """What a model of the Hub or of a packed folder differs in from its variant."""
    args = (stored_config(name) if ":" in name else {}).get("model_args") or {}
    return {key: value for key, value in args.items() if key not in ("num_classes", "in_chans")}


_reserved: list[int] = []


def reserve(folder: Path) -> None:
    """Keeps other processes from training into a run's folder as long as this one lives.

    Raises:
        ValueError: If another process does.
    """
    if fcntl is None or _reserved:
        return
    with contextlib.suppress(OSError):  # a file system without locks
        number = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(number)
            raise ValueError(
                f"another process is training into {folder}: wait for it, or give another --experiment"
            ) from error
        _reserved.append(number)  # open, and so locked, until the process ends
        # Workers that outlive it for a moment would keep the lock.
        os.register_at_fork(after_in_child=functools.partial(os.close, number))


def write_when_it_starts(record: Record) -> None:
    """Lets ``train.py`` write the record into its output folder in the moment in which it makes that.

    It raises `RunError` there if the folder can't be written to, or another process trains into it.
    """
    from timm import utils

    original: Any = utils.get_outdir

    @functools.wraps(original)
    def get_outdir(*args, **kwargs):
        try:
            folder = Path(original(*args, **kwargs))
            reserve(folder)
            record.write(folder)
        except OSError as error:
            todo = "free some space, and go on" if error.errno in DISK else "give another --output"
            raise RunError(f"{error.filename or 'the output folder'}: {os_reason(error)}: {todo}") from error
        except ValueError as error:
            raise RunError(one_line(error)) from error
        return str(folder)

    utils.get_outdir = get_outdir

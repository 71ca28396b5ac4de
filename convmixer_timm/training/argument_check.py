"""What a script of timm's takes as it comes and stumbles over late, or passes over: values, model and weights."""

import importlib.util
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils.distributed import world_info_from_env

from ..checkpoints import Shape, checkpoint_filter_fn, read_checkpoint
from ..errors import alike, nearest, one_line
from .data_check import Data, compare_names
from .record import Model, Record, describe_model, stored_names

__all__ = [
    "check_evaluated_model",
    "check_named",
    "check_results",
    "check_training_arguments",
    "check_values",
    "passed_over",
    "scheduled_epochs",
]

_FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CHOICES = {
    "eval_metric": ("loss", "top1", "top5"),
    "amp_dtype": ("float16", "bfloat16"),
    "interpolation": _FILTERS,
    "train_interpolation": ("random", *_FILTERS),
    "remode": ("pixel", "rand", "const"),
    "mixup_mode": ("batch", "pair", "elem", "half"),
    "clip_mode": ("norm", "value", "agc"),
    "model_dtype": ("float32", "float16", "bfloat16"),
    "worker_seeding": ("all", "part"),
}
_LEAST = {
    **dict.fromkeys(("epochs", "log_interval", "val_interval", "checkpoint_hist", "grad_accum_steps", "img_size"), 1),
    **dict.fromkeys(("batch_size", "validation_batch_size", "train_batches_per_epoch", "recount"), 1),
    **dict.fromkeys(("seed", "workers", "mixup", "cutmix", "weight_decay", "warmup_epochs", "cooldown_epochs"), 0),
    **dict.fromkeys(("start_epoch", "min_lr", "warmup_lr", "layer_decay", "color_jitter", "aug_splits"), 0),
    "num_bench_iter": 5,  # benchmark.py logs at each fifth of them
}
_SHARES = (
    "smoothing", "mixup_prob", "mixup_switch_prob", "hflip", "vflip", "reprob", "drop", "drop_path", "drop_block",
    "model_ema_decay", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob",
)  # fmt: skip
_PAIRS = ("scale", "ratio", "cutmix_minmax")
_ABOVE_0 = (
    "std", "ratio", "lr", "lr_base", "lr_base_size", "decay_epochs", "clip_grad", "kd_temperature",
)  # fmt: skip
# Arguments of a model that the script itself gives it, by its own options.
_OWN_OPTIONS = {
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    "drop_block_rate": "drop_block",
    "global_pool": "gp",
    "checkpoint_path": "initial_checkpoint",
    **{name: name for name in ("num_classes", "in_chans", "bn_momentum", "bn_eps", "pretrained")},
}
_RESULTS = ("csv", "json", "json-split", "parquet")
# What each counts only beside.
_BESIDE = {
    **dict.fromkeys(("amp_dtype", "amp_impl"), "amp"),
    **dict.fromkeys(("model_ema_decay", "model_ema_warmup", "model_ema_force_cpu"), "model_ema"),
    **dict.fromkeys(("kd_temperature", "kd_distill_type", "distill_loss_weight", "task_loss_weight"), "kd_model_name"),
    **dict.fromkeys(("bce_sum", "bce_target_thresh", "bce_pos_weight"), "bce_loss"),
    **dict.fromkeys(("train_batch_sizes", "train_size_probs"), "train_img_sizes"),
    "clip_mode": "clip_grad",
}


def _schedule(options: Namespace) -> tuple[Any, int]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.lr or options.lr_base)
    return create_scheduler_v2(optimizer, **scheduler_kwargs(options), updates_per_epoch=1)


def scheduled_epochs(options: Namespace) -> int:
    """How many epochs ``train.py`` makes of its arguments, cycles, warmup and cooldown included."""
    return _schedule(options)[1]


def _scheduler(options: Namespace) -> None:
    if _schedule(options)[0] is None:
        raise ValueError("train.py needs one: --sched step --decay-rate 1 leaves the learning rate as it is")


def _optimizer(options: Namespace) -> None:
    told = {**optimizer_kwargs(options), "lr": options.lr or options.lr_base, "layer_decay": None}
    create_optimizer_v2(torch.nn.Linear(2, 2), **{**told, **(options.opt_kwargs or {})})


def _mode(options: Namespace) -> None:
    Image.new("RGB", (1, 1)).convert(options.input_img_mode)


def _transform(options: Namespace) -> None:
    create_transform(32, is_training=True, auto_augment=options.aa, re_prob=options.reprob, re_mode=options.remode)


def _device(options: Namespace) -> None:
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that this PyTorch can use: give --device cpu")


# For those that are mistyped.
_KNOWN: dict[str, Callable[[], list[Any]]] = {
    "opt": timm.optim.list_optimizers,
    "sched": lambda: ["cosine", "tanh", "step", "multistep", "plateau", "poly"],
    "aa": lambda: ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original", "originalr", "v0", "v0r", "3a"],
}


# What is made of several arguments, in the order in which they are looked at; by timm's own functions.
_MADE: dict[str, Callable[[Namespace], Any]] = {
    "device": _device,
    "input_img_mode": _mode,
    "opt": _optimizer,
    "sched": _scheduler,
    "aa": _transform,
}


def check_values(options: Namespace, made: Iterable[str] = tuple(_MADE)) -> None:
    """Raises ValueError for what a script's parser lets pass, `made` of what is made of several arguments."""
    given = {name: value for name, value in vars(options).items() if value is not None}

    def refuse(name: str, wanted: str) -> None:
        raise ValueError(f"--{name.replace('_', '-')} {wanted}, got {given[name]}")

    for name, value in given.items():
        number = isinstance(value, int | float)
        several = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(v, float) and not math.isfinite(v) for v in several):
            refuse(name, "is finite")
        if name in _CHOICES and value not in ("", *_CHOICES[name]):
            refuse(name, f"is one of {', '.join(_CHOICES[name])}")
        if name in _LEAST and number and value < _LEAST[name]:
            refuse(name, f"is {_LEAST[name]} or more")
        if name in _SHARES and number and not 0 <= value <= 1:
            refuse(name, "is a share, from 0 to 1")
        if name == "crop_pct" and not 0 < value <= 1:
            refuse(name, "is the share of the side that is looked at, above 0 and up to 1")
        if name in _PAIRS and (len(value) != 2 or value[0] > value[1]):
            refuse(name, "takes two numbers, the least and the greatest")
        if name in _ABOVE_0 and min(several) <= 0:
            refuse(name, "is above 0")
        if name == "scale" and not (value[0] >= 0 and 0 < value[1] <= 1):
            refuse(name, "is shares of the image's area, above 0 and up to 1")
        # Each process adds its number, and NumPy takes 32 bits.
        if name == "seed" and value > (most := 2**32 - world_info_from_env()[2]):
            refuse(name, f"is {most} or less")
        if name == "input_size" and min(value) < 1:
            refuse(name, "is channels, height and width, each 1 or more")
        if name == "aug_splits" and value == 1:
            refuse(name, "is 2 or more")
        if name == "tta" and value > 1:
            refuse(name, "averages images that lie side by side, as timm makes no copies of one: leave it out")
        if name == "aug_repeats" and value and world_info_from_env()[2] < 2:
            refuse(name, "needs several processes, torchrun's")
        if name == "model_dtype" and value not in ("", "float32") and given.get("amp"):
            refuse(name, "is float32 beside --amp")
    for name in given.get("model_kwargs") or ():
        if (own := _OWN_OPTIONS.get(name, "")) in vars(options):
            raise ValueError(f"--model-kwargs {name}: give --{own.replace('_', '-')} instead")
    if given.get("sync_bn") and given.get("device") == "cpu" and world_info_from_env()[2] > 1:
        raise ValueError("--sync-bn needs GPUs: leave it out, as --dist-bn averages the norms' statistics by itself")
    if _mixes(options) and options.batch_size % 2:
        refuse("batch_size", "is even where images are mixed")
    _check_splits(options)
    for name in made:
        if name not in given or not given[name]:
            continue
        try:
            _MADE[name](options)
        except (ValueError, AssertionError, RuntimeError, TypeError, KeyError, NotImplementedError) as error:
            reason = one_line(error).rstrip(".") or "timm can't read it"
            known = _KNOWN[name]() if name in _KNOWN else []
            hint = "" if given[name] in known else alike(str(given[name]), known)
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: {reason}{hint}") from error


def _mixes(options: Namespace) -> bool:
    """Whether images of a batch are mixed."""
    return any(getattr(options, name, None) for name in ("mixup", "cutmix", "cutmix_minmax"))


def _check_splits(options: Namespace) -> None:
    """Raises ValueError for what ``train.py`` asserts of ``--aug-splits`` and what goes with it."""
    given = vars(options)
    if given.get("aug_splits"):
        if _mixes(options):
            raise ValueError("--aug-splits doesn't go with --mixup and --cutmix: leave out one or the others")
    elif given.get("jsd_loss"):
        raise ValueError("--jsd-loss compares what --aug-splits makes of an image: give --aug-splits 3")
    elif given.get("split_bn") and not given.get("resplit"):
        raise ValueError("--split-bn has a norm for each of --aug-splits: give --aug-splits 2, or more")


def check_named(path: Path, options: Namespace, recipe: str = "") -> None:
    """Raises ValueError where a script takes a model and nobody names one: it would take a ResNet, say."""
    given = vars(options)
    if given.get("model", "") is not None or given.get("model_list"):
        return
    if recipe:
        raise ValueError(f"{recipe} names no model: add a line, model: NAME")
    raise ValueError(f"no --model is given, and {path.name} would take one of its own: give --model NAME")


def check_results(options: Namespace) -> None:
    """Raises ValueError for results that a script could not write, which it would find out after all its work."""
    given = vars(options)
    formats = given.get("results_format")
    if isinstance(formats, list):  # inference.py's
        if unknown := [name for name in formats if name not in _RESULTS]:
            raise ValueError(f"--results-format is one of {', '.join(_RESULTS)}, got {unknown[0]}")
        if {"json", "json-split"} <= set(formats):
            raise ValueError("--results-format json and json-split would go to the same file: give one of them")
        if "parquet" in formats and not any(map(importlib.util.find_spec, ("pyarrow", "fastparquet"))):
            raise ValueError("--results-format parquet needs the package pyarrow: pip install pyarrow")
    if "safetensors" in given and options.output != "./averaged.pth":  # a default, which its script renames
        suffix = Path(options.output).suffix
        if suffix and (suffix == ".safetensors") != options.safetensors:
            todo = "give it a name in .safetensors" if options.safetensors else "add --safetensors"
            raise ValueError(f"--output {options.output} would not be what its name says: {todo}")
    file, folder = given.get("results_file"), given.get("results_dir")
    if not (file or folder or isinstance(formats, list)):
        return
    parent = Path(folder or "", file or "results").parent
    if parent != Path(folder or "") and not parent.is_dir():  # of its own the script makes --results-dir only
        raise ValueError(f"--results-file {file}: there is no folder {parent}")
    _check_folder(parent, "--results-file" if file and not folder else "--results-dir")


def passed_over(options: Namespace, defaults: Namespace) -> list[str]:
    """Lines on arguments that ``train.py`` passes over, as what they belong to isn't given, or that can't be meant."""
    given, out = vars(options), []
    if given.get("amp") and given.get("device") == "cpu" and given.get("amp_dtype") == "float16":
        out.append("--amp trains in float16, which is slower on a CPU than bfloat16: give --amp-dtype bfloat16")
    for name, other in _BESIDE.items():
        if getattr(options, name, None) != getattr(defaults, name, None) and not getattr(options, other, None):
            out.append(f"--{name} is passed over without --{other}".replace("_", "-"))
    if given.get("bce_loss") and not given.get("smoothing") and not _mixes(options):
        out.append("--bce-loss is passed over where nothing is smoothed or mixed: give --smoothing 1e-9 to have it")
    source = str(given.get("dataset") or "").partition("/")[0].lower()
    if source not in ("tfds", "wds", "hfids"):
        if given.get("epoch_repeats"):
            out.append("--epoch-repeats is passed over but for streams (tfds/, wds/, hfids/): give more --epochs")
        for name in ("train_num_samples", "val_num_samples"):
            if given.get(name) is not None:
                out.append(f"--{name} is passed over but for streams (tfds/, wds/, hfids/)".replace("_", "-"))
    if (size := given.get("img_size")) and given.get("input_size") and options.input_size[1:] != [size, size]:
        counts = " ".join(map(str, options.input_size))
        out.append(f"--img-size {size} is passed over beside --input-size {counts}")
    warmup = 0 if given.get("warmup_prefix") else given.get("warmup_epochs") or 0
    if warmup and warmup >= options.epochs:
        out.append(
            f"--warmup-epochs {warmup} of {options.epochs}: the learning rate still climbs when the training ends"
        )
    return out


def check_training_arguments(options: Namespace, record: Record) -> str:
    """Looks at a training's arguments beside its model and its data.

    Returns:
        What could not be compared, to be said; or nothing.

    Raises:
        HubError: If a teacher's description is on the Hub and can't be had.
        OSError: If there are no such weights to start from.
        ValueError: If images don't fit the model, no run's folder can be made, or the weights to start from or a
            teacher's don't fit.
    """
    _check_channels(options, record)
    _check_folder(Path(options.output or "output/train"), "--output")
    _check_weights(options, record.model)
    return _check_teacher(options, record.data) if getattr(options, "kd_model_name", None) else ""


def _check_channels(options: Namespace, record: Record) -> None:
    told = record.model.preprocessing
    channels = told["input_size"][0]
    wanted = options.in_chans or channels
    if channels != wanted:
        height, width = told["input_size"][1:]
        told_how = f"--input-size {wanted} {height} {width}"
        raise ValueError(f"the model takes {wanted} channels and its images have {channels}: give {told_how}")
    if mode := getattr(options, "input_img_mode", None):
        has = len(Image.new(mode, (1, 1)).getbands())
        if has != wanted:
            raise ValueError(f"--input-img-mode {mode} has {has} channels and the model takes {wanted}")
    if getattr(options, "aa", None) and wanted not in (1, 3):
        raise ValueError(f"--aa {options.aa} is for images of 1 or 3 channels, and the model takes {wanted}")


def _check_folder(folder: Path, option: str) -> None:
    """Raises ValueError unless files can be written to a folder, which may have to be made."""
    there = nearest(folder.resolve())
    if not there.is_dir():
        raise ValueError(f"{there} is a file: give another {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} can't be written to: give another {option}")


def _check_weights(options: Namespace, model: Model) -> None:
    """Raises OSError or ValueError unless the weights that a script's arguments name can be had and fit its model."""
    given = vars(options)
    if path := given.get("pretrained_path"):
        if not options.pretrained:
            raise ValueError(f"--pretrained-path {path} is passed over without --pretrained: add that")
        _check_file("--pretrained-path", Path(path), model, adapted=True)
    elif given.get("pretrained"):
        _check_pretrained("--model", options.model, given.get("model_kwargs") or {})
        cfg = None if ":" in options.model else timm.get_pretrained_cfg(options.model)
        if cfg and cfg.file:  # on this machine
            _check_file(f"--pretrained {options.model},", Path(cfg.file), model, adapted=True)
    for name in ("initial_checkpoint", "checkpoint"):
        path = Path(given.get(name) or "")
        if given.get(name) and not (name == "checkpoint" and path.is_dir()):  # of validate.py, with many
            _check_file(f"--{name.replace('_', '-')}", path, model, adapted=False)


def _check_pretrained(option: str, name: str, model_kwargs: dict[str, Any]) -> None:
    """Raises ValueError for a registered name without weights."""
    cfg = None if ":" in name else timm.get_pretrained_cfg(name)
    if cfg is None or cfg.has_weights or model_kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}:
        return
    known = ", ".join(timm.list_pretrained(f"{name.split('.')[0].split('_')[0]}*"))
    raise ValueError(f"{option} {name} has no pretrained weights. With weights there are: {known or 'none'}.")


def _check_file(option: str, path: Path, model: Model, adapted: bool) -> None:
    """Raises OSError or ValueError unless a file has a model's weights.

    Args:
        option: Which names it.
        path: The file.
        model: The model.
        adapted: Whether timm brings it into its own layout, and gives it the model's classes and channels.
    """
    if path.suffix.lower() in (".npz", ".npy"):  # which some architectures read by themselves
        return
    content = read_checkpoint(path)
    if not model.architecture.startswith("convmixer"):
        return
    with torch.device("meta"):
        made: Any = timm.create_model(
            model.architecture,
            num_classes=model.num_classes,
            in_chans=model.preprocessing["input_size"][0],
            **model.args,
        )
    try:
        found = asdict(Shape.of(checkpoint_filter_fn(content, made)))
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}") from error
    if adapted:
        return
    if any(".aux_bn." in key for key in content.get("state_dict") or content):
        raise ValueError(
            f"{option} {path} has the second norms of --split-bn, which are taken out by "
            f"convmixer-timm run clean_checkpoint --checkpoint {path} --output NEW --clean-aux-bn"
        )
    if "stem.0.weight" not in load_state_dict(str(path), weights_only=True):
        raise ValueError(
            f"{option} {path} isn't in timm's layout: write it anew by convmixer-timm convert {path} NEW.safetensors"
        )
    wanted = asdict(Shape.of(made.state_dict()))
    if other := [name for name in wanted if wanted[name] != found[name]]:
        there, here = (", ".join(f"{name} {sizes[name]}" for name in other) for sizes in (found, wanted))
        hint = ": --pretrained --pretrained-path FILE adapts it" if option == "--initial-checkpoint" else ""
        raise ValueError(f"{option} {path} has {there} and the model {here}{hint}")


def _check_teacher(options: Namespace, data: Data) -> str:
    """Raises ValueError for a teacher without weights, or of other classes: timm would give it a head at random.

    Returns a note on names that can't be compared, or nothing.
    """
    option, name = "--kd-model-name", options.kd_model_name
    try:
        teacher = describe_model(Namespace(model=name))
    except ValueError as error:
        raise ValueError(str(error).replace("--model", option, 1)) from error
    _check_pretrained(option, name, {})
    if getattr(options, "kd_distill_type", "logit") == "feature":  # which its head is no part of
        return ""
    classes = options.num_classes or data.num_classes
    if teacher.num_classes != classes:
        raise ValueError(f"{option} {name} knows {teacher.num_classes} classes, and the data have {classes}")
    return compare_names("the data", data.classes, name, stored_names(name), "it would teach wrong names")


def check_evaluated_model(options: Namespace) -> None:
    """Raises HubError, OSError or ValueError unless a script's model and weights can be had and fit each other.

    Names that ``validate.py`` and others take for many models (a pattern, ``all``, a file of names) are left to them.
    """
    name = getattr(options, "model", None)
    if name and (":" in name or timm.is_model(name) or not _many(name)):
        _check_weights(options, describe_model(options))


def _many(name: str) -> bool:
    return name == "all" or bool(timm.list_models(name)) or os.path.isfile(name)

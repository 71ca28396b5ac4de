"""The recipes, and what the process that trains or validates is set to before timm's script runs."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.distributed import world_info_from_env

from ..checkpoints import read_checkpoint
from .argument_check import (
    check_evaluated_model,
    check_named,
    check_results,
    check_training_arguments,
    check_values,
    passed_over,
    scheduled_epochs,
)
from .compat import agree_on, keep_best
from .data_check import check_evaluation_data, check_root, check_training_data, left_out, names_repeat
from .record import FILE, Record, reserve, stored_names, write_when_it_starts
from .scripts import (
    TRAINERS,
    check_config,
    find_script,
    import_modules,
    read_config,
    run_script,
    script_flags,
    script_options,
)

__all__ = [
    "launch",
    "prepare_evaluation",
    "prepare_training",
    "recipes",
    "told_by_record",
    "train_arguments",
]

RECIPES = Path(__file__).with_name("recipes")
LAST = "last.pth.tar"
# What a resumed optimizer brings along, whatever the arguments say.
_OF_THE_OPTIMIZER = (
    "lr", "lr_base", "lr_base_size", "lr_base_scale", "momentum", "opt", "opt_betas", "opt_eps", "weight_decay",
    "layer_decay",
)  # fmt: skip
# Arguments of a model, by their names' beginnings, that don't change what it computes once it is trained.
_OF_TRAINING = ("drop", "pretrained_cfg")


def _given(args: list[str], name: str) -> str | None:
    """The value of option `name` among a script's arguments, which argparse lets users shorten; the last one counts."""
    found = None
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if len(option) > 2 and name.startswith(option):
            if equals:
                found = value
            elif i + 1 < len(args):
                found = args[i + 1]
    return found


def _config(args: list[str]) -> str:
    """The ``--config`` file among a script's arguments, as ``train.py`` finds it."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("-c", "--config", default="")
    return str(parser.parse_known_args(args)[0].config)


def _on_cpu(args: list[str]) -> bool:
    device = _given(args, "--device")
    if device:
        return device == "cpu"
    return not torch.cuda.is_available()


def recipes() -> dict[str, str]:
    """The recipes that ship with the package: name and first comment line."""
    return {p.stem: p.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for p in sorted(RECIPES.glob("*.yaml"))}


def _recipe_file(recipe: str) -> Path:
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe)
    if not path.is_file():
        raise ValueError(f"no recipe {recipe!r}; there are {', '.join(recipes())}, or give a YAML file.")
    return path


def train_arguments(recipe: str, args: list[str]) -> list[str]:
    """Arguments of ``train.py`` for a recipe: its file, then the user's own, which win.

    Added where neither the user nor a recipe of the user's own gives them: the device, if it is a CPU, and a folder
    ``output/train/RECIPE``, so that the same command finds an interrupted run.

    Raises:
        ValueError: If there is no such recipe, or it is no YAML mapping.
    """
    path = _recipe_file(recipe)
    if _config(args):
        raise ValueError(
            "a recipe is a --config already: write what differs into a YAML of your own, and name that as the recipe"
        )
    told = {str(name).replace("-", "_"): value for name, value in read_config(path).items()}

    def given(name: str) -> Any:
        value = _given(args, f"--{name}")
        return told.get(name) if value is None else value

    out = ["--config", str(path)]
    if given("device") is None and _on_cpu(args):
        out += ["--device", "cpu"]
    if not given("output"):
        out += ["--output", "output/train"]
    if not given("experiment"):
        seed = given("seed")
        out += ["--experiment", path.stem + (f"-seed{seed}" if seed is not None else "")]
    size, sizes = _given(args, "--img-size") or "", told.get("input_size")
    if size.isdecimal() and sizes and isinstance(sizes, list) and not _given(args, "--input-size"):
        # Of the two train.py takes this one, which would be the recipe's.
        args = [*args, "--input-size", str(sizes[0]), size, size]
    return [*out, *args]


def launch(
    script: str, args: list[str], folder: str | None = None, recipe: str | None = None
) -> Callable[[], None] | None:
    """Makes ready to run one of timm's scripts in this process.

    What would train or measure on other data than the user thinks is refused; see `prepare_training` and
    `prepare_evaluation`.

    Args:
        script: Its name.
        args: Its arguments.
        folder: A clone of timm's repository, as for `scripts.find_script`.
        recipe: For ``train``, the recipe that the arguments come after.

    Returns:
        What runs the script; what that raises is the script's own. None where there is nothing left to do.

    Raises:
        OSError: If there is no such script.
        ValueError: If its data or arguments can't be right; the message is one line.
    """
    if recipe is not None:
        args = train_arguments(recipe, args)
    path = find_script(script, folder)
    if path.stem in TRAINERS:
        if config := _config(args):
            # Another version of timm may have written it, as the args.yaml of a run.
            for note in check_config(path, Path(config), complete=recipe is not None):
                _say(note)
        prepared = prepare_training(path, args, recipe or "")
    elif path.stem == "bulk_runner":
        prepared = _through_launcher(path, args, folder)
    elif path.stem == "avg_checkpoints":
        prepared = _of_each_epoch(path, args)
    else:
        prepared = prepare_evaluation(path, args)
    mode = _inference_mode(path, prepared) if path.stem == "inference" and prepared else None
    return None if prepared is None else lambda: run_script(path, prepared, mode)


def _inference_mode(path: Path, args: list[str]) -> str:
    """Pillow's mode of the images of ``inference.py``, which doesn't tell timm's reader how many channels it wants.

    Raises:
        ValueError: If there is none of so many.
    """
    options = vars(script_options(path, args) or Namespace())
    channels = options.get("in_chans") or (options.get("input_size") or [3])[0]
    if channels not in (1, 3):
        raise ValueError(f"{path.name} reads images of 1 or 3 channels, and the model takes {channels}")
    return "L" if channels == 1 else "RGB"


def _through_launcher(path: Path, args: list[str], folder: str | None) -> list[str]:
    """Arguments of ``bulk_runner.py``, which starts a process for each model: timm's script there by this command."""
    options = script_options(path, args)
    if options is None or options.module or options.no_python:
        return args
    script, own = Path(options.script), args[: len(args) - len(options.script_args) - 1]
    folder = folder or (str(script.parent) if script.is_file() else None)
    where = ["--timm-scripts", folder] if folder else []
    module = ["--module=yes", "convmixer_timm"]  # which that script's parser wants a value for
    return [*own, *module, "run", *where, script.stem, *options.script_args]


def _of_each_epoch(path: Path, args: list[str]) -> list[str]:
    """Arguments of ``avg_checkpoints.py``: of a run's folder the epochs, not their copies, which would count again."""
    options = script_options(path, args)
    if options is None:
        return args
    check_results(options)
    epochs = "checkpoint-*.pth.tar"
    if _given(args, "--filter") is None and any(Path(options.input).glob(epochs)):
        _say(
            f"Averaging {epochs} alone, as {LAST}, model_best.pth.tar and others may be copies: --filter takes them too"
        )
        args = [*args, "--filter", epochs]
    return args


def prepare_training(path: Path, args: list[str], recipe: str = "") -> list[str] | None:
    """Checks a training's data, finds the run that it goes on with, and has its record written when it starts.

    Args:
        path: ``train.py``; of one without the usual parser nothing is checked.
        args: Its arguments.
        recipe: The recipe that they are from.

    Returns:
        The arguments with what the data told, and with what resumes an interrupted run; None for a run that is done.

    Raises:
        ValueError: If the data can't be trained on, or the output folder holds another run.
    """
    options = script_options(path, args)
    if options is None:
        return args
    check_values(options)
    for note in passed_over(options, script_options(path, []) or options):
        _say(note)
    processes = world_info_from_env()[2]
    data = check_training_data(options, processes)
    if data.val_split != options.val_split:
        _say(f"{data.name} has no {options.val_split}: validating on {data.val_split}")
        args = [*args, "--val-split", data.val_split]
    if options.num_classes is None and data.num_classes is not None:
        args = [*args, "--num-classes", str(data.num_classes)]
    check_named(path, options, recipe)
    options = script_options(path, args)
    assert options is not None
    record = Record.of(options, data, recipe, processes)
    if note := check_training_arguments(options, record):
        _say(note)
    told = record.model.preprocessing
    if told["input_size"][0] != 3 and not (options.mean or options.std):
        # timm fills what an augmentation leaves empty by the mean, and takes an RGB one for images of other channels.
        args = [*args, "--mean", *map(str, told["mean"]), "--std", *map(str, told["std"])]
    resumed = Path(options.resume) if options.resume else None
    if resumed and not resumed.is_file():
        raise ValueError(f"--resume {resumed}: no such file")
    run = _earlier_run(options, resumed, recipe)
    start = options.start_epoch or 0
    if checkpoint := resumed or (run and run / LAST):
        going_on = _going_on(checkpoint, record, options)
        if going_on is None:
            return None
        record, start = going_on
        if not resumed:
            _say(f"Resuming from {checkpoint}")
            args = [*args, "--resume", str(checkpoint)]
        elif _is_recovery(resumed) and options.start_epoch is None:
            _say(f"{resumed} is of the midst of epoch {start}, which is trained anew from its weights")
            args = [*args, "--start-epoch", str(start)]
        if run:
            if _is_first():
                reserve(run)
            keep_best(record.alike_since(), start)
    elif start >= (epochs := scheduled_epochs(options)):
        raise ValueError(f"--start-epoch {start} of {epochs} epochs: nothing would be trained")
    _say(f"Data: {data}")
    for note in left_out(data) if _is_first() else ():
        _say(note)
    agree_on(f"epoch {start}")
    write_when_it_starts(record)
    return args


def _earlier_run(options: Namespace, resumed: Path | None, recipe: str) -> Path | None:
    """The folder that a training goes to, if a run is there already.

    Raises:
        ValueError: If the training would write over it instead of going on with it.
    """
    if not options.experiment:
        return None
    run = Path(options.output or "output/train") / options.experiment
    if (run / LAST).exists():
        if not (resumed.parent.resolve() == run.resolve() if resumed else recipe):
            raise ValueError(
                f"{run} has a run already: give another --experiment, or go on with it by --resume {run / LAST}"
            )
        return run
    # An interruption while it was replaced leaves the others; a new run would write over them. One that was being
    # written is no loss.
    others = sorted(filter(_is_whole, run.glob("*.pth.tar")), key=lambda file: file.stat().st_mtime)
    if others and not resumed:
        raise ValueError(
            f"{run} has {others[-1].name} and no {LAST}: go on with it by --resume {others[-1]}, or give another "
            "--experiment"
        )
    return None


def _going_on(checkpoint: Path, record: Record, options: Namespace) -> tuple[Record, int] | None:
    """The record of the run that goes on from a checkpoint, and its next epoch; None, which is said, where it is done.

    Raises:
        ValueError: If the checkpoint is of another run or model, or nothing would be trained.
    """
    start, epochs = _epoch_after(checkpoint), scheduled_epochs(options)
    if options.start_epoch is not None:
        start = options.start_epoch
    before = Record.read(checkpoint.parent)
    if not options.resume:
        _check_same_run(checkpoint.parent, record, before)
    elif before:
        _check_resumable(checkpoint, record, before.at(start - 1), options)
    record = record.going_on_from(before, start)
    if start < epochs:
        return record, start
    done = f"{checkpoint.parent} is finished, {start} of {epochs} epochs."
    if record is not before:
        raise ValueError(f"{done} Nothing would be trained: to go on with it give --epochs N, more than {start}")
    _say(f"{done} To start anew give --experiment NAME; to train longer give --epochs N --resume {checkpoint}")
    return None


def _check_resumable(checkpoint: Path, record: Record, before: Record, options: Namespace) -> None:
    """Raises ValueError for a checkpoint of another model, and for arguments that its optimizer would win over."""
    mine, theirs = (
        f"{r.model.architecture} of {r.model.num_classes} classes and {r.model.preprocessing['input_size'][0]} channels"
        for r in (record, before)
    )
    if mine != theirs:
        raise ValueError(
            f"{checkpoint} is of a {theirs}, and this is a {mine}: to start from its weights give --initial-checkpoint"
        )
    if not options.no_resume_opt:
        other = record.other_arguments(before)
        if told := ", ".join(f"{name} ({other[name][0]!r})" for name in _OF_THE_OPTIMIZER if name in other):
            raise ValueError(
                f"{checkpoint} brings its optimizer's own {told}: add --no-resume-opt to have this command's, or leave "
                "that as it was"
            )


def _check_same_run(run: Path, record: Record, before: Record | None) -> None:
    """Raises ValueError unless the record in a run's folder is that of the run about to start."""
    what_then = f"To start anew give --experiment NAME; to go on with it nevertheless give --resume {run / LAST}"
    if before is None:
        raise ValueError(f"{run} holds a run that nothing is known of, as it has no {FILE}. {what_then}")
    if differences := record.differences(before):
        raise ValueError(f"{run} holds another run: {'; '.join(differences)}. {what_then}")


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(read_checkpoint(checkpoint))
    except ValueError:
        return False


def _is_recovery(checkpoint: Path) -> bool:
    """Whether ``train.py`` wrote a checkpoint in the midst of an epoch."""
    return checkpoint.name.startswith("recovery-")


def _epoch_after(checkpoint: Path) -> int:
    """The epoch, counted from 0, that comes after a checkpoint of ``train.py``: one that was cut short, once more."""
    epoch = read_checkpoint(checkpoint).get("epoch")
    if not isinstance(epoch, int):
        raise ValueError(f"{checkpoint} is no checkpoint to resume from: it tells no epoch")
    return epoch if _is_recovery(checkpoint) else epoch + 1


def prepare_evaluation(path: Path, args: list[str]) -> list[str]:
    """Arguments of a script that trains nothing, with what this machine and a run's record tell: device and model.

    Args:
        path: ``validate.py``, ``inference.py``, ``onnx_export.py``, …
        args: Its arguments; they win.

    Raises:
        ValueError: If arguments, model or data can't be read, or ``validate.py``'s data has other classes than the run.
    """
    text = path.read_text(encoding="utf-8")
    if "--device" not in text and "--checkpoint" not in text:
        return args
    options = script_options(path, args)
    if options is not None and "device" in options:
        if _given(args, "--device") is None and _on_cpu(args):
            args = ["--device", "cpu", *args]
            options.device = "cpu"
        check_values(options, ("device", "input_img_mode"))
    if options is None:
        return args
    check_results(options)
    if "checkpoint" not in options:
        check_named(path, options)
        return args
    checkpoint = Path(options.checkpoint or "")
    if options.checkpoint and not checkpoint.exists():
        raise ValueError(f"--checkpoint {checkpoint}: no such file")
    if options.checkpoint and checkpoint.is_dir():  # which validate.py takes for many
        if path.stem != "validate" or not any(checkpoint.glob("*.pth*")):
            raise ValueError(f"--checkpoint {checkpoint} is a folder: give a file, a run's {LAST} say")
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    record = Record.read(run) if options.checkpoint else None
    if record:
        epoch = read_checkpoint(checkpoint).get("epoch") if record.before and checkpoint.is_file() else None
        if isinstance(epoch, int):  # averaged weights, say, tell none
            record = record.at(epoch)
        import_modules(record.args.get("device_modules"))
        if added := told_by_record(record, script_flags(path), getattr(options, "dataset", "")):
            _say(f"From {run / FILE}: {' '.join(added)}")
        args = [*added, *args]
        options = script_options(path, args) or options
    check_named(path, options)
    if path.stem == "validate" and not options.checkpoint:
        options.pretrained = True  # as that script takes it
    check_evaluated_model(options)
    if path.stem == "inference":
        check_root(options)
        if not options.fullname and names_repeat(options):
            _say("Images in different folders have one name: writing each with its folder, as --fullname does")
            args = [*args, "--fullname"]
    elif path.stem == "validate":
        classes = record.data.classes if record else _pretrained_classes(options)
        validated = record.data.val_split if record else ""
        split, note = check_evaluation_data(options, classes, recorded=bool(record), split=validated)
        if split != options.split:
            _say(f"{options.data_dir or options.dataset} has no {options.split}: validating on {split}")
            args = [*args, "--split", split]
        if note:
            _say(note)
    return args


def _pretrained_classes(options: Namespace) -> list[str] | None:
    """What a pretrained model calls its classes; None where it doesn't tell, or its classifier is left out, which is
    said."""
    one = ":" in options.model or timm.is_model(options.model)
    classes = stored_names(options.model) if one and not options.checkpoint else None
    if classes and options.num_classes not in (None, len(classes)):
        has = len(classes)
        _say(f"--num-classes {options.num_classes}: the weights' classifier has {has}; a random one takes its place.")
        return None
    return classes


def told_by_record(record: Record, flags: set[str], dataset: str = "") -> list[str]:
    """A run's model and its preprocessing as arguments of one of timm's scripts, as far as it has such.

    Args:
        record: The run's.
        flags: The script's.
        dataset: What it reads; only of the run's own it is told the columns.

    Raises:
        ValueError: If the script makes a model and can't be told all of this one.
    """
    told, kwargs = record.model.preprocessing, dict(record.model.args)
    channels, height, width = told["input_size"]
    # A script with an option for the pooling gives it to the model by itself.
    pooling = kwargs.pop("global_pool", None) if "--gp" in flags else None
    if "--model" in flags:
        given = {} if "--model-kwargs" in flags else kwargs
        others = {name: value for name, value in given.items() if not name.startswith(_OF_TRAINING)}
        own = timm.get_pretrained_cfg(record.model.architecture)
        if "--in-chans" not in flags and own and channels != own.input_size[0]:
            others["in_chans"] = channels
        if others:
            told_of = ", ".join(f"{name}={value}" for name, value in others.items())
            raise ValueError(
                f"this script can't be told of the run's {told_of}. To write its model to a file, publish it and use "
                "convmixer-timm export hf-hub:OWNER/NAME"
            )
    if "--label-type" in flags and record.data.classes:
        kwargs["pretrained_cfg_overlay"] = {"label_names": record.data.classes}
    columns = record.args if dataset and dataset == record.args.get("dataset") else {}
    args: dict[str, Any] = {
        "--model": record.model.architecture,
        # timm splits each at its '='; others can only be in a text.
        "--model-kwargs": ["{}={}".format(name, repr(value).replace("=", "\\x3d")) for name, value in kwargs.items()],
        "--gp": [pooling] if pooling else [],
        "--mean": told["mean"],
        "--std": told["std"],
        "--crop-pct": told["crop_pct"],
        "--interpolation": told["interpolation"],
        "--input-key": columns.get("input_key") or [],
        "--target-key": columns.get("target_key") or [],
        "--input-img-mode": record.args.get("input_img_mode") or [],
        "--in-chans": channels,
        # Another size of the user's own, given by either option, counts more than one by --img-size.
        **({"--img-size": height} if height == width else {"--input-size": told["input_size"]}),
        # The last one takes one value, so that a script's own first argument stays that.
        "--num-classes": record.model.num_classes,
    }
    out = []
    if "--use-ema" in flags and record.validates_average:
        out.append("--use-ema")
    for flag, value in args.items():
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if flag in flags and values:
            out += [flag, *map(str, values)]
    return out


def _is_first() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    return world_info_from_env()[1] == 0


def _say(text: str) -> None:
    """On stderr, once where several processes train."""
    if _is_first():
        print(text, file=sys.stderr, flush=True)

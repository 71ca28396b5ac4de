"""The ``convmixer-timm`` command: the list of its sub-commands, each a few lines over its room's functions."""

import argparse
import contextlib
import io
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import DISK, RunError, one_line, os_reason, printable
from .version import version

DEFAULT_MODEL = "convmixer_256_8.e100_cifar10"


_path = os.path.expanduser  # where no shell did: --output=~/x


def _positive(text: str) -> int:
    try:
        if (value := int(text)) >= 1:
            return value
    except ValueError:  # of which argparse would name this function
        pass
    raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")


def _predict(args: argparse.Namespace) -> int:
    from .inference.loading import usable_device
    from .inference.predicting import predict_files
    from .inference.reporting import FORMATS
    from .training.trained import load_model

    model = load_model(args.model, usable_device(args.device))
    results, failed = predict_files(model, args.images, args.topk, args.batch_size)
    FORMATS[args.format](results)
    return 1 if failed else 0


def _list(args: argparse.Namespace) -> int:
    from .variants import table

    print(*table(), sep="\n")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .checkpoints import convert

    shape, layout = convert(args.source, args.target)
    print(f"{args.target}: ConvMixer from {layout} layout: {shape}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .hub.verify import verify_all

    problems = 0
    for name, problem in verify_all(args.names):
        problems += bool(problem)
        print(f"FAILED  {name}: {problem}" if problem else f"ok      {name}")
    return 1 if problems else 0


def _publish(args: argparse.Namespace) -> int:
    from huggingface_hub import constants, utils

    from .hub.publish import publish
    from .inference.labels import read_labels

    if not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # bars fill a log
        utils.disable_progress_bars()
    publication = publish(
        args.source,
        args.repo_id,
        architecture=args.model,
        labels=read_labels(args.labels) if args.labels else None,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        tag=args.tag,
        page=args.page,
        dry_run=args.dry_run,
        timeout=args.timeout,
    )
    print(*publication.report(), sep="\n")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from .images import find_images
    from .inference.labels import class_names
    from .plots import draw
    from .training.trained import load_model

    model = load_model(args.model)
    failed: list[OSError] = []
    images = find_images(args.image)
    for line in draw(model, class_names(model), Path(args.output), args.layers, images, failed.append):
        print(printable(line))
    for error in failed:
        print(f"error: {one_line(error)}", file=sys.stderr)
    return 1 if failed else 0


def _export(args: argparse.Namespace) -> int:
    from .inference.export import export
    from .training.trained import load_model

    metadata = export(
        load_model(args.model), args.output, args.format, args.precision, args.dynamic_batch, args.calibration
    )
    size = "x".join(map(str, ("N" if args.dynamic_batch else 1, *metadata["input_size"])))
    print(f"{args.output}: {args.model} as {args.format} in {args.precision} for images of {size}, outputs compared")
    return 0


def _page(args: argparse.Namespace) -> int:
    from .web.page import page

    files = page(
        args.model,
        args.output,
        precision=args.precision,
        calibration=args.calibration,
        title=args.title,
        examples=args.examples,
        runtime=args.runtime,
    )
    print(*(f"{size:>12,}  {file}" for file, size in files.items()), sep="\n")
    print(f"To look at it: python -m http.server --bind 127.0.0.1 --directory {shlex.quote(args.output)}")
    return 0


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between them, got {text}") from None


def _run(args: argparse.Namespace) -> int:
    from .training.launch import launch

    if any(arg.partition("=")[0] == "--timm-scripts" for arg in args.args):
        raise ValueError(f"--timm-scripts DIR stands before {args.script if args.recipe is None else args.recipe}")
    run = launch(args.script, args.args, args.timm_scripts, args.recipe)
    if run:
        args.started = True  # from here on errors are the script's own
        with _interruption_told():
            run()
        args.started = False
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from .training.launch import recipes

    known = recipes()
    for name, description in known.items():
        print(f"{name:{max(map(len, known))}}  {description}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convmixer-timm", description="ConvMixer for timm.")
    parser.add_argument("--version", action="version", version=f"convmixer-timm {version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    p = command("predict", _predict, "Classify images.")
    p.add_argument("images", nargs="+", type=_path, metavar="IMAGE", help="file, folder or glob")
    p.add_argument("--model", default=DEFAULT_MODEL, help="NAME, hf-hub:OWNER/NAME or local-dir:FOLDER (%(default)s)")
    p.add_argument("--topk", type=_positive, default=5, help="classes an image (%(default)s)")
    p.add_argument("--format", choices=("csv", "json", "table"), default="table", help="output (%(default)s)")
    p.add_argument("--device", help="torch device (cuda where there is one, else cpu)")
    p.add_argument("--batch-size", type=_positive, default=64, help="images at a time (%(default)s)")

    command("list", _list, "Show the variants, their size and their weights.")

    p = command("convert", _convert, "Convert another implementation's ConvMixer checkpoint to timm's layout.")
    p.add_argument("source", type=_path, metavar="IN", help="checkpoint of timm, the authors, labml or mmpretrain")
    p.add_argument("target", type=_path, metavar="OUT.safetensors")

    p = command("verify", _verify, "Check the files of bundled and downloaded checkpoints.")
    p.add_argument("names", nargs="*", metavar="NAME", help="checkpoints (all that are here)")

    p = command("publish", _publish, "Publish a trained model on the Hugging Face Hub, in one commit.")
    p.add_argument("source", type=_path, help="folder under weights/, output folder of a training, or checkpoint file")
    p.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="made if it isn't there")
    p.add_argument("--model", metavar="VARIANT", help="the architecture, for a checkpoint file")
    p.add_argument("--labels", type=_path, metavar="FILE", help="class names, one a line (the data folder's)")
    p.add_argument("--private", action="store_true", help="make a new repository private")
    p.add_argument("--revision", metavar="BRANCH", help="made if it isn't there (main)")
    p.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    p.add_argument("--tag", help="name for the commit")
    p.add_argument("--page", action="store_true", help="publish its page too, as a static Space of the same name")
    p.add_argument("--dry-run", action="store_true", help="show files and card, and send nothing")
    p.add_argument("--timeout", type=_positive, default=60, metavar="S", help="seconds for each answer (%(default)s)")

    p = command("plot", _plot, "Draw a model's patch-embedding filters and depthwise kernels, and what it looks at.")
    p.add_argument("model", metavar="MODEL", help="NAME, hf-hub:OWNER/NAME or local-dir:FOLDER")
    p.add_argument("--layers", type=_layers, metavar="I,J,…", help="whose kernels (first, middle and last)")
    p.add_argument("--image", nargs="+", type=_path, metavar="IMAGE", default=(), help="a heat map for each")
    p.add_argument("-o", "--output", type=_path, metavar="DIR", default=".", help="for the PNG files (%(default)s)")

    p = command("export", _export, "Write a model for another program, with its preprocessing as metadata.")
    p.add_argument("model", metavar="MODEL", help="NAME, hf-hub:OWNER/NAME or local-dir:FOLDER")
    p.add_argument("--format", choices=("onnx", "openvino", "torch-export"), required=True)
    p.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32", help="(%(default)s)")
    p.add_argument("--dynamic-batch", action="store_true", help="for any number of images at a time (one)")
    p.add_argument("--calibration", type=_path, metavar="DIR", help="images to choose int8's scales by")
    p.add_argument("-o", "--output", type=_path, metavar="OUT", required=True, help="file: .onnx, .xml or .pt2")

    p = command("page", _page, "Write a static page on which visitors try the model in their browsers.")
    p.add_argument("model", metavar="MODEL", help="NAME, hf-hub:OWNER/NAME or local-dir:FOLDER")
    p.add_argument("-o", "--output", type=_path, metavar="FOLDER", default="page", help="(%(default)s)")
    p.add_argument("--precision", choices=("fp32", "int8"), default="fp32", help="(%(default)s)")
    p.add_argument("--calibration", type=_path, metavar="DIR", help="images to choose int8's scales by")
    p.add_argument("--title", help="of the page (the model's name)")
    p.add_argument("--examples", nargs="+", type=_path, metavar="IMAGE", help="to try (the bundled ones, for CIFAR-10)")
    p.add_argument("--runtime", type=_path, metavar="FOLDER", help="npm's onnxruntime-web, for the page (from a CDN)")

    def runner(name, what, help, rest):
        p = command(name, _run, help)
        p.set_defaults(script="train", recipe=None)
        where = "clone of timm's repository ($TIMM_SCRIPTS; else downloaded)"
        p.add_argument("--timm-scripts", type=_path, metavar="DIR", help=where)
        p.add_argument(what, metavar=what.upper(), help=rest)
        p.add_argument("args", nargs=argparse.REMAINDER, metavar="…", help="the script's own arguments")

    scripts = "train, validate, inference, benchmark, onnx_export, …"
    runner("run", "script", "Run one of timm's scripts with the ConvMixer variants registered.", scripts)
    runner("train", "recipe", "Train by a recipe, or go on with an interrupted run.", "name or YAML file")
    command("recipes", _recipes, "Show the recipes.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code. What a user can mend comes as one line on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this; without one, errors would go to the other
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that its encoding lacks, or no encoding has, are escaped
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    # Pillow's, of images that are refused in a line of their own.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds")
    args.started = False
    try:
        # SIGTERM, a time limit's say, ends a command as Ctrl-C does, so that nothing half-written stays.
        with contextlib.nullcontext() if args.run is _run else _handling(signal.SIGTERM, _end):
            code: int = args.run(args)
        _flush()
        return code
    except KeyboardInterrupt:
        return 130  # what a shell gives for it; Python's own code depends on what runs at exit
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        return _fail(ValueError(f"this needs the package {package}: pip install {package}"))
    except (OSError, ValueError, RuntimeError, RunError) as error:
        if args.started and not isinstance(error, RunError):  # a script's errors pass through as they are
            raise
        with contextlib.suppress(OSError):
            _flush()
        if isinstance(error, BrokenPipeError):  # the reader, `head` say, has seen enough
            return 0
        return _fail(error)


def _flush() -> None:
    """Writes out what was printed. What can't be is dropped: Python would try once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@contextlib.contextmanager
def _handling(number: int, handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Has a signal handled by `handler` meanwhile."""
    if threading.current_thread() is not threading.main_thread():  # which alone may ask for signals
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def _interruption_told() -> Iterator[None]:
    """Raises KeyboardInterrupt after Ctrl-C also where a script ends quietly then, as ``train.py`` does."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    ignored = signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # under nohup, say
    with contextlib.nullcontext() if ignored else _handling(signal.SIGINT, note):
        yield
    if noted:
        raise KeyboardInterrupt


def _fail(error: Exception) -> int:
    message = str(error)
    if isinstance(error, OSError) and error.errno:
        name = error.filename2 or error.filename
        message = f"{name if isinstance(name, str) else 'reading or writing a file'}: {os_reason(error)}"
        if error.errno in DISK:
            message += ": free some space, or write to another disk"
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine, where torchrun started several
        print(f"convmixer-timm: error: {one_line(message)}", file=sys.stderr)
    return 1

"""The ``convmixer-timm`` command. Each sub-command is a thin layer over one module, imported when it is needed."""

import argparse
import csv
import json
import os
import sys

from . import __version__

DEFAULT_MODEL = "convmixer_256_8.e70_cifar10"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _predict(args: argparse.Namespace) -> int:
    import torch
    from huggingface_hub.utils import tqdm

    from .predict import find_images, load_model, predict

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    model = load_model(args.model, device)
    paths = find_images(args.images)
    if not paths:
        raise ValueError(f"no images found in {' '.join(args.images)}")
    failed = 0

    def report(path, error):
        nonlocal failed
        failed += 1
        tqdm.write(f"error: {path}: {error}", file=sys.stderr)

    watched = sys.stderr.isatty() and len(paths) > args.batch_size
    progress = tqdm(paths, unit="img", disable=not watched)
    results = list(predict(model, progress, args.topk, args.batch_size, on_error=report))
    _FORMATS[args.format](results)
    return 1 if failed else 0


def _print_table(results) -> None:
    width = max((len(str(path)) for path, _ in results), default=0)
    for path, classes in results:
        print(f"{path!s:{width}}  " + "  ".join(f"{name} {p:.3f}" for name, p in classes))


def _print_json(results) -> None:
    rows = [{"path": str(path), "classes": [{"label": n, "prob": p} for n, p in classes]} for path, classes in results]
    print(json.dumps(rows, indent=2))


def _print_csv(results) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "rank", "label", "prob"])
    for path, classes in results:
        writer.writerows([path, rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(classes, 1))


_FORMATS = {"table": _print_table, "json": _print_json, "csv": _print_csv}


def _list(args: argparse.Namespace) -> int:
    from .variants import variants

    rows = [("variant", "params (M)", "GMACs", "input", "weights")]
    for v in variants():
        size = "x".join(map(str, v.input_size))
        rows.append((v.name, f"{v.params / 1e6:.2f}", f"{v.macs / 1e9:.2f}", size, ", ".join(v.weights) or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = (
            f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        print("  ".join([*cells, row[-1]]))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .checkpoints import convert

    shape, layout = convert(args.source, args.target)
    print(f"{args.target}: ConvMixer from {layout} layout: {shape}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .verify import verifiable, verify

    failed = 0
    files = verifiable()
    for name in args.names or files:
        try:
            verify(name, files)
            print(f"ok      {name}")
        except ValueError as error:
            failed += 1
            print(f"FAILED  {name}: {' '.join(str(error).split())}")
    return 1 if failed else 0


def _publish(args: argparse.Namespace) -> int:
    from .hub import publish

    publication = publish(
        args.source,
        args.repo_id,
        architecture=args.model,
        labels=_lines(args.labels) if args.labels else None,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        tag=args.tag,
        dry_run=args.dry_run,
        timeout=args.timeout,
    )
    for name, size in publication.files.items():
        print(f"{size:>12,}  {name}")
    if args.dry_run:
        print(f"\n{publication.card}\nNothing was sent. This is the card of a new repository: one that is there keeps")
        print("what people wrote into its own.")
    elif publication.changed:
        print(f"Published: {publication.url}")
    else:
        print(f"Nothing to publish: {args.repo_id} has all of it already.")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from pathlib import Path

    from .convmixer import ConvMixer
    from .plots import draw_depthwise_kernels, draw_heat_map, draw_patch_filters
    from .predict import class_names, image_loader, load_model

    model = load_model(args.model)
    if not isinstance(model, ConvMixer):
        raise ValueError(f"{args.model} is a {type(model).__name__}, which is no ConvMixer")
    folder = Path(args.output)
    draw_patch_filters(model, folder / "patch_filters.png")
    draw_depthwise_kernels(model, folder / "depthwise_kernels.png", args.layers)
    print(folder / "patch_filters.png", folder / "depthwise_kernels.png", sep="\n")
    load = image_loader(model)
    for path in map(Path, args.image or ()):
        target = folder / f"heat_map_{path.stem}.png"
        said = draw_heat_map(model, load(path), class_names(model), target)
        print(f"{target}  {said}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from pathlib import Path

    from .export import export
    from .predict import class_names, load_model

    model = load_model(args.model)
    target = Path(args.output)
    labels = class_names(model)
    metadata = export(model, target, args.format, args.precision, args.dynamic_batch, args.calibration, labels)
    size = "x".join(map(str, ("N" if args.dynamic_batch else 1, *metadata["input_size"])))
    print(f"{target}: {args.model} as {args.format} in {args.precision} for images of {size}, outputs compared")
    return 0


def _layers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _lines(path: str) -> list[str]:
    with open(path) as file:
        return [line.strip() for line in file if line.strip()]


def _run(args: argparse.Namespace) -> int:
    from .launch import restart_with_allocator_settings
    from .scripts import find_script, run_script

    try:
        path = find_script(args.script, args.timm_scripts)
    except OSError as error:
        return _fail(error)
    if args.settings and args.from_shell:
        restart_with_allocator_settings(args.args)
    run_script(path, args.args)
    return 0


def _train(args: argparse.Namespace) -> int:
    from .launch import train_arguments

    try:
        args.script, args.args = "train", train_arguments(args.recipe, args.args)
    except ValueError as error:
        return _fail(error)
    return _run(args)


def _recipes(args: argparse.Namespace) -> int:
    from .launch import recipes

    for name, description in recipes().items():
        print(f"{name:16}{description}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convmixer-timm", description="ConvMixer for timm.")
    parser.add_argument("--version", action="version", version=f"convmixer-timm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    p = command("predict", _predict, "Classify images.")
    p.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or glob")
    p.add_argument("--model", default=DEFAULT_MODEL, help="NAME, hf-hub:OWNER/NAME or local-dir:FOLDER (%(default)s)")
    p.add_argument("--topk", type=_positive, default=5, help="classes an image (%(default)s)")
    p.add_argument("--format", choices=sorted(_FORMATS), default="table", help="output (%(default)s)")
    p.add_argument("--device", help="torch device (cuda where there is one, else cpu)")
    p.add_argument("--batch-size", type=_positive, default=64, help="images at a time (%(default)s)")

    command("list", _list, "Show the variants, their size and their weights.")

    p = command("convert", _convert, "Convert another implementation's ConvMixer checkpoint to timm's layout.")
    p.add_argument("source", metavar="IN", help="checkpoint of timm, the authors, labml or mmpretrain")
    p.add_argument("target", metavar="OUT.safetensors")

    p = command("verify", _verify, "Check the files of bundled and downloaded checkpoints.")
    p.add_argument("names", nargs="*", metavar="NAME", help="checkpoints (all that are here)")

    p = command("publish", _publish, "Publish a trained model on the Hugging Face Hub, in one commit.")
    p.add_argument("source", help="folder under weights/, output folder of a training, or checkpoint file")
    p.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="made if it isn't there")
    p.add_argument("--model", metavar="VARIANT", help="the architecture, for a checkpoint file")
    p.add_argument("--labels", metavar="FILE", help="class names, one a line (those of the training's data folder)")
    p.add_argument("--private", action="store_true", help="make a new repository private")
    p.add_argument("--revision", metavar="BRANCH", help="made if it isn't there (main)")
    p.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    p.add_argument("--tag", help="name for the commit")
    p.add_argument("--dry-run", action="store_true", help="show files and card, and send nothing")
    p.add_argument("--timeout", type=_positive, default=60, metavar="S", help="seconds for each answer (%(default)s)")

    p = command("plot", _plot, "Draw a model's patch-embedding filters and depthwise kernels, and what it looks at.")
    p.add_argument("model", metavar="MODEL", help="NAME, hf-hub:OWNER/NAME or local-dir:FOLDER")
    p.add_argument("--layers", type=_layers, metavar="I,J,…", help="whose kernels (first, middle and last)")
    p.add_argument("--image", nargs="+", metavar="IMAGE", help="draw a heat map for each (Grad-CAM)")
    p.add_argument("-o", "--output", metavar="DIR", default=".", help="folder for the PNG files (%(default)s)")

    p = command("export", _export, "Write a model for another program, with its preprocessing as metadata.")
    p.add_argument("model", metavar="MODEL", help="NAME, hf-hub:OWNER/NAME or local-dir:FOLDER")
    p.add_argument("--format", choices=("onnx", "openvino", "torch-export"), required=True)
    p.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32", help="(%(default)s)")
    p.add_argument("--dynamic-batch", action="store_true", help="for any number of images at a time (one)")
    p.add_argument("--calibration", metavar="DIR", help="images to choose int8's scales by")
    p.add_argument("-o", "--output", metavar="OUT", required=True, help="file: .onnx, .xml or .pt2")

    def runner(name, run, what, help, rest):
        p = command(name, run, help)
        where = "clone of timm's repository ($TIMM_SCRIPTS; else downloaded)"
        p.add_argument("--timm-scripts", metavar="DIR", help=where)
        p.add_argument(
            "--no-cpu-settings", dest="settings", action="store_false", help="leave the memory allocator as it is"
        )
        p.add_argument(what, metavar=what.upper(), help=rest)
        p.add_argument("args", nargs=argparse.REMAINDER, metavar="…", help="the script's own arguments")

    scripts = "train, validate, inference, benchmark, onnx_export, …"
    runner("run", _run, "script", "Run one of timm's scripts with the ConvMixer variants registered.", scripts)
    runner("train", _train, "recipe", "Train by a recipe, or go on with an interrupted run.", "name or YAML file")
    command("recipes", _recipes, "Show the recipes.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code. What a user can mend comes as one line on stderr."""
    args = _parser().parse_args(argv)
    args.from_shell = argv is None
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130  # what a shell gives for it; Python's own code depends on what runs at exit
    except (OSError, ValueError, RuntimeError) as error:
        if args.run in (_run, _train):  # a script's errors pass through as they are
            raise
        if isinstance(error, BrokenPipeError):  # the reader, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(error)


def _fail(error: Exception) -> int:
    print(f"convmixer-timm: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1

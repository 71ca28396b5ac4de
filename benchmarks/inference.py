"""Times inference: variants by engines, precisions, batch and image sizes, against timm's own class as it comes.

    python benchmarks/inference.py --calibration DIR --csv benchmarks/results/inference.csv --plots benchmarks/plots
    python benchmarks/inference.py --quick

Every setting runs in a process of its own, so that its peak memory is its own; all are warmed up, then take turns, in
another order each time. A row appears only if the outputs were those of the model in fp32, within
`TOLERANCES` of `convmixer_timm.inference.agreement`. The peak is the speed of the model's own 1x1 convolution in the
row's precision, measured in the same run.
"""

import argparse
import csv
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from arguments import existing_folder, model_pixels_batch, positive
from train_step import append_rows, build, machine

# What is timed. 'timm' is its class as it comes, 'eager' this package's, 'optimize' its one call.
SETTINGS = ("timm", "eager", "inductor", "openvino", "onnxruntime", "optimize")
PRECISIONS = ("fp32", "bf16", "int8")


def runnable(setting: str, precision: str) -> bool:
    from convmixer_timm.inference.engines import BACKENDS, unavailable

    if setting in ("timm", "eager"):
        return precision == "fp32" or (precision == "bf16" and unavailable("inductor", "bf16") is None)
    if setting == "optimize":
        return any(unavailable(name, precision) is None for name in BACKENDS)
    return unavailable(setting, precision) is None


def prepare(args, setting: str, precision: str):
    """A function of nothing that runs the model once, and what to say of it: how far its outputs are from fp32's."""
    import timm

    from convmixer_timm.inference import optimize as inference
    from convmixer_timm.inference.agreement import TOLERANCES, difference
    from convmixer_timm.inference.calibration import calibration_batches
    from convmixer_timm.inference.engines import BACKENDS, quiet
    from convmixer_timm.inference.optimize import optimize

    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=args.model in args.pretrained).eval().requires_grad_(False)
    size = (3, args.img_size, args.img_size)
    model.pretrained_cfg["input_size"] = size
    images = torch.randn(args.batch_size, *size)
    real = list(calibration_batches(model, args.calibration)) if args.calibration else []
    if real:
        images = torch.cat(real)[torch.arange(args.batch_size) % sum(map(len, real))]
    batches = real if precision == "int8" else None
    with torch.inference_mode():
        expected = model(images)
    label = setting
    if setting in ("timm", "eager"):
        network = model if setting == "eager" else build("timm", args.model).eval()
        network.load_state_dict(model.state_dict())

        @torch.inference_mode()
        def run(x):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return network(x).float()
    elif setting == "optimize":
        inference._remembered = lambda key: None  # what is measured includes the choice
        run = optimize(model, images, precision=precision, calibration=batches)
        label = f"optimize ({run.chosen})"
    else:
        with quiet():
            run = BACKENDS[setting][0](model, images, precision, False, batches or [])
    found = run(images)
    matches = difference(found, expected, precision) <= TOLERANCES[precision]
    top1 = accuracy(args, model, run) if setting == "optimize" and args.accuracy else ""
    largest = difference(found, expected, "fp32")  # of the largest output, in int8 too
    answer = {"difference": largest, "matches": matches, "label": label, "top1": top1}
    return lambda: run(images), answer


def accuracy(args, model, run) -> float:
    """Top-1 in percent on a folder of images in one folder a class."""
    from timm.data import create_dataset, create_loader, resolve_model_data_config

    dataset = create_dataset("", args.accuracy)
    config = resolve_model_data_config(model)
    loader = create_loader(dataset, batch_size=args.batch_size, use_prefetcher=False, num_workers=0, **config)
    return 100 * sum((run(images).argmax(1) == labels).sum().item() for images, labels in loader) / len(dataset)


def peak_flops(args, precision: str) -> float:
    """Multiply-adds, counted as two, a second of the model's 1x1 convolution in this precision."""
    from convmixer_timm.inference.engines import BACKENDS, quiet

    model = build("ours", args.model)
    dim, side, layers = model.num_features, args.img_size // model.stem[0].kernel_size[0], 8
    convolutions = torch.nn.Sequential(*[torch.nn.Conv2d(dim, dim, 1) for _ in range(layers)]).eval()
    x = torch.randn(args.batch_size, dim, side, side)
    backend = "openvino" if precision == "int8" else "inductor"
    if precision == "int8":
        with quiet():
            run = BACKENDS[backend][0](convolutions, x, precision, True, [x])
    else:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        layers, x = 1, x.to(dtype).contiguous(memory_format=torch.channels_last)
        run = torch.inference_mode()(convolutions[0].to(dtype).to(memory_format=torch.channels_last))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        run(x)
        seconds.append(time.perf_counter() - start)
    return 2 * layers * dim * dim * side * side * args.batch_size / min(seconds)


def work(args) -> None:
    """A worker: says that it is ready, then answers each line on stdin with the seconds of one call."""
    from convmixer_timm.errors import one_line

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    setting, precision = args.worker
    if setting == "peak":
        return print(peak_flops(args, precision), file=answers)
    try:
        run, answer = prepare(args, setting, precision)
    except Exception as error:  # whatever it is, it is said in the row's place
        why = f"{type(error).__name__}: {one_line(error)}"
        return print(json.dumps({"matches": False, "why": why}), file=answers)
    for _ in range(2):
        run()
    print(json.dumps(answer), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(time.perf_counter() - start, memory, file=answers, flush=True)
    return None


def measure(args, model: str, img_size: int, batch_size: int) -> list[dict]:
    from convmixer_timm.variants import variants

    def start(setting: str, precision: str) -> subprocess.Popen:
        command = [sys.executable, __file__, "--worker", setting, precision, "--model", model]
        command += ["--img-size", str(img_size), "--batch-size", str(batch_size), "--pretrained", *args.pretrained]
        command += ["--calibration", args.calibration] if args.calibration else []
        command += ["--accuracy", args.accuracy] if args.accuracy and model in args.pretrained else []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # timm's class as it comes: the model that it is compared with would tell glibc to keep memory, for both.
        environment = {**os.environ, **({"CONVMIXER_TIMM_FAST": "0"} if setting == "timm" else {})}
        return subprocess.Popen(command, text=True, env=environment, **pipes)

    workers, said = {}, {}
    for setting, precision in args.kinds:
        worker = start(setting, precision)
        line = worker.stdout.readline()
        answer = json.loads(line) if line else {"matches": False, "why": "its process ended, of memory perhaps"}
        args.progress.update()
        if answer["matches"]:
            workers[setting, precision], said[setting, precision] = worker, answer
        else:
            why = answer.get("why") or f"outputs differ by {answer['difference']}"
            args.progress.write(f"left out: {model} {setting} {precision}: {why}")
            worker.kill()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in workers}
    memory = {}
    for _ in range(args.repeats):
        for key in random.sample(list(workers), len(workers)):
            for call in range(1 + (args.calls if batch_size == 1 else 1)):
                workers[key].stdin.write("\n")
                workers[key].stdin.flush()
                took, memory[key] = map(float, workers[key].stdout.readline().split())
                if call:  # during the first, the threads of the one before may still spin, and the caches are its own
                    seconds[key].append(took)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    peak = {p: float(start("peak", p).communicate()[0]) for p in {precision for _, precision in workers}}
    variant = next(v for v in variants() if v.name == model.split(".")[0])
    macs = variant.macs * (img_size / variant.input_size[-1]) ** 2
    base = statistics.median(seconds["timm", "fp32"]) if ("timm", "fp32") in seconds else float("nan")
    rows = []
    for (setting, precision), values in seconds.items():
        median = statistics.median(values)
        quantiles = statistics.quantiles(values, n=20) if len(values) > 1 else values
        rows.append(
            {
                "model": model,
                "backend": said[setting, precision]["label"],
                "precision": precision,
                "infer_samples_per_sec": round(batch_size / median, 2),
                "slowest": round(batch_size / max(values), 2),
                "fastest": round(batch_size / min(values), 2),
                "infer_step_time": round(median * 1000, 3),
                "p95_step_time": round(quantiles[-1] * 1000, 3),
                "infer_batch_size": batch_size,
                "infer_img_size": img_size,
                "infer_gmacs": round(macs / 1e9, 2),
                "param_count": round(variant.params / 1e6, 2),
                "times_timm": round(base / median, 2),
                "share_of_peak": round(2 * macs * batch_size / median / peak[precision], 2),
                "peak_MiB": round(memory[setting, precision]),
                "difference": f"{said[setting, precision]['difference']:.1e}",
                "top1": said[setting, precision]["top1"],
            }
        )
    return rows


def draw(rows: list[dict], folder: Path) -> None:
    """Throughput and share of the peak by engine; growth with batch and image size; accuracy against throughput."""
    from matplotlib.figure import Figure

    from convmixer_timm.files import atomic_path
    from convmixer_timm.inference.engines import BACKENDS

    colors = {"fp32": "tab:blue", "bf16": "tab:orange", "int8": "tab:green"}

    def save(figure, name):
        with atomic_path(folder / name) as temporary:
            figure.savefig(temporary, dpi=120)

    # Engines are compared where they were measured, which growth and accuracy need not be.
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault((row["model"], int(row["infer_img_size"]), int(row["infer_batch_size"])), []).append(row)
    chosen = {key: members for key, members in groups.items() if any(r["backend"] in BACKENDS for r in members)}
    for column, name, label in (
        ("infer_samples_per_sec", "throughput.png", "images/s"),
        ("share_of_peak", "share_of_peak.png", "share of the 1x1 convolution's measured speed"),
    ):
        figure = Figure(figsize=(6 * max(1, len(chosen)), 4.5), layout="constrained")
        panels = figure.subplots(1, max(1, len(chosen)), squeeze=False)[0]
        for axes, (key, members) in zip(panels, chosen.items(), strict=False):
            names = [f"{row['backend']}, {row['precision']}" for row in members]
            axes.barh(names, [float(row[column]) for row in members], color=[colors[r["precision"]] for r in members])
            axes.invert_yaxis()
            axes.set(title=f"{key[0]}\n{key[1]} pixels, batch {key[2]}", xlabel=label)
            axes.tick_params(labelsize="small")
        save(figure, name)

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, x, fixed in zip(
        figure.subplots(1, 2),
        ("infer_batch_size", "infer_img_size"),
        ("infer_img_size", "infer_batch_size"),
        strict=True,
    ):
        lines: dict[tuple, list] = {}
        for row in rows:
            if row["backend"].startswith(("timm", "optimize")):
                kind = row["backend"].split(" ")[0]
                lines.setdefault((row["model"], kind, row["precision"], row[fixed]), []).append(row)
        for (model, backend, precision, _), members in lines.items():
            if len(members) > 2:
                members.sort(key=lambda row: int(row[x]))
                values = [float(row["infer_samples_per_sec"]) for row in members]
                sizes = [int(row[x]) for row in members]
                axes.plot(sizes, values, "o-", label=f"{model}, {backend}, {precision}")
                if x == "infer_img_size":
                    linear = [values[-1] * (sizes[-1] / size) ** 2 for size in sizes]
                    axes.plot(sizes, linear, ":", color="gray", label="_")
        axes.set(xlabel=x.replace("infer_", "").replace("_", " "), ylabel="images/s")
        if axes.lines:  # a logarithm of nothing is an error
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(sorted({size for line in axes.lines for size in line.get_xdata()}))
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.minorticks_off()
            axes.legend(fontsize="x-small", title="dotted: the same cost for each pixel" if "img" in x else None)
    save(figure, "growth.png")

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    measured: dict[str, list] = {}
    for row in rows:
        if row["top1"]:
            measured.setdefault(row["model"], []).append(row)
    for model, members in measured.items():
        values = [[float(row[key]) for row in members] for key in ("infer_samples_per_sec", "top1")]
        axes.plot(*values, "-", color="lightgray", zorder=0)
        axes.scatter(*values, color=[colors[row["precision"]] for row in members])
        axes.annotate(model, (max(values[0]), max(values[1])), (0, 10), textcoords="offset points", ha="right")
    for precision, color in colors.items():
        axes.scatter([], [], color=color, label=precision)
    axes.set(xlabel="images/s by optimize", ylabel="top-1 in %")
    if measured:  # here too
        axes.set_xscale("log")
    axes.legend()
    axes.margins(y=0.2)
    save(figure, "accuracy.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--img-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--pretrained", nargs="*", default=[], help=argparse.SUPPRESS)
    columns = [("convmixer_256_8", 32, 64), ("convmixer_768_32", 224, 4), ("convmixer_1536_20", 224, 2)]
    default = ", ".join(":".join(map(str, column)) for column in columns)
    form = {"type": model_pixels_batch, "metavar": "MODEL:PIXELS:BATCH"}
    parser.add_argument("--columns", **form, nargs="*", default=columns, help=f"({default})")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, metavar="SETTING")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, metavar="PRECISION")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--calls", type=positive, default=10, help="calls a repeat at batch 1 (%(default)s)")
    images = {"type": existing_folder, "metavar": "DIR"}
    parser.add_argument("--calibration", **images, help="images for int8, which is left out without them")
    parser.add_argument("--accuracy", **images, help="labelled images: top-1 of `optimize` for bundled weights")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--plots", type=Path, help="draw the CSV's rows, or this run's, into this folder")
    parser.add_argument("--quick", action="store_true", help="one small model, in less than two minutes")
    args = parser.parse_args()
    if args.worker:
        return work(args)
    if args.quick:
        args.columns, args.repeats, args.precisions = [("convmixer_128_4", 32, 4)], 5, ["fp32"]

    args.kinds = [
        (setting, precision)
        for precision in args.precisions
        for setting in args.settings
        if runnable(setting, precision) and (precision != "int8" or args.calibration)
    ]
    if args.columns and not args.kinds:
        without = "" if args.calibration or "int8" not in args.precisions else "; int8 takes --calibration DIR"
        parser.error(f"none of {', '.join(args.settings)} runs in {', '.join(args.precisions)} here{without}")
    if not args.columns and not (args.csv and args.csv.is_file()):
        parser.error("without --columns it draws what --csv has, and there is no such file")

    from huggingface_hub.utils import tqdm

    about = machine()
    for package in ("openvino", "onnxruntime", "nncf"):
        try:
            about[package] = __import__(package).__version__
        except ImportError:
            about[package] = ""
    print(about)
    args.pretrained = [model for model, _, _ in args.columns if "." in model]
    everything: list[dict] = []
    args.progress = tqdm(total=len(args.columns) * len(args.kinds), unit="row")
    for model, img_size, batch_size in args.columns:
        rows = measure(args, model, img_size, batch_size)
        for row in rows:
            args.progress.write(
                "  ".join(f"{k}={v}" for k, v in row.items() if k not in ("infer_gmacs", "param_count"))
            )
        rows = [{**row, **about} for row in rows]
        everything += rows
        if args.csv:
            append_rows(args.csv, rows)
    args.progress.close()
    if args.csv:
        with args.csv.open(encoding="utf-8") as file:
            everything = list(csv.DictReader(file))
    if args.plots:
        draw(everything, args.plots)


if __name__ == "__main__":
    main()

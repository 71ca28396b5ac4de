"""Times one training step (forward, backward, optimizer) of this package's ConvMixer against timm's own class.

    python benchmarks/train_step.py --model convmixer_256_8 --precision fp32 --csv benchmarks/results/train_step.csv
    python benchmarks/train_step.py --evaluate --precision fp32 --batch-size 64

Every setting runs in a process of its own, as the memory allocator is set once a process. All are warmed up, then take
turns; the ratios are of medians over the turns. The floor is what the step would take if it did nothing but the
convolutions' multiply-adds at the speed measured here and read and wrote each activation once a pass.
"""

import argparse
import csv
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from arguments import optimizer_name, positive, registered_model

SETTINGS = {  # name: (whose class, channels-last, compiled, allocator set in the environment)
    "timm": ("timm", False, False, False),
    "timm channels-last": ("timm", True, False, False),
    "timm channels-last, allocator": ("timm", True, False, True),
    "timm compiled": ("timm", True, True, True),
    "ours": ("ours", False, False, False),
    "ours channels-last": ("ours", True, False, False),
    "ours compiled": ("ours", True, True, False),
}
# glibc's settings that keep freed memory, as the package has it without them, and huge pages, which it doesn't ask for.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def build(whose: str, name: str):
    import timm
    from timm.models.convmixer import ConvMixer as TimmConvMixer

    import convmixer_timm

    model = timm.create_model(name)
    if whose == "ours":
        return model
    convmixer_timm.set_fast_training(False)  # timm's optimizers are mended by it too
    depthwise = model.blocks[0][0].fn[0]
    theirs = TimmConvMixer(
        model.num_features,
        len(model.blocks),
        depthwise.kernel_size[0],
        model.stem[0].kernel_size[0],
        num_classes=model.num_classes,
        act_layer=type(model.stem[1]),
    )
    theirs.pretrained_cfg = model.pretrained_cfg
    return theirs


def work(args) -> None:
    """A worker: answers each line on stdin with the seconds of one step."""
    import torch
    from timm.optim import create_optimizer_v2

    if args.march:
        from convmixer_timm.kernels import build as kernels
        from convmixer_timm.kernels import fast
        from convmixer_timm.training.compat import mend_muon

        kernels._FLAGS = [flag.replace("-march=native", f"-march={args.march}") for flag in kernels._FLAGS]
        if os.environ["ONEDNN_MAX_CPU_ISA"] in ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"):
            fast.SLOW_DTYPES.add(torch.bfloat16)  # else asked of the processor itself
            mend_muon()
    if args.worker == "floor":
        return print(floor_seconds(args))
    whose, channels_last, compiled, _ = SETTINGS[args.worker]
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = build(whose, args.model).to(memory_format=layout).train(not args.evaluate)
    images = torch.randn(args.batch_size[0], 3, args.img_size, args.img_size).to(memory_format=layout)
    labels = torch.randint(model.num_classes, (len(images),))
    optimizer = create_optimizer_v2(model, args.opt, lr=1e-3)
    run = torch.compile(model) if compiled else model

    def evaluate():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            run(images)

    def train():
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step = evaluate if args.evaluate else train
    for _ in range(3):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def floor_seconds(args) -> float:
    """The least time of a step, from speeds measured now."""
    import torch
    import torch.nn.functional as F

    from convmixer_timm.kernels import fast

    model = build("ours", args.model)
    dim, depth, patch = model.num_features, len(model.blocks), model.stem[0].kernel_size[0]
    kernel = model.blocks[0][0].fn[0].kernel_size[0]
    side = args.img_size // patch
    # As the package's convolutions take it: bf16 where the processor has it.
    dtype = torch.bfloat16 if args.precision == "bf16" and torch.bfloat16 not in fast.SLOW_DTYPES else torch.float32
    x = torch.randn(args.batch_size[0], dim, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    depthwise, pointwise = torch.randn(dim, 1, kernel, kernel).to(dtype), torch.randn(dim, dim, 1, 1).to(dtype)
    out = torch.empty_like(x)

    def best(f):
        times = []
        for _ in range(10):
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        return min(times)

    bias = torch.zeros(dim, dtype=dtype)
    with torch.no_grad():
        vector = best(lambda: F.conv2d(x, depthwise, bias, padding="same", groups=dim))
        matrix = best(lambda: F.conv2d(x, pointwise, bias))
        copy = best(lambda: out.copy_(x))  # reads and writes a tensor
    # Each convolution three times (forward, input gradient, weight gradient). Norms: forward reads and writes once,
    # plus the shortcut; backward reads two tensors and writes one.
    return depth * (3 * vector + 3 * matrix + copy / 2 * (2 * 2 + 1 + 2 * 3))


def measure(args, batch_size: int) -> list[dict]:
    def start(name: str, allocator: bool) -> subprocess.Popen:
        environment = {**os.environ, **(ALLOCATOR if allocator else {})}
        if args.march:
            environment["ONEDNN_MAX_CPU_ISA"] = args.isa
        command = [sys.executable, __file__, "--worker", name, "--model", args.model, "--precision", args.precision]
        command += ["--batch-size", str(batch_size), "--img-size", str(args.img_size), "--opt", args.opt]
        command += ["--march", args.march] if args.march else []
        command += ["--evaluate"] if args.evaluate else []
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    workers = {}
    for name in args.settings:
        workers[name] = start(name, allocator=SETTINGS[name][3])
        if workers[name].stdout.readline() != "ready\n":
            sys.exit(f"{name}: its process ended before it was ready")
    seconds, memory = {name: [] for name in workers}, {}
    for _ in range(args.repeats):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            took, memory[name] = map(float, worker.stdout.readline().split())
            seconds[name].append(took)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    floor = float("nan") if args.evaluate else float(start("floor", allocator=True).communicate()[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((m for name, m in medians.items() if name.startswith("timm")), default=float("nan"))
    rows = []
    for name, values in seconds.items():
        median = medians[name]
        rows.append(
            {
                "model": args.model,
                "img_size": args.img_size,
                "loop": "evaluation" if args.evaluate else "training",
                "precision": args.precision,
                "code": args.march or "native",
                "optimizer": "" if args.evaluate else args.opt,
                "batch_size": batch_size,
                "setting": name,
                "images_per_s": round(batch_size / median, 1),
                "slowest": round(batch_size / max(values), 1),
                "fastest": round(batch_size / min(values), 1),
                "times_timm": round(medians.get("timm", float("nan")) / median, 2),
                "times_timms_best": round(best / median, 2),
                "share_of_floor": round(floor / median, 2),
                "peak_MiB": round(memory[name]),
            }
        )
        print(
            "  ".join(
                f"{k}={v}" for k, v in rows[-1].items() if k not in ("model", "img_size", "precision", "code", "loop")
            ),
            flush=True,
        )
    return rows


def machine() -> dict[str, str]:
    """What a result was measured on."""
    import timm
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "") or platform.processor()
    cpu += f" x{torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"cpu": cpu, "torch": torch.__version__, "timm": timm.__version__}


def append_rows(path: Path, rows: list[dict]) -> None:
    """Appends to a CSV file, which gets its header with the first rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, list(rows[0])):
            raise SystemExit(f"{path} has other columns than these rows: name another file")
        file.seek(0, 2)
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if header is None:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=registered_model, default="convmixer_256_8")
    parser.add_argument("--img-size", type=positive, default=32)
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[128, 512])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--opt", type=optimizer_name, default="adamw", help="timm's name of the optimizer (adamw)")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--evaluate", action="store_true", help="time evaluation without gradients instead")
    parser.add_argument("--march", help="build the kernels for this processor, as haswell for AVX2 alone")
    parser.add_argument("--isa", default="AVX2", help="with --march: what oneDNN may use (ONEDNN_MAX_CPU_ISA)")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--worker", choices=[*SETTINGS, "floor"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)

    about = machine()
    print(about)
    for batch_size in list(args.batch_size):
        rows = [{**row, **about} for row in measure(args, batch_size)]
        if args.csv:
            append_rows(args.csv, rows)


if __name__ == "__main__":
    main()

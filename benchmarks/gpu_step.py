"""Times a training step, and inference, on a GPU: timm's ConvMixer in its settings against this package's GPU kernels.

    python benchmarks/gpu_step.py --models convmixer_256_8:32:256 convmixer_768_32:224:64 --csv FILE

MODEL:PIXELS:BATCH. Everything runs under bf16 autocast; images/s of the median of several timings by CUDA events.
"""

import argparse
import statistics
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from arguments import model_pixels_batch, positive
from gpu_train import forward
from timm.models.convmixer import ConvMixer as TimmConvMixer
from train_step import append_rows, build

SETTINGS = ("timm", "timm channels-last", "timm compiled", "ours", "ours, CUDA graph")
INFERENCE = ("timm", "timm channels-last", "timm compiled")


def seconds(run, repeats: int) -> float:
    """Median over five timings of `repeats` runs."""
    taken = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1000 / repeats)
    return statistics.median(taken)


def training(setting: str, name: str, images: torch.Tensor):
    """A function that does one step: forward, backward, AdamW."""
    layout = torch.channels_last if "channels-last" in setting or "compiled" in setting else torch.contiguous_format
    model = build("timm" if "timm" in setting else "ours", name).cuda().train().to(memory_format=layout)
    assert isinstance(model, TimmConvMixer) == ("timm" in setting)
    images = images.to(memory_format=layout)
    labels = torch.randint(model.num_classes, (len(images),), device="cuda")
    graphed = "graph" in setting
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=graphed)
    run = torch.compile(model) if "compiled" in setting else model

    def step() -> None:
        optimizer.zero_grad()
        if "ours" in setting:
            logits = forward(model, images.bfloat16())
        else:
            with torch.autocast("cuda", torch.bfloat16):
                logits = run(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    if not graphed:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def inference(setting: str, name: str, images: torch.Tensor):
    layout = torch.contiguous_format if setting == "timm" else torch.channels_last
    model = build("timm", name).cuda().eval().to(memory_format=layout)
    images = images.to(memory_format=layout)
    run = torch.compile(model) if "compiled" in setting else model

    def step() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            run(images)

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=model_pixels_batch, nargs="+", required=True, metavar="MODEL:PIXELS:BATCH")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--inference", nargs="*", choices=INFERENCE, default=[], metavar="SETTING")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU here")
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "timm": timm.__version__}
    rows = []
    for name, pixels, batch in args.models:
        images = torch.randn(batch, 3, pixels, pixels, device="cuda")
        for loop, settings in ((training, args.settings), (inference, args.inference)):
            for setting in settings:
                torch.cuda.reset_peak_memory_stats()
                step = loop(setting, name, images)
                for _ in range(3):
                    step()
                row = {"loop": loop.__name__, "model": name, "pixels": pixels, "batch_size": batch, "setting": setting}
                row["images_per_s"] = round(batch / seconds(step, args.repeats))
                row["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
                rows.append({**row, **about})
                print(*row.values(), sep="  ", flush=True)
                del step
                torch.cuda.empty_cache()
    if args.csv:
        append_rows(args.csv, rows)

"""Trains variants on CIFAR-sized images with the whole data set, and all that is done to it, in a GPU's memory.

    python benchmarks/gpu_train.py DATA e25 e100 --output output/gpu

DATA has train/CLASS/IMAGE and validation/CLASS/IMAGE, as ``cifar_folders.py`` writes them; ``gpu_recipes.yaml`` has
each name's settings. Reading, cropping and mixing images takes ``train.py`` longer than a GPU needs for a small model's
step; here a step, with all of that and the optimizer's, is one CUDA graph. A run's folder is as ``train.py`` leaves it:
args.yaml, summary.csv, last.pth.tar.
"""

import argparse
import csv
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from timm.optim import param_groups_weight_decay
from timm.optim.muon import _COEFFICIENTS, Muon, _is_suitable_for_muon, get_lr_scale, zeropower_via_newtonschulz
from timm.utils import accuracy
from torch import Tensor

import convmixer_timm  # noqa: F401

RECIPES = Path(__file__).with_name("gpu_recipes.yaml")
DEFAULTS = {
    "model": "convmixer_256_8",
    "epochs": 25,
    "batch_size": 128,
    "lr": 0.01,
    "weight_decay": 0.02,
    "momentum": 0.9,
    "warmup_epochs": 2,
    "size": 32,  # of the crops
    "padding": 4,  # reflected, around the images that are cropped
    "affine": 0.0,  # share of the images that are turned, sheared and zoomed
    "color": 0.0,  # greatest change of an image's brightness and contrast
    "cutmix_prob": 0.5,  # share of the batches
    "cutmix_off": 0.84,  # after this part of the epochs there is none
    "smoothing": 0.1,
    "val_interval": 5,
    "train_on_all": False,  # with what is held out, which then measures nothing
    "seed": 42,
}


def _pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


@cache
def read_images(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """All images of CLASS/IMAGE, uint8 [N, 3, H, W], their classes' numbers, and the classes."""
    classes = sorted(path.name for path in folder.iterdir())
    files = [(file, i) for i, name in enumerate(classes) for file in sorted((folder / name).iterdir())]
    with ProcessPoolExecutor() as pool:
        images = list(pool.map(_pixels, [file for file, _ in files], chunksize=250))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor([i for _, i in files]), classes


def crops(images: Tensor, size: int, affine: float, color: float) -> Tensor:
    """Random crops of `size` of larger images, half of them mirrored, and what else `DEFAULTS` tells."""
    n, side, device = len(images), images.shape[-1], images.device

    def uniform(least: float, most: float) -> Tensor:
        return torch.rand(n, device=device) * (most - least) + least

    chosen = (torch.rand(n, device=device) < affine).float()
    turn, shear = chosen * uniform(-0.35, 0.35), chosen * uniform(-0.25, 0.25)
    zoom = size / side * (1 + chosen * uniform(-0.25, 0.2))
    mirror = (torch.rand(n, device=device) < 0.5) * 2.0 - 1.0
    down, right = (torch.floor(uniform(0, side - size + 1)) * 2 - (side - size) for _ in range(2))
    cos, sin = torch.cos(turn) * zoom, torch.sin(turn) * zoom
    rows = [cos * mirror, sin + shear * zoom, right / side, -sin * mirror, cos, down / side]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), [n, 3, size, size], align_corners=False)
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if color:
        mean = out.mean((1, 2, 3), keepdim=True)
        contrast, light = uniform(1 - color, 1 + color), uniform(-color, color)
        out = (out - mean) * contrast.view(-1, 1, 1, 1) + mean + light.view(-1, 1, 1, 1)
    return out


def cutmix(images: Tensor, targets: Tensor, prob: Tensor) -> tuple[Tensor, Tensor]:
    """timm's CutMix of a batch with itself in reverse order, without a number that the host would have to know."""
    size, device = images.shape[-1], images.device
    half = torch.sqrt(torch.rand((), device=device)) / 2 * (torch.rand((), device=device) < prob)  # of uniform area
    at = (torch.arange(size, device=device) + 0.5) / size
    rows, columns = ((at - torch.rand((), device=device)).abs() < half for _ in range(2))
    box = rows[:, None] & columns
    return torch.where(box, images.flip(0), images), targets.lerp(targets.flip(0), box.float().mean())


class Optimizer:
    """timm's Muon with Nesterov's momentum (``nmuon``), the matrices of one shape taken together."""

    def __init__(self, model: torch.nn.Module, lr: Tensor, weight_decay: float, momentum: float, capturable: bool):
        self.lr, self.momentum, self.matrices, rest = lr, momentum, {}, []
        for group in param_groups_weight_decay(model, weight_decay):
            others = [p for p in group["params"] if not _is_suitable_for_muon(p)]
            rest.append({**group, "params": others, "use_fallback": True})
            for p in group["params"]:
                if _is_suitable_for_muon(p):
                    self.matrices.setdefault((group["weight_decay"], *p.flatten(1).shape), []).append(p)
        self.rest = Muon(rest, lr=1.0, nesterov=True, momentum=momentum, capturable=capturable)
        for group in self.rest.param_groups:
            group["lr"] = lr
        self.buffers = {key: torch.zeros(len(ps), *key[1:], device=lr.device) for key, ps in self.matrices.items()}
        self.parameters = list(model.parameters())

    @torch.no_grad()
    def step(self) -> None:
        self.rest.step()
        for key, params in self.matrices.items():
            grad, buffer = torch.stack([p.grad.flatten(1) for p in params]), self.buffers[key]
            buffer.lerp_(grad, 1 - self.momentum)
            update = zeropower_via_newtonschulz(grad.lerp(buffer, self.momentum), 5, _COEFFICIENTS["quintic"]).float()
            update *= self.lr * get_lr_scale(key[1:])
            torch._foreach_mul_(params, 1 - self.lr * key[0])
            torch._foreach_sub_(params, [u.view_as(p) for u, p in zip(update, params, strict=True)])


def forward(model: torch.nn.Module, images: Tensor) -> Tensor:
    """The model's logits by the package's GPU kernels."""
    from convmixer_timm.kernels import triton_kernels as gpu

    conv, act, norm = model.stem
    gelu = not isinstance(act, torch.nn.ReLU)
    x = gpu.channel_mixing(F.pixel_unshuffle(images, conv.stride[0]), conv, norm, gelu)
    for spatial, conv, _, norm in model.blocks:
        depthwise, _, its_norm = spatial.fn
        x = gpu.channel_mixing(gpu.spatial_mixing(x, depthwise, its_norm, True, gelu), conv, norm, gelu)
    return model.head(x.mean((2, 3), dtype=torch.float32))


@torch.no_grad()
def evaluate(model: torch.nn.Module, images: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Loss, top-1 and top-5 in percent."""
    model.eval()
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = torch.cat([model(part) for part in images.split(500)]).float()
    model.train()
    top1, top5 = (share.item() for share in accuracy(logits, targets, topk=(1, 5)))
    return F.cross_entropy(logits, targets).item(), top1, top5


class Step:
    """One step of the training; on a GPU the fourth one records a CUDA graph, which the later ones replay.

    Attributes:
        chosen: Which images it takes.
        prob: Of CutMix.
        loss: Sum over the steps.
    """

    def __init__(self, model, optimizer, images, targets, args):
        self.model, self.optimizer, self.images, self.targets, self.args = model, optimizer, images, targets, args
        self.chosen = torch.zeros(args.batch_size, dtype=torch.long, device=images.device)
        self.prob, self.loss = (torch.zeros((), device=images.device) for _ in range(2))
        self.graph, self.steps = None, 0
        self.stream = torch.cuda.Stream() if images.is_cuda else None

    def _run(self) -> None:
        args = self.args
        with torch.no_grad():
            images = crops(self.images[self.chosen], args.size, args.affine, args.color)
            images, targets = cutmix(images, self.targets[self.chosen], self.prob)
        logits = forward(self.model, images.bfloat16()) if images.is_cuda else self.model(images)
        loss = torch.sum(-targets * F.log_softmax(logits.float(), 1), 1).mean()
        loss.backward()
        self.optimizer.step()
        self.loss.add_(loss.detach())

    def __call__(self) -> None:
        self.steps += 1
        if self.graph:
            return self.graph.replay()
        for p in self.optimizer.parameters:
            p.grad = None
        if not self.images.is_cuda:
            return self._run()
        if self.steps <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._run()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._run()
            self.graph.replay()


def learning_rate(progress: float, warmup: float) -> float:
    """A share of the highest: linear from a hundredth, then a half cosine to zero."""
    if progress < warmup:
        return 0.01 + 0.99 * progress / warmup
    return 0.5 * (1 + math.cos(math.pi * progress))


def train(settings: dict, data: Path, run: Path, device: str) -> dict:
    """Trains one variant and writes its run. Returns its last row of summary.csv."""
    args = argparse.Namespace(**DEFAULTS | settings)
    torch.manual_seed(args.seed)
    images, targets, classes = read_images(data / "train")
    held_out, held_out_targets, _ = read_images(data / "validation")
    if args.train_on_all:
        images, targets = torch.cat([images, held_out]), torch.cat([targets, held_out_targets])
    model = timm.create_model(args.model, num_classes=len(classes)).to(device).train()
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[name], device=device).view(1, 3, 1, 1) * 255 for name in ("mean", "std"))
    images = F.pad((images.to(device) - mean) / std, [args.padding] * 4, mode="reflect").bfloat16()
    targets = F.one_hot(targets.to(device), len(classes)) * (1 - args.smoothing) + args.smoothing / len(classes)
    held_out, held_out_targets = (held_out.to(device) - mean) / std, held_out_targets.to(device)

    lr = torch.zeros((), device=device)
    optimizer = Optimizer(model, lr, args.weight_decay, args.momentum, capturable=lr.is_cuda)
    step = Step(model, optimizer, images, targets, args)
    batch, per_epoch, epochs = args.batch_size, len(images) // args.batch_size, args.epochs
    rows, begin = [], time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), device=device)
        step.prob.fill_(args.cutmix_prob if epoch < args.cutmix_off * epochs else 0.0)
        step.loss.zero_()
        for i in range(per_epoch):
            lr.fill_(args.lr * learning_rate((epoch + i / per_epoch) / epochs, args.warmup_epochs / epochs))
            step.chosen.copy_(order[i * batch : (i + 1) * batch])
            step()
        train_loss = step.loss.item() / per_epoch
        if not math.isfinite(train_loss):
            raise SystemExit(f"{run.name} diverged in epoch {epoch}")
        if (epoch + 1) % args.val_interval == 0 or epoch == epochs - 1:
            rows.append({"epoch": epoch, "train_loss": train_loss})
            if not args.train_on_all:
                figures = evaluate(model, held_out, held_out_targets)
                rows[-1] |= dict(zip(("eval_loss", "eval_top1", "eval_top5"), figures, strict=True))
            rows[-1]["lr"] = lr.item()
            print(f"{run.name} after {time.perf_counter() - begin:.1f} s: {rows[-1]}", flush=True)
    seconds = round(time.perf_counter() - begin, 1)
    run.mkdir(parents=True, exist_ok=True)
    told = {**vars(args), "opt": "nmuon", "input_size": [3, args.size, args.size], "num_classes": len(classes)}
    told |= {"experiment": run.name, "seconds": seconds}
    (run / "args.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    with (run / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    torch.save({"arch": args.model, "epoch": epochs - 1, "state_dict": state}, run / "last.tmp")
    os.replace(run / "last.tmp", run / "last.pth.tar")
    return rows[-1] | {"seconds": seconds, "images_per_s": round(epochs * per_epoch * batch / seconds)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="+", help="of gpu_recipes.yaml")
    parser.add_argument("--recipes", type=Path, default=RECIPES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    recipes = yaml.safe_load(options.recipes.read_text(encoding="utf-8"))
    if unknown := [name for name in options.names if name not in recipes]:
        parser.error(f"{options.recipes} has no {', '.join(unknown)}; there are {', '.join(recipes)}")
    if missing := [split for split in ("train", "validation") if not (options.data / split).is_dir()]:
        parser.error(f"{options.data} has no folder {' or '.join(missing)}: cifar_folders.py makes them")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU here; --device cpu tries a recipe, slowly")
    if options.device.startswith("cuda:"):
        torch.cuda.set_device(options.device)
    print(f"torch {torch.__version__}, timm {timm.__version__}")
    for name in options.names:
        result = train(recipes[name], options.data, options.output / name, options.device)
        print(name, json.dumps(result), flush=True)

"""Trains variants on CIFAR-sized images with the whole data set in a GPU's memory.

    python benchmarks/gpu_train.py DATA e25 e100 --output output/gpu

DATA has train/CLASS/IMAGE and validation/CLASS/IMAGE, as ``cifar_folders.py`` writes them; ``gpu_recipes.yaml`` has
each name's settings. Reading, cropping and mixing images takes ``train.py`` longer than a GPU needs for a small model's
step. Here a step, with cropping, mixing and the optimizer's, is one CUDA graph; timm's transforms, where wanted, make
an epoch's images in other processes during the one before. A run's folder is as ``train.py`` leaves it: args.yaml,
summary.csv, last.pth.tar.
"""

import argparse
import csv
import json
import math
import mmap
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from arguments import existing_file, existing_folder, missing_folders
from PIL import Image
from timm.data import create_transform
from timm.optim import param_groups_weight_decay
from timm.optim.muon import _COEFFICIENTS, Muon, _is_suitable_for_muon, get_lr_scale, zeropower_via_newtonschulz
from timm.utils import accuracy, random_seed
from torch import Tensor

import convmixer_timm  # noqa: F401

RECIPES = Path(__file__).with_name("gpu_recipes.yaml")
DEFAULTS = {
    "model": "convmixer_256_8",
    "epochs": 25,
    "batch_size": 128,
    "opt": "nmuon",  # or adam
    "lr": 0.01,
    "weight_decay": 0.02,
    "momentum": 0.9,
    "sched": "cosine",  # or constant
    "warmup_epochs": 2,
    "mean": None,  # in place of the variant's
    "std": None,
    "size": 32,  # of the crops
    "padding": 4,  # around the images that are cropped
    "padding_mode": "reflect",  # or constant: black
    "aa": "",  # timm's name of a policy: then its transforms make the crops, with the three below, as train.py has them
    "scale": [0.75, 1.0],
    "ratio": [0.75, 4 / 3],
    "reprob": 0.25,
    "early_size": 32,  # of the crops by timm's transforms in the epochs up to
    "early": 0.0,  # this part of them
    "cutmix_prob": 0.5,  # share of the batches
    "cutmix_off": 0.84,  # after this part of the epochs there is none
    "smoothing": 0.1,
    "teacher": "",  # a model with weights, which sees the same images
    "temperature": 2.0,  # at which it teaches
    "task_loss_weight": 0.3,  # beside it, of the labels
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


class Transformed:
    """Each epoch's images by timm's transforms, made in other processes while the epoch before is trained on.

    Args:
        images: All of them, uint8 [N, 3, H, W].
        sizes: Of the images that it makes.
        device: Where they go, normalized, in bf16.
        more: Arguments of ``timm.data.create_transform``.
    """

    def __init__(self, images: Tensor, sizes: set[int], device: str, seed: int, **more):
        self.count, self.seed, self.made = len(images), seed, 0
        # Anonymous memory, which forked processes share: /dev/shm may be small.
        self.memory = torch.frombuffer(mmap.mmap(-1, 2 * self.count * 3 * max(sizes) ** 2), dtype=torch.bfloat16)
        transforms = {size: create_transform(size, is_training=True, **more) for size in sizes}
        state = (np.ascontiguousarray(images.permute(0, 2, 3, 1)), self.memory, transforms)
        processes = max(1, (os.cpu_count() or 1) - 1)
        self.pool = multiprocessing.get_context("fork").Pool(processes, _begin, state)
        self.thread = ThreadPoolExecutor(1)
        self.on_device = [torch.empty_like(self.memory, device=device) for _ in range(2)]
        self.stream = torch.cuda.Stream() if self.on_device[0].is_cuda else None

    def begin(self, size: int) -> Future:
        """Images of the next epoch, [N, 3, size, size]. Those of the last epoch but one are gone with it."""
        return self.thread.submit(self._make, size)

    def _make(self, size: int) -> Tensor:
        starts = range(0, self.count, 250)
        seeds = np.random.SeedSequence([self.seed, self.made]).generate_state(len(starts))
        self.pool.starmap(_transform, [(i, size, int(s)) for i, s in zip(starts, seeds, strict=True)], chunksize=1)
        there = self.on_device[self.made % 2]
        self.made += 1
        with torch.cuda.stream(self.stream):
            out = _as_images(there, self.count, size).copy_(_as_images(self.memory, self.count, size))
            if self.stream:
                self.stream.synchronize()
        return out

    def close(self) -> None:
        self.thread.shutdown()
        self.pool.terminate()


def _as_images(memory: Tensor, count: int, size: int) -> Tensor:
    return memory[: count * 3 * size * size].view(count, 3, size, size)


def _begin(*state) -> None:
    global _state
    _state = state
    torch.set_num_threads(1)


def _transform(start: int, size: int, seed: int) -> None:
    """Transforms 250 images from `start` on into the memory that all processes share."""
    images, memory, transforms = _state
    random_seed(seed)
    out = _as_images(memory, len(images), size)
    for i, image in enumerate(images[start : start + 250], start):
        out[i] = transforms[size](Image.fromarray(image))


def crops(images: Tensor, size: int) -> Tensor:
    """Random crops of `size` of larger images, half of them mirrored."""
    n, side, device = len(images), images.shape[-1], images.device
    mirror = torch.rand(n, 1, device=device) < 0.5
    down, right = (torch.randint(side - size + 1, (n, 1), device=device) for _ in range(2))
    along = torch.arange(size, device=device)
    columns = right + torch.where(mirror, along.flip(0), along)
    at = torch.arange(n, device=device)[:, None, None]
    out = images.permute(0, 2, 3, 1)[at, (down + along)[:, :, None], columns[:, None]]
    return out.permute(0, 3, 1, 2).contiguous()


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
        batch: Their transformed pixels; None where it crops the images itself.
        prob: Of CutMix.
        loss: Sum over the steps.
    """

    def __init__(self, model, optimizer, images, targets, args, size=None, teacher=None):
        self.model, self.optimizer, self.images, self.targets, self.args = model, optimizer, images, targets, args
        self.teacher = teacher
        device = targets.device
        self.chosen = torch.zeros(args.batch_size, dtype=torch.long, device=device)
        pixels = (args.batch_size, 3, size, size)
        self.batch = torch.zeros(pixels, dtype=torch.bfloat16, device=device) if size else None
        self.prob, self.loss = (torch.zeros((), device=device) for _ in range(2))
        self.graph, self.steps = None, 0
        self.stream = torch.cuda.Stream() if targets.is_cuda else None

    def _run(self) -> None:
        with torch.no_grad():
            images = crops(self.images[self.chosen], self.args.size) if self.batch is None else self.batch
            images, targets = cutmix(images, self.targets[self.chosen], self.prob)
        logits = forward(self.model, images) if images.is_cuda else self.model(images.float())
        loss = torch.sum(-targets * F.log_softmax(logits.float(), 1), 1).mean()
        if self.teacher:
            loss = loss.lerp(self._distance(logits, images), 1 - self.args.task_loss_weight)
        loss.backward()
        self.optimizer.step()
        self.loss.add_(loss.detach())

    def _distance(self, logits: Tensor, images: Tensor) -> Tensor:
        """From the teacher's answers, as timm's `LogitDistillationTask` takes it."""
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            taught = self.teacher(images.contiguous(memory_format=torch.channels_last))
        mine, theirs = (F.log_softmax(x.float() / self.args.temperature, 1) for x in (logits, taught))
        return F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * self.args.temperature**2

    def __call__(self) -> None:
        self.steps += 1
        if self.graph:
            return self.graph.replay()
        self.model.zero_grad()
        if not self.stream:
            return self._run()
        if self.steps <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._run()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # a thread brings images meanwhile
                self._run()
            self.graph.replay()


def make_optimizer(model: torch.nn.Module, lr: Tensor, args: argparse.Namespace) -> Optimizer | torch.optim.Adam:
    if args.opt == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=args.weight_decay, capturable=lr.is_cuda)
    return Optimizer(model, lr, args.weight_decay, args.momentum, capturable=lr.is_cuda)


def learning_rate(progress: float, warmup: float, sched: str = "cosine") -> float:
    """A share of the highest: linear from a hundredth, then that highest, or a half cosine to zero."""
    if progress < warmup:
        return 0.01 + 0.99 * progress / warmup
    return 1.0 if sched == "constant" else 0.5 * (1 + math.cos(math.pi * progress))


class Pace:
    """What share of the training an epoch is: of as many as are wanted, or of fewer that end within some seconds."""

    def __init__(self, args, seconds: float | None):
        self.args, self.taken = args, {}
        self.end = time.perf_counter() + seconds if seconds else math.inf

    def measure(self, steps: dict[int, Step], transformed: Transformed | None) -> None:
        """Times an epoch of each size, by some steps of a learning rate that is still zero."""
        for size, step in steps.items():
            begin = time.perf_counter()
            if transformed:
                transformed.begin(size).result()
                step.batch.normal_()
            made = time.perf_counter() - begin
            step.chosen.random_(len(step.targets))
            for count in (4, 30):
                begin = time.perf_counter()
                for _ in range(count):
                    step()
                step.loss.item()
            trained = (time.perf_counter() - begin) / count * (len(step.targets) // self.args.batch_size)
            print(f"{size} pixels: an epoch takes {trained:.2f} s, its transforms {made:.2f} s", flush=True)
            self.taken[size] = max(made, trained)

    def share(self, progress: float) -> float:
        args = self.args
        epochs = args.epochs
        if math.isfinite(self.end):
            early, late = max(0.0, args.early - progress), 1 - max(args.early, progress)
            per_epoch = early * self.taken.get(args.early_size, 0) + late * self.taken[args.size]
            epochs = min(epochs, (self.end - time.perf_counter()) / per_epoch)
        return (1 - progress) / max(1, round((1 - progress) * epochs))


def load_teacher(args: argparse.Namespace, classes: int, device: str) -> torch.nn.Module:
    teacher = timm.create_model(args.teacher, pretrained=True).eval().requires_grad_(False)
    told = [classes, args.mean, args.std]
    known = [teacher.num_classes, *(list(teacher.pretrained_cfg[name]) for name in ("mean", "std"))]
    if told != known:
        raise SystemExit(f"{args.teacher} knows {known} (classes, mean, std), and the images are {told}")
    return teacher.to(device, memory_format=torch.channels_last)


def train(settings: dict, data: Path, run: Path, device: str, seconds: float | None = None) -> dict:
    """Trains one variant and writes its run. Returns its last row of summary.csv."""
    args = argparse.Namespace(**DEFAULTS | settings)
    pace = Pace(args, seconds)
    torch.manual_seed(args.seed)
    images, targets, classes = read_images(data / "train")
    held_out, held_out_targets, _ = read_images(data / "validation")
    if args.train_on_all:
        images, targets = torch.cat([images, held_out]), torch.cat([targets, held_out_targets])
    model = timm.create_model(args.model, num_classes=len(classes)).train()
    sizes, transformed = {args.size}, None
    for name in ("mean", "std"):
        setattr(args, name, list(getattr(args, name) or model.pretrained_cfg[name]))
    if args.aa:
        sizes |= {args.early_size} if args.early else set()
        transformed = Transformed(
            images, sizes, device, args.seed, scale=args.scale, ratio=args.ratio, auto_augment=args.aa,
            re_prob=args.reprob, re_mode="pixel", interpolation="random", mean=args.mean, std=args.std,
        )  # fmt: skip
    elif args.early:
        raise SystemExit(f"{run.name}: smaller images early are made by timm's transforms, which want an aa")
    model.to(device)
    mean, std = (torch.tensor(told, device=device).view(1, 3, 1, 1) * 255 for told in (args.mean, args.std))
    if not transformed:
        images = F.pad(images.to(device).float(), [args.padding] * 4, mode=args.padding_mode)
        images = ((images - mean) / std).bfloat16()
    targets = F.one_hot(targets.to(device), len(classes)) * (1 - args.smoothing) + args.smoothing / len(classes)
    held_out, held_out_targets = (held_out.to(device) - mean) / std, held_out_targets.to(device)

    lr = torch.zeros((), device=device)
    optimizer = make_optimizer(model, lr, args)
    teacher = load_teacher(args, len(classes), device) if args.teacher else None
    steps = {
        size: Step(model, optimizer, images, targets, args, size if transformed else None, teacher)
        for size in sorted(sizes)
    }
    if seconds:
        pace.measure(steps, transformed)
    batch, per_epoch = args.batch_size, len(images) // args.batch_size

    def size_at(progress: float) -> int:
        return args.early_size if progress < args.early else args.size

    coming = transformed.begin(size_at(0)) if transformed else None
    rows, begin, epoch, progress, share = [], time.perf_counter(), 0, 0.0, pace.share(0.0)
    warmup = args.warmup_epochs * share
    while progress < 1 - share / 2:
        step, epoch_begin, after = steps[size_at(progress)], time.perf_counter(), round(progress + share, 9)
        if transformed:
            pixels = coming.result()
            coming = transformed.begin(size_at(after)) if after < 1 - share / 2 else None
        order = torch.randperm(len(images), device=device)
        step.prob.fill_(args.cutmix_prob * (progress < args.cutmix_off))
        step.loss.zero_()
        for i in range(per_epoch):
            lr.fill_(args.lr * learning_rate(progress + share * i / per_epoch, warmup, args.sched))
            step.chosen.copy_(order[i * batch : (i + 1) * batch])
            if transformed:
                torch.index_select(pixels, 0, step.chosen, out=step.batch)
            step()
        train_loss = step.loss.item() / per_epoch
        if not math.isfinite(train_loss):
            raise SystemExit(f"{run.name} diverged in epoch {epoch}")
        pace.taken[size_at(progress)] = time.perf_counter() - epoch_begin
        progress = after
        share = pace.share(progress) if progress < 1 - share / 2 else share
        epoch += 1
        if epoch % args.val_interval == 0 or progress >= 1 - share / 2:
            rows.append({"epoch": epoch - 1, "train_loss": train_loss})
            if not args.train_on_all:
                figures = evaluate(model, held_out, held_out_targets)
                rows[-1] |= dict(zip(("eval_loss", "eval_top1", "eval_top5"), figures, strict=True))
            rows[-1]["lr"] = lr.item()
            print(f"{run.name} after {time.perf_counter() - begin:.1f} s: {rows[-1]}", flush=True)
    seconds, args.epochs = round(time.perf_counter() - begin, 1), epoch
    if transformed:
        transformed.close()
    run.mkdir(parents=True, exist_ok=True)
    told = {**vars(args), "input_size": [3, args.size, args.size], "num_classes": len(classes)}
    told |= {"experiment": run.name, "seconds": seconds, "kd_model_name": args.teacher or None}
    (run / "args.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    with (run / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    torch.save({"arch": args.model, "epoch": epoch - 1, "state_dict": state}, run / "last.tmp")
    os.replace(run / "last.tmp", run / "last.pth.tar")
    return rows[-1] | {"seconds": seconds, "images_per_s": round(epoch * per_epoch * batch / seconds)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=existing_folder)
    parser.add_argument("names", nargs="+", help="of gpu_recipes.yaml")
    parser.add_argument("--recipes", type=existing_file, default=RECIPES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, help="fewer epochs than the recipe's, if those would take longer")
    options = parser.parse_args()
    recipes = yaml.safe_load(options.recipes.read_text(encoding="utf-8"))
    if unknown := [name for name in options.names if name not in recipes]:
        parser.error(f"{options.recipes} has no {', '.join(unknown)}; there are {', '.join(recipes)}")
    if missing := missing_folders(options.data, "train", "validation"):
        parser.error(f"{missing}: cifar_folders.py makes them")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU here; --device cpu tries a recipe, slowly")
    if options.device.startswith("cuda:"):
        torch.cuda.set_device(options.device)
    print(f"torch {torch.__version__}, timm {timm.__version__}")
    for name in options.names:
        result = train(recipes[name], options.data, options.output / name, options.device, options.seconds)
        print(name, json.dumps(result), flush=True)

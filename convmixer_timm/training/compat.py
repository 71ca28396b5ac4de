"""What timm and its scripts get wrong on CPUs, after an interruption or with newer libraries, each mended in one place.

`mend_posterize` and `mend_muon` are called when the package is imported, the others by the launcher only. Each one can
go when the oldest timm that this package supports no longer needs it.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from timm.data import auto_augment

from ..checkpoints import read_checkpoint
from ..errors import DISK, RunError
from ..files import atomic_path
from ..kernels import switch
from ..kernels.fast import SLOW_DTYPES
from .history import as_csv, read_history

__all__ = [
    "agree_on",
    "keep_best",
    "mend_cpu_ddp",
    "mend_mixup_off",
    "mend_muon",
    "mend_posterize",
    "mend_safetensors",
    "mend_saver",
    "mend_summary",
]

_posterize = auto_augment.posterize


def _posterize_any(img, bits_to_keep, **kwargs):
    # At the top of its range timm's RandAugment keeps 0 bits. Pillow gave a black image for that until version 12 and
    # raises ValueError since 13. Black it stays: the published recipes were trained with it.
    if bits_to_keep <= 0:
        return img.point(lambda _: 0)
    return _posterize(img, bits_to_keep, **kwargs)


def mend_posterize() -> None:
    """Let timm's AutoAugment and RandAugment policies posterize to 0 bits with every Pillow."""
    for name, op in auto_augment.NAME_TO_OP.items():
        if op is _posterize:
            auto_augment.NAME_TO_OP[name] = _posterize_any


def mend_muon() -> None:
    """Let timm's Muon compute in fp32 on a CPU that has no instructions for bf16.

    It orthogonalizes its steps in bf16, in which PyTorch multiplies matrices there by a plain loop: for ConvMixer-256/8
    that took longer than the step itself (benchmarks/README.md).
    """
    if torch.bfloat16 not in SLOW_DTYPES:
        return
    from timm.optim import muon

    original = muon.zeropower_via_newtonschulz
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def zeropower_via_newtonschulz(G, *args, **kwargs):
        if G.is_cpu and switch.enabled() and len(args) < 5:  # a sixth argument, or a keyword, is the caller's dtype
            kwargs.setdefault("dtype", torch.float32)
        return original(G, *args, **kwargs)

    muon.zeropower_via_newtonschulz = zeropower_via_newtonschulz


def mend_cpu_ddp() -> None:
    """Let timm's scripts train with several processes on CPUs.

    They give `DistributedDataParallel` the device as ``device_ids`` whatever it is, and it refuses CPUs there; for a
    module on a CPU the argument means nothing, so it is dropped.
    """
    from torch.nn.parallel import DistributedDataParallel

    original = DistributedDataParallel.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def init(self, module, device_ids=None, *args, **kwargs):
        if all(p.device.type == "cpu" for p in module.parameters()):
            device_ids = None
        original(self, module, device_ids, *args, **kwargs)

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]


def mend_mixup_off() -> None:
    """Let ``--mixup-off-epoch`` reach the workers that load images.

    They stay from epoch to epoch, each with its own copy of what mixes images, so that what is switched off in the
    training process goes on in them. After a change they are started anew.
    """
    from timm.data.loader import PrefetchLoader

    loader: Any = PrefetchLoader
    original = loader.mixup_enabled
    if hasattr(original.fset, "__wrapped__"):
        return

    @functools.wraps(original.fset)
    def mixup_enabled(self, enabled):
        original.fset(self, enabled)
        self.loader._iterator = None  # torch keeps persistent workers there
        if getattr(self.loader, "iterator", None) is not None:  # and timm's --use-multi-epochs-loader what they give
            self.loader.iterator = torch.utils.data.DataLoader.__iter__(self.loader)

    loader.mixup_enabled = original.setter(mixup_enabled)


def agree_on(start: str) -> None:
    """Has processes that train together end, each in one line, unless they start from the same.

    Machines without a common disk may: one has a run to go on with, and the others begin anew.

    Args:
        start: What this one starts from.
    """
    from timm import utils

    original = getattr(utils.init_distributed_device, "__wrapped__", utils.init_distributed_device)

    @functools.wraps(original)
    def init_distributed_device(args):
        device = original(args)
        if args.distributed:
            starts = [""] * args.world_size
            torch.distributed.all_gather_object(starts, start)
            if other := next((rank for rank, theirs in enumerate(starts) if theirs != starts[0]), 0):
                raise RunError(
                    f"rank 0 starts from {starts[0]}, and rank {other} from {starts[other]}: bring the run's folder to "
                    "every machine, or give another --experiment"
                )
        return device

    utils.init_distributed_device = init_distributed_device


def _no_room(file: str | Path) -> RunError:
    return RunError(f"{file}: the disk is full: free some space, and go on by the same command")


def mend_saver() -> None:
    """Leave no half of a checkpoint on a disk that it doesn't fit on, and say so in one line."""
    from timm.utils import CheckpointSaver

    original = CheckpointSaver._save
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def _save(self, save_path, *args, **kwargs):
        try:
            original(self, save_path, *args, **kwargs)
        except (OSError, RuntimeError) as error:
            # In the words of torch's own writer, positions in the file don't agree.
            full = error.errno in DISK if isinstance(error, OSError) else "inline_container" in str(error)
            if not full:
                raise
            Path(save_path).unlink(missing_ok=True)
            raise _no_room(save_path) from error

    CheckpointSaver._save = _save  # type: ignore[method-assign]


def mend_summary() -> None:
    """Keep ``summary.csv`` one table, a row an epoch, and write it whole or not at all.

    Of a resumed run, older ``train.py`` writes the header once more and repeats an epoch that had its row but no
    checkpoint yet. A file that a full disk left empty is begun anew: it would end every later epoch before its
    checkpoint is saved.
    """
    from timm import utils

    original = utils.update_summary
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def update_summary(epoch, train_metrics, eval_metrics, filename, *args, **kwargs):
        path = Path(filename)
        rows = [row for row in read_history(path) if int(row["epoch"]) < epoch]
        kwargs["write_header"] = True
        try:
            with atomic_path(path) as temporary:
                original(epoch, train_metrics, eval_metrics, str(temporary), *args, **kwargs)
                if rows:
                    table = as_csv([*rows, *read_history(temporary)])
                    temporary.write_text(table, encoding="utf-8", newline="")
        except OSError as error:
            if error.errno not in DISK:
                raise
            raise _no_room(path) from error

    utils.update_summary = update_summary


def mend_safetensors() -> None:
    """Let ``avg_checkpoints.py`` and ``clean_checkpoint.py`` write what ``--channels-last`` trained as safetensors,
    which takes tensors in the usual layout only."""
    import safetensors.torch

    original = safetensors.torch.save_file
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def save_file(tensors, *args, **kwargs):
        original({name: tensor.contiguous() for name, tensor in tensors.items()}, *args, **kwargs)

    safetensors.torch.save_file = save_file


def keep_best(first_epoch: int, start: int) -> None:
    """Let a run that goes on know which of its epochs was the best, and which checkpoints it has.

    ``train.py`` begins anew otherwise, and takes the first epoch after the interruption for the best.

    Args:
        first_epoch: Since which the validation is the same; what was measured otherwise counts no more.
        start: The epoch that comes next.
    """
    from timm.utils import CheckpointSaver

    original = CheckpointSaver.__init__
    if hasattr(original, "__wrapped__"):
        return

    def measured(file: Path) -> tuple[float, int] | None:
        try:
            told: dict[str, Any] = read_checkpoint(file)
        except (OSError, ValueError):  # somebody's own, or damaged
            return None
        metric, epoch = told.get("metric"), told.get("epoch")
        counts = isinstance(metric, int | float) and isinstance(epoch, int) and first_epoch <= epoch < start
        return (metric, epoch) if counts else None  # type: ignore[return-value]

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        kept = []
        for file in Path(self.checkpoint_dir).glob(f"{self.save_prefix}-*{self.extension}"):
            if (told := measured(file)) is not None:
                kept.append((*told, str(file)))
        kept.sort(reverse=not self.decreasing)
        self.checkpoint_files = [(file, metric) for metric, _, file in kept]
        best = Path(self.checkpoint_dir, f"model_best{self.extension}")
        if best.is_file() and (told := measured(best)) is not None:
            self.best_metric, self.best_epoch = told

    CheckpointSaver.__init__ = init  # type: ignore[method-assign]

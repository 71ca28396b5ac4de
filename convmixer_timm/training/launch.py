"""Settings of the process that trains, and the recipes that it trains with."""

import os
import platform
import sys
from pathlib import Path

from .scripts import find_script, run_script

__all__ = ["allocator_settings", "launch", "recipes", "restart_with_allocator_settings", "train_arguments"]

RECIPES = Path(__file__).with_name("recipes")

# glibc gives every large tensor back to the system and pays for its page faults again at the next step. Kept instead, a
# step of batch 512 takes half the time; tcmalloc is as good, and jemalloc as it comes is not (benchmarks/README.md).
_GLIBC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_RESTARTED = "CONVMIXER_TIMM_RESTARTED"


def allocator_settings(environment: dict[str, str]) -> dict[str, str]:
    """What to add to the environment of a process that trains on a CPU.

    Empty where the user chose an allocator or any of its settings, or where the C library isn't glibc.
    """
    chosen = "malloc" in environment.get("LD_PRELOAD", "") or any(name in environment for name in _GLIBC)
    if chosen or platform.libc_ver()[0] != "glibc":
        return {}
    return dict(_GLIBC)


def _given(args: list[str], name: str) -> str | None:
    """The value of option `name` among a script's arguments."""
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(f"{name}="):
            return arg.partition("=")[2]
    return None


def _on_cpu(args: list[str]) -> bool:
    device = _given(args, "--device")
    if device:
        return device == "cpu"
    import torch

    return not torch.cuda.is_available()


def restart_with_allocator_settings(args: list[str]) -> None:
    """Replaces this process by itself with `allocator_settings`, if `args` run on a CPU; says so on stderr.

    The allocator reads its settings when a process starts. The process keeps its number, so signals, exit codes and
    torchrun see no difference.
    """
    settings = {} if os.environ.get(_RESTARTED) or not _on_cpu(args) else allocator_settings(dict(os.environ))
    if settings:
        print("CPU settings:", *(f"{k}={v}" for k, v in settings.items()), file=sys.stderr, flush=True)
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **settings, _RESTARTED: "1"})


def recipes() -> dict[str, str]:
    """The recipes that ship with the package: name and first comment line."""
    return {p.stem: p.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for p in sorted(RECIPES.glob("*.yaml"))}


def train_arguments(recipe: str, args: list[str]) -> list[str]:
    """Arguments of ``train.py`` for a recipe: its file, then the user's own, which win.

    Added where the user doesn't give them: the device, if it is a CPU; a folder ``output/train/RECIPE``, so that the
    same command finds an interrupted run; and what resumes it from the last epoch that it finished.

    Raises:
        ValueError: If there is no such recipe.
    """
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe)
        if not path.is_file():
            raise ValueError(f"No recipe {recipe!r}; there are {', '.join(recipes())}, or give a YAML file.")
    out = ["--config", str(path), *args]

    if _given(args, "--device") is None and _on_cpu(args):
        out += ["--device", "cpu"]
    output, experiment = _given(args, "--output") or "output/train", _given(args, "--experiment")
    if experiment is None:
        seed = _given(args, "--seed")
        experiment = path.stem + (f"-seed{seed}" if seed else "")
        out += ["--output", output, "--experiment", experiment]
    last = Path(output) / experiment / "last.pth.tar"
    if _given(args, "--resume") is None and last.exists():
        print(f"Resuming from {last}", file=sys.stderr)
        out += ["--resume", str(last)]
    return out


def launch(script: str, args: list[str], folder: str | None = None, settings: bool = True) -> None:
    """Runs one of timm's scripts in this process; on a CPU the process starts anew with `allocator_settings` before.

    Args:
        script: Its name.
        args: Its arguments.
        folder: A clone of timm's repository, as for `scripts.find_script`.
        settings: Whether the allocator may be set.

    Raises:
        OSError: If there is no such script; what the script itself raises passes through.
    """
    path = find_script(script, folder)
    if settings:
        restart_with_allocator_settings(args)
    run_script(path, args)

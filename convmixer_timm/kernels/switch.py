"""When the kernels may run: what the user has switched on, and what PyTorch is doing around a call."""

import os

import torch

__all__ = ["batched", "enabled", "recomputes", "set_fast_training", "transformed"]

_enabled = os.environ.get("CONVMIXER_TIMM_FAST", "1").lower() not in ("0", "off", "no", "false")
_gpu_enabled = os.environ.get("CONVMIXER_TIMM_FAST", "").lower() == "gpu"


def set_fast_training(enable: bool = True, gpu: bool | None = None) -> None:
    """Turn what makes a model fast on CPUs on or off: its kernels, its channels-last layout, and what glibc is told.

    ``CONVMIXER_TIMM_FAST=0`` in the environment turns it off from the start; ``gpu`` there turns both on.

    Args:
        enable: On or off.
        gpu: Take Triton kernels on NVIDIA GPUs as well, for training under autocast; they were measured on one GPU.
            None leaves that as it is, at first off.

    Raises:
        ValueError: If one of them is neither True nor False.
    """
    global _enabled, _gpu_enabled
    for name, value in (("enable", enable), ("gpu", False if gpu is None else gpu)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    _enabled = enable
    if gpu is not None:
        _gpu_enabled = gpu


def enabled(gpu: bool = False) -> bool:
    """Whether a model may be made fast: on CPUs, or on GPUs."""
    return _enabled and (_gpu_enabled or not gpu)


@torch.compiler.assume_constant_result  # the compiler traces within the transforms, and compiles anew for others
def transformed() -> bool:
    """Whether torch.func (vmap, jvp, …) or forward-mode differentiation transforms what runs: the kernels' operators
    don't tell it how."""
    # torch has no public way to ask; torch.autograd.Function itself asks so.
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def batched(grad: torch.Tensor) -> bool:
    """Whether it stands for several gradients: of ``is_grads_batched=True``, whose vmap `transformed` doesn't see."""
    if torch.compiler.is_compiling():
        return False
    return transformed() or torch._C._dispatch_keys(grad).has("Batched")


def recomputes() -> bool:
    """Whether what runs is a part of the backward pass: activations that a checkpoint computes anew."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

"""Activation and batch-norm as one operation, for bf16 training on CPUs.

ConvMixer normalises after every activation, so a training step spends much of its time in GELU and BatchNorm: in
PyTorch five passes over memory forwards and as many backwards, each rounding to bf16 and each keeping a tensor for
the gradient. ``kernels.cpp`` does it in two passes each way, in fp32 between load and store, and keeps the
convolution's output only.
"""

import ctypes

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import get_act_layer
from torch.nn.modules.module import _has_any_global_hook

from . import build

__all__ = ["act_norm", "can_fuse", "conv_act_norm", "has_hooks", "move_running_stats"]


# timm's GELU differs in ignoring an argument; a user's own subclass may compute anything.
_GELUS = (nn.GELU, get_act_layer("gelu"))


class _ActNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, shortcut, gamma, beta, gelu, eps):
        channels = x.shape[1]
        y = torch.empty_like(x)
        mean, var = torch.empty(2, channels, dtype=torch.float32).unbind()
        build.library().act_norm_forward(
            int(gelu),
            torch.get_num_threads(),
            *build.pointers(x, shortcut, gamma, beta, y, mean, var),
            ctypes.c_int64(x.numel() // channels),
            ctypes.c_int64(channels),
            ctypes.c_double(eps),
        )
        return y, mean, var

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, gamma, _, ctx.gelu, ctx.eps = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, gamma, mean, var)

    @staticmethod
    def backward(ctx, grad, *_):
        x, gamma, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: PyTorch's operations are themselves differentiable
            y = F.gelu(x) if ctx.gelu else F.relu(x)
            y = F.batch_norm(y, None, None, gamma, torch.zeros_like(gamma), training=True, eps=ctx.eps)
            x_grad, gamma_grad = torch.autograd.grad(y, (x, gamma), grad, create_graph=True)
            shortcut_grad = grad if ctx.needs_input_grad[1] else None
            return x_grad, shortcut_grad, gamma_grad, grad.sum((0, 2, 3), dtype=gamma.dtype), None, None
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        channels = x.shape[1]
        x_grad = torch.empty_like(x)
        gamma_grad, beta_grad = torch.empty(2, channels, dtype=torch.float32).unbind()
        build.library().act_norm_backward(
            int(ctx.gelu),
            torch.get_num_threads(),
            *build.pointers(x, grad, gamma, mean, var, x_grad, gamma_grad, beta_grad),
            ctypes.c_int64(x.numel() // channels),
            ctypes.c_int64(channels),
            ctypes.c_double(ctx.eps),
        )
        shortcut_grad = grad if ctx.needs_input_grad[1] else None
        return x_grad, shortcut_grad, gamma_grad, beta_grad, None, None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into or comes out of `module`: then it has to be called as it is."""
    return _has_any_global_hook() or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def can_fuse(x: torch.Tensor, act: nn.Module, norm: nn.Module) -> bool:
    """Whether `act_norm` may stand for ``norm(act(x))`` here: bf16 in channels-last on a CPU, exact GELU or ReLU, then
    a BatchNorm2d in training that nobody hooks into, outside of any tracing or compiling."""
    return (
        build.trains_here(x)
        and x.dtype == torch.bfloat16
        and x.shape[1] % build.CHANNELS == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and (type(act) is nn.ReLU or (type(act) in _GELUS and act.approximate == "none"))
        and x.numel() > x.shape[1]  # BatchNorm refuses a single value a channel, in its own words
        and not has_hooks(act)
        and not has_hooks(norm)
        and build.library() is not None
    )


def act_norm(
    x: torch.Tensor, act: nn.Module, norm: nn.BatchNorm2d, shortcut: torch.Tensor | None = None
) -> torch.Tensor:
    """``norm(act(x))``, plus `shortcut` if there is one; running statistics move as `norm` would move them.

    Args:
        x: Output of a convolution, [N, C, H, W], for which `can_fuse` holds.
        act: GELU or ReLU.
        norm: BatchNorm2d in training.
        shortcut: Input of the residual branch, the same shape.

    Returns:
        [N, C, H, W] in the dtype of `x`.
    """
    if shortcut is not None:
        shortcut = shortcut.to(x.dtype).contiguous(memory_format=torch.channels_last)
    y, mean, var = _ActNorm.apply(
        x, shortcut, norm.weight.float(), norm.bias.float(), isinstance(act, nn.GELU), norm.eps
    )
    move_running_stats(norm, mean, var, x.numel() // x.shape[1])
    return y


@torch.no_grad()
def move_running_stats(norm: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    """Move `norm`'s running statistics by a batch's mean and biased variance, each [C] over `count` values."""
    assert norm.momentum is not None and norm.running_mean is not None  # `can_fuse`
    assert norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)


def conv_act_norm(
    x: torch.Tensor, conv: nn.Module, act: nn.Module, norm: nn.Module, shortcut: torch.Tensor | None = None
) -> torch.Tensor:
    """``norm(act(conv(x)))``, plus `shortcut` if there is one, with `act_norm` where it serves."""
    x = conv(x)
    if can_fuse(x, act, norm):
        assert isinstance(norm, nn.BatchNorm2d)
        return act_norm(x, act, norm, shortcut)
    x = norm(act(x))
    return x if shortcut is None else x + shortcut

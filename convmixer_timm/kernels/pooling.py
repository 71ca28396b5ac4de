"""Global average pooling for bf16 training on CPUs.

PyTorch's own sums a channels-last tensor along its slow dimensions and gives a gradient in channels-first layout, which
the layer before has to turn: a tenth of a ConvMixer's step, where its fixed-window pooling takes next to nothing.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d

from . import build
from .act_norm import has_hooks

__all__ = ["average_pool", "can_pool"]


def can_pool(x: torch.Tensor, pool: nn.Module) -> bool:
    """Whether `average_pool` may stand for ``pool(x)`` here: bf16 in channels-last that trains on a CPU, timm's flat
    'avg' pooling that nobody hooks into, outside of any tracing or compiling."""
    return (
        build.trains_here(x)
        and x.dtype == torch.bfloat16
        and x.is_contiguous(memory_format=torch.channels_last)
        and type(pool) is SelectAdaptivePool2d
        and pool.pool_type == "avg"
        and isinstance(pool.flatten, nn.Flatten)
        and not has_hooks(pool)
        and not has_hooks(pool.pool)
    )


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return F.avg_pool2d(x, x.shape[2:]).flatten(1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx, grad):
        grad = grad / (ctx.shape[2] * ctx.shape[3])
        return grad[:, :, None, None].expand(ctx.shape).contiguous(memory_format=torch.channels_last)


def average_pool(x: torch.Tensor) -> torch.Tensor:
    """Means over positions, with the gradient in channels-last: [N, C, H, W] to [N, C] in the dtype of `x`."""
    return _AveragePool.apply(x)

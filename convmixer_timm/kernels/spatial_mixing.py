"""ConvMixer's spatial mixing as one operation, for bf16 training on CPUs.

Depthwise convolution, activation, batch-norm and the residual around them: ``kernels.cpp`` takes the norm's statistics
while it convolves, and backwards never writes the gradient of the convolution's output to memory.
"""

import ctypes

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import build
from .act_norm import can_fuse, has_hooks, move_running_stats
from .depthwise import DepthwiseConv2d

__all__ = ["can_mix", "mix_space"]


class _SpatialMixing(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, gamma, beta, residual, gelu, eps):
        z, y = torch.empty_like(x), torch.empty_like(x)
        mean, var = torch.empty(2, x.shape[1], dtype=torch.float32).unbind()
        build.library().spatial_mixing_forward(
            int(gelu),
            int(residual),
            torch.get_num_threads(),
            *build.pointers(x, weight, bias, gamma, beta, z, y, mean, var),
            *map(ctypes.c_int64, (*x.shape, weight.shape[-1])),
            ctypes.c_double(eps),
        )
        return y, z, mean, var

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, gamma, _, ctx.residual, ctx.gelu, ctx.eps = inputs
        _, z, mean, var = output
        ctx.mark_non_differentiable(z, mean, var)
        ctx.save_for_backward(x, weight, bias, gamma, z, mean, var)

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, bias, gamma, z, mean, var = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: PyTorch's operations are themselves differentiable
            return _differentiable_grads(ctx, grad)
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        x_grad = torch.empty_like(x) if for_x else None
        weight_grad, bias_grad = (torch.zeros_like(t) if for_weight or for_bias else None for t in (weight, bias))
        gamma_grad, beta_grad = torch.empty(2, x.shape[1], dtype=torch.float32).unbind()
        build.library().spatial_mixing_backward(
            int(ctx.gelu),
            int(ctx.residual),
            torch.get_num_threads(),
            *build.pointers(
                x, z, grad, weight, gamma, mean, var, x_grad, weight_grad, bias_grad, gamma_grad, beta_grad
            ),
            *map(ctypes.c_int64, (*x.shape, weight.shape[-1])),
            ctypes.c_double(ctx.eps),
        )
        return x_grad, weight_grad, bias_grad, gamma_grad, beta_grad, None, None, None


def _differentiable_grads(ctx, grad):
    x, weight, bias, gamma, *_ = ctx.saved_tensors
    beta = torch.zeros_like(gamma)
    inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, weight, bias, gamma, beta)]
    x, weight, bias, gamma, beta = inputs
    z = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding="same", groups=len(weight))
    y = F.gelu(z) if ctx.gelu else F.relu(z)
    y = F.batch_norm(y, None, None, gamma, beta, training=True, eps=ctx.eps)
    y = y + x if ctx.residual else y
    return *torch.autograd.grad(y, inputs, grad, create_graph=True), None, None, None


def can_mix(x: torch.Tensor, conv: nn.Module, act: nn.Module, norm: nn.Module) -> bool:
    """Whether `mix_space` may stand for ``norm(act(conv(x)))`` here: `act_norm.can_fuse` holds already for `x`, and
    `conv` is a depthwise convolution in training that nobody hooks into and that would compute in bf16."""
    if type(conv) is not DepthwiseConv2d or conv.bias is None or not can_fuse(x, act, norm) or has_hooks(conv):
        return False
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else conv.weight.dtype
    return dtype == x.dtype and conv.weight.requires_grad


def mix_space(
    x: torch.Tensor, conv: nn.Module, act: nn.Module, norm: nn.Module, residual: bool = False
) -> torch.Tensor:
    """``norm(act(conv(x)))``, plus `x` for a residual; running statistics move as `norm` would move them.

    Args:
        x: Images' features, [N, C, H, W], for which `can_mix` holds.
        conv: Depthwise convolution.
        act: GELU or ReLU.
        norm: BatchNorm2d in training.
        residual: Add `x`.

    Returns:
        [N, C, H, W] in the dtype of `x`.
    """
    assert isinstance(conv, DepthwiseConv2d) and conv.bias is not None and isinstance(norm, nn.BatchNorm2d)  # `can_mix`
    y, _, mean, var = _SpatialMixing.apply(
        x,
        conv.weight.float().contiguous(),
        conv.bias.float(),
        norm.weight.float(),
        norm.bias.float(),
        residual,
        isinstance(act, nn.GELU),
        norm.eps,
    )
    move_running_stats(norm, mean, var, x.numel() // x.shape[1])
    return y

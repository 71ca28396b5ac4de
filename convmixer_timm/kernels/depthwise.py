"""A depthwise convolution whose weight gradient is fast on CPUs.

oneDNN has a depthwise kernel for the forward pass, but in channels-last layout it computes the weight gradient with a
dense kernel, the largest part of a ConvMixer's training step. Here that gradient comes from ``kernels.cpp`` or, without
a compiler, from a grouped convolution with the images folded into the channels, and the input gradient from the
forward kernel. Every other device runs PyTorch's own.
"""

import ctypes

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import build

__all__ = ["DepthwiseConv2d", "depthwise_conv2d", "depthwise_weight_grad"]

_FOLD = 8  # images folded into channels at a time, which bounds the fp32 copies


def _padding(kernel_size: int) -> tuple[int, int]:
    """What ``padding='same'`` puts (before, after) a side."""
    return (kernel_size - 1) // 2, kernel_size // 2


@torch.library.custom_op("convmixer_timm::depthwise_weight_grad", mutates_args=())
def depthwise_weight_grad(x: torch.Tensor, grad: torch.Tensor, kernel_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of a stride-1 depthwise convolution with ``padding='same'`` for its weight and bias.

    Args:
        x: Input of the convolution, [N, C, H, W].
        grad: Gradient of its output, the same shape and dtype.
        kernel_size: Side k of the square kernel.

    Returns:
        The weight's gradient [C, 1, k, k] and the bias's [C], in the dtype of `x`.
    """
    n, c, h, w = x.shape
    lib = build.library() if x.dtype in (torch.float32, torch.bfloat16) and c % build.CHANNELS == 0 else None
    if lib is None:
        return _folded_weight_grad(x, grad, kernel_size)
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    weight_grad = torch.zeros(c, 1, kernel_size, kernel_size, dtype=torch.float32)
    bias_grad = torch.zeros(c, dtype=torch.float32)
    lib.depthwise_weight_grad(
        int(x.dtype == torch.bfloat16),
        torch.get_num_threads(),
        *build.pointers(x, grad, weight_grad, bias_grad),
        *map(ctypes.c_int64, (n, c, h, w, kernel_size)),
    )
    return weight_grad.to(x.dtype), bias_grad.to(x.dtype)


@depthwise_weight_grad.register_fake
def _(x, grad, kernel_size):
    return x.new_empty(x.shape[1], 1, kernel_size, kernel_size), x.new_empty(x.shape[1])


def _folded_weight_grad(x, grad, kernel_size):
    """The same in PyTorch: correlate every (image, channel) of `x` with its gradient, then sum over images."""
    before, after = _padding(kernel_size)
    x = F.pad(x, (before, after, before, after)).contiguous()
    grad = grad.contiguous()
    h, w = grad.shape[2:]
    accumulate = torch.promote_types(x.dtype, torch.float32)  # bf16 would round each image's part
    total = torch.zeros(x.shape[1], kernel_size, kernel_size, dtype=accumulate)
    for xs, gs in zip(x.split(_FOLD), grad.split(_FOLD), strict=True):
        xs, gs = xs.to(accumulate), gs.to(accumulate)
        images, channels = xs.shape[:2]
        groups = images * channels
        taps = F.conv2d(xs.reshape(1, groups, *xs.shape[2:]), gs.reshape(groups, 1, h, w), groups=groups)
        total += taps.view(images, channels, kernel_size, kernel_size).sum(0)
    return total.unsqueeze(1).to(x.dtype), grad.sum((0, 2, 3), dtype=accumulate).to(x.dtype)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return F.conv2d(x, weight, bias, padding="same", groups=weight.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: PyTorch's operation is itself differentiable
            return _pytorch_grads(x, weight, grad, [for_x, for_weight, for_bias and ctx.has_bias], ctx.has_bias)
        x_grad = weight_grad = bias_grad = None
        if for_x:
            x_grad = _input_grad(x, weight, grad, ctx.has_bias)
        if for_weight:
            weight_grad, bias_grad = depthwise_weight_grad(x, grad, weight.shape[-1])
            weight_grad = torch.empty_like(weight).copy_(weight_grad)  # in its strides, which DDP's buckets expect
        elif for_bias:
            bias_grad = grad.sum((0, 2, 3))
        return x_grad, weight_grad, bias_grad if for_bias else None


def _input_grad(x, weight, grad, has_bias):
    dim, kernel_size = weight.shape[0], weight.shape[-1]
    if kernel_size % 2 == 0:  # 'same' pads such a kernel unevenly
        return _pytorch_grads(x, weight, grad, [True, False, False], has_bias)[0]
    # The same sum as a forward convolution, the faster kernel. In fp32 PyTorch asks oneDNN only if there is a bias.
    return F.conv2d(grad, weight.flip(2, 3), grad.new_zeros(dim), padding=kernel_size // 2, groups=dim)


def _pytorch_grads(x, weight, grad, mask, has_bias):
    dim, kernel_size = weight.shape[0], weight.shape[-1]
    before, after = _padding(kernel_size)
    h, w = x.shape[2:]
    x = F.pad(x, (0, after - before, 0, after - before)) if after > before else x  # as conv2d's own 'same' does
    x_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        grad, x, weight, [dim] if has_bias else None, [1, 1], [before, before], [1, 1], False, [0, 0], dim, mask
    )
    return x_grad[..., :h, :w] if mask[0] else None, weight_grad, bias_grad


def _fast(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the weight gradient will be wanted, on a CPU, from code that runs now rather than is being traced."""
    return (
        build.enabled()
        and isinstance(x, torch.Tensor)  # not an FX proxy
        and x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32, torch.float64)
        and not (x.dtype == torch.float64 and torch.is_autocast_enabled("cpu"))  # which leaves float64 alone
        and torch.is_grad_enabled()
        and weight.requires_grad
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
        and not build.transformed()
        and (torch.compiler.is_compiling() or not (build.watched(x) or build.watched(weight)))
    )


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Stride-1 depthwise convolution with ``padding='same'``: `torch.nn.functional.conv2d`, trained fast on CPUs.

    Args:
        x: Input, [N, C, H, W].
        weight: One k x k filter a channel, [C, 1, k, k].
        bias: [C], or None.

    Returns:
        Output, [N, C, H, W].
    """
    if not _fast(x, weight):
        return F.conv2d(x, weight, bias, padding="same", groups=weight.shape[0])
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _DepthwiseConv2d.apply(x, weight, bias)


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one k x k filter a channel, stride 1, ``padding='same'``, that calls `depthwise_conv2d`."""

    def __init__(self, dim: int, kernel_size: int, bias: bool = True, device=None, dtype=None):
        super().__init__(dim, dim, kernel_size, groups=dim, padding="same", bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        return depthwise_conv2d(x, self.weight, self.bias)

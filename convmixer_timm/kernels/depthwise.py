"""A depthwise convolution whose weight gradient is fast on CPUs.

oneDNN has a depthwise kernel for the forward pass, but in channels-last layout it computes the weight gradient with a
dense kernel, the largest part of a ConvMixer's training step. Here that gradient comes from ``kernels.cpp`` or, without
a compiler, from a grouped convolution with the images folded into the channels, and the input gradient from the
forward kernel.
"""

import torch
import torch.nn.functional as F

from . import build, operators, switch

__all__ = ["depthwise_conv2d"]

_FOLD = 8  # images folded into channels at a time, which bounds the fp32 copies


def _padding(kernel_size: int) -> tuple[int, int]:
    """What ``padding='same'`` puts (before, after) a side."""
    return (kernel_size - 1) // 2, kernel_size // 2


def _weight_grad(x, grad, kernel_size):
    """Gradients for weight and bias, in the dtype of `x`."""
    if build.available() and operators.takes(x):
        grads = operators.depthwise_weight_grad(x, grad, kernel_size)
    else:
        grads = _folded_weight_grad(x, grad, kernel_size)
    return [g.to(x.dtype) for g in grads]


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
    return total.unsqueeze(1), grad.sum((0, 2, 3), dtype=accumulate)


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
        # An autocast that is still on around the backward pass, as the compiler has it, would cast what isn't cast.
        with torch.autocast("cpu", enabled=False):
            return _grads(*ctx.saved_tensors, grad, ctx.needs_input_grad, ctx.has_bias)


def _grads(x, weight, grad, needed, has_bias):
    for_x, for_weight, for_bias = needed
    if torch.is_grad_enabled() or switch.batched(grad):  # PyTorch can differentiate its own operation, and batch it
        return _pytorch_grads(x, weight, grad, [for_x, for_weight, for_bias], has_bias)
    x_grad = weight_grad = bias_grad = None
    if for_x:
        x_grad = _input_grad(x, weight, grad, has_bias)
    if for_weight:
        weight_grad, bias_grad = _weight_grad(x, grad, weight.shape[-1])
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
    if mask[0] and after > before:
        x_grad = x_grad[..., :h, :w]
    return x_grad if mask[0] else None, weight_grad, bias_grad


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Stride-1 depthwise convolution with ``padding='same'``: `torch.nn.functional.conv2d`, trained fast on CPUs.

    Under autocast it casts as conv2d does.

    Args:
        x: Input, [N, C, H, W], on a CPU.
        weight: One k x k filter a channel, [C, 1, k, k].
        bias: [C], or None.

    Returns:
        Output, [N, C, H, W].
    """
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _DepthwiseConv2d.apply(x, weight, bias)

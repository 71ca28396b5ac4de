"""The kernels of ``kernels.cpp`` as PyTorch operators, ``torch.ops.convmixer_timm.*``.

One signature each. Its function checks the arguments and makes the results' tensors: that is what the operator does
where tensors have no data (`FakeTensorMode`, `torch.compile`), and on a CPU the kernel then fills them. Gradients stand
beside the layer that they belong to (depthwise.py, act_norm.py, spatial_mixing.py).

Feature maps are [N, C, H, W] in fp32 or bf16, of any strides; they are worked on, and come out, in channels-last.
Everything else is fp32; a convolution of bf16 rounds its filters to bf16 where the processor multiplies in it, as
PyTorch's does.
"""

import ctypes
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import build

__all__ = [
    "act_norm",
    "act_norm_backward",
    "act_norm_inference",
    "depthwise_weight_grad",
    "spatial_mixing",
    "spatial_mixing_backward",
    "spatial_mixing_inference",
    "takes",
]

_CHANNELS = 16  # the kernels take multiples of so many channels
_DTYPES = (torch.float32, torch.bfloat16)


def _operator(results: Callable) -> torch.library.CustomOpDef:
    """Registers the kernel of the same name with the signature of `results`, which checks the arguments (the first is a
    feature map) and makes the tensor or tensors that the kernel writes."""
    name = results.__name__
    needed = [p.name if p.annotation is Tensor else "" for p in inspect.signature(results).parameters.values()]

    @functools.wraps(results)
    def checked(*arguments):
        for parameter, argument in zip(needed, arguments, strict=True):
            if parameter and argument is None:  # PyTorch lets it through
                raise ValueError(f"{name} needs a tensor for {parameter}, got None.")
        return results(*arguments)

    def kernel(x, *arguments):
        out = checked(x, *arguments)
        everything = (x, *arguments, *((out,) if isinstance(out, Tensor) else out))
        # Copies in the right layout live until the kernel is done.
        keep = [_laid_out(a, x) if isinstance(a, Tensor) else a for a in everything]
        function = getattr(build.require(), name)
        function.restype = ctypes.c_bool
        if not function(*map(_c, (x.dtype == torch.bfloat16, torch.get_num_threads(), *x.shape, *keep))):
            raise RuntimeError(f"{name}: not enough memory for {list(x.shape)}")  # as PyTorch's allocator has it
        return out

    schema = torch.library.infer_schema(results, mutates_args=())
    operator = torch.library.custom_op(
        f"convmixer_timm::{name}", kernel, mutates_args=(), device_types="cpu", schema=schema
    )
    operator.register_fake(checked)
    operator.__doc__ = results.__doc__
    return operator


def _laid_out(t: Tensor, x: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if t.shape == x.shape else torch.contiguous_format)


def _c(argument: Tensor | float | None) -> ctypes.c_void_p | ctypes.c_double | ctypes.c_int64:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr() if argument is not None and argument.numel() else None)
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def takes(x: Tensor) -> bool:
    """Whether the kernels take such a feature map."""
    kind = x.dim() == 4 and x.dtype in _DTYPES and x.device.type in ("cpu", "meta")
    return kind and x.shape[1] % _CHANNELS == 0 and x.numel() > 0


def _check_maps(x: Tensor, *others: Tensor | None) -> None:
    """Refuses what isn't a feature map, or is none of the same kind as the first."""
    if not takes(x):
        raise ValueError(
            f"The kernels take [N, C, H, W] in float32 or bfloat16 on a CPU, not empty, C a multiple of {_CHANNELS}; "
            f"got {list(x.shape)} in {x.dtype} on {x.device}."
        )
    for t in others:
        if t is not None and (t.shape != x.shape or t.dtype != x.dtype or t.device != x.device):
            raise ValueError(
                f"Feature maps must agree; got {list(x.shape)} in {x.dtype} on {x.device} and "
                f"{list(t.shape)} in {t.dtype} on {t.device}."
            )


def _check_parameters(x: Tensor, shape: tuple[int, ...], *parameters: Tensor) -> None:
    for p in parameters:
        if tuple(p.shape) != shape or p.dtype != torch.float32 or p.device != x.device:
            raise ValueError(
                f"Expected {list(shape)} in float32 on {x.device}, got {list(p.shape)} in {p.dtype} on {p.device}."
            )


def _map(x: Tensor) -> Tensor:
    """What a kernel writes a feature map like `x` to."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


@_operator
def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Gradient of a stride-1 depthwise convolution with ``padding='same'`` for its weight and bias.

    Args:
        x: Input of the convolution, [N, C, H, W].
        grad: Gradient of its output, the same shape and dtype.
        kernel_size: Side k of the square kernel.

    Returns:
        The weight's gradient [C, 1, k, k] and the bias's [C], in fp32.
    """
    _check_maps(x, grad)
    return _fp32(x, x.shape[1], 1, kernel_size, kernel_size), _fp32(x, x.shape[1])


@_operator
def act_norm(
    x: Tensor, shortcut: Tensor | None, gamma: Tensor, beta: Tensor, gelu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch-norm, with the batch's own statistics, of GELU (or ReLU) of `x`, plus `shortcut`.

    Returns:
        The feature map, and mean [C] and biased variance [C] of the activation.
    """
    _check_maps(x, shortcut)
    channels = x.shape[1]
    _check_parameters(x, (channels,), gamma, beta)
    return _map(x), _fp32(x, channels), _fp32(x, channels)


@_operator
def act_norm_inference(
    x: Tensor,
    shortcut: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    gelu: bool,
    eps: float,
) -> Tensor:
    """The feature map of `act_norm` by `mean` and `var` instead of the batch's own."""
    _check_maps(x, shortcut)
    _check_parameters(x, (x.shape[1],), gamma, beta, mean, var)
    return _map(x)


@_operator
def act_norm_backward(
    x: Tensor, grad: Tensor, gamma: Tensor, mean: Tensor, var: Tensor, gelu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `act_norm` for `x`, `gamma` and `beta`."""
    _check_maps(x, grad)
    channels = x.shape[1]
    _check_parameters(x, (channels,), gamma, mean, var)
    return _map(x), _fp32(x, channels), _fp32(x, channels)


@_operator
def spatial_mixing(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    kernel_size: int,
    residual: bool,
    gelu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depthwise convolution (``padding='same'``), GELU or ReLU, batch-norm, and on request plus `x`.

    Returns:
        The feature map, the convolution's output, and mean [C] and biased variance [C] of the activation.
    """
    _check_maps(x)
    channels = x.shape[1]
    _check_parameters(x, (channels, 1, kernel_size, kernel_size), weight)
    _check_parameters(x, (channels,), bias, gamma, beta)
    return _map(x), _map(x), _fp32(x, channels), _fp32(x, channels)


@_operator
def spatial_mixing_inference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    kernel_size: int,
    residual: bool,
    gelu: bool,
    eps: float,
) -> Tensor:
    """The feature map of `spatial_mixing` by `mean` and `var` instead of the batch's own; it has no gradient."""
    _check_maps(x)
    channels = x.shape[1]
    _check_parameters(x, (channels, 1, kernel_size, kernel_size), weight)
    _check_parameters(x, (channels,), bias, gamma, beta, mean, var)
    return _map(x)


@_operator
def spatial_mixing_backward(
    x: Tensor,
    z: Tensor,
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor,
    mean: Tensor,
    var: Tensor,
    kernel_size: int,
    residual: bool,
    gelu: bool,
    eps: float,
    for_x: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `spatial_mixing` for `x` (if `for_x`), `weight` and `bias` (if `for_weight`; empty where not asked
    for), `gamma` and `beta`; `z` is the convolution's output."""
    _check_maps(x, z, grad)
    channels = x.shape[1]
    _check_parameters(x, (channels, 1, kernel_size, kernel_size), weight)
    _check_parameters(x, (channels,), gamma, mean, var)
    return (
        _map(x) if for_x else x.new_empty(0),
        _fp32(x, *(weight.shape if for_weight else (0,))),
        _fp32(x, channels if for_weight else 0),
        _fp32(x, channels),
        _fp32(x, channels),
    )


# Multiply-adds count twice, as PyTorch counts a convolution's; activation and norm count nothing, as there.


def _convolution_flops(x: torch.Size, kernel_size: int) -> int:
    return 2 * x.numel() * kernel_size**2


@register_flop_formula(torch.ops.convmixer_timm.depthwise_weight_grad)
def _(x_shape, grad_shape, kernel_size, *args, out_shape=None, **kwargs) -> int:
    return _convolution_flops(x_shape, kernel_size)


@register_flop_formula([torch.ops.convmixer_timm.spatial_mixing, torch.ops.convmixer_timm.spatial_mixing_inference])
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _convolution_flops(x_shape, weight_shape[-1])


@register_flop_formula(torch.ops.convmixer_timm.spatial_mixing_backward)
def _(x_shape, z_shape, grad_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    for_x, for_weight = args[-2:]
    return _convolution_flops(x_shape, weight_shape[-1]) * (for_x + for_weight)

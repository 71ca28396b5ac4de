"""Where the Triton kernels may stand for PyTorch's operations: on a GPU, if the user wants it and they work there."""

import functools
import logging

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import one_line
from . import switch

__all__ = ["channel_mixing", "is_gpu", "pays", "spatial_mixing", "takes"]

_logger = logging.getLogger(__name__)
_DTYPES = (torch.bfloat16, torch.float16)
_LEAST = 2**25  # values; for fewer, launching takes the host longer than PyTorch takes in all (benchmarks/README.md)


def is_gpu(x: Tensor) -> bool:
    """Whether it lies on a GPU of PyTorch's CUDA."""
    return x.is_cuda


def takes(x: Tensor) -> bool:
    """Whether the kernels are wanted, and work, for what trains with `x` under autocast."""
    kind = x.device.type
    return (
        switch.enabled(gpu=True)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()  # a mode, to count operations say, sees PyTorch's alone
        and torch.is_autocast_enabled(kind)
        and (dtype := torch.get_autocast_dtype(kind)) in _DTYPES
        and _work(x.device, dtype)
    )


def pays(values: int) -> bool:
    """Whether a layer's map, of that many values over the whole batch, is large enough for the kernels."""
    return values >= _LEAST


def spatial_mixing(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, residual: bool, gelu: bool) -> Tensor:
    """See `triton_kernels.spatial_mixing`; `x` of any type and strides."""
    from .triton_kernels import spatial_mixing

    return spatial_mixing(_laid_out(x), conv, norm, residual, gelu)


def channel_mixing(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, gelu: bool) -> Tensor:
    """``norm(act(conv(x)))`` of a convolution whose patches don't overlap, as 1x1; `x` of any type and strides."""
    from .triton_kernels import channel_mixing

    patch = conv.stride[0]
    height, width = (side // patch * patch for side in x.shape[2:])  # as conv2d leaves out the rest
    return channel_mixing(F.pixel_unshuffle(_laid_out(x[..., :height, :width]), patch), conv, norm, gelu)


def _laid_out(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype(x.device.type)).contiguous()


@functools.cache
def _work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on a GPU and give what PyTorch gives: tried once, on small layers of each kind."""
    try:
        # The user's seeds, default device and saved-tensor hooks (a checkpoint's, say) have nothing to do with it.
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        ):
            errors = [_error(device, dtype, images, width) for images, width in ((4, 12), (1, 40))]
    except Exception as reason:  # no Triton, a GPU that it doesn't know, …
        problem = one_line(reason)
    else:
        # bf16 rounds to 0.004, and sums that nearly cancel keep less; what is wrong is off by one, or NaN.
        if all(error < 0.1 for error in errors):
            return True
        problem = f"their results are off by {' and '.join(f'{error:.2g}' for error in errors)}"
    _logger.warning("The GPU kernels don't work on %s, PyTorch's operations run instead: %s", device, problem)
    return False


def _error(device: torch.device, dtype: torch.dtype, images: int, width: int) -> float:
    """The greatest relative error of the kernels' results, gradients and statistics against PyTorch in fp32."""
    torch.default_generator.manual_seed(0)
    conv, norm = nn.Conv2d(4, 4, 5, groups=4, padding="same").to(device), nn.BatchNorm2d(4).to(device)
    conv2, norm2 = nn.Conv2d(4, 8, 2, stride=2).to(device), nn.BatchNorm2d(8).to(device)
    x, grad = torch.randn(images, 4, 12, width).to(device), torch.randn(images, 8, 6, width // 2).to(device)

    def results(kernels: bool) -> list[Tensor]:
        inputs = [x.detach().requires_grad_(), *(p for m in (conv, norm, conv2, norm2) for p in m.parameters())]
        for n in (norm, norm2):
            n.reset_running_stats()
        with torch.autocast(device.type, dtype, enabled=kernels):
            if kernels:
                y = channel_mixing(spatial_mixing(inputs[0], conv, norm, True, True), conv2, norm2, True)
            else:
                y = norm2(F.gelu(conv2(norm(F.gelu(conv(inputs[0]))) + inputs[0])))
        grads = torch.autograd.grad(y, inputs, grad.to(y.dtype))
        return [y, *grads, *(b * 1.0 for n in (norm, norm2) for b in n.buffers())]

    pairs = zip(results(True), results(False), strict=True)
    return torch.stack([(a.float() - b).norm() / b.norm() for a, b in pairs]).max().item()  # of a NaN too

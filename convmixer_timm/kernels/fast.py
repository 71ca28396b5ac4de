"""ConvMixer's layers in fewer passes over memory, and when that may be.

Each class here goes in front of a layer of the architecture, whose `forward` says what is computed. Called on a CPU,
the layer computes the same by the kernels of this folder, or at least in channels-last, where PyTorch's CPU operations
are faster, and in fp32 where they have no instructions for the type; on a GPU, by the Triton kernels, if the user asked
for them. Otherwise, or where somebody looks on (a tracer, a hook, a tensor subclass), its `forward` runs.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import drop_path, get_act_layer
from torch import Tensor
from torch.nn.modules import module as _module

from . import build, gpu, memory, operators, switch
from .act_norm import act_norm
from .depthwise import depthwise_conv2d
from .operators import act_norm_inference, spatial_mixing_inference
from .spatial_mixing import spatial_mixing

__all__ = ["SLOW_DTYPES", "Block", "ConvActNorm", "GlobalPool", "Residual", "as_given", "settle", "untouched"]

# Hooks of every module; torch's own function for the question came after the oldest torch that this runs with.
_GLOBAL_HOOKS = (
    _module._global_forward_pre_hooks,
    _module._global_forward_hooks,
    _module._global_backward_pre_hooks,
    _module._global_backward_hooks,
)

# timm's GELU is always the exact one; a user's own subclass may compute anything.
_GELUS = (nn.GELU, get_act_layer("gelu"))


def _computes_in(name: str) -> bool:
    """Whether oneDNN has instructions for the type, "bf16" or "fp16", on this processor."""
    if not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()):
        return False
    # With an AVX-512 that has no bf16, Intel's from Skylake to Ice Lake, oneDNN says yes and converts as it goes.
    return name != "bf16" or not torch.cpu._is_avx512_supported() or torch.cpu._is_avx512_bf16_supported()


# Types in which convolutions take longer on this processor than in fp32: twice as long with AVX-512, ten times without.
SLOW_DTYPES = {dtype for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")) if not _computes_in(name)}

# Evaluation has the kernels built once it has taken about as long as that: after so many values in feature maps, which
# are some 2000 images of 32 pixels by ConvMixer-256/8. Small maps don't count: who has single images waits for each.
_LARGE, _MANY = 1 << 20, 1 << 31
_evaluated = 0
# Compiled evaluation calls the kernels for feature maps of so many values, of 16 or, in bf16, 4 images of 32 pixels by
# ConvMixer-256/8. For smaller ones the calls cost more than they save, and everything is left to the compiler.
_WORTH_A_CALL = {torch.float32: 1 << 20, torch.bfloat16: 1 << 18}
# An evaluation that is recorded for a gradient, as it is where `torch.no_grad()` was forgotten, calls them for maps of
# so many values, of 2 such images: each recorded call costs some 0.1 ms more.
_WORTH_RECORDING = 1 << 17
# The largest kernels by which the loops of this folder evaluate; with larger ones PyTorch's fp32 convolution is faster.
_WIDEST = 21


class _Layer(nn.Module):
    _forward: Callable[..., Tensor]  # that of the layer which this stands before

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "_forward") and cls.forward is not nn.Module.forward:
            cls._forward = cls.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs.get("x", kwargs.get("input"))
        if len(args) + len(kwargs) != 1 or not isinstance(x, Tensor) or (not self.training and _is_little(x)):
            return super().__call__(*args, **kwargs)
        if not _runs_here(x) or not _is_as_made(self) or self._stays(x):
            return super().__call__(*args, **kwargs)
        if not gpu.is_gpu(x):
            memory.keep_freed()
            if self.training and torch.is_grad_enabled():
                # Even where all norms are frozen: the first backward pass would, and a checkpoint that a layer is under
                # would go another way from there on.
                build.available()
            x = _turned(x)
        return self._fast(x)

    def _stays(self, x: Tensor) -> bool:
        """Whether an evaluation is faster in the layout that it came in: with norms that lose more by channels-last
        than the convolutions gain."""
        return not self.training and _is_grouped(self._norm()) and not gpu.is_gpu(x) and not _is_slow(_precision(x))

    def _norm(self) -> nn.Module | None:
        """The layer's last norm, whose kind is that of the others."""
        return self[-1] if isinstance(self, nn.Sequential) and len(self) else None

    def _fast(self, x: Tensor) -> Tensor:
        """The layer of `x`, [N, C, H, W], on a CPU in channels-last."""
        raise NotImplementedError


class ConvActNorm(_Layer):
    """Before a sequence of convolution, activation and norm."""

    def _fast(self, x):
        if len(self) != 3:  # a part of one, or somebody put a layer in
            return self.forward(x)
        return _conv_act_norm(x, *self)


class Residual(_Layer):
    """Before a module that adds its input to its `fn`, a `ConvActNorm`, with stochastic depth `drop_path`."""

    def _norm(self):
        return self.fn._norm() if isinstance(self.fn, ConvActNorm) else None

    def _fast(self, x):
        plain = type(self.drop_path) is nn.Identity and untouched(self.drop_path)
        if plain and isinstance(self.fn, ConvActNorm) and len(self.fn) == 3 and _is_as_made(self.fn):
            return _conv_act_norm(x, *self.fn, residual=True)
        return self.drop_path(self.fn(x)) + x


class Block(_Layer):
    """Before a sequence of spatial mixing, convolution, activation and norm, the latter with or without a `residual`,
    with stochastic depth at `drop_rate`."""

    def _fast(self, x):
        if len(self) != 4:
            return self.forward(x)
        spatial, *channel = self
        x = spatial(x)
        if self.residual and self.training and self.drop_rate > 0:
            return drop_path(_conv_act_norm(x, *channel), self.drop_rate, training=True) + x
        return _conv_act_norm(x, *channel, residual=self.residual)


class GlobalPool(_Layer):
    """Before timm's pooling. PyTorch's global average gives a gradient in channels-first, which the layer before has to
    turn: a tenth of a step. Windows keep the layout; one over rows, then one over columns is faster than one over both,
    and rounds less."""

    def _stays(self, x):
        return not self.training and x.is_contiguous()  # as after layers that stayed

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        # Without pooling the layout is its caller's.
        return super().__call__(*args, **kwargs) if self.pool_type else nn.Module.__call__(self, *args, **kwargs)

    def _fast(self, x):
        # Compiled, windows of one size would be for that size alone.
        here = not gpu.is_gpu(x) and not torch.compiler.is_compiling() and untouched(self.pool, self.flatten)
        average = type(self.pool) is nn.AdaptiveAvgPool2d and self.pool.output_size in (1, (1, 1))
        if here and average and isinstance(self.flatten, nn.Flatten):
            return F.avg_pool2d(F.avg_pool2d(x, (1, x.shape[3])), (x.shape[2], 1)).flatten(1)
        return self.forward(x)


class _Turn(torch.autograd.Function):
    """To channels-last, with a gradient in the usual layout: PyTorch's passes it on as it lies."""

    @staticmethod
    def forward(ctx, x):
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


def _turned(x: Tensor) -> Tensor:
    lies_so = x.is_contiguous(memory_format=torch.channels_last)
    if x.requires_grad and not lies_so and not torch.compiler.is_compiling():
        turned: Tensor = _Turn.apply(x)  # type: ignore[no-untyped-call]
        return turned
    return x.contiguous(memory_format=torch.channels_last)


def settle(x: Tensor) -> None:
    """Has the kernels built, if they can be, before layers run that a checkpoint computes anew: a layer in evaluation
    would go another way then, if a layer in training had them built in between."""
    if torch.is_grad_enabled() and _runs_here(x) and not gpu.is_gpu(x):
        build.available()


def as_given(features: Tensor, images: Tensor) -> Tensor:
    """`features` in the memory format of `images`, where a layer before left it."""
    if torch.jit.is_scripting():
        return features
    else:
        # Strides tell the format of a part of a batch too; channels that are expanded have one of 0.
        if _runs_here(features) and not 0 < images.stride(1) < images.stride(3):
            return features.contiguous()
        return features


def _is_little(x: Tensor) -> bool:
    """Whether `x`, of an evaluation, is too small for the kernels to pay; if they aren't built, for the layout alone.

    Asked first, as all the other questions take time that shows where a single image goes through a small model.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.numel() >= _LARGE:
        return False
    recorded = torch.is_grad_enabled() and x.numel() < _WORTH_RECORDING
    return (recorded or not build.available(build=False)) and not _is_slow(_precision(x))


def _plain(t: Tensor) -> bool:
    """Whether it is no subclass of a tensor, which would tell operations itself what to do."""
    return type(t) in (Tensor, nn.Parameter)


def _runs_here(x: Tensor) -> bool:
    """Whether code that runs now, or is compiled, rather than is traced or transformed, works on a CPU with `x`, or on
    a GPU whose kernels are wanted."""
    if not switch.enabled() or not _plain(x) or torch.jit.is_tracing():
        return False
    on_gpu = gpu.is_gpu(x)
    if x.dtype == torch.float64:  # which oneDNN hasn't: PyTorch's own operations are slower in channels-last
        return False
    compiles = torch.compiler.is_compiling()
    # What `torch.compiler.is_exporting` gives; compiled by an older torch, 2.10 say, that function always says yes.
    if compiles and torch.compiler._is_exporting_flag:  # a program for anywhere
        return False
    if not (on_gpu or x.is_cpu) or x.dim() != 4 or x.numel() == 0 or switch.transformed():
        return False
    if on_gpu:
        return gpu.takes(x)
    return not compiles or torch.is_grad_enabled() or _is_slow(_precision(x)) or build.available()


def _precision(x: Tensor) -> torch.dtype:
    """The type that a convolution takes `x`, features or weights, in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _is_slow(dtype: torch.dtype) -> bool:
    """Whether convolutions in the type take longer than in fp32; backwards PyTorch's in fp16 have no instructions."""
    return dtype in SLOW_DTYPES or (dtype == torch.float16 and torch.is_grad_enabled())


def untouched(*modules: nn.Module) -> bool:
    """Whether nobody hooks into the modules, compiles them or has put another `forward` in place of theirs: such a
    module has to be called as it is."""
    return not any(_GLOBAL_HOOKS) and not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or m._compiled_call_impl is not None
        or "forward" in m.__dict__
        for m in modules
    )


def _is_as_made(layer: _Layer) -> bool:
    """Whether a call of the layer would compute what this package made it for: nobody's subclass, hook or patch."""
    return type(layer).forward is type(layer)._forward and untouched(layer)


def _conv_act_norm(x: Tensor, conv: nn.Module, act: nn.Module, norm: nn.Module, residual: bool = False) -> Tensor:
    """``norm(act(conv(x)))``, plus `x` for a residual."""
    if gpu.is_gpu(x):
        if (y := _on_gpu(x, conv, act, norm, residual)) is not None:
            return y
        z = conv(x)
    elif not _fuses(norm, act):
        z = _convolution(x, conv)
    elif _mixes(conv, x, norm) and _available(norm):
        weights = *_parameters(conv), *_parameters(norm)
        settings = residual, _is_gelu(act), norm.eps
        if not norm.training:
            return spatial_mixing_inference(x, *weights, *_running_stats(norm), conv.weight.shape[-1], *settings)
        y, mean, var = spatial_mixing(x, *weights, *settings)
        _move_running_stats(norm, mean, var, x.numel() // x.shape[1])
        return y
    elif _takes(z := _convolution(x, conv), norm) and _available(norm, z.numel()):
        shortcut = x if residual and x.dtype == z.dtype else None
        if norm.training:
            y, mean, var = act_norm(z, *_parameters(norm), _is_gelu(act), norm.eps, shortcut)
            _move_running_stats(norm, mean, var, z.numel() // z.shape[1])
        else:
            y = act_norm_inference(z, shortcut, *_parameters(norm), *_running_stats(norm), _is_gelu(act), norm.eps)
        return y + x if residual and shortcut is None else y
    # In fp32 group norms are as fast in channels-last as they are otherwise.
    apart = (
        _is_grouped(norm) and not gpu.is_gpu(x) and (z.dtype != torch.float32 or isinstance(norm, nn.InstanceNorm2d))
    )
    z = act(z.contiguous() if apart else z)  # each result frees the one before
    z = norm(z)
    z = _turned(z) if apart else z
    return z + x if residual else z


def _on_gpu(x: Tensor, conv: nn.Module, act: nn.Module, norm: nn.Module, residual: bool) -> Tensor | None:
    """The same by a GPU's kernels; None where they don't do it."""
    if not _fuses(norm, act) or not norm.training or type(conv) is not nn.Conv2d or conv.bias is None:
        return None
    if not conv.weight.dtype == norm.weight.dtype == torch.float32 or not _plain(conv.weight) or not untouched(conv):
        return None
    if (x.shape[1], x.device) != (conv.in_channels, conv.weight.device) or conv.out_channels != norm.num_features:
        return None  # PyTorch says what is wrong
    assert norm.running_mean is not None and norm.running_var is not None  # `_fuses`
    if not (norm.running_mean.is_contiguous() and norm.running_var.is_contiguous()):
        return None
    height, width = (side // stride for side, stride in zip(x.shape[2:], conv.stride, strict=True))
    if not gpu.pays(len(x) * conv.out_channels * height * width):
        return None
    if _is_depthwise(conv) and conv.kernel_size[0] in range(1, 64, 2) and x.numel() > x.shape[1]:
        return gpu.spatial_mixing(x, conv, norm, residual, _is_gelu(act))
    if _embeds_patches(conv) and not residual and len(x) * height * width > 1:
        return gpu.channel_mixing(x, conv, norm, _is_gelu(act))
    return None


def _is_grouped(norm: nn.Module | None) -> bool:
    """Whether a norm is over few channels of one image, for which PyTorch is slow in channels-last, most so in bf16."""
    return isinstance(norm, nn.InstanceNorm2d) or (isinstance(norm, nn.GroupNorm) and norm.num_groups > 1)


def _embeds_patches(conv: nn.Conv2d) -> bool:
    """Whether the patches that it looks at are squares side by side, single positions say."""
    return (
        conv.kernel_size == conv.stride == (conv.stride[0],) * 2
        and (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)
        and conv.padding_mode == "zeros"
    )


def _convolution(x: Tensor, conv: nn.Module) -> Tensor:
    if _widens(conv, x):
        convolve = depthwise_conv2d if _is_trained_depthwise(conv) else conv._conv_forward
        with torch.autocast("cpu", enabled=False):
            z = convolve(x.float(), conv.weight.float(), None if conv.bias is None else conv.bias.float())
        return z.to(_precision(x))
    return depthwise_conv2d(x, conv.weight, conv.bias) if _is_trained_depthwise(conv) else conv(x)


def _is_trained_depthwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    return torch.is_grad_enabled() and _is_depthwise(conv) and _is_trained(conv)


def _is_trained(conv: nn.Conv2d) -> bool:
    """Whether any of it trains, be it the bias alone."""
    return conv.weight.requires_grad or (conv.bias is not None and conv.bias.requires_grad)


def _widens(conv: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether fp32 may stand for the type that the convolution would compute in, and is faster."""
    if not _is_slow(_precision(x)):
        return False
    if type(conv) is not nn.Conv2d or not _plain(conv.weight) or not untouched(conv):
        return False
    types = {t.dtype for t in (x, conv.weight, conv.bias) if t is not None}
    # Of others, and of types that don't agree, PyTorch says what is wrong.
    autocast = torch.is_autocast_enabled("cpu")
    return types <= {torch.float32, torch.bfloat16, torch.float16} if autocast else len(types) == 1


def _is_depthwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding in ("same", tuple((side - 1) / 2 for side in conv.kernel_size))
        and (conv.stride, conv.dilation, conv.padding_mode) == ((1, 1), (1, 1), "zeros")
        and conv.weight.shape[2] == conv.weight.shape[3]
        and _plain(conv.weight)
        and untouched(conv)
    )


def _available(norm: nn.BatchNorm2d, values: int = 0) -> bool:
    """Whether the kernels are there, for a feature map of so many values; training, compiling and a long evaluation
    build them."""
    global _evaluated
    if norm.training or torch.compiler.is_compiling():
        return build.available()
    if values >= _LARGE:
        _evaluated += values
    return build.available(build=_evaluated >= _MANY)


def _parameters(module: nn.Conv2d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert module.bias is not None  # `_mixes`, `_fuses`
    return module.weight.float(), module.bias.float()


def _running_stats(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None  # `_fuses`
    return norm.running_mean.float(), norm.running_var.float()


def _mixes(conv: nn.Module, x: Tensor, norm: nn.BatchNorm2d) -> TypeGuard[nn.Conv2d]:
    """Whether `spatial_mixing` may stand for the convolution: one that would compute in the type of `x`, and that
    trains, or is evaluated for no gradient."""
    if not _is_depthwise(conv) or conv.bias is None or not _takes(x, norm):
        return False
    if x.dtype != _precision(conv.weight) or x.shape[1] != conv.in_channels:  # PyTorch says what is wrong
        return False
    if norm.training:
        return _is_trained(conv)
    inputs = (x, conv.weight, conv.bias, norm.weight, norm.bias)
    frozen = not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs)
    return frozen and conv.weight.shape[-1] <= _WIDEST


def _fuses(norm: nn.Module, act: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether `act_norm` may stand for ``norm(act(x))``: a BatchNorm2d, in training or in evaluation, and exact GELU or
    ReLU."""
    return (
        type(norm) is nn.BatchNorm2d
        and (torch.is_grad_enabled() or not norm.training)
        and norm.weight is not None
        and norm.bias is not None
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.running_mean is not None
        and norm.running_var is not None
        and _plain(norm.weight)
        and (type(act) is nn.ReLU or (type(act) in _GELUS and getattr(act, "approximate", "none") == "none"))
        and untouched(act, norm)
    )


def _takes(x: Tensor, norm: nn.BatchNorm2d) -> bool:
    """Whether the kernels take such a feature map; BatchNorm refuses others than its own channels, and a single value
    for each, in its own words."""
    if not operators.takes(x) or x.shape[1] != norm.num_features or x.numel() == x.shape[1]:
        return False
    return norm.training or not torch.compiler.is_compiling() or x.numel() >= _WORTH_A_CALL[x.dtype]


def _is_gelu(act: nn.Module) -> bool:
    return type(act) is not nn.ReLU


@torch.no_grad()
def _move_running_stats(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves `norm`'s running statistics by a batch's mean and biased variance, each [C] over `count` values."""
    if switch.recomputes():
        return  # they moved before, and checkpointing changes nothing
    assert norm.momentum is not None and norm.running_mean is not None and norm.running_var is not None  # `_fuses`
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    # As PyTorch's own do, past the counter of versions: a graph that was made before may still need what they were.
    norm.running_mean.data.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.data.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)

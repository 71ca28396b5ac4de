"""Activation and batch-norm as one operation, on CPUs.

ConvMixer normalises after every activation, so a training step spends much of its time in GELU and BatchNorm: in
PyTorch five passes over memory forwards and as many backwards, each rounding to the activations' type and each keeping
a tensor for the gradient. ``kernels.cpp`` does it in two passes each way, in fp32 between load and store, and keeps
the convolution's output only. In evaluation one pass stands for two, or three with a residual.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators

__all__ = ["act_norm", "leaf"]


def act_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, gelu: bool, eps: float, shortcut: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch-norm, with the batch's own statistics, of GELU (or ReLU) of `x`, plus `shortcut` if there is one.

    Args:
        x: Output of a convolution, [N, C, H, W], in fp32 or bf16.
        gamma: The norm's weight, [C], in fp32.
        beta: The norm's bias, [C], in fp32.
        gelu: GELU, the exact one; ReLU if not.
        eps: Added to the variance.
        shortcut: Input of the residual branch, like `x`.

    Returns:
        [N, C, H, W] in the dtype of `x`, and the activation's mean [C] and biased variance [C].
    """
    y, mean, var = operators.act_norm(x, shortcut, gamma, beta, gelu, eps)
    return y, mean, var


def _setup_context(ctx, inputs, output):
    x, shortcut, gamma, _, ctx.gelu, ctx.eps = inputs
    _, mean, var = output
    ctx.has_shortcut = shortcut is not None
    ctx.set_materialize_grads(False)  # of the other results: zeros as large as a feature map
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, gamma, mean, var)


def _backward(ctx, grad, *_):
    if grad is None:  # nobody needs it
        return (None,) * 6
    x, gamma, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: PyTorch's operations are themselves differentiable
        x_grad, gamma_grad, beta_grad = _pytorch_grads(ctx, x, gamma, grad, None, None)
    else:
        x_grad, gamma_grad, beta_grad = operators.act_norm_backward(x, grad, gamma, mean, var, ctx.gelu, ctx.eps)
    return x_grad, grad if ctx.has_shortcut else None, gamma_grad, beta_grad, None, None


def _setup_inference_context(ctx, inputs, output):
    x, shortcut, gamma, _, mean, var, ctx.gelu, ctx.eps = inputs
    ctx.has_shortcut = shortcut is not None
    ctx.save_for_backward(x, gamma, mean, var)


def _inference_backward(ctx, grad):
    x, gamma, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled() or any(ctx.needs_input_grad[2:4]):
        x_grad, gamma_grad, beta_grad = _pytorch_grads(ctx, x, gamma, grad, mean, var)
    else:  # of a frozen model, for its input: the norm only scales
        scaled = (grad * (gamma * (var + ctx.eps).rsqrt()).view(-1, 1, 1)).to(x.dtype)
        aten = torch.ops.aten
        x_grad = aten.gelu_backward(scaled, x) if ctx.gelu else aten.threshold_backward(scaled, x, 0)
        gamma_grad = beta_grad = None
    return x_grad, grad if ctx.has_shortcut else None, gamma_grad, beta_grad, None, None, None, None


def leaf(t: Tensor) -> Tensor:
    """`t` as a gradient's end, also where it was made by others that the gradient is for: layers may share weights."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _pytorch_grads(ctx, x, gamma, grad, mean, var):
    """Gradients for `x`, `gamma` and beta by PyTorch's operations, which are themselves differentiable; by the batch's
    own statistics where there are no others."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x, gamma, beta = map(leaf, (x, gamma, torch.zeros_like(gamma)))
        a = F.gelu(x) if ctx.gelu else F.relu(x)
        y = F.batch_norm(a, mean, var, gamma, beta, training=mean is None, eps=ctx.eps)
        return torch.autograd.grad(y, (x, gamma, beta), grad, create_graph=create_graph)


operators.act_norm.register_autograd(_backward, setup_context=_setup_context)
operators.act_norm_inference.register_autograd(_inference_backward, setup_context=_setup_inference_context)

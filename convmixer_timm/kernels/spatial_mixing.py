"""ConvMixer's spatial mixing as one operation, for training on CPUs.

Depthwise convolution, activation, batch-norm and the residual around them: ``kernels.cpp`` takes the norm's statistics
while it convolves, and backwards never writes the gradient of the convolution's output to memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators

__all__ = ["spatial_mixing"]


def spatial_mixing(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, residual: bool, gelu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch-norm, with the batch's own statistics, of GELU (or ReLU) of a depthwise convolution with
    ``padding='same'``; plus `x` for a residual.

    Args:
        x: Features, [N, C, H, W], in fp32 or bf16.
        weight: One k x k filter a channel, [C, 1, k, k], in fp32.
        bias: The convolution's, [C], in fp32.
        gamma: The norm's weight, [C], in fp32.
        beta: The norm's bias, [C], in fp32.
        residual: Add `x`.
        gelu: GELU, the exact one; ReLU if not.
        eps: Added to the variance.

    Returns:
        [N, C, H, W] in the dtype of `x`, and the activation's mean [C] and biased variance [C].
    """
    y, _, mean, var = operators.spatial_mixing(x, weight, bias, gamma, beta, weight.shape[-1], residual, gelu, eps)
    return y, mean, var


def _setup_context(ctx, inputs, output):
    x, weight, bias, gamma, _, *ctx.settings = inputs
    _, z, mean, var = output
    ctx.set_materialize_grads(False)  # of the other results: zeros as large as a feature map
    ctx.mark_non_differentiable(z, mean, var)
    ctx.save_for_backward(x, weight, bias, gamma, z, mean, var)


def _backward(ctx, grad, *_):
    if grad is None:  # nobody needs it
        return (None,) * 9
    x, weight, _bias, gamma, z, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: PyTorch's operations are themselves differentiable
        return *_differentiable_grads(ctx, grad), None, None, None, None
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    for_weight = for_weight or for_bias
    x_grad, weight_grad, bias_grad, gamma_grad, beta_grad = operators.spatial_mixing_backward(
        x, z, grad, weight, gamma, mean, var, *ctx.settings, for_x, for_weight
    )
    if not for_x:
        x_grad = None
    if not for_weight:
        weight_grad = bias_grad = None
    return x_grad, weight_grad, bias_grad, gamma_grad, beta_grad, None, None, None, None


def _differentiable_grads(ctx, grad):
    x, weight, bias, gamma, *_ = ctx.saved_tensors
    _, residual, gelu, eps = ctx.settings
    beta = torch.zeros_like(gamma)
    inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, weight, bias, gamma, beta)]
    x, weight, bias, gamma, beta = inputs
    z = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding="same", groups=len(weight))
    y = F.gelu(z) if gelu else F.relu(z)
    y = F.batch_norm(y, None, None, gamma, beta, training=True, eps=eps)
    y = y + x if residual else y
    return torch.autograd.grad(y, inputs, grad, create_graph=True)


operators.spatial_mixing.register_autograd(_backward, setup_context=_setup_context)

"""ConvMixer's spatial mixing as one operation, on CPUs.

Depthwise convolution, activation, batch-norm and the residual around them: ``kernels.cpp`` takes the norm's statistics
while it convolves, and backwards never writes the gradient of the convolution's output to memory. In evaluation the
convolution's output isn't written either.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators, switch
from .act_norm import leaf

__all__ = ["differentiable_grads", "spatial_mixing"]


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
    x, weight, bias, gamma, z, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: PyTorch's operations are themselves differentiable
        _, residual, gelu, eps = ctx.settings
        inputs = (x, weight, bias, gamma, torch.zeros_like(gamma))
        return *differentiable_grads(inputs, residual, gelu, eps, grad), None, None, None, None
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    for_weight = for_weight or for_bias
    x_grad, weight_grad, bias_grad, gamma_grad, beta_grad = operators.spatial_mixing_backward(
        x, z, grad, weight, gamma, mean, var, *ctx.settings, for_x, for_weight
    )
    if not for_x:
        x_grad = None
    if not for_weight:
        weight_grad = bias_grad = None
    elif not switch.batched(grad):
        weight_grad = torch.empty_like(weight).copy_(weight_grad)  # in its strides, which DDP's buckets expect
    return x_grad, weight_grad, bias_grad, gamma_grad, beta_grad, None, None, None, None


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # which may still be on around the backward pass
        return F.conv2d(x, weight, bias, padding="same", groups=len(weight))


@torch.enable_grad()
def differentiable_grads(inputs, residual, gelu, eps, grad, convolve=_depthwise):
    """Gradients by PyTorch's operations, which are themselves differentiable.

    Args:
        inputs: Features, the convolution's weight and bias, the norm's weight and bias.
        residual: Whether the features were added.
        gelu: GELU; ReLU if not.
        eps: The norm's.
        grad: Of the result.
        convolve: The convolution, of features, weight and bias.

    Returns:
        One for each of `inputs`.
    """
    inputs = [leaf(t) for t in inputs]
    x, weight, bias, gamma, beta = inputs
    z = convolve(x, weight.to(x.dtype), bias.to(x.dtype))
    y = F.batch_norm(F.gelu(z) if gelu else F.relu(z), None, None, gamma, beta, training=True, eps=eps)
    y = y + x if residual else y
    return torch.autograd.grad(y, inputs, grad.to(y.dtype), create_graph=True)


operators.spatial_mixing.register_autograd(_backward, setup_context=_setup_context)

"""ConvMixer's two layers as one operation each, for training on NVIDIA GPUs, in Triton.

Two things make a ConvMixer slow on a GPU. cuDNN's depthwise convolution multiplies without tensor cores; here a row of
pixels times a banded matrix, one for each row of the kernel, does it with them: more multiplications in less time. And
GELU, BatchNorm and the residual read and write each feature map many times; here what is only wanted for a mean is
never written.

Feature maps are [N, C, H, W] in bf16 or fp16, contiguous. Everything else is fp32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench

from . import switch
from .spatial_mixing import differentiable_grads

__all__ = ["channel_mixing", "spatial_mixing"]

_TILE = 4096  # values a program of the elementwise kernels works on
_ROWS = 128  # rows of pixels a program of the convolution works on
_PARTS = 2**25  # numbers of the images' own weight gradients that may be in memory


@triton.jit
def _normal(x):
    """The normal distribution's cumulated and plain density at `x`, within 2e-7 (Abramowitz and Stegun, 26.2.17): half
    the instructions of an erf and an exp."""
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.23164190 * tl.abs(x))
    tail = t * (0.31938153 + t * (-0.35656378 + t * (1.7814779 + t * (-1.8212560 + t * 1.3302744))))
    tail *= density
    return tl.where(x < 0, tail, 1.0 - tail), density


@triton.jit
def _act(x, GELU: tl.constexpr):
    """GELU, or ReLU, and its derivative."""
    if GELU:
        cumulated, density = _normal(x)
        y, slope = x * cumulated, cumulated + x * density
    else:
        y, slope = tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    return y, slope


@triton.jit
def _tile_stats(v, valid, stats, at, step):
    """Stores count, mean and the sum of squared deviations of a tile."""
    count = tl.sum(valid.to(tl.float32))
    mean = tl.sum(tl.where(valid, v, 0.0)) / count
    off = tl.where(valid, v - mean, 0.0)
    tl.store(stats + at, count)
    tl.store(stats + step + at, mean)
    tl.store(stats + 2 * step + at, tl.sum(off * off))


@triton.jit
def _band(weight, out, K: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, FLIP: tl.constexpr):
    """Each kernel row as a banded matrix [columns in, columns out]; zero for rows that the kernel doesn't have."""
    c, dy = tl.program_id(0), tl.program_id(1)
    cols_in, cols_out = tl.arange(0, IN), tl.arange(0, OUT)
    dx = cols_in[:, None] - (IN - OUT) // 2 - cols_out[None, :] + K // 2
    tap = dy * K + dx
    there = (dx >= 0) & (dx < K) & (tap < K * K)
    if FLIP:
        tap = K * K - 1 - tap
    band = tl.load(weight + c * K * K + tap, mask=there, other=0.0)
    at = (c * tl.num_programs(1) + dy) * IN * OUT + cols_in[:, None] * OUT + cols_out[None, :]
    tl.store(out + at, band.to(out.dtype.element_ty))


# TAPS: rows of the kernel that one matrix product takes.
_CONFIGS = [triton.Config({"TAPS": taps}, num_warps=4, num_stages=stages) for taps in (1, 2, 4, 8) for stages in (1, 3)]


def _fitting(configs, arguments, **more):
    fitting = [c for c in configs if 64 <= c.kwargs["TAPS"] * more["IN"] <= 128]
    return fitting[:1] if torch.are_deterministic_algorithms_enabled() else fitting


def _time(call, quantiles):
    return do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _tuned(*key: str) -> Callable:
    """Chooses a kernel's tiles by time for each set of these arguments."""
    return triton.autotune(_CONFIGS, list(key), prune_configs_by={"early_config_prune": _fitting}, do_bench=_time)


@_tuned("H", "W", "K", "BACKWARD", "GELU")
@triton.jit
def _depthwise(
    x, bands, bias, shortcut, out, stats,
    N, C, KERNEL_ROWS, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr, GELU: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Forward: the convolution with its bias, and the statistics of its activation. Backward: the input's gradient,
    plus the residual's."""
    c, tile, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    n, h = row // H, row % H
    cols_out = block * OUT + tl.arange(0, OUT)
    q = tl.arange(0, TAPS * IN)
    cols_in = block * OUT - (IN - OUT) // 2 + q % IN
    image = (n.to(tl.int64) * C + c) * (H * W)
    acc = tl.zeros([ROWS, OUT], dtype=tl.float32)
    for first in range(0, K, TAPS):
        dy = first + q // IN
        y = h[:, None] + dy[None, :] - K // 2
        inside = (row < N * H)[:, None] & (y >= 0) & (y < H) & ((dy < K) & (cols_in >= 0) & (cols_in < W))[None, :]
        rows = tl.load(x + image[:, None] + y * W + cols_in[None, :], mask=inside, other=0.0)
        at = ((c * KERNEL_ROWS + first) * IN + q)[:, None] * OUT + tl.arange(0, OUT)[None, :]
        acc = tl.dot(rows, tl.load(bands + at), acc)
    valid = (row < N * H)[:, None] & (cols_out < W)[None, :]
    at = image[:, None] + h[:, None] * W + cols_out[None, :]
    if BACKWARD:
        if shortcut is not None:
            acc += tl.load(shortcut + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid)
    else:
        z = (acc + tl.load(bias + c)).to(out.dtype.element_ty)
        tl.store(out + at, z, mask=valid)
        tiles = tl.num_programs(1) * tl.num_programs(2)
        y, _ = _act(z.to(tl.float32), GELU)
        _tile_stats(y, valid, stats, c * tiles + tile * tl.num_programs(2) + block, C * tiles)


@_tuned("H", "W", "K")
@triton.jit
def _depthwise_weight_grad(
    x, grad, out,
    N, C, tiles, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the rows, for TAPS rows of the kernel: out[part, c, dy, dx]."""
    c, part = tl.program_id(0), tl.program_id(1)
    cols_out = tl.arange(0, OUT)
    q = tl.arange(0, TAPS * IN)
    first = tl.program_id(2) * TAPS
    dy = first + q // IN
    for block in tl.static_range((W + OUT - 1) // OUT):
        to = block * OUT + cols_out
        frm = block * OUT - (IN - OUT) // 2 + q % IN
        acc = tl.zeros([TAPS * IN, OUT], dtype=tl.float32)
        for tile in range(part, tiles, tl.num_programs(1)):
            row = tile * ROWS + tl.arange(0, ROWS)
            n, h = row // H, row % H
            image = (n.to(tl.int64) * C + c) * (H * W)
            g = tl.load(
                grad + image[:, None] + h[:, None] * W + to[None, :],
                mask=(row < N * H)[:, None] & (to < W)[None, :],
                other=0.0,
            )
            y = h[None, :] + dy[:, None] - K // 2
            inside = (row < N * H)[None, :] & (y >= 0) & (y < H) & ((dy < K) & (frm >= 0) & (frm < W))[:, None]
            rows = tl.load(x + image[None, :] + y * W + frm[:, None], mask=inside, other=0.0)
            acc = tl.dot(rows, g, acc)
        dx = frm[:, None] - to[None, :] + K // 2
        kept = first + tl.arange(0, TAPS)
        for tap in tl.static_range(K):
            s = tl.sum(tl.where(dx == tap, acc, 0.0), 1)
            s = tl.sum(tl.reshape(s, [TAPS, IN]), 1)
            at = out + ((part * C + c) * K + kept) * K + tap
            if block > 0:
                s += tl.load(at, mask=kept < K)
            tl.store(at, s, mask=kept < K)


@triton.jit
def _places(N, C, P: tl.constexpr, TILE: tl.constexpr):
    """Where the values of a channel's tile lie: offsets, and which of them are."""
    m = tl.program_id(1) * TILE + tl.arange(0, TILE)
    n = m // P
    return (n.to(tl.int64) * C + tl.program_id(0)) * P + m % P, m < N * P


@triton.jit
def _biased(x, bias, c, at, valid):
    """A tile of a convolution's output, of whose bias it may still be in want."""
    v = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + c)
    return v


@triton.jit
def _act_stats(x, bias, stats, N, C, P: tl.constexpr, GELU: tl.constexpr, TILE: tl.constexpr):
    c, tiles = tl.program_id(0), tl.num_programs(1)
    at, valid = _places(N, C, P, TILE)
    y, _ = _act(_biased(x, bias, c, at, valid), GELU)
    _tile_stats(y, valid, stats, c * tiles + tl.program_id(1), C * tiles)


@triton.jit
def _finish_stats(stats, mean, rstd, running_mean, running_var, C, tiles, momentum, eps, TILES: tl.constexpr):
    """A channel's mean and 1 / standard deviation of its tiles' statistics; moves the running ones."""
    c, t = tl.program_id(0), tl.arange(0, TILES)
    count = tl.load(stats + c * tiles + t, mask=t < tiles, other=0.0)
    means = tl.load(stats + C * tiles + c * tiles + t, mask=t < tiles, other=0.0)
    squares = tl.load(stats + 2 * C * tiles + c * tiles + t, mask=t < tiles, other=0.0)
    total = tl.sum(count)
    m = tl.sum(count * means) / total
    var = (tl.sum(squares) + tl.sum(count * (means - m) * (means - m))) / total
    tl.store(mean + c, m)
    tl.store(rstd + c, 1.0 / tl.sqrt(var + eps))
    before = tl.load(running_mean + c)
    tl.store(running_mean + c, before + momentum * (m - before))
    before = tl.load(running_var + c)
    tl.store(running_var + c, before + momentum * (var * total / (total - 1.0) - before))


@triton.jit
def _act_norm(
    x, bias, gamma, beta, mean, rstd, shortcut, out,
    N, C, P: tl.constexpr, GELU: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    at, valid = _places(N, C, P, TILE)
    v = _biased(x, bias, c, at, valid)
    y, _ = _act(v, GELU)
    y = (y - tl.load(mean + c)) * (tl.load(rstd + c) * tl.load(gamma + c)) + tl.load(beta + c)
    if shortcut is not None:
        y += tl.load(shortcut + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _norm_sums(x, grad, bias, mean, sums, N, C, P: tl.constexpr, GELU: tl.constexpr, TILE: tl.constexpr):
    c, tiles = tl.program_id(0), tl.num_programs(1)
    at, valid = _places(N, C, P, TILE)
    v = _biased(x, bias, c, at, valid)
    g = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(sums + c * tiles + tl.program_id(1), tl.sum(g))
    y, _ = _act(v, GELU)
    tl.store(sums + (C + c) * tiles + tl.program_id(1), tl.sum(g * (y - tl.load(mean + c))))


@triton.jit
def _act_norm_backward(
    x, grad, bias, gamma, mean, rstd, sums, out, beta_grad, gamma_grad, bias_sums,
    N, C, P: tl.constexpr, GELU: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Every program sums its channel's sums anew: they lie in the cache, and a launch is saved."""
    c, tiles = tl.program_id(0), tl.num_programs(1)
    t = tl.arange(0, TILES)
    g_sum = tl.sum(tl.load(sums + c * tiles + t, mask=t < tiles, other=0.0))
    gv_sum = tl.sum(tl.load(sums + (C + c) * tiles + t, mask=t < tiles, other=0.0))
    m, r = tl.load(mean + c), tl.load(rstd + c)
    if tl.program_id(1) == 0:
        tl.store(beta_grad + c, g_sum)
        tl.store(gamma_grad + c, gv_sum * r)
    at, valid = _places(N, C, P, TILE)
    v = _biased(x, bias, c, at, valid)
    g = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
    count = N * P * 1.0
    scale = r * tl.load(gamma + c)
    y, slope = _act(v, GELU)
    g = slope * scale * (g - g_sum / count - (y - m) * (r * r * gv_sum / count))
    tl.store(out + at, g.to(out.dtype.element_ty), mask=valid)
    tl.store(bias_sums + c * tiles + tl.program_id(1), tl.sum(tl.where(valid, g, 0.0)))


def _power_of_2(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _columns(width: int, kernel_size: int) -> tuple[int, int]:
    """Columns that a program of the convolution reads, and that it writes."""
    if width <= 32:
        return _power_of_2(width), _power_of_2(width)
    return _power_of_2(32 + kernel_size - 1), 32


def _bands(weight: Tensor, width: int, dtype: torch.dtype, flip: bool) -> Tensor:
    """A depthwise kernel's rows as banded matrices, [C, kernel rows and zeros up to a multiple of 8, IN, OUT]."""
    channels, kernel_size = len(weight), weight.shape[-1]
    columns = _columns(width, kernel_size)
    out = weight.new_empty(channels, triton.cdiv(kernel_size, 8) * 8, *columns, dtype=dtype)
    _band[out.shape[:2]](weight, out, kernel_size, *columns, FLIP=flip)
    return out


def _convolve(x, bands, kernel_size, bias=None, shortcut=None, stats=None, gelu=True):
    """The depthwise convolution where there are `stats`, else its backward pass."""
    n, channels, h, w = x.shape
    out = torch.empty_like(x)
    _, kernel_rows, columns_in, columns_out = bands.shape
    _depthwise[_blocks(x, columns_out)](
        x, bands, bias, shortcut, out, stats, n, channels, kernel_rows, h, w, kernel_size,
        IN=columns_in, OUT=columns_out, ROWS=_ROWS, BACKWARD=stats is None, GELU=gelu,
    )  # fmt: skip
    return out


def _blocks(x: Tensor, columns_out: int) -> tuple[int, int, int]:
    n, channels, h, w = x.shape
    return channels, triton.cdiv(n * h, _ROWS), triton.cdiv(w, columns_out)


def _convolution_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> Tensor:
    n, channels, h, w = x.shape
    columns_in, columns_out = _columns(w, kernel_size)
    rows = _ROWS // 2
    tiles = triton.cdiv(n * h, rows)
    out = x.new_empty(min(tiles, 8), channels, 1, kernel_size, kernel_size, dtype=torch.float32)
    _depthwise_weight_grad[lambda meta: (channels, len(out), triton.cdiv(kernel_size, meta["TAPS"]))](
        x, grad, out, n, channels, tiles, h, w, kernel_size, IN=columns_in, OUT=columns_out, ROWS=rows
    )
    return out.sum(0)


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[1], triton.cdiv(x.shape[0] * x.shape[2] * x.shape[3], _TILE)


def _finish(stats, norm):
    """Mean and 1 / standard deviation of the tiles' statistics; moves the norm's, unless a checkpoint recomputes."""
    again = switch.recomputes()
    if norm.num_batches_tracked is not None and not again:
        norm.num_batches_tracked.add_(1)
    _, channels, tiles = stats.shape
    mean, rstd = stats.new_empty(channels), stats.new_empty(channels)
    _finish_stats[(channels,)](
        stats, mean, rstd, norm.running_mean, norm.running_var, channels, tiles,
        0.0 if again else norm.momentum, norm.eps, TILES=triton.next_power_of_2(tiles),
    )  # fmt: skip
    return mean, rstd


def _normalize(x, bias, gamma, beta, mean, rstd, shortcut, gelu):
    out = torch.empty_like(x)
    n, channels, h, w = x.shape
    _act_norm[_grid(x)](
        x, bias, gamma, beta, mean, rstd, shortcut, out, n, channels, P=h * w, GELU=gelu, TILE=_TILE
    )  # fmt: skip
    return out


def _normalize_backward(x, grad, bias, gamma, mean, rstd, gelu):
    """Gradients of the convolution's output, of gamma, beta and the convolution's bias."""
    n, channels, h, w = x.shape
    grid = _grid(x)
    sums = mean.new_empty(2, channels, grid[1])
    _norm_sums[grid](x, grad, bias, mean, sums, n, channels, P=h * w, GELU=gelu, TILE=_TILE)
    out, bias_sums = torch.empty_like(x), mean.new_empty(channels, grid[1])
    gamma_grad, beta_grad = torch.empty_like(mean), torch.empty_like(mean)
    _act_norm_backward[grid](
        x, grad, bias, gamma, mean, rstd, sums, out, beta_grad, gamma_grad, bias_sums,
        n, channels, P=h * w, GELU=gelu, TILE=_TILE, TILES=triton.next_power_of_2(grid[1]),
    )  # fmt: skip
    return out, gamma_grad, beta_grad, bias_sums.sum(1)


def _left_to_pytorch(grad):
    """Whether the backward pass must be differentiable (``create_graph=True``) or is of many at once
    (``is_grads_batched=True``)."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


class _SpatialMixing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, norm, gelu, residual):
        with torch.cuda.device_of(x):  # Triton launches on the current one
            bands = _bands(weight, x.shape[3], x.dtype, flip=False)
            _, tiles, blocks = _blocks(x, bands.shape[3])
            stats = gamma.new_empty(3, len(gamma), tiles * blocks)
            z = _convolve(x, bands, weight.shape[-1], bias, stats=stats, gelu=gelu)
            mean, rstd = _finish(stats, norm)
            out = _normalize(z, None, gamma, beta, mean, rstd, x if residual else None, gelu)
        ctx.save_for_backward(x, weight, bias, gamma, beta, z, mean, rstd)
        ctx.norm, ctx.gelu, ctx.residual = norm, gelu, residual
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, gamma, beta, z, mean, rstd = ctx.saved_tensors
        if _left_to_pytorch(grad):
            inputs = (x, weight, bias, gamma, beta)
            return *differentiable_grads(inputs, ctx.residual, ctx.gelu, ctx.norm.eps, grad), None, None, None
        with torch.cuda.device_of(x):
            grad = grad.contiguous()
            z_grad, gamma_grad, beta_grad, bias_grad = _normalize_backward(z, grad, None, gamma, mean, rstd, ctx.gelu)
            bands = _bands(weight, x.shape[3], x.dtype, flip=True)
            x_grad = _convolve(z_grad, bands, weight.shape[-1], shortcut=grad if ctx.residual else None)
            weight_grad = _convolution_weight_grad(x, z_grad, weight.shape[-1])
        weight_grad = torch.empty_like(weight).copy_(weight_grad)
        return x_grad, weight_grad, bias_grad, gamma_grad, beta_grad, None, None, None


class _ChannelMixing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, norm, gelu):
        n, _, h, w = x.shape
        matrix = weight.flatten(1).to(x.dtype)
        with torch.cuda.device_of(x):
            z = torch.bmm(matrix.expand(n, -1, -1), x.flatten(2)).view(n, -1, h, w)
            grid = _grid(z)
            stats = gamma.new_empty(3, *grid)
            _act_stats[grid](z, bias, stats, n, grid[0], P=h * w, GELU=gelu, TILE=_TILE)
            mean, rstd = _finish(stats, norm)
            out = _normalize(z, bias, gamma, beta, mean, rstd, None, gelu)
        ctx.save_for_backward(x, weight, bias, gamma, beta, z, matrix, mean, rstd)
        ctx.norm, ctx.gelu = norm, gelu
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, gamma, beta, z, matrix, mean, rstd = ctx.saved_tensors
        if _left_to_pytorch(grad):

            def convolve(x, weight, bias):
                return F.conv2d(x, weight.flatten(1)[:, :, None, None], bias)

            inputs = (x, weight, bias, gamma, beta)
            return *differentiable_grads(inputs, False, ctx.gelu, ctx.norm.eps, grad, convolve), None, None
        with torch.cuda.device_of(x):
            grad = grad.contiguous()
            z_grad, gamma_grad, beta_grad, bias_grad = _normalize_backward(z, grad, bias, gamma, mean, rstd, ctx.gelu)
            z_grad, x_grad = z_grad.flatten(2), None
            if ctx.needs_input_grad[0]:
                x_grad = torch.bmm(matrix.t().expand(len(x), -1, -1), z_grad).view_as(x)
            parts = max(1, _PARTS // matrix.numel())
            weight_grad = sum(
                torch.bmm(g, part.flatten(2).mT).sum(0, dtype=torch.float32)
                for g, part in zip(z_grad.split(parts), x.split(parts), strict=True)
            )
        weight_grad = torch.empty_like(weight).copy_(weight_grad.view(weight.shape))
        return x_grad, weight_grad, bias_grad, gamma_grad, beta_grad, None, None


def spatial_mixing(
    x: Tensor, conv: torch.nn.Conv2d, norm: torch.nn.BatchNorm2d, residual: bool, gelu: bool = True
) -> Tensor:
    """``norm(act(conv(x)))``, plus `x` for a residual.

    Args:
        x: Features, [N, C, H, W], in bf16 or fp16, contiguous.
        conv: Depthwise, of an odd kernel with ``padding='same'`` and a bias, in fp32.
        norm: In training and in fp32; its running statistics move.
        residual: Add `x`.
        gelu: The activation is GELU; ReLU if not.
    """
    assert conv.bias is not None
    parameters = (p.contiguous() for p in (conv.weight, conv.bias, norm.weight, norm.bias))
    return _SpatialMixing.apply(x, *parameters, norm, gelu, residual)


def channel_mixing(x: Tensor, conv: torch.nn.Conv2d, norm: torch.nn.BatchNorm2d, gelu: bool = True) -> Tensor:
    """``norm(act(conv(x)))`` of a 1x1 convolution, or of a patch embedding whose patches are the channels of `x`
    already (`torch.nn.functional.pixel_unshuffle`).

    Args:
        x: Features, [N, C, H, W], in bf16 or fp16, contiguous.
        conv: With a bias, in fp32.
        norm: In training and in fp32; its running statistics move.
        gelu: The activation is GELU; ReLU if not.
    """
    assert conv.bias is not None
    bias, gamma, beta = (p.contiguous() for p in (conv.bias, norm.weight, norm.bias))
    return _ChannelMixing.apply(x, conv.weight, bias, gamma, beta, norm, gelu)

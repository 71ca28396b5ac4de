"""Each operator against PyTorch's operations in fp64, and what it refuses."""

import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer_timm.kernels import depthwise, operators
from convmixer_timm.kernels.act_norm import act_norm
from convmixer_timm.kernels.depthwise import depthwise_conv2d
from convmixer_timm.kernels.spatial_mixing import spatial_mixing

from .helpers import channels_last, needs_compiler, relative

DTYPES = [torch.float32, torch.bfloat16]


class DepthwiseConv2d(nn.Conv2d):
    def __init__(self, dim, kernel_size):
        super().__init__(dim, dim, kernel_size, groups=dim, padding="same")

    def forward(self, x):
        return depthwise_conv2d(x, self.weight, self.bias)


def gradients(conv, x, grad, dtype):
    x = x.to(dtype).detach().requires_grad_()
    weight, bias = (p.detach().to(dtype).requires_grad_() for p in (conv.weight, conv.bias))
    fast = F.conv2d(x, weight, bias, padding="same", groups=len(weight))
    fast.backward(grad.to(dtype))
    return x.grad, weight.grad, bias.grad


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 17])
@pytest.mark.parametrize("size", [(16, 16), (7, 11), (1, 1)])
@pytest.mark.parametrize("batch", [1, 9])
def test_gradients_are_pytorchs(way, kernel_size, size, batch):
    conv = DepthwiseConv2d(32, kernel_size)
    x, grad = torch.randn(2, batch, 32, *size)
    x = x.to(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    conv(leaf).backward(grad)
    exact = gradients(conv, x, grad, torch.float64)
    for got, want in zip((leaf.grad, conv.weight.grad, conv.bias.grad), exact, strict=True):
        assert relative(got, want) < 1e-5


def test_bf16_is_no_further_from_fp64_than_pytorchs(way):
    conv = DepthwiseConv2d(32, 5)
    x, grad = torch.randn(2, 16, 32, 16, 16).bfloat16()
    x = x.to(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    conv.bfloat16()(leaf).backward(grad)
    exact, theirs = (gradients(conv, x, grad, dtype) for dtype in (torch.float64, torch.bfloat16))
    for got, want, pytorchs in zip((leaf.grad, conv.weight.grad, conv.bias.grad), exact, theirs, strict=True):
        assert relative(got, want) <= 1.05 * relative(pytorchs, want)


@pytest.mark.parametrize("kernel_size", [3, 4])
def test_gradcheck_and_second_derivatives(kernel_size):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, weight, bias))
    assert torch.autograd.gradgradcheck(depthwise_conv2d, (x, weight, bias))
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, weight))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    ],
    ids=["channels-first", "channels-last", "transposed", "sliced"],
)
def test_any_layout(way, layout):
    conv = DepthwiseConv2d(32, 5)
    x, grad = torch.randn(2, 4, 32, 8, 8)
    conv(layout(x)).backward(layout(grad))
    want = gradients(conv, x, grad, torch.float64)
    assert relative(conv.weight.grad, want[1]) < 1e-5


def test_the_weight_gradient_has_the_strides_of_the_weight(way):
    conv = DepthwiseConv2d(32, 5).to(memory_format=torch.channels_last)
    x, grad = torch.randn(2, 4, 32, 8, 8)
    received = []
    conv.weight.register_hook(lambda weight_grad: received.append(weight_grad.stride()))
    conv(x).backward(grad)
    assert received == [conv.weight.stride()]


def test_channels_that_fill_no_register(way):
    conv = DepthwiseConv2d(13, 3)
    x, grad = torch.randn(2, 4, 13, 8, 8)
    conv(x).backward(grad)
    assert relative(conv.weight.grad, gradients(conv, x, grad, torch.float64)[1]) < 1e-5


def test_no_work_for_gradients_that_nobody_needs(monkeypatch):
    def forbidden(*args):
        raise AssertionError("a weight gradient was computed")

    conv = DepthwiseConv2d(32, 5)
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    monkeypatch.setattr(depthwise, "_weight_grad", forbidden)
    conv.weight.requires_grad_(False)
    conv(x).sum().backward()
    assert x.grad is not None
    assert conv.bias.grad is not None
    conv.requires_grad_(False)
    conv(x).sum().backward()
    conv.requires_grad_(True)
    with torch.no_grad():
        conv(x)


# ---- activation and norm, spatial mixing ----


def parameters(kernel_size=5):
    return (
        torch.randn(32, 1, kernel_size, kernel_size) / kernel_size,
        torch.randn(32),
        torch.rand(32) + 0.5,
        torch.randn(32),
    )


def plain_act_norm(x, shortcut, gamma, beta, gelu, mean=None, var=None):
    y = F.gelu(x) if gelu else F.relu(x)
    y = F.batch_norm(y, mean, var, gamma, beta, training=mean is None)
    return y if shortcut is None else y + shortcut


def plain_mixing(x, weight, bias, gamma, beta, residual, gelu, *stats):
    z = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding="same", groups=32)
    return plain_act_norm(z, x if residual else None, gamma, beta, gelu, *stats)


def with_gradients(fn, tensors, grad):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(y.dtype))]


def assert_as_near_fp64_as_pytorchs(fast, plain, tensors, grad):
    """Sums that cancel (a bias's gradient before a norm) leave few digits to either."""
    exact = with_gradients(plain, [None if t is None else t.double() for t in tensors], grad.double())
    theirs, ours = with_gradients(plain, tensors, grad), with_gradients(fast, tensors, grad)
    for got, want, pytorchs in zip(ours, exact, theirs, strict=True):
        assert got.dtype == pytorchs.dtype
        assert relative(got, want) <= max(2 * relative(pytorchs, want), 1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("shape", [(2, 32, 1, 1), (3, 32, 7, 5), (16, 32, 16, 16)])
def test_act_norm_is_as_near_fp64_as_pytorchs(dtype, gelu, with_shortcut, shape):
    torch.manual_seed(0)
    x, shortcut, grad = (channels_last(*shape, dtype=dtype) * 2 for _ in range(3))
    _, _, gamma, beta = parameters()
    assert_as_near_fp64_as_pytorchs(
        lambda *t: act_norm(t[0], t[2], t[3], gelu, 1e-5, t[1])[0],
        lambda *t: plain_act_norm(*t, gelu),
        (x, shortcut if with_shortcut else None, gamma, beta),
        grad,
    )


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5, 7, 8, 9, 10, 17])
@pytest.mark.parametrize("shape", [(4, 32, 4, 3), (2, 32, 6, 14), (1, 32, 7, 11), (8, 32, 16, 16)])
@pytest.mark.parametrize("residual, gelu", [(True, True), (False, False), (True, False)])
def test_mixing_is_as_near_fp64_as_pytorchs(dtype, kernel_size, shape, residual, gelu):
    torch.manual_seed(0)
    x, grad = (channels_last(*shape, dtype=dtype) for _ in range(2))
    weight, *others = parameters(kernel_size)
    if not gelu:  # whose slope jumps, where a rounded weight moves a value over 0
        weight = weight.to(dtype).float()
    assert_as_near_fp64_as_pytorchs(
        lambda *t: spatial_mixing(*t, residual, gelu, 1e-5)[0],
        lambda *t: plain_mixing(*t, residual, gelu),
        (x, weight, *others),
        grad,
    )


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 1, 1), (3, 32, 7, 5), (16, 32, 16, 16)])
def test_act_norm_by_given_statistics(dtype, gelu, with_shortcut, shape):
    torch.manual_seed(0)
    x, shortcut, grad = (channels_last(*shape, dtype=dtype) * 2 for _ in range(3))
    _, mean, gamma, beta = parameters()
    var = torch.rand(32) + 0.1
    var[:3] = 1e-6  # by so little that bf16's GELU isn't right enough
    assert_as_near_fp64_as_pytorchs(
        lambda *t: operators.act_norm_inference(*t, mean, var, gelu, 1e-5),
        lambda *t: plain_act_norm(*t, gelu, *(s.to(t[2].dtype) for s in (mean, var))),
        (x, shortcut if with_shortcut else None, gamma, beta),
        grad,
    )


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel_size", [2, 5, 7, 9, 17])
@pytest.mark.parametrize("shape", [(1, 32, 7, 11), (1, 32, 250, 33)])  # the latter in bands of rows
@pytest.mark.parametrize("residual, gelu", [(True, True), (False, False)])
def test_mixing_by_given_statistics(dtype, kernel_size, shape, residual, gelu):
    torch.manual_seed(0)
    x, tensors, mean, var = channels_last(*shape, dtype=dtype), parameters(kernel_size), torch.randn(32), torch.rand(32)
    got = operators.spatial_mixing_inference(x, *tensors, mean, var, kernel_size, residual, gelu, 1e-5)
    theirs, exact = (
        plain_mixing(x.to(t), *(p.to(u) for p in tensors), residual, gelu, mean.to(u), var.to(u))
        for t, u in ((dtype, torch.float32), (torch.float64, torch.float64))
    )
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert relative(got, exact) <= max(relative(theirs, exact), 1e-6)


@needs_compiler
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 4e-7), (torch.bfloat16, 2**-8)])
def test_gelu_over_its_whole_range(dtype, limit):
    v = torch.linspace(-12, 12, 4096 * 32).reshape(4096, 32, 1, 1).to(dtype)
    y, _mean, _ = act_norm(v, torch.ones(32), torch.zeros(32), True, 1e-12)
    want = F.batch_norm(F.gelu(v.double()), None, None, training=True, eps=1e-12)
    assert (y - want).abs().max() < limit * want.abs().max()


@needs_compiler
def test_fp32_gelu_is_right_in_its_tail():
    """Where the value is tiny, it is tiny: unlike a polynomial for the whole range."""
    v = torch.tensor([-8.0, -6, -5, -4, -3]).repeat(32, 1).T.reshape(5, 32, 1, 1)
    y, mean, _ = act_norm(v, torch.ones(32), torch.zeros(32), True, 1e-12)
    exact = F.gelu(v.double())
    assert relative(mean, exact.mean(0).flatten()) < 1e-6
    assert relative(y, F.batch_norm(exact, None, None, training=True, eps=1e-12)) < 2e-6


@needs_compiler
def test_large_activations_make_no_subnormal_numbers():
    """A multiplication that meets one takes Intel's processors a hundred cycles or more."""
    z = torch.linspace(-40, 40, 4096 * 32).reshape(4096, 32, 1, 1)
    y, mean, var = operators.act_norm(z, None, torch.ones(32), torch.zeros(32), True, 1e-5)
    grad = torch.full_like(z, 1e-3)
    for t in (y, operators.act_norm_backward(z, grad, torch.ones(32), mean, var, True, 1e-5)[0]):
        assert not ((t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)).any()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_hidden(dtype, bad):
    x = channels_last(4, 32, 4, 4, dtype=dtype)
    x[2, 3, 0, 0] = bad
    y = act_norm(x, torch.ones(32), torch.zeros(32), True, 1e-5)[0]
    assert y[:, 3].isnan().any()
    assert y[:, :3].isfinite().all() and y[:, 4:].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [(-4.5, -3.5), (-5.5, -4.5), (-7, -5), (-40, -20), (-1500, -500), (20, 40)])
def test_channels_that_are_all_in_the_tail(dtype, values):
    """Their norm divides by next to nothing, and makes much of whatever is wrong."""
    torch.manual_seed(0)
    least, most = values
    x, grad = channels_last(16, 32, 8, 8, dtype=dtype), channels_last(16, 32, 8, 8, dtype=dtype)
    x[:, :20] = least + (most - least) * torch.rand(16, 20, 8, 8)  # a whole block of channels and a part of one
    gamma, beta = torch.ones(32), torch.zeros(32)
    mixed = (torch.zeros(32, 1, 3, 3), torch.zeros(32), gamma, beta)
    mixed[0][:, 0, 1, 1] = 1
    exact = with_gradients(lambda t: plain_act_norm(t, None, gamma.double(), beta.double(), True), [x.double()], grad)
    for fast in (
        lambda t: act_norm(t, gamma, beta, True, 1e-5)[0],
        lambda t: spatial_mixing(t, *mixed, False, True, 1e-5)[0],
    ):
        for got, want in zip(with_gradients(fast, [x], grad), exact, strict=True):
            for channels in (slice(0, 20), slice(20, 32)):
                limit = 1e-3 if dtype == torch.float32 else 2e-2
                difference = (got[:, channels] - want[:, channels]).norm()
                assert difference <= limit * want[:, channels].norm() + 1e-6


@needs_compiler
@pytest.mark.parametrize("where", [(0, 0, 0), (0, 4, 4), (15, 7, 7)])
@pytest.mark.parametrize("gelu", [True, False])
def test_one_value_far_from_the_others(where, gelu):
    """Wherever it stands: the sums are taken around some of the values."""
    torch.manual_seed(0)
    x = channels_last(16, 32, 8, 8) * 0.01
    n, h, w = where
    x[n, :, h, w] = 1000.0
    gamma, beta = torch.ones(32), torch.zeros(32)
    mixed = (torch.zeros(32, 1, 3, 3), torch.zeros(32), gamma, beta)
    mixed[0][:, 0, 1, 1] = 1
    a = (F.gelu if gelu else F.relu)(x.double())
    for _, mean, var in (act_norm(x, gamma, beta, gelu, 1e-5), spatial_mixing(x, *mixed, False, gelu, 1e-5)):
        exact = a.var((0, 2, 3), correction=0)
        assert ((mean - a.mean((0, 2, 3))).abs() < 1e-6 * exact.sqrt()).all()
        assert relative(var, exact) < 2e-6


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the process's memory")
def test_too_little_memory_raises_and_ends_nothing():
    code = """
import resource, torch
from pathlib import Path
from convmixer_timm.kernels import operators
torch.set_num_threads(2)
ones, x = torch.ones(16), torch.randn(1, 16, 512, 512).contiguous(memory_format=torch.channels_last)
arguments = torch.ones(16, 1, 9, 9), ones, ones, ones, 9, True, True, 1e-5
operators.spatial_mixing(x[:, :, :8, :8], *arguments)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (36 << 20),) * 2)  # the results take 32
try:
    operators.spatial_mixing(x, *arguments)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "spatial_mixing: not enough memory for [1, 16, 512, 512]\n", done.stderr


@needs_compiler
def test_variance_of_values_far_from_zero():
    torch.manual_seed(0)
    x = channels_last(64, 32, 8, 8) + 1000
    weight, _, gamma, beta = parameters(3)
    for y, exact in (
        (
            act_norm(x, gamma, beta, True, 1e-5)[0],
            plain_act_norm(x.double(), None, gamma.double(), beta.double(), True),
        ),
        (
            spatial_mixing(x - 1000, weight, torch.full((32,), 1000.0), gamma, beta, False, True, 1e-5)[0],
            plain_mixing(
                x.double() - 1000,
                weight.double(),
                torch.full((32,), 1000.0).double(),
                gamma.double(),
                beta.double(),
                False,
                True,
            ),
        ),
    ):
        assert relative(y, exact) < 1e-4  # what is left of fp32's digits after the thousands


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixing_gives_the_gradients_that_are_asked_for(dtype):
    torch.manual_seed(0)
    x, tensors = channels_last(4, 32, 8, 8, dtype=dtype), parameters()
    for asked in range(5):
        leaves = [t.detach().requires_grad_(i == asked) for i, t in enumerate((x, *tensors))]
        fast, plain = spatial_mixing(*leaves, True, True, 1e-5)[0], plain_mixing(*leaves, True, True)
        (got,), (want,) = (torch.autograd.grad(y.float().square().sum(), leaves[asked]) for y in (fast, plain))
        assert relative(got, want) < (0.05 if dtype == torch.bfloat16 else 1e-4)


@needs_compiler
@pytest.mark.parametrize("frozen", [None, 1, 2])
def test_second_derivatives(frozen):
    torch.manual_seed(0)
    x, grad, (weight, bias, gamma, beta) = *torch.randn(2, 4, 32, 6, 6), parameters(3)
    for fast, plain, tensors in (
        (
            lambda *t: spatial_mixing(*t, True, True, 1e-5)[0],
            lambda *t: plain_mixing(*t, True, True),
            (x, weight, bias, gamma, beta),
        ),
        (
            lambda x, g, b: act_norm(x, g, b, True, 1e-5)[0],
            lambda x, g, b: plain_act_norm(x, None, g, b, True),
            (x, gamma, beta),
        ),
        (
            lambda x, g, b: operators.act_norm_inference(x, None, g, b, bias, gamma, True, 1e-5),
            lambda x, g, b: plain_act_norm(x, None, g, b, True, bias, gamma),
            (x, gamma, beta),
        ),
    ):
        results = []
        for fn in (fast, plain):
            leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
            wanted = [t for t in leaves if t.requires_grad]
            (first,) = torch.autograd.grad(fn(*leaves), leaves[0], grad, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), wanted, allow_unused=True))
        for got, want in zip(*results, strict=True):
            assert (got is None and want is None) or relative(got, want) < 1e-3


@needs_compiler
def test_gradients_that_are_not_there_are_none():
    """As gradcheck tries it, on what PyTorch's own gradients give in fp32."""
    torch.manual_seed(0)
    tensors = [
        t.requires_grad_() for t in (torch.randn(2, 16, 3, 3), torch.randn(16, 1, 3, 3), *torch.rand(3, 16) + 0.5)
    ]
    assert torch.autograd.gradcheck(
        lambda *t: spatial_mixing(*t, True, True, 1e-5)[0], tensors, eps=1e-2, atol=0.05, rtol=0.05
    )
    x, _, gamma, _, beta = tensors
    assert torch.autograd.gradcheck(
        lambda *t: act_norm(*t, True, 1e-5)[0], (x, gamma, beta), eps=1e-2, atol=0.05, rtol=0.05
    )


# ---- as operators ----


def examples():
    """Each operator with arguments that it takes."""
    for dtype in DTYPES:
        x, z, grad = (channels_last(2, 32, 6, 6, dtype=dtype) for _ in range(3))
        weight, bias, gamma, beta = parameters(3)
        trained = [t.requires_grad_() for t in (x.clone(), weight.clone(), bias.clone(), gamma.clone(), beta.clone())]
        mean, var = torch.randn(32), torch.rand(32)
        yield operators.depthwise_weight_grad, (x, grad, 3)
        yield operators.act_norm, (trained[0], None, *trained[3:], True, 1e-5)
        yield operators.act_norm, (trained[0], z.clone().requires_grad_(), *trained[3:], False, 1e-5)
        yield operators.act_norm_backward, (x, grad, gamma, mean, var, True, 1e-5)
        yield (
            operators.act_norm_inference,
            (trained[0], z.clone().requires_grad_(), *trained[3:], mean, var, True, 1e-5),
        )
        yield operators.spatial_mixing, (*trained, 3, True, True, 1e-5)
        yield operators.spatial_mixing_inference, (x, weight, bias, gamma, beta, mean, var, 3, True, True, 1e-5)
        for asked in ((True, True), (True, False), (False, True)):
            yield operators.spatial_mixing_backward, (x, z, grad, weight, gamma, mean, var, 3, True, True, 1e-5, *asked)


@needs_compiler
def test_opcheck():
    seen = set()
    for operator, arguments in examples():
        torch.library.opcheck(operator, arguments)
        seen.add(operator)
    assert seen == {getattr(operators, name) for name in operators.__all__ if name != "takes"}


X, C = torch.randn(2, 32, 6, 6), torch.ones(32)


@needs_compiler
@pytest.mark.parametrize(
    "arguments",
    [
        (X.double(), None, C, C),
        (X.half(), None, C, C),
        (X[0], None, C, C),
        (X[:0], None, C, C),
        (X[:, :8], None, C[:8], C[:8]),
        (X, X[:1], C, C),
        (X, X.bfloat16(), C, C),
        (X, None, C.bfloat16(), C),
        (X, None, C, C.double()),
        (X, None, C[:16], C),
        (X, None, C, C[None]),
        (X, None, C.to("meta"), C),
        (X, None, None, C),
        (None, None, C, C),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments):
    with pytest.raises(ValueError) as error:
        operators.act_norm(*arguments, True, 1e-5)
    assert "\n" not in str(error.value)


@needs_compiler
def test_any_strides_are_worked_on_as_they_are():
    torch.manual_seed(0)
    x, (weight, bias, gamma, beta) = channels_last(4, 32, 8, 8), parameters()
    want = operators.spatial_mixing(x, weight, bias, gamma, beta, 5, True, True, 1e-5)
    strided = torch.randn(32, 2)
    strided[:, 0] = gamma
    for other in (x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3), torch.cat([x, x], 1)[:, :32]):
        turned = weight.transpose(2, 3).contiguous().transpose(2, 3)
        got = operators.spatial_mixing(other, turned, bias, strided[:, 0], beta, 5, True, True, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3, 4, 8])
def test_the_same_call_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for operator, arguments in examples():
            results = [operator(*arguments) for _ in range(4)]
            first, *others = ([r] if isinstance(r, torch.Tensor) else r for r in results)
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    finally:
        torch.set_num_threads(before)

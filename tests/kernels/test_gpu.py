"""The Triton kernels, in Triton's interpreter on a CPU (in fp32 and fp16: it can't do bf16), and where the layers take
them. What they were measured at on a GPU is in benchmarks/README.md; here is no GPU.
"""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from convmixer_timm import ConvMixer, set_fast_training
from convmixer_timm.kernels import fast, gpu

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_in_the_interpreter():
    """Runs the others of this file in a process where Triton interprets: it decides so when it is imported."""
    if INTERPRETED:
        pytest.skip("this is that process")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "not switch"]
    result = subprocess.run(command, env=environment, capture_output=True)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
    assert b" passed" in result.stdout


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")


@pytest.fixture
def kernels(monkeypatch):
    """The module, with one setting instead of a choice by time, and tiles that fit small maps."""
    from convmixer_timm.kernels import triton_kernels

    monkeypatch.setattr(triton_kernels, "_ROWS", 32)
    monkeypatch.setattr(triton_kernels, "_TILE", 256)
    for function in (triton_kernels._depthwise, triton_kernels._depthwise_weight_grad):
        monkeypatch.setattr(function, "configs", function.configs[2:3])  # two rows of the kernel at a time
    return triton_kernels


@pytest.fixture
def on_gpu(kernels, monkeypatch):
    """Takes the CPU for a GPU whose kernels the user wants."""
    monkeypatch.setattr(gpu, "is_gpu", lambda x: True)
    monkeypatch.setattr(gpu, "_LEAST", 0)
    gpu._work.cache_clear()
    set_fast_training(gpu=True)
    yield
    set_fast_training(gpu=False)
    gpu._work.cache_clear()


def layers(channels, kernel_size, wider=0):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(channels, channels, kernel_size, groups=channels, padding="same"), nn.BatchNorm2d(channels)
    pointwise, norm2 = nn.Conv2d(channels, channels + wider, 1), nn.BatchNorm2d(channels + wider)
    for n in (norm, norm2):
        nn.init.normal_(n.weight)
        nn.init.normal_(n.bias)
    return nn.ModuleList([conv, norm, pointwise, norm2])


def by_pytorch(modules, x, residual, act=F.gelu):
    conv, norm, pointwise, norm2 = modules
    y = norm(act(conv(x)))
    return norm2(act(pointwise(y + x if residual else y)))


def close(a, b, tolerance=2e-5):
    assert (a - b).norm() <= tolerance * b.norm() + 1e-6


SHAPES = [((3, 2, 8, 16), 5), ((5, 2, 7, 14), 3), ((2, 2, 5, 40), 7), ((1, 2, 3, 70), 9), ((1, 1, 32, 32), 9)]


@interpreted
@pytest.mark.parametrize(
    ("shape", "kernel_size", "residual"),
    [*((*s, True) for s in SHAPES), (*SHAPES[0], False), (*SHAPES[2], False), ((4, 2, 2, 1), 5, False)],
)
def test_kernels_compute_what_pytorch_does(kernels, shape, kernel_size, residual):
    modules = layers(shape[1], kernel_size, wider=3)
    ours = copy.deepcopy(modules)
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    gelu = residual  # each with one of them
    expected = by_pytorch(modules, inputs[0], residual, F.gelu if gelu else F.relu)
    conv, norm, pointwise, norm2 = ours
    y = kernels.channel_mixing(kernels.spatial_mixing(inputs[1], conv, norm, residual, gelu), pointwise, norm2, gelu)
    close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    close(inputs[1].grad, inputs[0].grad)
    for p, q in zip(ours.parameters(), modules.parameters(), strict=True):
        close(p.grad, q.grad, 1e-4)
    for b, c in zip(ours.buffers(), modules.buffers(), strict=True):
        close(b.float(), c.float())


@interpreted
def test_gradients_of_gradients(kernels):
    modules = layers(2, 3)
    ours = copy.deepcopy(modules)
    x = torch.randn(2, 2, 4, 8)

    def penalty(compute, modules):
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(compute(inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [inputs, *modules.parameters()])

    conv, norm, pointwise, norm2 = ours

    def by_kernels(x):
        return kernels.channel_mixing(kernels.spatial_mixing(x, conv, norm, True), pointwise, norm2)

    expected = penalty(lambda x: by_pytorch(modules, x, True), modules)
    for a, b in zip(penalty(by_kernels, ours), expected, strict=True):
        close(a, b, 1e-3)


def model(**kwargs):
    torch.manual_seed(1)
    return ConvMixer(8, 2, kernel_size=3, patch_size=2, num_classes=4, **kwargs)


def calls_of(monkeypatch):
    calls = []
    for name in ("spatial_mixing", "channel_mixing"):
        function = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *args, _f=function, _n=name: calls.append(_n) or _f(*args))
    return calls


@interpreted
@pytest.mark.parametrize(
    ("size", "layout", "act"), [((16, 16), torch.channels_last, "gelu"), ((9, 15), torch.contiguous_format, "relu")]
)
def test_a_model_trains_on_them_under_autocast(on_gpu, monkeypatch, size, layout, act):
    net = model(act_layer=act).to(memory_format=layout)
    reference = copy.deepcopy(net)
    images = torch.randn(4, 3, *size).to(memory_format=layout)
    with torch.autocast("cpu", torch.float16):
        assert gpu._work(images.device, torch.float16)  # which calls them itself
        calls = calls_of(monkeypatch)
        loss = F.cross_entropy(net(images), torch.arange(4))
    loss.backward()
    assert calls == ["channel_mixing", *["spatial_mixing", "channel_mixing"] * 2]
    set_fast_training(gpu=False)
    monkeypatch.setattr(gpu, "is_gpu", lambda x: False)
    expected = F.cross_entropy(reference(images), torch.arange(4))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    grads = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (net, reference)]
    assert F.cosine_similarity(*grads, dim=0) > (0.99 if act == "gelu" else 0.9)  # a ReLU near zero may be another
    for a, b in zip(net.buffers(), reference.buffers(), strict=True):
        close(a.float(), b.float(), 0.02)


@interpreted
def test_where_they_do_not_run(on_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "_error", lambda *args: 0.0)  # which calls them itself
    calls = calls_of(monkeypatch)
    images = torch.randn(2, 3, 4, 4)

    def trains(net, autocast=True):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            net(images).sum().backward()

    trains(model(), autocast=False)  # in fp32
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        model()(images)
    trains(model(act_layer="relu", norm_layer=nn.Identity))
    trains(model().eval())
    hooked = model()
    for module in hooked.modules():
        module.register_forward_hook(lambda *_: None)
    trains(hooked)
    set_fast_training(gpu=False)
    trains(model())
    assert not calls


@interpreted
def test_small_maps_are_left_to_pytorch(on_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "_error", lambda *args: 0.0)  # which calls them itself
    calls = calls_of(monkeypatch)
    for least, taken in ((257, 0), (256, 5)):  # a map of 2 images, 8 channels and 4 x 4 positions
        monkeypatch.setattr(gpu, "_LEAST", least)
        with torch.autocast("cpu", torch.float16):
            model()(torch.randn(2, 3, 8, 8)).sum().backward()
        assert len(calls) == taken


@interpreted
def test_what_does_not_work_is_said_once(on_gpu, monkeypatch, caplog):
    errors = iter([0.0, float("nan")])
    monkeypatch.setattr(gpu, "_error", lambda *args: next(errors))
    with torch.autocast("cpu", torch.float16):
        for _ in range(2):
            model()(torch.randn(2, 3, 8, 8)).sum().backward()
    (record,) = caplog.records
    assert "PyTorch's operations run instead: their results are off by 0 and nan" in record.getMessage()
    monkeypatch.setattr(gpu, "_error", lambda *args: 1 / 0)
    gpu._work.cache_clear()
    assert not gpu._work(torch.device("cpu"), torch.float16)
    assert "division by zero" in caplog.records[-1].getMessage()


@interpreted
def test_nan_is_no_result(kernels, monkeypatch):
    gradient = kernels._convolution_weight_grad
    monkeypatch.setattr(kernels, "_convolution_weight_grad", lambda *args: gradient(*args) * float("nan"))
    assert torch.tensor(gpu._error(torch.device("cpu"), torch.float16, 2, 8)).isnan()


@interpreted
def test_the_trial_leaves_the_user_alone(on_gpu, monkeypatch):
    """His seeds, also those of the GPUs, his default device, and a checkpoint around the whole model."""
    net, images = model(), torch.randn(2, 3, 4, 4)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    before = torch.random.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.float16):
        y = checkpoint(net, images, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert gpu._work(torch.device("cpu"), torch.float16)


@interpreted
def test_parameters_and_features_that_do_not_fit(on_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "_error", lambda *args: 0.0)
    calls = calls_of(monkeypatch)
    net, images = model(), torch.randn(2, 3, 8, 8)
    conv = net.blocks[0][0].fn[0]
    reference = copy.deepcopy(net)
    conv.weight = nn.Parameter(conv.weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))
    assert not conv.weight.is_contiguous()
    with torch.autocast("cpu", torch.float16):
        close(net(images), reference(images), 1e-6)
        assert "spatial_mixing" in calls
        with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
            net(torch.randn(2, 4, 8, 8))
        with pytest.raises(RuntimeError, match="channels"):
            net.blocks[0][0](torch.randn(2, 6, 4, 4))


@interpreted
def test_many_gradients_at_once(kernels):
    conv, norm, pointwise, norm2 = layers(2, 3)
    x = torch.randn(2, 2, 4, 8, requires_grad=True)
    y = kernels.channel_mixing(kernels.spatial_mixing(x, conv, norm, True), pointwise, norm2)
    grads = torch.randn(3, *y.shape)
    (found,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for grad, one in zip(grads, found, strict=True):
        close(one, torch.autograd.grad(y, x, grad, retain_graph=True)[0], 1e-4)


@pytest.mark.skipif(INTERPRETED, reason="is compiled in the other process")
def test_a_batch_of_one_compiles():
    """Triton takes an argument that is 1 for a constant; of kernels that compile there is no GPU to try it on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from convmixer_timm.kernels import triton_kernels

    kernel = triton_kernels._act_norm_backward
    constants = {"N": 1, "P": 64, "GELU": True, "TILE": 256, "TILES": 1}
    types = {"x": "*bf16", "grad": "*bf16", "out": "*bf16", "C": "i32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


def test_without_the_switch_a_gpu_gets_pytorchs_operations(monkeypatch):
    monkeypatch.setattr(gpu, "is_gpu", lambda x: True)
    assert not fast._runs_here(torch.randn(1, 3, 4, 4))

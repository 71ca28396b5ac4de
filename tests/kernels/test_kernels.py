"""The fast CPU training kernels against PyTorch's own operations, and in every setting that training meets."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer_timm import ConvMixer, convmixer, set_fast_training
from convmixer_timm.kernels import act_norm, build, depthwise, spatial_mixing
from convmixer_timm.kernels.depthwise import DepthwiseConv2d, depthwise_conv2d
from convmixer_timm.kernels.pooling import average_pool, can_pool

# The first is the compiled kernel, the second what runs on machines without a compiler.
WAYS = ["compiled", "folded"]

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C++ compiler with OpenMP on this machine")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    torch.manual_seed(0)
    if request.param == "folded":
        monkeypatch.setattr(build, "library", lambda: None)
    elif build.library() is None:
        pytest.skip("no C++ compiler with OpenMP on this machine")
    return request.param


def gradients(conv, x, grad, dtype):
    x = x.to(dtype).detach().requires_grad_()
    weight, bias = (p.detach().to(dtype).requires_grad_() for p in (conv.weight, conv.bias))
    fast = F.conv2d(x, weight, bias, padding="same", groups=len(weight))
    fast.backward(grad.to(dtype))
    return x.grad, weight.grad, bias.grad


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


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
    monkeypatch.setattr(depthwise, "depthwise_weight_grad", forbidden)
    conv.weight.requires_grad_(False)
    conv(x).sum().backward()
    assert x.grad is not None
    assert conv.bias.grad is not None
    conv.requires_grad_(False)
    conv(x).sum().backward()
    conv.requires_grad_(True)
    with torch.no_grad():
        conv(x)


def test_one_switch_turns_it_off(monkeypatch):
    monkeypatch.setattr(depthwise, "depthwise_weight_grad", lambda *args: pytest.fail("the fast kernel ran"))
    monkeypatch.setattr(act_norm, "act_norm", lambda *args: pytest.fail("the fast kernel ran"))
    for name in ("mix_space", "average_pool"):
        monkeypatch.setattr(convmixer, name, lambda *args, **kwargs: pytest.fail("the fast kernel ran"))
    model = ConvMixer(32, 2, 5, 2, num_classes=10).to(memory_format=torch.channels_last)
    try:
        set_fast_training(False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(2, 3, 16, 16)).sum()
        loss.backward()
    finally:
        set_fast_training(True)
    code = "import convmixer_timm.kernels.build as b; assert not b.enabled()"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**__import__("os").environ, "CONVMIXER_TIMM_FAST": "0"}
    )


def test_build_problems_leave_pytorchs_operations(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    try:
        monkeypatch.setenv("CXX", "false")
        with caplog.at_level("INFO"):
            assert build.library() is None
        assert "could not be built" in caplog.text
        assert not [p for p in (tmp_path / "convmixer-timm").iterdir()]
    finally:
        build.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "half", "folder"])
def test_a_damaged_cache_is_built_anew(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "from convmixer_timm.kernels.build import library; assert library() is not None"
    subprocess.run([sys.executable, "-c", code], check=True)
    (built,) = (tmp_path / "convmixer-timm").iterdir()
    content = built.read_bytes()
    built.unlink()
    if damage == "folder":
        built.mkdir()
    else:
        built.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    subprocess.run([sys.executable, "-c", code], check=True)
    assert built.is_file() and len(built.read_bytes()) == len(content)


def test_without_a_home_directory_it_builds_in_a_folder_of_its_own(monkeypatch):
    from convmixer_timm import files

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    folder = files.cache_dir()
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    assert folder == files.cache_dir()


# ---- activation and norm ----


def plain_act_norm(x, act, norm, shortcut):
    y = norm(act(x))
    return y if shortcut is None else y + shortcut


def run_act_norm(fn, dtype, act, with_shortcut, x, shortcut, grad):
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(32)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    if dtype == torch.float64:
        norm = norm.double()
    x, shortcut = (t.to(dtype).detach().requires_grad_() for t in (x, shortcut))
    y = fn(x, act, norm, shortcut if with_shortcut else None)
    y.backward(grad.to(dtype))
    out = [y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    return [*out, shortcut.grad] if with_shortcut else out


@needs_compiler
@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU()], ids=["gelu", "relu"])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("shape", [(2, 32, 1, 1), (3, 32, 7, 5), (16, 32, 16, 16)])
def test_act_norm_is_no_further_from_fp64_than_pytorchs(act, with_shortcut, shape):
    torch.manual_seed(0)
    x, shortcut, grad = (t.to(memory_format=torch.channels_last) for t in torch.randn(3, *shape).bfloat16() * 2)
    norm = nn.BatchNorm2d(32)
    assert act_norm.can_fuse(x, act, norm)
    args = (act, with_shortcut, x, shortcut, grad)
    exact = run_act_norm(plain_act_norm, torch.float64, *args)
    theirs = run_act_norm(plain_act_norm, torch.bfloat16, *args)
    ours = run_act_norm(act_norm.act_norm, torch.bfloat16, *args)
    for got, want, pytorchs in zip(ours, exact, theirs, strict=True):
        assert relative(got, want) <= 1.05 * relative(pytorchs, want) + 1e-6


@needs_compiler
def test_gelu_over_its_whole_range():
    # Two rows, +v and -v a channel pair, so that batch-norm's affine map can be undone exactly enough.
    v = torch.linspace(-12, 12, 4096 * 32).reshape(4096, 32, 1, 1).bfloat16().to(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(32)
    leaf = v.clone().requires_grad_()
    y = act_norm.act_norm(leaf, nn.GELU(), norm)
    want = F.batch_norm(F.gelu(v.double()), None, None, training=True)
    assert (y - want).abs().max() < 2**-8 * want.abs().max()


@needs_compiler
def test_nan_and_infinity_are_not_hidden():
    for bad in (float("nan"), float("inf")):
        x = torch.randn(4, 32, 4, 4).bfloat16().to(memory_format=torch.channels_last)
        x[0, 3, 0, 0] = bad
        leaf = x.requires_grad_()
        y = act_norm.act_norm(leaf, nn.GELU(), nn.BatchNorm2d(32))
        assert y[:, 3].isnan().any()
        assert y[:, :3].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, act, norm: (x.float(), act, norm),
        lambda x, act, norm: (x.contiguous(), act, norm),
        lambda x, act, norm: (x, nn.SiLU(), norm),
        lambda x, act, norm: (x, nn.GELU(approximate="tanh"), norm),
        lambda x, act, norm: (x, act, norm.eval()),
        lambda x, act, norm: (x, act, nn.BatchNorm2d(32, momentum=None)),
        lambda x, act, norm: (x, act, nn.SyncBatchNorm(32)),
        lambda x, act, norm: (x[:, :13].to(memory_format=torch.channels_last), act, nn.BatchNorm2d(13)),
    ],
)
def test_everything_else_is_left_to_pytorch(change):
    x = torch.randn(2, 32, 4, 4).bfloat16().to(memory_format=torch.channels_last)
    assert not act_norm.can_fuse(*change(x, nn.GELU(), nn.BatchNorm2d(32)))


# ---- spatial mixing ----


def mixing_layers(kernel_size=5, dtype=torch.float32):
    torch.manual_seed(1)
    conv, norm = DepthwiseConv2d(32, kernel_size), nn.BatchNorm2d(32)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return conv.to(dtype), norm.to(dtype)


def images(*shape, count=1):
    torch.manual_seed(0)
    return [t.bfloat16().to(memory_format=torch.channels_last) for t in torch.randn(count, *shape)]


def plain_mixing(x, conv, act, norm, residual):
    y = norm(act(F.conv2d(x, conv.weight, conv.bias, padding="same", groups=32)))
    return y + x if residual else y


def run_mixing(fn, dtype, kernel_size, act, residual, x, grad):
    conv, norm = mixing_layers(kernel_size, dtype)
    x = x.to(dtype if dtype == torch.float64 else x.dtype).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
        y = fn(x, conv, act, norm, residual)
    y.backward(grad.to(y.dtype))
    grads = [x.grad, conv.weight.grad, conv.bias.grad, norm.weight.grad, norm.bias.grad]
    return [y, *grads, norm.running_mean, norm.running_var]


@needs_compiler
@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5, 7, 8, 9, 10, 17])
@pytest.mark.parametrize("shape", [(1, 32, 7, 11), (8, 32, 16, 16)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU()], ids=["gelu", "relu"])
def test_mixing_is_no_further_from_fp64_than_pytorchs(kernel_size, shape, residual, act):
    x, grad = images(*shape, count=2)
    args = (kernel_size, act, residual, x, grad)
    exact = run_mixing(plain_mixing, torch.float64, *args)
    theirs = run_mixing(plain_mixing, torch.float32, *args)
    ours = run_mixing(spatial_mixing.mix_space, torch.float32, *args)
    for got, want, pytorchs in zip(ours, exact, theirs, strict=True):
        assert relative(got, want) <= 1.05 * relative(pytorchs, want) + 1e-6


@needs_compiler
def test_mixing_gives_the_gradients_that_are_asked_for():
    (x,) = images(4, 32, 8, 8)
    conv, norm = mixing_layers()
    conv.bfloat16()
    for asked in ([x.requires_grad_()], [conv.weight], [conv.bias], [x, conv.weight, norm.weight]):
        y = spatial_mixing.mix_space(x, conv, nn.GELU(), norm, residual=True)
        want = plain_mixing(x, conv, nn.GELU(), norm, residual=True)
        got, expected = (torch.autograd.grad(out.float().square().sum(), asked[-1]) for out in (y, want))
        assert relative(got[0], expected[0]) < 0.05
    y = spatial_mixing.mix_space(x.detach(), conv, nn.GELU(), norm)
    y.float().square().sum().backward()
    assert conv.weight.grad.dtype == torch.bfloat16
    assert conv.weight.grad.abs().sum() > 0


@needs_compiler
def test_mixing_differentiates_twice():
    (x,) = images(4, 32, 6, 6)
    results = []
    for fn in (spatial_mixing.mix_space, plain_mixing):
        conv, norm = mixing_layers(3)
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = fn(leaf, conv, nn.GELU(), norm, True)
        (first,) = torch.autograd.grad(y.float().square().sum(), leaf, create_graph=True)
        first.float().square().sum().backward()
        results.append((leaf.grad, conv.weight.grad, norm.weight.grad))
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 0.05


@needs_compiler
def test_mixing_is_for_bf16_convolutions_that_train():
    (x,) = images(2, 32, 4, 4)
    conv, norm = mixing_layers()
    can_mix = spatial_mixing.can_mix
    with torch.autocast("cpu", torch.bfloat16):
        assert can_mix(x, conv, nn.GELU(), norm)
        assert not can_mix(x.float(), conv, nn.GELU(), norm)
        assert not can_mix(x, nn.Conv2d(32, 32, 1), nn.GELU(), norm)
        assert not can_mix(x, DepthwiseConv2d(32, 5, bias=False), nn.GELU(), norm)
        assert not can_mix(x, copy.deepcopy(conv).requires_grad_(False), nn.GELU(), norm)
        handle = conv.register_forward_hook(lambda *args: None)
        assert not can_mix(x, conv, nn.GELU(), norm)
        handle.remove()
    assert not can_mix(x, conv, nn.GELU(), norm)  # PyTorch refuses a bf16 image for fp32 weights, in its own words
    assert can_mix(x, conv.bfloat16(), nn.GELU(), norm)


# ---- pooling ----


@pytest.mark.parametrize("size", [(16, 16), (7, 5), (1, 1)])
def test_pooling_is_no_further_from_fp64_than_pytorchs(size):
    (x,) = images(4, 32, *size)
    results = []
    for fn, dtype in (
        (average_pool, torch.bfloat16),
        (lambda t: t.mean((2, 3)), torch.bfloat16),
        (lambda t: t.mean((2, 3)), torch.float64),
    ):
        leaf = x.to(dtype).detach().requires_grad_()
        y = fn(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad))
    for got, pytorchs, want in zip(*results, strict=True):
        assert relative(got, want) <= 1.05 * relative(pytorchs, want) + 1e-6
    assert results[0][1].is_contiguous(memory_format=torch.channels_last)


def test_pooling_of_other_kinds_is_timms():
    (x,) = images(2, 32, 4, 4)
    pool = timm.layers.SelectAdaptivePool2d(pool_type="avg", flatten=True)
    assert can_pool(x, pool)
    assert not can_pool(x.float(), pool)
    assert not can_pool(x.contiguous(), pool)
    assert not can_pool(x, timm.layers.SelectAdaptivePool2d(pool_type="avgmax", flatten=True))
    assert not can_pool(x, timm.layers.SelectAdaptivePool2d(pool_type="avg"))
    with torch.no_grad():
        assert not can_pool(x, pool)


# ---- the whole model in training ----


def train_step(model, x, autocast=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 10)
    loss.backward()
    return loss.item()


def test_bf16_training_follows_fp32(way):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 16, 16).to(memory_format=torch.channels_last)
    losses = {}
    for autocast in (False, True):
        torch.manual_seed(1)
        model = ConvMixer(32, 3, 5, 2, num_classes=10).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        losses[autocast] = []
        for _ in range(20):
            losses[autocast].append(train_step(model, x, autocast))
            optimizer.step()
            optimizer.zero_grad()
    assert losses[True][-1] < 0.5 * losses[True][0]
    assert losses[True] == pytest.approx(losses[False], rel=0.1)


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_frozen_layers_and_accumulation(way, autocast):
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    model = ConvMixer(32, 3, 5, 2, num_classes=10).to(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for m in (model, other):
        m.stem.requires_grad_(False)
        m.blocks[0].requires_grad_(False)
        train_step(m, x, autocast)
        train_step(m, x, autocast)
    assert model.stem[0].weight.grad is None
    for a, b in zip(model.blocks[1:].parameters(), other.blocks[1:].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3)


def test_create_graph_works_under_autocast():
    model = ConvMixer(32, 2, 3, 2, num_classes=10).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    weight = model.blocks[0][0].fn[0].weight
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    first.square().sum().backward()
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0


# ---- what stands between PyTorch and the kernels ----


def small_model():
    torch.manual_seed(1)
    return ConvMixer(32, 2, 5, 2, num_classes=10).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_no_gradient(way, default):
    x = torch.randn(8, 3, 16, 16)
    plain, other = small_model(), small_model()
    train_step(plain, x)
    torch.set_default_dtype(default)
    try:
        train_step(other, x)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_fake_tensors_and_flop_counters_see_pytorchs_operations(autocast):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = ConvMixer(32, 2, 5, 2, num_classes=10)(torch.randn(8, 3, 16, 16)).sum()
        loss.backward()
    flops = []
    for fast in (True, False):
        set_fast_training(fast)
        try:
            with FlopCounterMode(display=False) as counter:
                train_step(small_model(), torch.randn(8, 3, 16, 16), autocast)
        finally:
            set_fast_training(True)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


class Doubled(nn.GELU):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_an_activation_is_called():
    (x,) = images(2, 32, 4, 4)
    assert act_norm.can_fuse(x, nn.GELU(), nn.BatchNorm2d(32)) == (build.library() is not None)
    assert not act_norm.can_fuse(x, Doubled(), nn.BatchNorm2d(32))


def test_a_global_hook_sees_every_module():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        train_step(small_model(), torch.randn(8, 3, 16, 16))
    finally:
        handle.remove()
    assert seen.count(nn.GELU) + seen.count(timm.layers.get_act_layer("gelu")) == 5
    assert seen.count(nn.BatchNorm2d) == 5


def test_float64_under_autocast_runs():
    model = small_model().double()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 3, 16, 16, dtype=torch.float64)).sum().backward()
    assert model.blocks[0][0].fn[0].weight.grad.abs().sum() > 0

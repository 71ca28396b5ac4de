"""When a model's layers run on the kernels, and that nobody sees it but in the time."""

import copy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.convmixer import ConvMixer as TimmConvMixer

from convmixer_timm import ConvMixer, set_fast_training
from convmixer_timm.kernels import build, fast

from .helpers import needs_compiler, relative


def small_model(cls=ConvMixer, dim=32, **kwargs):
    torch.manual_seed(1)
    return cls(dim, 2, kernel_size=5, patch_size=2, num_classes=10, **kwargs)


@pytest.fixture
def calls(monkeypatch):
    """How often the layers ran on the fused kernels and on the depthwise weight gradient: a list of names."""
    names = []
    for name in (
        "act_norm",
        "act_norm_inference",
        "spatial_mixing",
        "spatial_mixing_inference",
        "depthwise_conv2d",
    ):
        function = getattr(fast, name)

        def counted(*args, _name=name, _function=function):
            names.append(_name)
            return _function(*args)

        monkeypatch.setattr(fast, name, counted)
    return names


# ---- the whole model in training ----


def train_step(model, x, autocast=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 10)
    loss.backward()
    return loss.item()


def test_bf16_training_follows_fp32(way):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 16, 16)
    losses = {}
    for autocast in (False, True):
        torch.manual_seed(1)
        model = ConvMixer(32, 3, 5, 2, num_classes=10)
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
    x = torch.randn(4, 3, 16, 16)
    model = ConvMixer(32, 3, 5, 2, num_classes=10)
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
    if way == "kernels":  # PyTorch's norms move their statistics twice
        for a, b in zip(model.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_create_graph_works_under_autocast():
    model = ConvMixer(32, 2, 3, 2, num_classes=10)
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    weight = model.blocks[0][0].fn[0].weight
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    first.square().sum().backward()
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0


# ---- without a flag ----


@needs_compiler
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"pointwise_residual": True}])
def test_a_plain_loop_runs_on_the_kernels(calls, memory_format, autocast, kwargs):
    model = small_model(**kwargs).to(memory_format=memory_format)
    train_step(model, torch.randn(4, 3, 16, 16).to(memory_format=memory_format), autocast)
    # stem, then a spatial and a channel mixing a layer; under autocast the stem's output is bf16 too
    assert calls == ["act_norm", *["spatial_mixing", "act_norm"] * 2]


@needs_compiler
@pytest.mark.parametrize(
    ("kernel_size", "padding", "taken"),
    [(5, "same", True), (5, 2, True), (5, (2, 1), False), (4, "same", True), (6, 3, False)],
)
def test_a_convolution_of_ones_own_with_the_same_padding_is_taken(calls, kernel_size, padding, taken):
    layer = small_model().blocks[0][0].fn
    layer[0] = nn.Conv2d(32, 32, kernel_size, groups=32, padding=padding)
    x = torch.randn(2, 32, 8, 8)
    layer(x).sum().backward()
    assert calls.count("spatial_mixing") == taken
    torch.testing.assert_close(layer(x), layer.forward(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_layouts_come_out_as_they_went_in(way, training):
    model = small_model().train(training)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 16, 16).to(memory_format=memory_format).requires_grad_()
        features, intermediates = model.forward_intermediates(x)
        for t in (model.forward_features(x), features, *intermediates):
            assert t.is_contiguous(memory_format=memory_format)
        model(x).sum().backward()
        assert x.grad.is_contiguous(memory_format=memory_format)
    for p in model.parameters():
        assert all(a == b for a, b, size in zip(p.grad.stride(), p.stride(), p.shape, strict=True) if size > 1)


@pytest.mark.parametrize("training", [True, False])
def test_feature_maps_without_pooling_keep_the_layout(way, training):
    model = small_model(global_pool="").train(training)
    for classes in (0, 10):
        model.reset_classifier(classes)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(4, 3, 16, 16).to(memory_format=memory_format)
            assert model(x).is_contiguous(memory_format=memory_format)
            features = model.forward_head(model.forward_features(x), pre_logits=True)
            assert features.is_contiguous(memory_format=memory_format)


@needs_compiler
def test_fp32_outputs_and_gradients_are_timms():
    torch.manual_seed(0)
    theirs, ours, exact = small_model(TimmConvMixer), small_model(), small_model(TimmConvMixer).double()
    ours.load_state_dict(theirs.state_dict())
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(16, 3, 32, 32)
    for model in (theirs, ours, exact):
        train_step(model, x.to(model.head.weight.dtype), autocast=False)
    for a, b, c in zip(ours.parameters(), theirs.parameters(), exact.parameters(), strict=True):
        # A bias before a norm has a gradient of sums that cancel: neither has many digits of it.
        assert relative(a.grad, b.grad) < 1e-5 or relative(a.grad, c.grad) < 1.5 * relative(b.grad, c.grad)
    assert relative(ours(x), theirs(x)) < 1e-6


def evaluated(cls=ConvMixer, **kwargs):
    """A model whose norms' statistics, of no training, are not those that it was made with."""
    model = small_model(cls, **kwargs).eval()
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(32) / 4)
            module.running_var.copy_(torch.rand(32) + 0.1)
    return model


@needs_compiler
@pytest.mark.parametrize("act_layer", [nn.GELU, nn.ReLU])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("gradients", ["off", "frozen", "on"])
def test_an_evaluation_runs_on_the_kernels(calls, monkeypatch, act_layer, precision, gradients):
    monkeypatch.setattr(fast, "_WORTH_RECORDING", 0)
    models = [evaluated(cls, act_layer=act_layer) for cls in (ConvMixer, TimmConvMixer, TimmConvMixer)]
    x = torch.randn(4, 3, 16, 16)
    if precision == "bf16":
        models[:2], x = [m.bfloat16() for m in models[:2]], x.bfloat16()
    with torch.set_grad_enabled(gradients != "off"), torch.autocast("cpu", torch.bfloat16, precision == "autocast"):
        ours, theirs = (m.requires_grad_(gradients == "on")(x) for m in models[:2])
    exact = models[2].double()(x.double())
    assert ours.dtype == theirs.dtype and ours.requires_grad == (gradients == "on")
    assert relative(ours, exact) < (1e-6 if precision == "fp32" else 1.2 * relative(theirs, exact))
    spatial = ["depthwise_conv2d", "act_norm_inference"] if gradients == "on" else ["spatial_mixing_inference"]
    assert calls == ["act_norm_inference", *[*spatial, "act_norm_inference"] * 2]


@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("little", [False, True])
def test_gradients_of_an_evaluation_are_timms(calls, monkeypatch, little, autocast):
    """Fine-tuning with frozen norms, and what looks for the pixels that matter; of little, where kernels don't pay."""
    if not little:
        monkeypatch.setattr(fast, "_WORTH_RECORDING", 0)
    found = []
    for model in (evaluated(), evaluated(TimmConvMixer), evaluated(TimmConvMixer).double()):
        x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(model.head.weight.dtype)
        x.requires_grad_()
        train_step(model, x, autocast and x.dtype == torch.float32)
        found.append([x.grad, *(p.grad for p in model.parameters())])
    for ours, theirs, exact in zip(*found, strict=True):
        assert relative(ours, exact) < (0.03 if autocast else max(1e-5, 2 * relative(theirs, exact)))
    assert autocast or bool(calls) != little  # some processors have a slow bf16, which little is no reason for


@pytest.mark.parametrize("training", [True, False])
def test_the_images_gradient_has_their_layout(way, training):
    model = small_model().train(training)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 16, 16).to(memory_format=memory_format).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x)
        assert grad.is_contiguous(memory_format=memory_format)
    features = torch.randn(4, 32, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(model.forward_head(features).sum(), features)
    grad.view(4, -1)


@needs_compiler
@pytest.mark.parametrize("act_layer", [nn.GELU, nn.ReLU])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_through_a_frozen_model_is_timms(calls, monkeypatch, act_layer, autocast):
    monkeypatch.setattr(fast, "_WORTH_RECORDING", 0)
    x = torch.randn(4, 3, 16, 16)
    found = []
    for model in (evaluated(act_layer=act_layer), *[evaluated(TimmConvMixer, act_layer=act_layer) for _ in range(2)]):
        exact = len(found) == 2
        model = (model.double() if exact else model).requires_grad_(False)
        images = (x.double() if exact else x).clone().requires_grad_()
        train_step(model, images, autocast and not exact)
        found.append(images.grad)
    assert "act_norm_inference" in calls
    assert relative(found[0], found[2]) < max(1e-5, 1.5 * relative(found[1], found[2]))


# ---- types that the processor has no instructions for ----


@pytest.fixture(params=["few images", "many images"])
def no_instructions(request, way, monkeypatch):
    """As on a processor that has neither bf16 nor fp16."""
    monkeypatch.setattr(fast, "SLOW_DTYPES", {torch.bfloat16, torch.float16})
    if request.param == "many images":
        monkeypatch.setattr(fast, "_LARGE", 0)


@pytest.fixture
def convolved(monkeypatch):
    """The types that convolutions computed in."""
    types = set()
    function = F.conv2d

    def noted(x, *args, **kwargs):
        z = function(x, *args, **kwargs)
        types.update((x.dtype, z.dtype))  # which autocast may have cast on the way
        return z

    monkeypatch.setattr(F, "conv2d", noted)
    return types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_convolutions_take_fp32_where_their_own_type_is_slow(no_instructions, convolved, dtype, autocast, training):
    found = []
    for cls in (ConvMixer, TimmConvMixer, TimmConvMixer):
        model = evaluated(cls).train(training)
        x = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        given = torch.float64 if len(found) == 2 else torch.float32 if autocast else dtype
        model, images = model.to(given), x.to(given)
        with torch.autocast("cpu", dtype, enabled=autocast and given != torch.float64):
            features, logits = model.forward_features(images), model(images)
        logits.float().square().sum().backward()
        grads = torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in model.parameters())])
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast and given != torch.float64):
            without_gradients = model.train(False)(images)
        if not found:
            assert convolved == {torch.float32}
            assert images.dtype == given and features.is_contiguous()
        found.append((features, logits, without_gradients, grads))
    for ours, theirs, exact in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours, exact) < 1.3 * relative(theirs, exact)


@pytest.mark.parametrize("autocast", [False, True])
def test_fp16_trains_by_convolutions_in_fp32(monkeypatch, convolved, autocast):
    """PyTorch has no instructions for it backwards, on a processor that has them."""
    monkeypatch.setattr(fast, "SLOW_DTYPES", set())
    model, x = small_model(), torch.randn(4, 3, 16, 16)
    if not autocast:
        model, x = model.half(), x.half()
    for training, types in ((True, {torch.float32}), (False, {torch.float16})):
        convolved.clear()
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.float16, enabled=autocast):
            model.train(training)(x)
        assert types == convolved - ({torch.float32} if autocast and not training else set())


@pytest.mark.parametrize(
    "kwargs",
    [{"norm_layer": "layernorm2d"}, {"act_layer": "silu"}, {"pointwise_residual": True}, {"dim": 24}, {"frozen": True}],
)
def test_other_layers_take_fp32_too(no_instructions, convolved, kwargs):
    frozen = kwargs.get("frozen")
    model = small_model(**{} if frozen else kwargs).train(not frozen)
    x = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    assert convolved <= {torch.float32} and model.stem[0].weight.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_said_as_by_timms_class():
    errors = []
    for cls in (TimmConvMixer, ConvMixer):
        model = small_model(cls)
        with pytest.raises(RuntimeError) as channels:
            model.blocks(torch.randn(2, 48, 8, 8))
        model.blocks[0][3] = torch.nn.BatchNorm2d(48)
        with pytest.raises(RuntimeError) as norm:
            model(torch.randn(2, 3, 16, 16))
        errors.append((str(channels.value), str(norm.value)))
    assert errors[0] == errors[1]


def test_biases_alone_train_by_the_kernels(calls):
    x = torch.randn(4, 3, 16, 16)
    grads = []
    for cls in (TimmConvMixer, ConvMixer):
        model = small_model(cls)
        for name, p in model.named_parameters():
            p.requires_grad_("bias" in name)
        model(x).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert relative(grads[1], grads[0]) < 1e-5 and "spatial_mixing" in calls


@pytest.mark.parametrize(
    ("avx512", "bf16", "fast_in_bf16"),
    [(True, True, True), (True, False, False), (False, False, True)],
    ids=["AVX-512 with bf16", "AVX-512 without", "another that has it"],
)
def test_where_onednn_only_converts_bf16_is_slow(monkeypatch, avx512, bf16, fast_in_bf16):
    onednn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True, _is_mkldnn_fp16_supported=lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert fast._computes_in("bf16") == fast_in_bf16
    assert not fast._computes_in("fp16")


def test_types_that_dont_agree_are_an_error_still(no_instructions):
    with pytest.raises(RuntimeError, match="should be the same"):
        small_model().bfloat16()(torch.randn(2, 3, 16, 16))
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
        small_model()(torch.ones(2, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("training", [False, True])
def test_compiled_it_takes_fp32_too(monkeypatch, training):
    monkeypatch.setattr(fast, "SLOW_DTYPES", {torch.bfloat16})
    torch.compiler.reset()
    types = set()

    def backend(graph, _):
        for node in graph.graph.nodes:
            if node.op == "call_function" and "conv2d" in str(node.target):
                types.add(node.args[0].meta["example_value"].dtype)
        return graph.forward

    model, x = small_model().train(training), torch.randn(4, 3, 16, 16)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        logits = torch.compile(model, backend=backend)(x)
        torch.testing.assert_close(logits, copy.deepcopy(model)(x), atol=0.03, rtol=0.03)
    assert types == {torch.float32}


@pytest.mark.parametrize("images, precision", [(512, "fp32"), (511, "fp32"), (128, "autocast"), (127, "autocast")])
def test_a_compiled_evaluation_calls_the_kernels_for_large_maps(way, images, precision):
    torch.compiler.reset()
    called = []

    def backend(graph, _):
        called.extend(str(node.target).split(".")[1] for node in graph.graph.nodes if "convmixer" in str(node.target))
        return graph.forward

    model, x = evaluated(), torch.randn(images, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, precision == "autocast"):
        logits = torch.compile(model, backend=backend, fullgraph=True)(x)
        assert relative(logits, evaluated(TimmConvMixer)(x)) < (1e-6 if precision == "fp32" else 0.02)
    if way == "kernels" and images in (128, 512):
        assert called == ["act_norm_inference", *["spatial_mixing_inference", "act_norm_inference"] * 2]
    else:
        assert not called


def test_a_compiled_vmap_sees_pytorchs_operations(way, monkeypatch):
    """So does a compiled jvp, whose compiling fails now and then in PyTorch, with timm's class too."""
    monkeypatch.setattr(fast, "_WORTH_A_CALL", {torch.float32: 0})
    torch.compiler.reset()
    each, x = torch.vmap(evaluated()), torch.randn(2, 4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(each, backend="aot_eager")(x), each(x))


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """As at the first use on a machine; gives what makes it the next process."""

    def forget():
        for cached in (build.library, build._was_built):
            cached.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield forget
    forget()


@needs_compiler
def test_the_evaluation_of_a_few_images_builds_nothing(calls, monkeypatch, tmp_path, nothing_built):
    """Building takes seconds; what is there is taken. Before, a few images go as through timm's class."""
    monkeypatch.setattr(fast, "_LARGE", 8 * 32 * 8 * 8)
    monkeypatch.setattr(fast, "_MANY", 7 * fast._LARGE)  # a model of five maps comes to that when it is run again
    monkeypatch.setattr(fast, "_evaluated", 0)
    model = evaluated()
    for images, built in ((7, False), (7, False), (8, False), (8, True), (7, True)):
        calls.clear()
        x = torch.randn(images, 3, 16, 16)
        with torch.no_grad():
            logits = model(x)
            assert built or images == 8 or torch.equal(logits, evaluated(TimmConvMixer)(x))
        assert bool(calls) == built == any(tmp_path.rglob("*.so"))
    nothing_built()
    calls.clear()
    with torch.no_grad():
        model(torch.randn(1, 3, 16, 16))
    assert calls


@needs_compiler
@pytest.mark.parametrize("intermediates", [False, True])
def test_a_checkpoint_computes_anew_what_it_computed(nothing_built, intermediates):
    """Layers in evaluation before one in training, which has the kernels built at its first step."""
    model = small_model()
    model.set_grad_checkpointing()
    model.stem.eval()
    model.blocks[0].eval()
    images = torch.randn(4, 3, 16, 16)
    if intermediates:
        features, layers = model.forward_intermediates(images)
        (features.sum() + layers[0].sum()).backward()
    else:
        train_step(model, images)


def test_one_switch_turns_it_off(calls):
    model, x = small_model(), torch.randn(2, 3, 16, 16)
    try:
        set_fast_training(False)
        train_step(model, x)
        model.eval()(x)
        model.train()
        assert not model.stem(x).is_contiguous(memory_format=torch.channels_last)
    finally:
        set_fast_training(True)
    assert not calls


# ---- who looks on ----


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["plain", "autocast", "pure"])
def test_another_default_dtype_changes_no_gradient(way, default, mode):
    """Lightning's precision "bf16-true" sets one. A model of that type alone is compared with timm's."""
    x = torch.randn(8, 3, 16, 16)
    torch.set_default_dtype(default)
    try:
        other = small_model() if mode == "pure" else small_model().float()
    finally:
        torch.set_default_dtype(torch.float32)
    other.load_state_dict(small_model().state_dict())
    plain = small_model(TimmConvMixer).to(default) if mode == "pure" else small_model()
    plain.load_state_dict(small_model().state_dict())
    x = x.to(default) if mode == "pure" else x
    train_step(plain, x, mode == "autocast")
    torch.set_default_dtype(default)
    try:
        train_step(other, x, mode == "autocast")
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(other.parameters(), plain.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype
        if mode == "pure" and default != torch.float64:
            assert relative(a.grad, b.grad) < 0.2
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
def test_fake_tensors_and_tracers_see_operators_and_flops_are_counted(autocast):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(8, 3, 16, 16)
    with FakeTensorMode():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = small_model()(torch.randn(8, 3, 16, 16)).sum()
        loss.backward()
    flops = []
    for model in (small_model(TimmConvMixer), small_model()):
        with FlopCounterMode(display=False) as counter:
            train_step(model, x, autocast)
        flops.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(x)
        flops.append(counter.get_total_flops())
    assert flops[:2] == flops[2:] and flops[0] > 2 * flops[1] > 0

    model, traced = small_model(), small_model()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return traced(x)

    graph = make_fx(forward)(x)
    assert any("convmixer_timm" in str(node.target) for node in graph.graph.nodes)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(graph(x), model(x))


def test_tensor_subclasses_keep_theirs(calls):
    class Mine(torch.Tensor):
        pass

    output = small_model()(torch.randn(4, 3, 16, 16).as_subclass(Mine))
    output.sum().backward()
    assert type(output) is Mine and not calls


def test_distributed_tensors():
    code = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor, init_device_mesh
from timm.models.convmixer import ConvMixer as TimmConvMixer
from convmixer_timm import ConvMixer
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh, x = init_device_mesh("cpu", (1,)), torch.randn(4, 3, 16, 16)
def distributed(cls):
    model = distribute_module(cls(32, 2, 5, 2, num_classes=10), mesh)
    return model(distribute_tensor(x, mesh, [Replicate()]))
try:
    distributed(TimmConvMixer)
except NotImplementedError as error:  # an older torch's
    assert "batch_norm" in str(error)
else:
    output = distributed(ConvMixer)
    assert type(output) is DTensor
    output.to_local().sum().backward()
model = ConvMixer(32, 2, 5, 2, num_classes=10)
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
model(x).sum().backward()
assert all(p.grad is not None for p in model.parameters())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Doubled(nn.GELU):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Tripled(nn.Conv2d):
    def forward(self, x):
        return 3 * super().forward(x)


@needs_compiler
@pytest.mark.parametrize("where", ["act", "norm", "conv"])
def test_a_subclass_of_a_layer_is_called(calls, where):
    model = small_model()
    fn = model.blocks[0][0].fn
    if where == "act":
        fn[1] = Doubled()
    elif where == "norm":
        fn[2] = Shifted(32)
    else:
        fn[0] = Tripled(32, 32, 5, groups=32, padding="same")
    x = torch.randn(4, 32, 8, 8)
    torch.testing.assert_close(model.blocks[0][0](x), model.blocks[0][0].forward(x), rtol=1e-4, atol=1e-4)
    assert calls.count("spatial_mixing") == 0
    train_step(model, torch.randn(4, 3, 16, 16))
    assert calls.count("spatial_mixing") == 1  # the other layer


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["stem", "blocks.0", "blocks.0.0", "blocks.0.0.fn", "global_pool"])
def test_a_layers_own_forward_in_a_subclass_is_called(name, training, monkeypatch):
    model = small_model().train(training)
    layer = model.get_submodule(name)
    x = torch.randn(2, 3 if name == "stem" else 32, 8, 8)
    kind = type(layer)
    layer.__class__ = type("Mine", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 0 + 7})
    assert (layer(x) == 7).all()
    layer.__class__ = kind
    assert not (layer(x) == 7).all()
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 0 + 5)
    assert (layer(x) == 5).all()


def test_a_pooling_put_in_place_is_called():
    model = small_model().eval()
    features = model.forward_features(torch.randn(2, 3, 16, 16))
    model.global_pool.pool = nn.AdaptiveMaxPool2d(1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))


def _nothing(model):
    pass


def _drop_the_activation(model):
    for layers in (model.stem, model.blocks[0][0].fn, model.blocks[0]):
        del layers[-2]


def _put_one_in(model):
    for layers in (model.stem, model.blocks[0][0].fn, model.blocks[0]):
        layers.append(nn.Tanh())


def _norm_first(model):
    for layers in (model.stem, model.blocks[0][0].fn, model.blocks[0]):
        layers[-1], layers[-2] = layers[-2], layers[-1]


@pytest.mark.parametrize("change", [_nothing, _drop_the_activation, _put_one_in, _norm_first])
@pytest.mark.parametrize("residual", [False, True])
def test_layers_put_in_or_taken_out_count(change, residual):
    """They are sequences, as timm's are."""
    x = torch.randn(2, 3, 8, 8)
    gradients = []
    for fast_training in (True, False):
        set_fast_training(fast_training)
        model = small_model(pointwise_residual=residual)
        change(model)
        model(x).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    set_fast_training(True)
    assert relative(*gradients) < 1e-4
    if not residual:
        timms = small_model(TimmConvMixer)
        timms.load_state_dict(small_model().state_dict())
        change(timms)
        assert torch.allclose(small_changed(change)(x), timms(x), atol=1e-5)


def small_changed(change):
    model = small_model()
    change(model)
    return model


def _share_a_layer(model):
    model.blocks[1] = model.blocks[0]


def _share_a_norm(model):
    model.blocks[1][3] = model.blocks[0][3]


def _norms_without_bias(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias = None


def _larger_kernels(model):
    for block in model.blocks:
        conv = block[0].fn[0]
        conv.weight = nn.Parameter(F.pad(conv.weight.data, (1, 1, 1, 1)))


@pytest.mark.parametrize("change", [_share_a_layer, _share_a_norm, _norms_without_bias, _larger_kernels])
@pytest.mark.parametrize("mode", ["training", "training, norms frozen", "evaluation"])
def test_what_people_change_gives_timms_gradients(way, change, mode):
    """To first and second order."""
    x = torch.randn(4, 3, 16, 16)
    found = []
    for cls in (ConvMixer, TimmConvMixer):
        model = evaluated(cls)
        change(model)
        model.train(mode != "evaluation")
        if mode == "training, norms frozen":
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        weights = list(model.parameters())
        first = torch.autograd.grad(model(x).square().sum(), weights)
        twice = torch.autograd.grad(model(x).square().sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in twice), weights)
        with torch.no_grad():
            found.append([model(x).flatten(), *(torch.cat([g.flatten() for g in grads]) for grads in (first, second))])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 1e-4


def test_an_evaluation_and_a_step_share_a_backward(way):
    """PyTorch's norms move their statistics without a graph that was made before noticing."""
    x = torch.randn(4, 3, 16, 16)
    found = []
    for cls in (ConvMixer, TimmConvMixer):
        model = evaluated(cls)
        loss = model(x).square().mean()
        (loss + model.train()(x).square().mean()).backward()
        found.append(torch.cat([t.flatten() for t in model.state_dict().values()]))
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(found[0], found[2]) < 1e-5
    assert relative(found[1], found[3]) < 1e-4


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_of_fp32_under_autocast_is_fp32(way, training):
    """As of features that somebody gives to a layer alone: PyTorch's addition takes the wider type."""
    x, layer = torch.randn(2, 32, 8, 8), small_model().blocks[0][0].train(training)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.float32
        assert relative(y - x, layer.fn(x)) < 1e-5


def test_large_kernels_are_evaluated_by_pytorchs_convolution(calls):
    model = small_model().eval()
    for block in model.blocks:
        block[0].fn[0] = nn.Conv2d(32, 32, 23, groups=32, padding="same")
    with torch.no_grad():
        model(torch.randn(4, 3, 16, 16))
    assert "spatial_mixing_inference" not in calls


def test_a_part_of_a_layer_is_a_sequence():
    block = small_model().blocks[0]
    x = torch.randn(2, 32, 4, 4)
    assert torch.allclose(block[1:](block[0](x)), block(x), atol=1e-6)
    assert torch.allclose(block[0].fn[1:](block[0].fn[:1](x)), block[0].fn(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize(
    "name", ["stem", "blocks.0", "blocks.0.0", "blocks.0.0.fn", "blocks.0.0.fn.0", "blocks.0.3", "global_pool"]
)
def test_every_hook_is_called_and_changes_nothing_else(kind, name):
    x, seen = torch.randn(4, 3, 16, 16), []
    plain, hooked = small_model(), small_model()
    getattr(hooked.get_submodule(name), f"register_{kind}_hook")(lambda *args: seen.append(args) and None)
    for model in (plain, hooked):
        train_step(model, x, autocast=False)
    assert len(seen) == 1
    for a, b in zip(hooked.parameters(), plain.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-4


def test_a_global_hook_sees_every_module():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        counts = []
        for model in (small_model(TimmConvMixer), small_model()):
            seen.clear()
            train_step(model, torch.randn(8, 3, 16, 16))
            counts.append({name: seen.count(name) for name in ("Conv2d", "GELU", "BatchNorm2d", "Residual", "Linear")})
    finally:
        handle.remove()
    assert counts[0] == counts[1] and counts[1]["Conv2d"] == 5


def test_a_forward_put_in_place_of_a_modules_own_is_called():
    model = small_model()
    model.blocks[1][0].fn[1].forward = torch.zeros_like
    model.blocks[1][2].forward = torch.zeros_like
    assert model(torch.randn(4, 3, 16, 16)).std(0).max() < 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_feature_extractor(training):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = small_model().train(training)
    x, seen = torch.randn(4, 3, 16, 16), []
    model.blocks[1][0].fn.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    features = create_feature_extractor(model, {"blocks.1.0.fn": "branch"})(x)["branch"]
    torch.testing.assert_close(features, seen[0], rtol=1e-4, atol=1e-4)


def test_the_depthwise_layer_is_a_plain_conv2d():
    ours, theirs = small_model(), small_model(TimmConvMixer)
    convolutions = [[m for m in model.modules() if isinstance(m, nn.Conv2d)] for model in (ours, theirs)]
    for a, b in zip(*convolutions, strict=True):
        assert type(a) is nn.Conv2d and repr(a) == repr(b)


def test_float64_under_autocast_runs():
    model = small_model().double()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 3, 16, 16, dtype=torch.float64)).sum().backward()
    assert model.blocks[0][0].fn[0].weight.grad.abs().sum() > 0


@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
def test_four_threads_train_alike_twice(autocast):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        results = []
        for _ in range(3):
            model = small_model()
            train_step(model, torch.randn(33, 3, 16, 16, generator=torch.Generator().manual_seed(0)), autocast)
            results.append([p.grad for p in model.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@needs_compiler
@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_kernels_is_exported_or_traced(training):
    model, x = small_model().train(training), torch.randn(4, 3, 16, 16)
    program = torch.export.export(model, (x,))
    assert not any("convmixer_timm" in str(node.target) for node in program.graph.nodes)
    for scripted in (torch.jit.trace(model, x, check_trace=False), torch.jit.script(model)):
        assert "convmixer_timm::" not in str(scripted.inlined_graph)
    assert "convmixer_timm" not in torch.fx.symbolic_trace(model).code


def test_parts_and_expanded_images_come_out_channels_first(way):
    model = small_model().eval()
    grey, whole = torch.randn(4, 1, 16, 16), torch.randn(4, 3, 20, 20)
    for x in (grey.expand(-1, 3, -1, -1), whole[:, :, 2:18, 2:18], whole.transpose(2, 3)):
        assert model.forward_features(x).is_contiguous()
    part = whole.to(memory_format=torch.channels_last)[:, :, 2:18, 2:18]
    assert model.forward_features(part).is_contiguous(memory_format=torch.channels_last)


def test_fp64_is_left_to_pytorch(calls):
    model = small_model().double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    assert model.stem(x).is_contiguous()  # in channels-last it would take three times as long
    model(x).sum().backward()
    assert not calls


@pytest.mark.parametrize("dim", [32, 24])
@pytest.mark.parametrize("training", [True, False])
def test_batched_gradients(dim, training):
    model, x = ConvMixer(dim, 2, 3, 2, num_classes=3).train(training), torch.randn(4, 3, 8, 8, requires_grad=True)
    y = model(x)
    inputs = [x, *model.parameters()]
    several = torch.autograd.grad(y, inputs, torch.eye(12).view(12, 4, 3), retain_graph=True, is_grads_batched=True)
    single = torch.autograd.grad(y[2, 1], inputs)
    for a, b in zip(several, single, strict=True):
        torch.testing.assert_close(a[7], b, atol=1e-4, rtol=1e-3)


def test_every_hook_is_called_that_timms_calls():
    x = torch.randn(2, 3, 8, 8)
    for name in dict(small_model().named_modules()):
        called = []
        model = small_model()
        model.get_submodule(name).register_forward_hook(lambda *args, called=called: called.append(1))
        model(x)
        assert called, name
    assert torch.equal(model.eval().stem(input=x), model.stem(x))


def test_norms_that_count_no_batches(way):
    model = small_model()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked = None
    before = model.stem[2].running_mean.clone()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert not model.stem[2].running_mean.equal(before)


def test_ddp_finds_gradients_in_its_buckets_strides(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small_model().to(memory_format=torch.channels_last)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Grad strides")
            parallel(torch.randn(2, 3, 8, 8)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("norm", ["groupnorm", nn.InstanceNorm2d])
def test_norms_over_few_channels_get_the_layout_that_they_are_fast_in(norm, monkeypatch):
    """An evaluation stays as it came; training turns for the norm alone, but for group norms in fp32."""
    monkeypatch.setattr(fast, "_is_little", lambda x: False)
    model = small_model(dim=64, norm_layer=norm)
    layouts = set()
    monkeypatch.setattr(
        F, "gelu", lambda x, *args, _gelu=F.gelu, **kwargs: layouts.add(x.stride(1) > 1) or _gelu(x, *args, **kwargs)
    )
    x = torch.randn(4, 3, 16, 16)
    usual = {}
    instances = norm is nn.InstanceNorm2d
    for training, dtype, in_rows in ((False, None, True), (True, None, instances), (True, torch.bfloat16, True)):
        model.train(training)
        outputs = []
        for enabled in (False, True):
            set_fast_training(enabled)
            layouts.clear()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                outputs.append(model(x).float())
            outputs[-1].square().sum().backward()
            usual[enabled] = torch.cat([p.grad.flatten() for p in model.parameters()])
            model.zero_grad()
        assert layouts == {in_rows}
        tolerance = 1e-5 if dtype is None else 0.03
        assert relative(outputs[1], outputs[0]) < tolerance and relative(usual[True], usual[False]) < tolerance

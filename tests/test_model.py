"""The model against timm's own class, and through every way that timm and torch have of using a model."""

import copy
import inspect
import re

import pytest
import timm
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn as nn
from timm.models.convmixer import ConvMixer as TimmConvMixer

from convmixer_timm import ConvMixer, class_names, set_fast_training

SMALL = dict(dim=32, depth=3, kernel_size=5, patch_size=2, num_classes=10)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(*shape, **kwargs):
    return torch.randn(*(shape or (2, 3, 32, 32)), **kwargs)


def pair(dtype=torch.float32, **kwargs):
    """timm's model and ours with the same weights."""
    kwargs = {**SMALL, **kwargs}
    theirs = TimmConvMixer(**kwargs).to(dtype)
    ours = ConvMixer(**kwargs, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "kwargs", [{}, dict(act_layer=nn.ReLU, kernel_size=7), dict(kernel_size=4), dict(patch_size=1)]
)
def test_outputs_equal_timms(kwargs, memory_format, train):
    theirs, ours = pair(**kwargs)
    x = images().to(memory_format=memory_format)
    for model in (theirs, ours):
        model.to(memory_format=memory_format).train(train)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("train", [False, True])
def test_gradients_and_statistics_equal_timms(train):
    theirs, ours = pair(dtype=torch.float64)
    x = images(dtype=torch.float64)
    for model in (theirs, ours):
        model.train(train)(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_fp32_gradients_are_as_near_to_fp64_as_timms():
    theirs, ours = pair()
    exact = copy.deepcopy(theirs).double()
    x = images(8, 3, 32, 32)
    for model in (theirs, ours, exact):
        model(x.to(model.head.weight.dtype)).square().mean().backward()

    def error(model):
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        return sum(((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in pairs)

    assert error(ours) < 1.5 * error(theirs)


def test_same_seed_gives_timms_initial_weights_and_keys():
    torch.manual_seed(1)
    theirs = TimmConvMixer(**SMALL).state_dict()
    torch.manual_seed(1)
    ours = ConvMixer(**SMALL).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for key in ("stem.0.weight", "blocks.0.0.fn.0.weight", "blocks.0.1.weight", "blocks.0.3.weight", "head.weight"):
        assert key in ours


def test_constructor_takes_all_that_timms_takes():
    theirs = inspect.signature(TimmConvMixer.__init__).parameters.values()
    ours = inspect.signature(ConvMixer.__init__).parameters
    for parameter in theirs:
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:  # timm swallowed unknown arguments once
            assert ours[parameter.name].default == parameter.default


@pytest.mark.parametrize("name", ["dim", "depth", "kernel_size", "patch_size"])
@pytest.mark.parametrize("value", [0, -1, (5, 5)])
def test_sizes_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a positive integer, got {re.escape(str(value))}"):
        ConvMixer(**{**SMALL, name: value})


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="dropout"):
        ConvMixer(**SMALL, dropout=0.1)
    with pytest.raises(TypeError, match="dropout"):
        timm.create_model("convmixer_128_4", dropout=0.1)


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (32, 48), (33, 31), (2, 64)])
def test_any_image_from_one_patch_up(size):
    model = ConvMixer(**SMALL).eval()
    assert model(images(1, 3, *size)).shape == (1, 10)


def test_wrong_inputs_are_named():
    model = ConvMixer(**SMALL)
    with pytest.raises(RuntimeError, match=r"\(1 x 1\).*\(2 x 2\)"):
        model(images(2, 3, 1, 1))
    with pytest.raises(RuntimeError, match="3 channels, but got 4 channels"):
        model(images(2, 4, 32, 32))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kwargs", [{}, dict(drop_path_rate=0.1), dict(pointwise_residual=True), dict(global_pool="")])
def test_script_trace_fx_compile_export(kwargs, train):
    model = ConvMixer(**SMALL, **kwargs).train(train)
    x = images()
    if kwargs.get("drop_path_rate") and train:
        assert torch.jit.script(model)(x).shape == (2, 10)
        return  # random
    # A copy each: a call in training moves the running statistics, but not this call's output.
    expected = copy.deepcopy(model)(x)
    ways = {
        "script": lambda m: torch.jit.script(m),
        "trace": lambda m: torch.jit.trace(m, x, check_trace=False),
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, (x,)).module(),
    }
    for name, way in ways.items():
        torch.testing.assert_close(way(copy.deepcopy(model))(x), expected, atol=1e-5, rtol=1e-5, msg=name)


def test_compiled_model_trains_like_the_eager_one():
    eager = ConvMixer(**SMALL)
    compiled = torch.compile(copy.deepcopy(eager))
    x = images()
    for model in (eager, compiled):
        model(x).square().mean().backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_exported_model_takes_any_batch_and_size():
    model = ConvMixer(**SMALL).eval()
    dynamic = {"x": {0: torch.export.Dim("n", min=1, max=64)}}
    exported = torch.export.export(model, (images(),), dynamic_shapes=dynamic).module()
    x = images(5, 3, 32, 32)
    torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=1e-5)


def test_meta_device_then_materialised():
    model = ConvMixer(**SMALL, device="meta")
    assert all(p.is_meta for p in model.parameters())
    with torch.device("meta"):
        assert ConvMixer(**SMALL).head.weight.is_meta
    model = model.to_empty(device="cpu")
    model.load_state_dict(ConvMixer(**SMALL).state_dict())
    assert model.eval()(images()).isfinite().all()


def test_children_come_in_timms_order():
    theirs, ours = pair()
    x = images()
    for n in range(1, 5):
        cut = [nn.Sequential(*list(model.eval().children())[:-n]) for model in (theirs, ours)]
        torch.testing.assert_close(cut[0](x), cut[1](x).contiguous(), atol=1e-5, rtol=1e-4)


def test_a_new_classifiers_classes_have_no_names():
    model = timm.create_model("convmixer_128_4.e25_cifar10", pretrained=True)
    assert class_names(model)[0] == "airplane"
    model.reset_classifier(10)
    assert class_names(model) == [str(i) for i in range(10)]
    assert class_names(timm.create_model("convmixer_128_4.e25_cifar10", pretrained=True))[0] == "airplane"
    assert (
        class_names(timm.create_model("convmixer_768_32", dim=16, depth=1))[0] == "0"
    )  # nor an untrained one ImageNet's


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reset_classifier_keeps_pooling_dtype_and_mode(dtype, train):
    model = ConvMixer(**SMALL, global_pool="catavgmax", dtype=dtype).train(train)
    assert model.get_classifier().in_features == model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.head.weight.dtype == dtype
    assert model.head.training is train
    assert model.global_pool.pool_type == "catavgmax"
    assert model(images(dtype=dtype)).shape == (2, 7)
    model.reset_classifier(4, "max")
    assert model.head_hidden_size == model.num_features
    assert model(images(dtype=dtype)).shape == (2, 4)
    model.reset_classifier(0, "")
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images(dtype=dtype)).shape == (2, 32, 16, 16)


@pytest.mark.parametrize(
    "pool, shape",
    [("avg", (2, 32)), ("max", (2, 32)), ("avgmax", (2, 32)), ("catavgmax", (2, 64)), ("fastavg", (2, 32))],
)
def test_global_pool(pool, shape):
    model = ConvMixer(**SMALL, global_pool=pool).eval()
    features = model.forward_features(images())
    assert model.forward_head(features, pre_logits=True).shape == shape
    assert model.forward_head(features).shape == (2, 10)


def test_without_pooling_the_classifier_applies_at_each_position():
    model = ConvMixer(**SMALL).eval()
    x = images()
    pooled = model(x)
    model.reset_classifier(10, "")
    head = ConvMixer(**SMALL).head
    model.head.load_state_dict(head.state_dict())
    logits = model(x)
    assert logits.shape == (2, 10, 16, 16)
    model.reset_classifier(10, "avg")
    model.head.load_state_dict(head.state_dict())
    torch.testing.assert_close(logits.mean((2, 3)), model(x), atol=1e-5, rtol=1e-5)
    assert pooled.shape == (2, 10)


def test_a_layers_features_have_gradients_by_those_after():
    """As for a Grad-CAM without hooks."""
    model = ConvMixer(**SMALL).eval()
    final, layers = model.forward_intermediates(images())
    (by_logits,) = torch.autograd.grad(model.forward_head(final)[:, 3].sum(), layers[0], retain_graph=True)
    (by_features,) = torch.autograd.grad(layers[2].sum(), layers[1])
    assert by_logits.abs().sum() > 0 and by_features.abs().sum() > 0


def test_any_stem_lets_the_classifier_be_replaced():
    model = ConvMixer(**SMALL)
    model.stem = nn.Sequential(nn.Sequential(model.stem))
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)


def test_forward_intermediates_and_pruning():
    model = ConvMixer(**SMALL).eval()
    x = images()
    final, layers = model.forward_intermediates(x)
    assert len(layers) == 3
    assert torch.equal(final, layers[-1])
    assert torch.equal(final, model.forward_features(x))
    only = model.forward_intermediates(x, indices=[0, -2], stop_early=True, intermediates_only=True)
    assert torch.equal(only[0], layers[0])
    assert torch.equal(only[1], layers[1])
    with pytest.raises(AssertionError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")
    assert model.prune_intermediate_layers([0, -2]) == [0, 1]
    assert len(model.blocks) == 2
    assert torch.equal(model(x), layers[1])


@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
def test_features_only(feature_cls):
    kwargs = {"feature_cls": feature_cls, "out_indices": (0, 2)}
    model = timm.create_model("convmixer_128_4", features_only=True, **kwargs).eval()
    shapes = [tuple(f.shape) for f in model(images())]
    assert shapes == [(2, 128, 16, 16)] * 2
    assert model.feature_info.channels() == [128, 128]
    assert model.feature_info.reduction() == [2, 2]
    if feature_cls == "getter":
        for found, expected in zip(torch.jit.script(model)(x := images()), model(x), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_grad_checkpointing_gives_the_same_gradients():
    plain = ConvMixer(**SMALL)
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing()
    x = images()
    for model in (plain, recomputed):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_groups_for_layer_decay_and_weight_decay():
    from timm.models import group_parameters
    from timm.optim import create_optimizer_v2

    model = ConvMixer(**SMALL)
    assert model.no_weight_decay() == set()
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) == 1 + 3 + 1  # stem, layers, head
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scales = sorted({g["lr_scale"] for g in optimizer.param_groups})
    assert scales == [0.0625, 0.125, 0.25, 0.5, 1.0]


def test_drop_rate_and_drop_path():
    model = ConvMixer(**SMALL, drop_rate=0.5, drop_path_rate=0.6)
    assert [getattr(b[0].drop_path, "drop_prob", 0.0) for b in model.blocks] == pytest.approx([0.0, 0.3, 0.6])
    x = images()
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    branch = model.blocks[2][0]
    kept = torch.stack([(branch(x_ := torch.randn(64, 32, 4, 4)) - x_).abs().amax((1, 2, 3)) > 0 for _ in range(20)])
    assert 0.3 < kept.float().mean() < 0.5  # 1 - 0.6


@pytest.mark.parametrize("norm", ["layernorm2d", "groupnorm1", "batchnorm2d"])
@pytest.mark.parametrize("act", ["gelu", "silu", nn.ReLU])
def test_norms_and_activations_by_timms_names(norm, act):
    model = ConvMixer(**SMALL, norm_layer=norm, act_layer=act)
    model(images()).sum().backward()
    assert type(model.stem[2]).__name__.lower() == norm


def test_pointwise_residual_adds_the_layers_input():
    plain, residual = ConvMixer(**SMALL).eval(), ConvMixer(**SMALL, pointwise_residual=True).eval()
    residual.load_state_dict(plain.state_dict())
    x = torch.randn(2, 32, 8, 8)
    mixed = plain.blocks[0][0](x)
    torch.testing.assert_close(residual.blocks[0](x), plain.blocks[0](x) + mixed)


@pytest.mark.parametrize("where", ["blocks.0.0.fn", "blocks.0.0.fn.2", "blocks.0.1", "blocks.0.3", "stem.1"])
@pytest.mark.parametrize("autocast", [False, True])
def test_hooks_see_what_they_see_in_timms_model(where, autocast):
    seen = []
    theirs, ours = pair()
    for model in (theirs, ours):
        model.to(memory_format=torch.channels_last)
        model.get_submodule(where).register_forward_hook(lambda m, i, o: seen.append(o.detach().float()))
    x = images()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs(x), ours(x)
    assert len(seen) == 2
    tolerance = 0.02 if autocast else 1e-6
    assert (seen[0] - seen[1]).abs().max() <= tolerance * seen[0].abs().max()


def test_torch_func_transforms():
    model = ConvMixer(**SMALL).eval()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    x = images(3, 3, 8, 8)

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    one = torch.func.grad(loss)(parameters, x[1])
    for name in parameters:
        torch.testing.assert_close(each[name][1], one[name], atol=1e-4, rtol=1e-4)
    output, tangent = torch.func.jvp(model, (x,), (x,))
    torch.testing.assert_close(output, model(x))
    assert tangent.isfinite().all()
    torch.testing.assert_close(torch.func.linearize(model, x)[1](x), tangent)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("of_images", [False, True])
def test_forward_mode_differentiation(of_images, train):
    model, x = ConvMixer(**SMALL).train(train), images()
    parameters = dict(model.named_parameters())

    def dual(t):
        return fwAD.make_dual(t.detach(), torch.ones_like(t))

    tangents = []
    for fast_training in (True, False):
        set_fast_training(fast_training)
        with fwAD.dual_level():
            inputs = (parameters, dual(x)) if of_images else ({k: dual(p) for k, p in parameters.items()}, x)
            tangents.append(fwAD.unpack_dual(torch.func.functional_call(model, *inputs)).tangent)
    set_fast_training(True)
    torch.testing.assert_close(*tangents)


def test_features_of_a_subclass_or_a_patch_are_taken():
    class Nothing(ConvMixer):
        def forward_features(self, x):
            return super().forward_features(x) * 0

    patched = ConvMixer(**SMALL).eval()
    patched.forward_features = lambda x, own=patched.forward_features: own(x) * 0
    for model in (Nothing(**SMALL).eval(), patched):
        assert torch.equal(model(images())[0], model.head.bias)


def test_a_head_of_ones_own():
    model = ConvMixer(**{**SMALL, "num_classes": 0})
    model.head = nn.Linear(model.num_features, 4)  # without telling num_classes
    assert model(images()).shape == (2, 4)
    model = ConvMixer(**SMALL, global_pool="")
    assert model(images()).shape == (2, 10, 16, 16)
    model.head = nn.Conv2d(model.num_features, 4, 1)
    assert model(images()).shape == (2, 4, 16, 16)


def test_compiled_once_for_images_of_any_size():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ConvMixer(**SMALL), backend=backend, dynamic=True)
    for size in (16, 20, 24, 28):
        compiled(images(2, 3, size, size)).sum().backward()
    assert len(graphs) == 1

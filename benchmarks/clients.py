"""What other libraries make of a variant, on a CPU: each by itself, with how far its output is from timm's.

    pip install accelerate coremltools executorch open_clip_torch torchao
    python benchmarks/clients.py [NAME...]

transformers, lightning and fastai have tests instead (`tests/clients`).
"""

import argparse
import re
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from arguments import known

import convmixer_timm  # noqa: F401  registers the variants

NAME = "convmixer_128_4.e25_cifar10"


def model():
    return timm.create_model(NAME, pretrained=True).eval()


def images(n=2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def difference(a, b):
    return f"largest difference {(a - b).abs().max().item():.1e}"


def accelerate(folder):
    from accelerate import Accelerator
    from safetensors.torch import load_file

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    trained = model().train()
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-3)
    data = torch.utils.data.DataLoader([(image, i) for i, image in enumerate(images(8))], batch_size=4)
    trained, optimizer, data = accelerator.prepare(trained, optimizer, data)
    for batch, labels in data:
        accelerator.backward(F.cross_entropy(trained(batch), labels))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_model(trained, folder)
    timm.create_model(NAME.split(".")[0]).load_state_dict(load_file(folder / "model.safetensors"))
    return "two steps in bf16; the saved weights load in timm"


def _sharded_step(rank, folder):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sharded, whole = model(), model()
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    for one in (sharded, whole):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(images()).square().mean().backward()
        optimizer.step()
    pairs = zip(sharded.parameters(), whole.parameters(), strict=True)
    worst = max((a.full_tensor() - b).abs().max().item() for a, b in pairs)
    if rank == 0:
        (folder / "worst").write_text(f"{worst:.1e}")
    dist.destroy_process_group()


def fsdp2(folder):
    torch.multiprocessing.spawn(_sharded_step, (folder,), nprocs=2)
    return f"a step of two processes against one's: largest difference {(folder / 'worst').read_text()}"


def torchao_weights(folder):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized = model()
    quantize_(quantized, Int8WeightOnlyConfig())
    return "int8 weights of the head: " + difference(quantized(images()), model()(images()))


def torchao_pt2e(folder):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    stated = model()
    for block in stated.blocks:  # the quantizer takes no "same", which timm's class has too
        depthwise = block[0].fn[0]
        depthwise.padding = tuple(side // 2 for side in depthwise.kernel_size)
    prepared = prepare_pt2e(torch.export.export(stated, (images(),)).module(), quantizer)
    prepared(images())
    return "int8: " + difference(convert_pt2e(prepared)(images()), model()(images()))


def executorch(folder):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    exported = torch.export.export(model(), (images(),))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    (folder / "model.pte").write_bytes(program.buffer)
    (logits,) = Runtime.get().load_program(folder / "model.pte").load_method("forward").execute([images()])
    return "XNNPACK: " + difference(logits, model()(images()))


def coremltools(folder):
    import coremltools

    exported = torch.export.export(model(), (images(),)).run_decompositions({})
    traced = torch.jit.trace(model(), images())
    coremltools.convert(exported, convert_to="mlprogram").save(str(folder / "exported.mlpackage"))
    inputs = [coremltools.TensorType(shape=images().shape)]
    coremltools.convert(traced, inputs=inputs, convert_to="mlprogram").save(str(folder / "traced.mlpackage"))
    return "converted from an export and from a trace; running it needs macOS"


def open_clip_torch(folder):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(timm_model_name=NAME.split(".")[0], timm_pool="avg", timm_proj="linear", image_size=32)
    clip = CLIP(64, vision, CLIPTextCfg(context_length=16, vocab_size=100, width=32, heads=2, layers=1))
    clip.encode_image(images()).sum().backward()
    assert all(p.grad is not None for p in clip.visual.trunk.parameters())
    return "gradients of an image tower"


CLIENTS = [accelerate, fsdp2, torchao_weights, torchao_pt2e, executorch, coremltools, open_clip_torch]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [client.__name__ for client in CLIENTS]
    parser.add_argument("names", nargs="*", type=lambda name: known("client", name, names), help=", ".join(names))
    chosen = parser.parse_args().names
    for client in CLIENTS:
        if not chosen or client.__name__ in chosen:
            package = {"fsdp2": "torch"}.get(client.__name__, re.sub("_(weights|pt2e)$", "", client.__name__))
            try:
                installed = version(package)
            except PackageNotFoundError:
                print(f"{client.__name__:16}not measured: {package} is not installed", flush=True)
                continue
            with tempfile.TemporaryDirectory() as folder:
                print(f"{client.__name__:16}{package} {installed}: {client(Path(folder))}", flush=True)

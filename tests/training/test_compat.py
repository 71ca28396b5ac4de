"""What the package mends in timm."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.optim import muon
from timm.utils import CheckpointSaver

import convmixer_timm
from convmixer_timm.errors import RunError
from convmixer_timm.training import compat

from ..conftest import torchrun


def test_randaugment_at_full_strength(cifar_images):
    random.seed(0)
    transform = create_transform(32, is_training=True, auto_augment="rand-m10-n5-inc1")
    image = Image.open(cifar_images[0][0])
    for _ in range(100):
        assert transform(image).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
def test_posterize(name, cifar_images):
    image = Image.open(cifar_images[0][0])
    posterize = auto_augment.NAME_TO_OP[name]
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert all(v % 128 == 0 for v, _ in posterize(image, 1).getchannel(0).getcolors() for v in [_])
    assert posterize(image, 8) is image


MIXED = """
import sys
import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from convmixer_timm.training.compat import mend_mixup_off

mend_mixup_off()
loader = create_loader(
    create_dataset("", root=sys.argv[1]),
    use_multi_epochs_loader=bool(sys.argv[2]),
    input_size=(3, 32, 32),
    batch_size=10,
    is_training=True,
    num_workers=1,
    collate_fn=FastCollateMixup(cutmix_alpha=1.0, num_classes=10, label_smoothing=0.0),
    device=torch.device("cpu"),
)
for enabled in (True, False, False):
    if not enabled:
        loader.mixup_enabled = False
    print(any(bool(target.max(1).values.min() < 1) for _, target in loader))
"""


@pytest.mark.parametrize("multi_epochs", ["", "yes"])
def test_mixup_that_is_switched_off_stays_off_in_the_workers(cifar_images, multi_epochs):
    # In a process of its own: a loader with workers here made a later test crash, after the inference engines' tests.
    command = [sys.executable, "-c", MIXED, str(cifar_images[0][0].parent.parent), multi_epochs]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [
        "True",
        "False",
        "False",
    ]


def test_a_checkpoint_that_the_disk_does_not_hold_leaves_no_half(monkeypatch, tmp_path):
    saver = CheckpointSaver(torch.nn.Linear(200, 200), torch.optim.SGD([torch.zeros(1)]), checkpoint_dir=tmp_path)
    monkeypatch.setattr(CheckpointSaver, "_save", CheckpointSaver._save)
    compat.mend_saver()
    saver.save_checkpoint(0)
    whole = (tmp_path / "last.pth.tar").read_bytes()
    original = torch.save

    def save(state, path):  # as on a disk that fills up while it is written
        original(state, path)
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 571776 vs 571668")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RunError, match=r"tmp\.pth\.tar: the disk is full: free some space, and go on"):
        saver.save_checkpoint(1)
    assert not (tmp_path / "tmp.pth.tar").exists() and (tmp_path / "last.pth.tar").read_bytes() == whole


def test_what_channels_last_trained_is_written_as_safetensors(monkeypatch, tmp_path):
    monkeypatch.setattr(safetensors.torch, "save_file", safetensors.torch.save_file)
    compat.mend_safetensors()
    conv = torch.nn.Conv2d(3, 8, 5).to(memory_format=torch.channels_last)
    safetensors.torch.save_file(conv.state_dict(), tmp_path / "conv.safetensors")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "conv.safetensors")["weight"], conv.weight)


STARTS = """
import os, sys
from argparse import Namespace
from timm import utils
from convmixer_timm.errors import RunError
from convmixer_timm.training.compat import agree_on

agree_on("epoch 7")  # of an earlier launch
agree_on(f"epoch {sys.argv[1 + int(os.environ['RANK'])]}")
try:
    utils.init_distributed_device(Namespace(device="cpu"))
    print("agreed")
except RunError as error:
    print(error)
"""


def test_processes_that_start_from_different_epochs_end(tmp_path):
    (tmp_path / "starts.py").write_text(STARTS)
    for epochs, said in ((["3", "3"], "agreed"), (["3", "0"], "rank 0 starts from epoch 3, and rank 1 from epoch 0: ")):
        out = subprocess.run(
            [*torchrun(2), str(tmp_path / "starts.py"), *epochs], capture_output=True, text=True, check=True
        ).stdout
        assert out.count(said) == 2, out


def test_muon_computes_in_fp32_where_the_processor_has_no_bf16(monkeypatch):
    as_it_came = getattr(muon.zeropower_via_newtonschulz, "__wrapped__", muon.zeropower_via_newtonschulz)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", as_it_came)
    monkeypatch.setattr(compat, "SLOW_DTYPES", set())
    compat.mend_muon()
    assert muon.zeropower_via_newtonschulz is as_it_came

    monkeypatch.setattr(compat, "SLOW_DTYPES", {torch.bfloat16})
    compat.mend_muon()
    compat.mend_muon()
    grad = torch.randn(16, 32)
    step = [(3.4445, -4.775, 2.0315)]
    orthogonal = muon.zeropower_via_newtonschulz(grad, 5, step)
    assert orthogonal.dtype == torch.float32
    torch.testing.assert_close(orthogonal, as_it_came(grad, 5, step).float(), atol=0.02, rtol=0)
    # As its caller wants it, on another device, or with all of it off: timm's own.
    assert muon.zeropower_via_newtonschulz(grad, 5, step, 1e-7, 1.0, torch.float64).dtype == torch.float64
    assert muon.zeropower_via_newtonschulz(grad, 5, step, dtype=torch.float64).dtype == torch.float64
    assert muon.zeropower_via_newtonschulz(grad.to("meta"), 5, step).dtype == torch.bfloat16
    convmixer_timm.set_fast_training(False)
    try:
        assert muon.zeropower_via_newtonschulz(grad, 5, step).dtype == torch.bfloat16
    finally:
        convmixer_timm.set_fast_training(True)

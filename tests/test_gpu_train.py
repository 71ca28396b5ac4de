"""What the GPU's training does beside the kernels, on a CPU."""

import argparse
import copy
import csv
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from timm.optim import create_optimizer_v2

from convmixer_timm.hub.sources import read_run
from convmixer_timm.training.launch import RECIPES

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu_train(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_train

    return gpu_train


def test_crops_are_parts_of_the_image_or_of_its_mirror(gpu_train):
    torch.manual_seed(0)
    images = torch.rand(40, 3, 12, 12)
    mirrored, corners = 0, set()
    for image, crop in zip(images, gpu_train.crops(images, 8), strict=True):
        (found,) = [
            (flip, down, right)
            for flip in (False, True)
            for down in range(5)
            for right in range(5)
            if torch.equal(part(image, down, right).flip(-1) if flip else part(image, down, right), crop)
        ]
        mirrored += found[0]
        corners.add(found[1:])
    assert 10 < mirrored < 30
    assert len(corners) > 12


def part(image, down, right):
    return image[:, down : down + 8, right : right + 8]


def test_cutmix_mixes_the_targets_as_the_pixels(gpu_train):
    torch.manual_seed(0)
    images, targets = torch.zeros(2, 3, 32, 32), torch.eye(2)
    images[1] = 1.0
    shares = []
    for _ in range(50):
        mixed, soft = gpu_train.cutmix(images, targets, torch.tensor(1.0))
        shares.append(soft[0, 1].item())
        assert mixed[0].mean().item() == pytest.approx(shares[-1], abs=1e-5)
        assert soft.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert min(shares) < 0.1 and max(shares) > 0.5
    assert torch.equal(gpu_train.cutmix(images, targets, torch.tensor(0.0))[0], images)


def test_the_optimizer_is_timms(gpu_train):
    torch.manual_seed(0)
    ours = timm.create_model("convmixer_128_4", dim=32, depth=2)
    theirs = copy.deepcopy(ours)
    lr = torch.tensor(0.01)
    mine = gpu_train.Optimizer(ours, lr, weight_decay=0.02, momentum=0.9, capturable=False)
    reference = create_optimizer_v2(theirs, opt="nmuon", lr=0.01, weight_decay=0.02)
    before = ours.head.weight.clone()
    for step in range(3):
        lr.fill_(0.01 / (step + 1))
        for group in reference.param_groups:
            group["lr"] = 0.01 / (step + 1)
        images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert (ours.head.weight - before).abs().max() > 0.001
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=3e-4)  # a step is 0.01, its directions are in bf16


def test_a_run_is_left_as_train_py_leaves_one(gpu_train, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "validation"):
        shutil.copytree(Path(__file__).parent / "images", data / split)
    settings = dict(model="convmixer_128_4", epochs=2, warmup_epochs=1, batch_size=8)
    run = tmp_path / "runs/tiny"
    gpu_train.train(settings, data, run, "cpu")
    assert sorted(path.name for path in run.iterdir()) == ["args.yaml", "last.pth.tar", "summary.csv"]
    with (run / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)  # validated after the last epoch
    source = read_run(run, labels=[f"class {i}" for i in range(10)])
    assert source.evaluation.top1 == float(row["eval_top1"])
    assert source.training.weights == "those of epoch 2 of 2"
    assert source.model.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_annotated_experiment(gpu_train, tmp_path, monkeypatch):
    data = tmp_path / "data"
    for split in ("train", "validation"):
        shutil.copytree(Path(__file__).parent / "images", data / split)
    settings = yaml.safe_load(gpu_train.RECIPES.read_text())["annotated_e150"]
    theirs = yaml.safe_load((RECIPES / "annotated_e150.yaml").read_text())
    names = "model", "epochs", "batch_size", "opt", "lr", "weight_decay", "warmup_epochs", "mean", "std", "smoothing"
    assert all(settings[name] == theirs[name] for name in names)
    seen, step = [], gpu_train.Step.__call__
    monkeypatch.setattr(gpu_train.Step, "__call__", lambda self: (seen.append(self), step(self)))
    settings |= dict(model="convmixer_128_4", epochs=2, batch_size=8)
    row = gpu_train.train(settings, data, tmp_path / "annotated", "cpu")
    images, optimizer = seen[0].images, seen[0].optimizer
    assert images.shape[2:] == (40, 40) and set(images[:, :, :4].unique().tolist()) == {-1.0}  # black
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == row["lr"]
    assert row["lr"] == pytest.approx(0.00025)
    source = read_run(tmp_path / "annotated", labels=[f"class {i}" for i in range(10)])
    assert source.model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_a_teacher_is_timms(gpu_train, tmp_path):
    from timm.task import LogitDistillationTask

    torch.manual_seed(0)
    args = argparse.Namespace(**gpu_train.DEFAULTS | {"teacher": "convmixer_128_4", "batch_size": 6})
    args.mean, args.std = ([*timm.get_pretrained_cfg(args.teacher).to_dict()[name]] for name in ("mean", "std"))
    teacher = gpu_train.load_teacher(args, 10, "cpu")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    student = timm.create_model("convmixer_128_4", dim=32, depth=2).eval()
    images, targets = torch.randn(6, 3, 16, 16), F.one_hot(torch.arange(6), 10).float()
    step = gpu_train.Step(student, None, images, targets, args, teacher=teacher)
    task = LogitDistillationTask(
        student, teacher, torch.nn.CrossEntropyLoss(), task_loss_weight=1.0, distill_loss_weight=1.0, temperature=2.0
    )
    mine = step._distance(student(images), images)
    assert mine.item() == pytest.approx(task(images, targets)["kd_loss"].item(), rel=0.05)  # mine is in bf16
    with pytest.raises(SystemExit, match=r"convmixer_128_4 knows \[10, .* and the images are \[2, "):
        gpu_train.load_teacher(args, 2, "cpu")

    data = tmp_path / "data"
    for split in ("train", "validation"):
        shutil.copytree(Path(__file__).parent / "images", data / split)
    settings = dict(model="convmixer_128_4", epochs=1, warmup_epochs=0, batch_size=8, teacher="convmixer_128_4")
    taught = gpu_train.train(settings, data, tmp_path / "taught", "cpu")["train_loss"]
    alone = gpu_train.train({**settings, "task_loss_weight": 1.0}, data, tmp_path / "alone", "cpu")["train_loss"]
    assert taught != alone
    told = read_run(tmp_path / "taught", labels=[f"class {i}" for i in range(10)]).training
    assert told.teacher == "convmixer_128_4"


def test_timms_transforms_make_smaller_images_early(gpu_train, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    for split in ("train", "validation"):
        shutil.copytree(Path(__file__).parent / "images", data / split)
    settings = dict(model="convmixer_128_4", epochs=4, warmup_epochs=1, batch_size=8, val_interval=1)
    settings |= dict(aa="rand-m9-mstd0.5-inc1", early_size=24, early=0.5)
    seen = []
    step = gpu_train.Step.__call__
    with monkeypatch.context() as patch:
        patch.setattr(gpu_train.Step, "__call__", lambda self: (seen.append(self.batch.clone()), step(self)))
        row = gpu_train.train(settings, data, tmp_path / "tiny", "cpu")
    assert row["epoch"] == 3
    per_epoch = len(seen) // 4
    assert [len(batch[0, 0]) for batch in seen] == [24] * 2 * per_epoch + [32] * 2 * per_epoch
    assert not torch.equal(seen[0], seen[per_epoch])  # each epoch's are others
    assert 0.5 < torch.cat(seen[-per_epoch:]).float().std() < 2  # normalized

    gpu_train.train({**settings, "epochs": 10**6}, data, tmp_path / "brief", "cpu", seconds=4)
    with (tmp_path / "brief/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert 1 <= len(rows) < 100
    assert "24 pixels: an epoch takes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="want an aa"):
        gpu_train.train({**settings, "aa": ""}, data, tmp_path / "none", "cpu")

"""What a run is, written down when it starts; and trainings that go on, or don't, by it."""

import ast
import csv
import fcntl
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm import utils

from convmixer_timm.cli import main
from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.training.data_check import Data, Split
from convmixer_timm.training.launch import told_by_record
from convmixer_timm.training.record import Record, describe_model, stored_config, write_when_it_starts

from .conftest import summary
from .test_data_check import make_data

PACKED = WEIGHTS_DIR / "convmixer_128_4.e25_cifar10"


def make_record(root="/data/insects", classes=("ant", "bee"), digest="1", recipe="finetune", processes=1, **args):
    splits = {split: Split(f"{root}/{split}", 40, digest) for split in ("train", "validation")}
    data = Data(root.rpartition("/")[2], list(classes), splits, "validation", len(classes))
    args = {"model": "convmixer_128_4", "epochs": 3, "seed": 42, "data_dir": root, "num_classes": 2, **args}
    return Record.of(Namespace(**args), data, recipe, processes)


def test_it_is_read_as_it_was_written(tmp_path, monkeypatch):
    record = make_record(mean=(0.5, 0.5, 0.5), model_kwargs={"depth": 2}, gp="max")
    assert Record.read(tmp_path) is None
    monkeypatch.setattr(utils, "get_outdir", utils.get_outdir)  # given back after the test
    write_when_it_starts(record.going_on_from(make_record(epochs=1), 1))
    folder = utils.get_outdir(str(tmp_path), "run")
    read = Record.read(tmp_path / "run")
    assert folder == str(tmp_path / "run")
    assert read is not None and read.differences(record) == []
    assert (read.model.args, read.data, read.first_epoch) == ({"global_pool": "max", "depth": 2}, record.data, 1)
    assert read.before is not None and read.before.args["epochs"] == 1
    assert read.at(0) == read.before and read.at(1) == read


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"data": 1}', '{"data": {"splits": {}}, "model": {}}'),
        '{"data": {"splits": {}}, "model": {"preprocessing": {}}}',
    ],
)
def test_a_record_that_is_none_is_named(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is no record"):
        Record.read(tmp_path)


def test_what_makes_another_run():
    record = make_record()
    for same in ({"workers": 9}, {"experiment": "x", "output": "y"}, {"data_dir": "/elsewhere"}, {"device": "cuda"}):
        assert make_record(**same).differences(record) == []
    assert make_record("/moved/insects").differences(record) == []
    for other, told in [
        ({"epochs": 5}, "epochs is 3 there and 5 here"),
        ({"seed": 1}, "seed is 42 there and 1 here"),
        ({"lr": 0.1}, "lr is None there and 0.1 here"),
        ({"root": "/b", "digest": "2"}, "/data/insects/train"),
        ({"digest": "2"}, "has files of other names, sizes or contents there"),
        ({"classes": ("ant", "wasp")}, "ant, wasp"),
        ({"model_kwargs": {"depth": 2}}, "depth"),
        ({"processes": 2}, "1 processes there and 2 here"),
    ]:
        assert any(told in line for line in make_record(**other).differences(record)), other
    two = make_record(recipe="/b/config.yaml", lr=1.0).differences(make_record(recipe="/a/config.yaml"))
    assert "its recipe is /a/config.yaml there and /b/config.yaml here" in two


def test_the_model(tmp_path):
    args = {"model": "convmixer_128_4.e25_cifar10", "num_classes": 3, "input_size": [1, 48, 48], "crop_pct": 0.9}
    model = describe_model(Namespace(**args))
    assert (model.architecture, model.num_classes) == ("convmixer_128_4", 3)
    assert tuple(model.preprocessing["input_size"]) == (1, 48, 48)
    assert [len(model.preprocessing[key]) for key in ("mean", "std")] == [1, 1]  # the averages, as the loader has them
    with pytest.raises(ValueError, match="--mean and --std take a number, or one for each channel: got"):
        describe_model(Namespace(**args, mean=[0.5, 0.5]))
    pooled = describe_model(Namespace(model="convmixer_128_4", gp=None, model_kwargs={"global_pool": "max"}))
    assert pooled.args["global_pool"] == "max"
    # A packed folder's model has a name of its own, and arguments of its own.
    folder = tmp_path / "convmixer_128_4.v1.2"
    own = timm.create_model("convmixer_128_4", depth=2, num_classes=4)
    timm.models.save_for_hf(own, str(folder), model_args={"depth": 2}, safe_serialization=True)
    model = describe_model(Namespace(model=f"local-dir:{folder}"))
    assert (model.architecture, model.args["depth"], model.num_classes) == ("convmixer_128_4", 2, 4)
    for name in ("convmixer_1_1", "local-dir:nowhere", "ann/convmixer"):
        with pytest.raises(ValueError, match=name):
            describe_model(Namespace(model=name))
    with pytest.raises(ValueError, match="colour"):
        describe_model(Namespace(model="convmixer_128_4", model_kwargs={"colour": 1}))


def test_arguments_of_other_scripts():
    record = make_record(num_classes=2, img_size=48, model_kwargs={"depth": 2})
    flags = {"--model", "--num-classes", "--img-size", "--input-size", "--model-kwargs"}
    told = "--model convmixer_128_4 --model-kwargs depth=2 --img-size 48 --num-classes 2"
    assert told_by_record(record, flags) == told.split()
    wide = told_by_record(make_record(num_classes=2, input_size=[3, 48, 64]), flags)
    assert " ".join(wide) == "--model convmixer_128_4 --input-size 3 48 64 --num-classes 2"
    named = told_by_record(record, {*flags, "--label-type"})
    assert "pretrained_cfg_overlay={'label_names': ['ant', 'bee']}" in named
    # timm splits at '=' and gives the pooling by itself, where the script has an option for it.
    odd = told_by_record(make_record(classes=("a=b", "c")), {*flags, "--label-type"})
    (text,) = (arg.split("=")[1] for arg in odd if arg.startswith("pretrained_cfg_overlay="))
    assert ast.literal_eval(text) == {"label_names": ["a=b", "c"]}
    colours = told_by_record(make_record(input_img_mode="YCbCr"), {*flags, "--input-img-mode"})
    assert colours[colours.index("--input-img-mode") + 1] == "YCbCr"
    assert "--input-img-mode" not in told_by_record(record, {*flags, "--input-img-mode"})
    pooled = make_record(gp="max")
    assert "--gp" in told_by_record(pooled, {*flags, "--gp"}) and "global_pool" not in str(
        told_by_record(pooled, {*flags, "--gp"})
    )
    assert "global_pool='max'" in told_by_record(pooled, flags)


@pytest.mark.parametrize(
    "options, lost", [({"gp": "max"}, "global_pool=max"), ({"model_kwargs": {"depth": 2}}, "depth=2")]
)
def test_a_script_that_cant_make_the_model_is_not_run(options, lost):
    flags = {"--model", "--num-classes", "--checkpoint"}  # onnx_export.py's
    with pytest.raises(ValueError, match=f"can't be told of the run's {lost}"):
        told_by_record(make_record(**options), flags)
    told_by_record(make_record(model_kwargs={"drop_path_rate": 0.1}), flags)
    grey = make_record(in_chans=1, input_size=[1, 28, 28], mean=[0.5], std=[0.5])
    with pytest.raises(ValueError, match="in_chans=1"):
        told_by_record(grey, flags)
    assert told_by_record(make_record(gp="max"), {"--checkpoint"}) == []  # clean_checkpoint.py makes none


def test_a_packed_folder_that_describes_no_model(tmp_path):
    for text in ("{", "[1]", '{"pretrained_cfg": [1]}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json describes no model"):
            stored_config(f"local-dir:{tmp_path}")


# Trainings. Each is a process of its own, on a few images of 8 pixels.


@pytest.fixture
def train(timm_scripts, tmp_path):
    def run(*args, data="a", recipe="finetune"):
        command = [sys.executable, "-m", "convmixer_timm", "train", recipe, "--data-dir", data]
        command += "--model convmixer_128_4.e25_cifar10 --epochs 1 --warmup-epochs 0 --input-size 3 8 8".split()
        command += "-b 2 -j 0 --device cpu".split()
        env = {**os.environ, "TIMM_SCRIPTS": str(timm_scripts), "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *args], cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def refused(result):
    """The one line that says why."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("convmixer-timm: error: ")
    return line


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_folder_is_one_run(train, tmp_path, capsys):
    make_data(tmp_path / "a")
    make_data(tmp_path / "b", ["wasp", "fly"])
    result = train()
    assert result.returncode == 0, result.stderr
    run = tmp_path / "output/train/finetune"
    before = snapshot(run)
    record = Record.read(run)
    assert record is not None and record.data.classes == ["ant", "bee"] and record.model.num_classes == 2
    # The same again, from where it was moved to.
    (tmp_path / "a").rename(tmp_path / "moved")
    again = train(data="moved")
    assert again.returncode == 0 and "is finished, 1 of 1 epochs" in again.stderr
    # Anything else.
    line = refused(train(data="b"))
    assert "ant, bee" in line and "fly, wasp" in line and "--experiment" in line and "--resume" in line
    assert "epochs is 1 there and 2 here" in refused(train("--epochs", "2", data="moved"))
    assert snapshot(run) == before
    # What is published is what was trained, wherever the data are by now.
    shutil.rmtree(tmp_path / "moved")
    assert main(["publish", str(run), "--repo-id", "ann/x", "--dry-run"]) == 0
    assert "2 classes" in capsys.readouterr().out
    # On purpose, but with nothing left to train: nothing is said of the other data.
    assert "Nothing would be trained" in refused(train("--resume", str(run / "last.pth.tar"), data="b"))
    assert snapshot(run) == before
    # On purpose: the classes are those of the epoch that is published.
    assert train("--epochs", "2", "--resume", str(run / "last.pth.tar"), data="b").returncode == 0
    assert [row["epoch"] for row in summary(run)] == ["0", "1"]
    record = Record.read(run)
    assert record is not None and record.first_epoch == 1
    assert (record.data.classes, record.at(0).data.classes) == (["fly", "wasp"], ["ant", "bee"])
    # One whose last checkpoint an interruption took with it.
    (run / "last.pth.tar").rename(run / "tmp.pth.tar")
    assert "has tmp.pth.tar and no last.pth.tar: go on with it by --resume" in refused(train(data="b"))
    (run / "tmp.pth.tar").rename(run / "last.pth.tar")
    # A run without a record, as of train.py alone.
    (run / "run.json").unlink()
    assert "no run.json" in refused(train("--epochs", "2", data="b"))


def test_the_best_epoch_is_known_after_an_interruption(train, tmp_path):
    make_data(tmp_path / "a")
    assert train().returncode == 0
    run = tmp_path / "output/train/finetune"
    for name in ("last.pth.tar", "model_best.pth.tar"):  # better than any that follows
        stored = torch.load(run / name, weights_only=False)
        (run / name).unlink()  # they are links to one file
        torch.save({**stored, "metric": 101.0}, run / name)
    result = train("--epochs", "2", "--resume", str(run / "last.pth.tar"))
    assert result.returncode == 0, result.stderr
    assert torch.load(run / "model_best.pth.tar", weights_only=False)["epoch"] == 0  # longer, and validated alike
    # Validated by another metric, the figures can't be compared.
    last = str(run / "last.pth.tar")
    assert train("--epochs", "3", "--eval-metric", "loss", "--resume", last).returncode == 0
    assert torch.load(run / "model_best.pth.tar", weights_only=False)["epoch"] == 2
    assert main(["publish", str(run), "--repo-id", "ann/x", "--dry-run"]) == 0
    (run / "averaged.pth.tar").write_bytes(b"somebody's own")
    shutil.copy(run / "averaged.pth.tar", run / "checkpoint-avg.pth.tar")
    stored = torch.load(run / "model_best.pth.tar", weights_only=False)
    for name in ("last.pth.tar", "model_best.pth.tar"):
        (run / name).unlink()
        torch.save({**stored, "epoch": 1, "metric": 0.0}, run / name)
    assert train("--epochs", "2", "--eval-metric", "loss", "--resume", last).returncode == 1  # nothing to train
    record = Record.read(run)
    assert record is not None and record.alike_since() == 2
    result = train("--epochs", "3", "--eval-metric", "loss", "--resume", last)
    assert result.returncode == 0, result.stderr
    assert torch.load(run / "last.pth.tar", weights_only=False)["epoch"] == 2


def test_two_recipes_of_one_name(train, tmp_path):
    make_data(tmp_path / "a")
    for folder, lr in (("one", 0.01), ("two", 0.02)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text(f"model: convmixer_128_4\nlr: {lr}\n")
    assert train(recipe="one/config.yaml").returncode == 0
    line = refused(train(recipe="two/config.yaml"))
    assert "lr is 0.01 there and 0.02 here" in line and "one/config.yaml" in line and "two/config.yaml" in line
    assert train("--experiment", "two", recipe="two/config.yaml").returncode == 0


def test_nothing_is_written_where_nothing_can_be_trained(train, tmp_path):
    make_data(tmp_path / "a", splits=("train",))
    assert "to validate on" in refused(train())
    make_data(tmp_path / "a", splits=("test",))
    assert "one batch" in refused(train("-b", "7"))
    assert "Unknown model" in refused(train("--model", "convmixer_1_1"))
    assert not (tmp_path / "output").exists()
    result = train()
    assert result.returncode == 0 and "a has no validation: validating on test" in result.stderr


def test_validation_of_a_fine_tuned_run(train, timm_scripts, tmp_path, monkeypatch):
    make_data(tmp_path / "a")
    assert train().returncode == 0
    checkpoint = tmp_path / "output/train/finetune/last.pth.tar"
    (row,) = summary(checkpoint.parent)
    command = [sys.executable, "-m", "convmixer_timm", "run", "validate", "--device", "cpu"]
    command += ["-j", "0", "-b", "2", "--data-dir", "a", "--checkpoint", str(checkpoint)]
    env = {**os.environ, "TIMM_SCRIPTS": str(timm_scripts), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.partition("--result")[2])
    assert (told["model"], told["img_size"]) == ("convmixer_128_4", 8)
    assert told["top1"] == pytest.approx(float(row["eval_top1"]), abs=17)  # of 6 images, and fp32 for bf16
    make_data(tmp_path / "b", ["ant", "wasp"])
    result = subprocess.run([*command, "--data-dir", "b"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "lacks bee" in refused(result)
    # A class map may give another order, and a pretrained model has names too.
    (tmp_path / "map.txt").write_text("bee\nant\n")
    mapped = subprocess.run([*command, "--class-map", "map.txt"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "in another order" in refused(mapped)
    pretrained = [*command[:-2], "--model", "convmixer_128_4.e25_cifar10", "--pretrained"]
    assert "lacks airplane" in refused(
        subprocess.run(pretrained, cwd=tmp_path, env=env, capture_output=True, text=True)
    )


@pytest.mark.parametrize("channels", ["3", "1"])
def test_inference_of_a_fine_tuned_run(channels, train, timm_scripts, tmp_path):
    """It works, or says what to install."""
    make_data(tmp_path / "a")
    assert train("--input-size", channels, "8", "8").returncode == 0
    command = [sys.executable, "-m", "convmixer_timm", "run", "inference", "--device", "cpu"]
    command += [
        "--checkpoint",
        "output/train/finetune/last.pth.tar",
        "-j",
        "0",
        "-b",
        "2",
        "--fullname",
        "--data-dir",
        "a/train",
    ]
    env = {**os.environ, "TIMM_SCRIPTS": str(timm_scripts), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    try:
        import pandas  # noqa: F401
    except ImportError:
        assert "pip install pandas" in refused(result)
    else:
        assert result.returncode == 0, result.stderr
        (file,) = tmp_path.glob("*.csv")
        with file.open() as rows:
            assert {row["label"] for row in csv.DictReader(rows)} <= {"ant", "bee"}


def test_inference_of_images_that_it_cannot_read_is_refused(timm_scripts, tmp_path, capsys):
    make_data(tmp_path / "a")
    model = ["--model", "convmixer_128_4", "--in-chans", "4"]
    command = ["run", "--timm-scripts", str(timm_scripts), "inference", *model, "--data-dir", str(tmp_path / "a/train")]
    assert main(command) == 1
    assert "inference.py reads images of 1 or 3 channels, and the model takes 4" in capsys.readouterr().err


def test_a_run_from_a_packed_folder(train, tmp_path, capsys):
    """Of any name, with dots in it or not."""
    make_data(tmp_path / "a")
    shutil.copytree(PACKED, tmp_path / "convmixer_128_4.v1.2")
    assert train("--model", f"local-dir:{tmp_path / 'convmixer_128_4.v1.2'}").returncode == 0
    run = tmp_path / "output/train/finetune"
    assert main(["publish", str(run), "--repo-id", "ann/x", "--dry-run"]) == 0
    assert "v1.2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is the output of a training: give its variant as --model, and one of its"):
        describe_model(Namespace(model=f"local-dir:{run}"))
    tuned = torch.load(run / "last.pth.tar", weights_only=False)["state_dict"]["stem.0.weight"]
    assert (tuned - load_file(PACKED / "model.safetensors")["stem.0.weight"]).abs().max() < 0.1


def test_records_are_replaced_on_purpose_only():
    first = make_record()
    assert make_record(workers=3).going_on_from(first, 0) == first
    second = make_record(epochs=9).going_on_from(first, 5)
    assert (second.first_epoch, second.before) == (5, first)
    assert replace(second, first_epoch=0, before=None) == make_record(epochs=9)
    # What was only begun, and trained no epoch, is no part of the story.
    third = make_record(epochs=12).going_on_from(second, 5)
    assert (third.first_epoch, third.before) == (5, first)
    assert make_record(epochs=9).going_on_from(first, 0).at(0).args["epochs"] == 9  # --start-epoch 0
    # Back behind where it changed, its later epochs are trained anew.
    back = make_record(epochs=9).going_on_from(second, 3)
    assert (back.first_epoch, back.before) == (3, first)
    assert make_record().going_on_from(second, 3) == first


def test_figures_that_can_be_compared():
    first = make_record()
    second = make_record(epochs=9, lr=0.1).going_on_from(first, 3)
    third = make_record(digest="2").going_on_from(second, 5)
    assert (first.alike_since(), second.alike_since(), third.alike_since()) == (0, 0, 5)
    for other in ({"eval_metric": "loss"}, {"crop_pct": 0.5}, {"classes": ("ant", "wasp")}):
        assert not make_record(**other).alike(first)


def test_a_run_has_one_process(train, tmp_path):
    make_data(tmp_path / "a")
    assert train().returncode == 0
    run = tmp_path / "output/train/finetune"
    before = snapshot(run)
    held = os.open(run, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    longer = ("--epochs", "2", "--resume", str(run / "last.pth.tar"))
    assert "another process is training into" in refused(train(*longer))
    assert snapshot(run) == before
    # One that has no checkpoint yet.
    for file in run.glob("*.pth.tar"):
        file.unlink()
    assert "another process is training into" in refused(train())
    os.close(held)
    assert train().returncode == 0


def test_what_a_checkpoint_brings_along(train, tmp_path):
    make_data(tmp_path / "a")
    assert train().returncode == 0
    last = str(tmp_path / "output/train/finetune/last.pth.tar")
    longer = ("--epochs", "2", "--resume", last)
    assert "lr (0.001): add --no-resume-opt" in refused(train("--lr", "0.3", *longer))
    line = refused(train("--model", "convmixer_128_8", *longer))
    assert "is of a convmixer_128_4 of 2 classes and 3 channels" in line and "--initial-checkpoint" in line
    assert train("--lr", "0.3", "--no-resume-opt", *longer).returncode == 0


def test_where_nothing_can_be_written(train, tmp_path):
    make_data(tmp_path / "a")
    (tmp_path / "file").touch()
    assert "file is a file: give another --output" in refused(train("--output", "file"))
    assert "file is a file: give another --output" in refused(train("--output", "file/below"))


def test_validation_that_begins_late(train, tmp_path, capsys):
    """Each of the history's columns stays its own."""
    make_data(tmp_path / "a")
    assert train("--val-split", "").returncode == 0
    run = tmp_path / "output/train/finetune"
    assert train("--epochs", "2", "--resume", str(run / "last.pth.tar")).returncode == 0
    first, second = summary(run)
    assert not first["eval_top1"] and 0 <= float(second["eval_top1"]) <= 100
    assert float(first["lr"]) < 0.01 and float(second["lr"]) < 0.01
    assert main(["publish", str(run / "last.pth.tar"), "--repo-id", "ann/x", "--dry-run"]) == 0
    assert f"| {float(second['eval_top1']):.2f} |" in capsys.readouterr().out


def test_averaged_weights_are_measured_as_they_were(train, timm_scripts, tmp_path):
    make_data(tmp_path / "a")
    assert train("--model-ema", "--model-ema-decay", "1.0").returncode == 0
    record = Record.read(tmp_path / "output/train/finetune")
    assert record is not None and "--use-ema" in told_by_record(record, {"--use-ema", "--model"})
    forced = make_record(model_ema=True, model_ema_force_cpu=True)
    assert "--use-ema" not in told_by_record(forced, {"--use-ema"})

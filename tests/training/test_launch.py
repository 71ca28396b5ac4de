"""Recipes and the process that trains with them."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from convmixer_timm.cli import main
from convmixer_timm.errors import RunError
from convmixer_timm.training import launch
from convmixer_timm.training.launch import RECIPES, prepare_evaluation, recipes, train_arguments
from convmixer_timm.training.scripts import check_config

from ..conftest import IMAGES, torchrun
from .conftest import run, summary

SMALL = "--model convmixer_128_4.e25_cifar10 -b 10 --val-split validation --device cpu -j 1".split()


def train(*args):
    return [sys.executable, "-m", "convmixer_timm", "train", *map(str, args)]


@pytest.mark.parametrize("name", recipes())
def test_every_option_of_a_recipe_is_one_of_train_py(name, timm_scripts):
    options = (timm_scripts / "train.py").read_text()
    for key in yaml.safe_load((RECIPES / f"{name}.yaml").read_text()):
        assert f"'--{key.replace('_', '-')}'" in options, key


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_trains(name, timm_scripts, data, tmp_path):
    args = [name, "--data-dir", data, *SMALL, "--num-classes", "10", "--input-size", "3", "32", "32", "--epochs", "1"]
    args += ["--amp-dtype", "bfloat16", "--output", tmp_path]  # in1k's float16 is for GPUs
    run(train(*args), TIMM_SCRIPTS=str(timm_scripts))
    assert [row["epoch"] for row in summary(tmp_path / name)] == ["0"]


def test_augmentations_of_grey_images(timm_scripts, data, tmp_path):
    """timm fills what they leave empty by a colour."""
    args = ["cifar10_e100", "--data-dir", data, *SMALL, "--input-size", "1", "32", "32", "--output", tmp_path]
    run(train(*args, "--epochs", "1", "--aa", "rand-m9-n5-mstd0.5-inc1"), TIMM_SCRIPTS=str(timm_scripts))
    assert [row["epoch"] for row in summary(tmp_path / "cifar10_e100")] == ["0"]


def test_an_epoch_that_was_cut_short_is_trained_anew(timm_scripts, data, tmp_path):
    args = ["--data-dir", data, *SMALL, "--output", tmp_path, "--experiment", "run", "--epochs", "1"]
    command = [sys.executable, "-m", "convmixer_timm", "run", "train", *map(str, args)]
    run([*command, "--recovery-interval", "1"], TIMM_SCRIPTS=str(timm_scripts))
    recovery = min((tmp_path / "run").glob("recovery-0-*"))
    for file in {*(tmp_path / "run").glob("*.pth.tar")} - {recovery}:
        file.unlink()
    (tmp_path / "run/summary.csv").unlink()
    told = run([*command, "--resume", str(recovery)], TIMM_SCRIPTS=str(timm_scripts)).stderr
    assert "is of the midst of epoch 0, which is trained anew from its weights" in told
    assert [row["epoch"] for row in summary(tmp_path / "run")] == ["0"]
    assert (tmp_path / "run/last.pth.tar").is_file()


def test_an_interrupted_run_goes_on_by_the_same_command(timm_scripts, data, tmp_path):
    args = ["cifar10_e25", "--data-dir", data, *SMALL, "--epochs", "12", "--model-ema", "--output", tmp_path]
    folder = tmp_path / "cifar10_e25"
    env = {**os.environ, "TIMM_SCRIPTS": str(timm_scripts), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(train(*args), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120

    def rows_so_far():  # the third comes after the second epoch's checkpoint
        return len(summary(folder)) if (folder / "summary.csv").exists() else 0

    while rows_so_far() < 3 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    done = [row["epoch"] for row in summary(folder)]
    assert done[:2] == ["0", "1"]
    second = run(train(*args), TIMM_SCRIPTS=str(timm_scripts))
    assert f"Resuming from {folder / 'last.pth.tar'}" in second.stderr
    assert "Train: 0 [" not in second.stderr
    assert "Train: 1 [" not in second.stderr
    rows = summary(folder)
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(12)]
    assert float(rows[-1]["lr"]) < float(rows[1]["lr"])  # the schedule went on, too


def test_two_processes_train_a_recipe(timm_scripts, data, tmp_path):
    command = [*torchrun(2), "-m", "convmixer_timm", "train", "cifar10_e25", "--data-dir", str(data), *SMALL]
    run([*command, "--epochs", "1", "--output", str(tmp_path)], TIMM_SCRIPTS=str(timm_scripts))
    assert [row["epoch"] for row in summary(tmp_path / "cifar10_e25")] == ["0"]


@pytest.mark.parametrize("rank", ["RANK", "SLURM_PROCID"])
def test_only_the_first_of_several_processes_speaks(rank, monkeypatch, capsys):
    for number, said in (("0", "resuming\n"), ("1", "")):
        monkeypatch.setenv(rank, number)
        launch._say("resuming")
        assert capsys.readouterr().err == said


def test_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train_arguments("cifar10_e25", ["--seed", "3", "--device", "cuda:1"])
    assert args[0] == "--config"
    assert args[2:6] == ["--output", "output/train", "--experiment", "cifar10_e25-seed3"]
    assert args[6:] == ["--seed", "3", "--device", "cuda:1"]  # the last one counts
    assert args.count("--device") == 1
    assert "--experiment" not in train_arguments("cifar10_e25", ["--exper", "mine"])  # as argparse takes it
    assert "--output" not in train_arguments("cifar10_e25", ["--output=elsewhere"])


def test_a_recipe_of_ones_own_may_tell_where_it_goes(tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text("epochs: 1\nseed: 7\ndevice: cuda\n")
    args = train_arguments(str(own), [])
    assert args == ["--config", str(own), "--output", "output/train", "--experiment", "own-seed7"]
    own.write_text("output: there\nexperiment: mine\nseed: 7\ndevice: cpu\n")
    assert train_arguments(str(own), []) == ["--config", str(own)]
    assert train_arguments(str(own), ["--experiment", "other"])[2:] == ["--experiment", "other"]


@pytest.mark.parametrize("text", ["- epochs", "epochs: [1", "", "\x00"])
def test_a_recipe_that_is_none_is_named(text, tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    assert main(["train", str(own)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(own) in line


def test_a_recipe_without_a_model_is_named(timm_scripts, data, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("epochs: 1\nbatch_size: 10\n")
    argv = ["train", "--timm-scripts", str(timm_scripts), str(tmp_path / "own.yaml"), "--data-dir", str(data)]
    assert main(argv) == 1
    assert "own.yaml names no model" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_script_gets_a_cpu_where_there_is_no_gpu(tmp_path):
    script = tmp_path / "benchmark.py"
    script.write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--device', default='cuda')\n"
    )
    assert prepare_evaluation(script, []) == ["--device", "cpu"]
    assert prepare_evaluation(script, ["--dev", "cpu"]) == ["--dev", "cpu"]
    with pytest.raises(ValueError, match="there is no GPU"):
        prepare_evaluation(script, ["--device", "cuda"])


def test_a_model_that_nobody_names_is_asked_for(tmp_path):
    script = tmp_path / "benchmark.py"
    options = "'--device', default='cpu'", "'--model', '-m', default='resnet50'", "'--model-list', default=''"
    lines = "\n".join(f"parser.add_argument({option})" for option in options)
    script.write_text(f"import argparse\nparser = argparse.ArgumentParser()\n{lines}\n")
    with pytest.raises(ValueError, match=r"no --model is given, and benchmark\.py would take one of its own"):
        prepare_evaluation(script, ["--device", "cpu"])
    for named in (["--model", "resnet50"], ["-m", "convmixer_128_4"], ["--model-list", "names.txt"]):
        assert prepare_evaluation(script, ["--device", "cpu", *named])[-2:] == named


@pytest.mark.parametrize(
    "command",
    [
        "train --data-dir DATA -b 10 --device cpu",
        "validate --data-dir DATA --checkpoint WEIGHTS",
        "inference --data-dir DATA --checkpoint WEIGHTS",
        "onnx_export WEIGHTS.onnx --checkpoint WEIGHTS",
        "benchmark",
    ],
)
def test_a_script_of_timm_takes_no_model_of_its_own(command, timm_scripts, data, tmp_path, capsys):
    script, *args = command.replace("DATA", str(data)).replace("WEIGHTS", str(tmp_path / "weights.pth")).split()
    if needed := {"inference": "pandas", "onnx_export": "onnx"}.get(script):
        pytest.importorskip(needed)
    torch.save({"state_dict": timm.create_model("convmixer_128_4").state_dict()}, tmp_path / "weights.pth")
    assert main(["run", "--timm-scripts", str(timm_scripts), script, *args]) == 1
    assert f"{script}.py would take one of its own: give --model NAME" in capsys.readouterr().err


def test_what_is_evaluated_without_a_checkpoint_is_pretrained(timm_scripts, tmp_path, capsys):
    for name in ("ant", "bee"):
        (tmp_path / "validation" / name).mkdir(parents=True)
        shutil.copy(next(IMAGES.glob("*/*.png")), tmp_path / "validation" / name)
    run_script = ["run", "--timm-scripts", str(timm_scripts)]
    assert main([*run_script, "validate", "--model", "convmixer_128_4.e25_cifar10", "--data-dir", str(tmp_path)]) == 1
    assert "its accuracy would be that of wrong names" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["validate", "inference", "clean_checkpoint"])
def test_a_checkpoint_that_is_not_there_is_named(script, timm_scripts, data, capsys):
    pytest.importorskip("pandas")
    args = [] if script == "clean_checkpoint" else ["--data-dir", str(data)]
    assert main(["run", "--timm-scripts", str(timm_scripts), script, "--checkpoint", "none.pth", *args]) == 1
    assert "--checkpoint none.pth: no such file" in capsys.readouterr().err


def test_an_average_counts_each_epoch_once(timm_scripts, tmp_path):
    """Of a run in channels-last, into safetensors."""
    model = timm.create_model("convmixer_128_4").to(memory_format=torch.channels_last)
    for epoch, names in enumerate((["checkpoint-0"], ["checkpoint-1", "last", "model_best"])):
        torch.nn.init.constant_(model.head.bias, epoch)
        for name in names:
            torch.save({"state_dict": model.state_dict(), "metric": float(epoch)}, tmp_path / f"{name}.pth.tar")
    command = [sys.executable, "-m", "convmixer_timm", "run", "avg_checkpoints", "--input", str(tmp_path)]
    for args, bias in ([], 0.5), (["--filter", "*.tar"], 0.75):
        file = tmp_path / f"{bias}.safetensors"
        run([*command, *args, "--output", str(file), "--safetensors"], TIMM_SCRIPTS=str(timm_scripts))
        assert set(load_file(file)["head.bias"].tolist()) == {bias}


def test_predictions_on_images_of_one_name_tell_their_folders(timm_scripts, tmp_path):
    pytest.importorskip("pandas")
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(next(IMAGES.glob("*/*.png")), tmp_path / "data" / name / "0.png")
    command = [sys.executable, "-m", "convmixer_timm", "run", "inference", "--model", "convmixer_128_4.e25_cifar10"]
    command += ["--pretrained", "--data-dir", str(tmp_path / "data"), "--results-file", str(tmp_path / "found.csv")]
    told = run([*command, "--device", "cpu", "-j", "1"], TIMM_SCRIPTS=str(timm_scripts)).stderr
    assert "writing each with its folder" in told
    with (tmp_path / "found.csv").open() as file:
        assert {row["filename"] for row in csv.DictReader(file)} == {"ant/0.png", "bee/0.png"}


def test_a_bulk_run_knows_the_variants(timm_scripts, data, tmp_path):
    results = tmp_path / "results.csv"
    command = [sys.executable, "-m", "convmixer_timm", "run", "bulk_runner", "--model-list", "convmixer_128_[48]"]
    command += ["--results-file", str(results), str(timm_scripts / "validate.py"), "--data-dir", str(data), "-j", "1"]
    run(command, TIMM_SCRIPTS=str(timm_scripts))
    with results.open() as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"convmixer_128_4", "convmixer_128_8"}


@pytest.mark.parametrize("option", ["--model-kwargs", "--opt-kwargs"])
def test_what_takes_name_and_value_says_so(option, timm_scripts, data, capsys):
    args = ["train", "--model", "convmixer_128_4", "--data-dir", str(data), option, "foo"]
    assert main(["run", "--timm-scripts", str(timm_scripts), *args]) == 1
    assert option in (err := capsys.readouterr().err) and "take NAME=VALUE" in err


def test_a_folder_that_inference_does_not_find_is_named(timm_scripts, tmp_path, capsys):
    pytest.importorskip("pandas")  # which that script writes its results by
    command = ["run", "--timm-scripts", str(timm_scripts), "inference", "--model", "convmixer_128_4"]
    assert main([*command, "--data-dir", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_unknown_recipe_is_named(capsys):
    for unknown in ("cifar11", ""):  # or a variable that isn't set
        assert main(["train", unknown, "--data-dir", "nowhere"]) == 1
        err = capsys.readouterr().err
        assert f"no recipe {unknown!r}; there are" in err
        assert "cifar10_e25" in err
    assert main(["recipes"]) == 0
    assert "cifar10_e25" in capsys.readouterr().out


def test_a_resumed_summary_stays_one_table(tmp_path):
    from timm import utils

    from convmixer_timm.training.compat import mend_summary

    mend_summary()
    path = tmp_path / "summary.csv"
    for epoch in (0, 1, 1, 2):  # older train.py asks for a header whenever it starts
        utils.update_summary(epoch, {"loss": epoch}, {"top1": 50.0}, filename=str(path), lr=0.1, write_header=True)
    assert [row["epoch"] for row in summary(tmp_path)] == ["0", "1", "2"]


def test_a_summary_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from timm import utils

    from convmixer_timm.training.compat import mend_summary

    def full(epoch, train_metrics, eval_metrics, filename, **kwargs):
        Path(filename).write_text("epo")
        raise OSError(28, "No space left on device")

    path = tmp_path / "summary.csv"
    for before in ("", "epoch,train_loss\n0,1.0\n"):
        path.write_text(before)
        monkeypatch.setattr(utils, "update_summary", full)
        mend_summary()
        with pytest.raises(RunError, match=r"summary\.csv: the disk is full: free some space, and go on"):
            utils.update_summary(1, {"loss": 0.5}, None, filename=str(path))
        assert path.read_text() == before
        assert [p.name for p in tmp_path.iterdir()] == ["summary.csv"]
    monkeypatch.undo()
    mend_summary()
    path.write_text("")  # as an earlier version left it on a full disk
    for epoch in (0, 1):
        utils.update_summary(epoch, {"loss": 0.5}, None, filename=str(path))
    assert [row["epoch"] for row in summary(tmp_path)] == ["0", "1"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("weight-decay: 0.5", "train.py has no setting 'weight-decay': did you mean weight_decay?"),
        ("1: 2", "train.py has no setting 1"),
        ("experiment: 7", "experiment has to be a text, '7', and is 7"),
        ("resume: true", "resume has to be a text"),
        ("model:", "model has to be a text, and is empty"),
        ("epochs:", "epochs has to be a whole number, and is empty"),
        ("epochs: 1.5", "epochs has to be a whole number, and is 1.5"),
        ("scale: 0.3", "scale has to be a list of numbers, and is 0.3"),
        ("scale: [0.3]", "--scale takes two numbers, the least and the greatest, got [0.3]"),
        ("mean: [a, b, c]", "mean has to be a list of numbers, and is ['a', 'b', 'c']"),
        ("input_size: [3, 32]", "input_size has to be a list of 3 numbers, and is [3, 32]"),
        ("train_size_schedule: up", "train_size_schedule has to be one of constant, progressive, and is 'up'"),
        ("eval_metric: acc", "--eval-metric is one of loss, top1, top5, got acc"),
        ("amp_dtype: bf16", "--amp-dtype is one of float16, bfloat16, got bf16"),
        (
            "input_size: [1, 32, 32]\nmean: [0.5, 0.5]\nmodel: convmixer_128_4\nbatch_size: 2",
            "--mean and --std take a number, or one for each channel: got [0.5, 0.5] and None",
        ),
        (
            "in_chans: 1\nmodel: convmixer_128_4\nbatch_size: 2",
            "the model takes 1 channels and its images have 3: give --input-size 1 32 32",
        ),
        ("bn_eps: 0.1\nmodel: convmixer_128_4\nbatch_size: 2", "unexpected keyword argument 'bn_eps'"),
        ("amp: 3", "amp has to be true or false, and is 3"),
        ("device_modules: own", "device_modules has to be a list of texts, and is 'own'"),
        ("batch_size: 0", "--batch-size is 1 or more, got 0"),
        ("epochs: 0", "--epochs is 1 or more, got 0"),
        ("workers: -1", "--workers is 0 or more, got -1"),
        ("model_kwargs: [depth=1]", "model_kwargs has to be lines of NAME: VALUE below it, and is ['depth=1']"),
        ("mean: {a: 1}", "mean has to be a list of numbers, and is {'a': 1}"),
        ("lr: 1\nseed: 2\nlr: 3", "own.yaml has lr more than once: leave one"),
        ("- lr", "own.yaml is no recipe: it has to hold lines of NAME: VALUE"),
    ],
)
def test_a_line_that_train_py_would_stumble_over_is_named(line, message, timm_scripts, data, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(f"{line}\n")
    argv = ["train", "--timm-scripts", str(timm_scripts), str(tmp_path / "own.yaml"), "--data-dir", str(data)]
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_line_of_a_config_that_train_py_passes_over_is_said(timm_scripts, tmp_path, capsys):
    """No error, as the args.yaml of another timm's run may have more."""
    (tmp_path / "args.yaml").write_text("epochz: 1\npretrained: null\n")
    main(["run", "--timm-scripts", str(timm_scripts), "train", "--config", str(tmp_path / "args.yaml")])
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.endswith("args.yaml: train.py has no setting 'epochz': did you mean epochs?")


@pytest.mark.parametrize("text, message", [("", "is no recipe"), ("[a]", "is no recipe"), ("a: [", "is no YAML")])
def test_a_config_that_is_none(text, message, timm_scripts, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(text)
    for option in (["--config", tmp_path / "own.yaml"], ["-c", tmp_path / "own.yaml"]):
        assert main(["run", "--timm-scripts", str(timm_scripts), "train", *map(str, option)]) == 1
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_the_users_options_win_however_short(tmp_path):
    arguments = train_arguments("cifar10_e25", ["--ex", "mine", "--ou", "here"])
    assert arguments[-4:] == ["--ex", "mine", "--ou", "here"]
    assert "--experiment" not in arguments and "--output" not in arguments


def test_a_size_by_either_option_wins_over_the_recipes(tmp_path):
    assert train_arguments("cifar10_e25", ["--img-size", "40"])[-4:] == ["--input-size", "3", "40", "40"]
    both = ["--img-size", "40", "--input-size", "3", "24", "24"]
    assert train_arguments("cifar10_e25", both)[-6:] == both


def test_the_scripts_folder_comes_first(capsys):
    assert main(["train", "finetune", "--timm-scripts", "scripts"]) == 1
    assert "--timm-scripts DIR stands before finetune" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--config", "own.yaml"], ["-c", "own.yaml"], ["-cown.yaml"], ["--config=own.yaml"]])
def test_a_recipe_and_a_config(args, capsys):
    assert main(["train", "finetune", "--data-dir", "images", *args]) == 1
    assert "a recipe is a --config already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["lr: 1e-3", "seed:", "torchcompile: inductor", "model_kwargs: {depth: 2}", "mean: [0.5, 0.5, 0.5]"]
)
def test_a_line_that_train_py_takes(line, timm_scripts, tmp_path):
    (tmp_path / "own.yaml").write_text(f"{line}\n")
    if line == "seed:":
        with pytest.raises(ValueError, match="seed has to be a whole number"):
            check_config(timm_scripts / "train.py", tmp_path / "own.yaml")
    else:
        check_config(timm_scripts / "train.py", tmp_path / "own.yaml")

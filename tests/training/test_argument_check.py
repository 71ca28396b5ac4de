"""Arguments of timm's scripts, looked at before they run."""

import math
from argparse import Namespace

import pytest
import timm
import torch
import yaml

from convmixer_timm.convmixer import CIFAR10_LABELS, WEIGHTS_DIR
from convmixer_timm.training.argument_check import (
    check_evaluated_model,
    check_results,
    check_training_arguments,
    check_values,
    passed_over,
)
from convmixer_timm.training.data_check import Data
from convmixer_timm.training.record import Record

NAME = "convmixer_128_4.e25_cifar10"
# What train.py's parser makes of a whole command.
ARGS = yaml.safe_load((WEIGHTS_DIR / NAME / "args.yaml").read_text())
OWN = {"device": "cpu", "output": "", "experiment": "", "num_classes": 2, "opt_kwargs": {}}


def options_of(**given):
    return Namespace(**{**ARGS, **OWN, **given})


def check(classes=("ant", "bee"), **given):
    options = options_of(**{"num_classes": len(classes), **given})
    data = Data("insects", list(classes), {}, "validation", len(classes))
    return check_training_arguments(options, Record.of(options, data))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"opt": "nope"}, "--opt nope: Optimizer nope not found"),
        ({"opt": "adamww"}, "not found in registry: did you mean adamw?"),
        ({"opt": "adamw", "opt_betas": [0.9, 7.0]}, "--opt adamw: Invalid beta"),
        ({"sched": "nope"}, "--sched nope: "),
        ({"sched": "nope"}, ": there are cosine, tanh, step, multistep, plateau, poly"),
        ({"sched": "none"}, "--sched none: train.py needs one"),
        ({"aa": "nonsense"}, "--aa nonsense: Unknown AA policy"),
        ({"aa": "randaug"}, "--aa randaug: timm can't read it: there are rand-m9-mstd0.5-inc1,"),
        ({"device": "gpu"}, "--device gpu: "),
        ({"smoothing": 1.5}, "--smoothing is a share, from 0 to 1, got 1.5"),
        ({"crop_pct": 90.0}, "--crop-pct is the share of the side that is looked at, above 0 and up to 1, got 90.0"),
        ({"drop_path": -0.1}, "--drop-path is a share, from 0 to 1, got -0.1"),
        ({"cutmix": -1.0}, "--cutmix is 0 or more, got -1.0"),
        ({"epochs": 0}, "--epochs is 1 or more, got 0"),
        ({"input_size": [3, 0, 32]}, "--input-size is channels, height and width, each 1 or more, got [3, 0, 32]"),
        ({"cutmix": 1.0, "batch_size": 25}, "--batch-size is even where images are mixed, got 25"),
        ({"train_interpolation": "nope"}, "--train-interpolation is one of random, nearest, bilinear"),
        ({"input_img_mode": "nope"}, "--input-img-mode nope: "),
        ({"remode": "nope"}, "--remode is one of pixel, rand, const, got nope"),
        ({"clip_mode": "nope"}, "--clip-mode is one of norm, value, agc, got nope"),
        ({"seed": -1}, "--seed is 0 or more, got -1"),
        ({"seed": 2**32}, "--seed is 4294967295 or less, got 4294967296"),
        ({"ratio": [1.0]}, "--ratio takes two numbers"),
        ({"ratio": [0.0, 1.0]}, "--ratio is above 0, got [0.0, 1.0]"),
        ({"scale": [1.0, 0.5]}, "--scale takes two numbers, the least and the greatest, got [1.0, 0.5]"),
        ({"scale": [0.5, 2.0]}, "--scale is shares of the image's area, above 0 and up to 1, got [0.5, 2.0]"),
        ({"std": [0.0, 0.2, 0.2]}, "--std is above 0, got [0.0, 0.2, 0.2]"),
        ({"mean": [0.5, math.nan, 0.5]}, "--mean is finite, got [0.5, nan, 0.5]"),
        ({"mixup": math.inf}, "--mixup is finite, got inf"),
        ({"validation_batch_size": -3}, "--validation-batch-size is 1 or more, got -3"),
        ({"amp_dtype": "bf16"}, "--amp-dtype is one of float16, bfloat16, got bf16"),
        ({"amp": False, "model_dtype": "half"}, "--model-dtype is one of float32, float16, bfloat16, got half"),
        ({"amp": True, "model_dtype": "bfloat16"}, "--model-dtype is float32 beside --amp, got bfloat16"),
        ({"worker_seeding": "x"}, "--worker-seeding is one of all, part, got x"),
        ({"cutmix": 0, "aug_splits": 1}, "--aug-splits is 2 or more, got 1"),
        ({"cutmix": 1.0, "aug_splits": 2}, "--aug-splits doesn't go with --mixup and --cutmix"),
        ({"jsd_loss": True}, "--jsd-loss compares what --aug-splits makes of an image: give --aug-splits 3"),
        ({"split_bn": True}, "--split-bn has a norm for each of --aug-splits: give --aug-splits 2, or more"),
        ({"aug_repeats": 3}, "--aug-repeats needs several processes, torchrun's, got 3"),
        ({"model_kwargs": {"drop_path_rate": 0.1}}, "--model-kwargs drop_path_rate: give --drop-path instead"),
        ({"model_kwargs": {"num_classes": 5}}, "--model-kwargs num_classes: give --num-classes instead"),
        ({"clip_grad": -1.0}, "--clip-grad is above 0, got -1.0"),
        ({"num_bench_iter": 2}, "--num-bench-iter is 5 or more, got 2"),
        ({"tta": 4}, "--tta averages images that lie side by side, as timm makes no copies of one: leave it out"),
    ],
)
def test_values(given, message):
    check_values(options_of())
    with pytest.raises(ValueError) as error:
        check_values(options_of(**given))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("processes", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_norms_over_processes_are_for_gpus(monkeypatch, processes):
    check_values(options_of(sync_bn=True))
    monkeypatch.setenv(processes, "2")
    check_values(options_of())
    with pytest.raises(ValueError, match="--sync-bn needs GPUs"):
        check_values(options_of(sync_bn=True))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"results_format": ["csv", "xml"]}, "--results-format is one of csv, json, json-split, parquet, got xml"),
        ({"results_format": ["json", "json-split"]}, "would go to the same file"),
        ({"results_file": "none/a.csv"}, "--results-file none/a.csv: there is no folder none"),
        ({"results_dir": "new", "results_file": "deeper/a.csv"}, "there is no folder new/deeper"),
        ({"results_dir": "file/new"}, "file is a file: give another --results-dir"),
        ({"results_file": "file/a.csv"}, "there is no folder file"),
        ({"output": "a.safetensors", "safetensors": False}, "not be what its name says: add --safetensors"),
        ({"output": "a.pth", "safetensors": True}, "give it a name in .safetensors"),
    ],
)
def test_results_that_could_not_be_written(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as error:
        check_results(Namespace(**given))
    assert message in str(error.value)


def test_results_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_results(Namespace())
    check_results(Namespace(results_file="", results_format="csv"))  # validate.py's
    check_results(Namespace(results_file="a.csv", results_dir=None, results_format=["csv", "json"]))
    check_results(Namespace(results_file="a.csv", results_dir="new/folder", results_format=["csv"]))


def test_arguments_that_train_py_passes_over():
    defaults = options_of(amp=False, amp_dtype="float16")
    given = options_of(amp=False, amp_dtype="bfloat16", model_ema_decay=0.99, kd_temperature=2.0, clip_mode="agc")
    assert passed_over(defaults, defaults) == []
    assert passed_over(given, defaults) == [
        "--amp-dtype is passed over without --amp",
        "--model-ema-decay is passed over without --model-ema",
        "--kd-temperature is passed over without --kd-model-name",
        "--clip-mode is passed over without --clip-grad",
    ]
    alone = options_of(bce_sum=True, train_batch_sizes=[2], bce_loss=False, train_img_sizes=None)
    assert passed_over(alone, options_of()) == [
        "--bce-sum is passed over without --bce-loss",
        "--train-batch-sizes is passed over without --train-img-sizes",
    ]
    hard = {"smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0}
    [line] = passed_over(options_of(bce_loss=True, **hard), options_of())
    assert line.startswith("--bce-loss is passed over where nothing is smoothed or mixed")
    assert passed_over(options_of(bce_loss=True, **{**hard, "smoothing": 0.1}), options_of()) == []
    [line] = passed_over(options_of(epoch_repeats=3.0), options_of())
    assert line.startswith("--epoch-repeats is passed over but for streams")
    assert passed_over(options_of(epoch_repeats=3.0, dataset="wds/x"), options_of()) == []
    [line] = passed_over(options_of(train_num_samples=3, dataset=""), options_of())
    assert line == "--train-num-samples is passed over but for streams (tfds/, wds/, hfids/)"
    [line] = passed_over(options_of(img_size=64, input_size=[3, 32, 32]), options_of())
    assert line == "--img-size 64 is passed over beside --input-size 3 32 32"
    [line] = passed_over(options_of(epochs=3, warmup_epochs=5), options_of())
    assert line == "--warmup-epochs 5 of 3: the learning rate still climbs when the training ends"
    assert passed_over(options_of(epochs=3, warmup_epochs=5, warmup_prefix=True), options_of()) == []
    slow = options_of(amp=True, amp_dtype="float16", device="cpu")
    assert passed_over(slow, defaults) == [
        "--amp trains in float16, which is slower on a CPU than bfloat16: give --amp-dtype bfloat16"
    ]
    told = {"amp": True, "model_ema": True, "kd_model_name": NAME, "clip_grad": 1.0}
    assert passed_over(Namespace(**{**vars(given), **told}), defaults) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"--device cuda:0: there is no GPU .* give --device cpu"):
        check_values(options_of(device="cuda:0"))


@pytest.fixture
def files(tmp_path):
    """Checkpoints by what is special of each."""
    deep, good = (timm.create_model(f"convmixer_128_{depth}", num_classes=2).state_dict() for depth in (8, 4))
    ten = timm.create_model("convmixer_128_4", num_classes=10).state_dict()
    content = {"good": good, "deep": {"state_dict": deep}, "ten": ten, "nested": {"net": good}, "other": {"a": 1}}
    for name, saved in content.items():
        torch.save(saved, tmp_path / f"{name}.pth")
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    return tmp_path


@pytest.mark.parametrize("option", ["initial_checkpoint", "pretrained_path"])
@pytest.mark.parametrize(
    "name, message",
    [
        ("absent", "No such checkpoint file"),
        ("damaged", "can't be read as weights"),
        ("other", "Not a ConvMixer checkpoint"),
        ("deep", "expected dim 128, depth 4, .*; found dim 128, depth 8"),
    ],
)
def test_files_to_start_from_that_do_not_fit(option, name, message, files):
    with pytest.raises((ValueError, OSError), match=message):
        check(pretrained=True, **{option: str(files / f"{name}.pth")})


def test_images_smaller_than_a_patch():
    check(model_kwargs={"patch_size": 4}, train_img_sizes=[16, 4])
    for given in ({"model_kwargs": {"patch_size": 64}}, {"train_img_sizes": [32, 1]}):
        with pytest.raises(ValueError, match=r"images of \d+ pixels are smaller than a patch of convmixer_128_4"):
            check(**given)


def test_channels():
    four = {"input_size": [4, 32, 32], "mean": [0.5], "std": [0.5], "initial_checkpoint": ""}
    assert check(**four, input_img_mode="RGBA") == ""
    with pytest.raises(ValueError, match="--input-img-mode RGBA has 4 channels and the model takes 3"):
        check(input_img_mode="RGBA")
    with pytest.raises(ValueError, match="--aa rand-m9 is for images of 1 or 3 channels, and the model takes 4"):
        check(**four, aa="rand-m9")


def test_files_to_start_from(files):
    assert check(initial_checkpoint=str(files / "good.pth")) == ""
    # timm adapts these, and loads the others as they are.
    for name in ("ten", "nested", "good"):
        assert check(pretrained=True, pretrained_path=str(files / f"{name}.pth")) == ""
    with pytest.raises(ValueError, match="num_classes 10 and the model num_classes 2: --pretrained --pretrained-path"):
        check(initial_checkpoint=str(files / "ten.pth"))
    with pytest.raises(ValueError, match=r"isn't in timm's layout: .* convmixer-timm convert"):
        check(initial_checkpoint=str(files / "nested.pth"))
    with pytest.raises(ValueError, match=r"good\.pth is passed over without --pretrained: add that"):
        check(pretrained_path=str(files / "good.pth"))


def test_files_that_train_py_would_stumble_over(files):
    with pytest.raises(OSError, match="it is a folder"):
        check(initial_checkpoint=str(files))
    second = {"stem.2.aux_bn.0.weight": torch.ones(128), **torch.load(files / "good.pth")}
    torch.save({"state_dict": second}, files / "second.pth")
    with pytest.raises(ValueError, match=r"has the second norms of --split-bn.*clean_checkpoint"):
        check(initial_checkpoint=str(files / "second.pth"))
    assert check(pretrained=True, pretrained_path=str(files / "second.pth")) == ""


def test_pretrained_weights_that_there_are_none_of():
    with pytest.raises(ValueError, match="expected dim 128, depth 4, kernel_size 5, patch_size 4; found"):
        check(model=NAME, pretrained=True, model_kwargs={"patch_size": 4})
    with pytest.raises(ValueError, match="unexpected keyword argument 'drop_block_rate'"):
        check(drop_block=0.1)
    with pytest.raises(ValueError, match=r"--model convmixer_256_16_ks9_p1 has no pretrained weights.*e25_cifar10"):
        check(model="convmixer_256_16_ks9_p1", pretrained=True)
    assert check(model=NAME, pretrained=True) == ""


def test_teachers():
    assert check(CIFAR10_LABELS, kd_model_name=NAME) == ""
    note = check([f"n{i}" for i in range(10)], kd_model_name=NAME)
    assert "calls its classes n0" in note and "taken for the same" in note
    with pytest.raises(ValueError, match="in another order: it would teach wrong names"):
        check(CIFAR10_LABELS[::-1], kd_model_name=NAME)
    with pytest.raises(ValueError, match=f"--kd-model-name {NAME} knows 10 classes, and the data have 2"):
        check(kd_model_name=NAME)
    assert check(kd_model_name=NAME, kd_distill_type="feature") == ""
    with pytest.raises(ValueError, match="--kd-model-name nope can't be made: Unknown model"):
        check(kd_model_name="nope")
    with pytest.raises(ValueError, match="--kd-model-name convmixer_256_8_ks7_p2 has no pretrained weights"):
        check(kd_model_name="convmixer_256_8_ks7_p2")


def test_models_to_evaluate(files):
    def evaluate(**given):
        check_evaluated_model(Namespace(**{"model": "convmixer_128_4", "pretrained": False, "checkpoint": "", **given}))

    evaluate(checkpoint=str(files / "ten.pth"))
    evaluate(checkpoint=str(files))  # a folder, of which validate.py takes each
    for many in ("all", "convmixer_128*", str(files / "good.pth")):
        evaluate(model=many)
    with pytest.raises(ValueError, match="--model nope can't be made"):
        evaluate(model="nope")
    with pytest.raises(OSError, match="No such checkpoint file"):
        evaluate(checkpoint="nofile")
    with pytest.raises(ValueError, match=r"has num_classes 2 and the model num_classes 10$"):
        evaluate(checkpoint=str(files / "good.pth"))
    with pytest.raises(ValueError, match="has no pretrained weights"):
        evaluate(model="convmixer_256_16_ks9_p1", pretrained=True)

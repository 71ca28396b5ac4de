"""`convmixer-timm verify`: a good checkpoint file is told from a damaged, truncated or swapped one."""

import hashlib
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from convmixer_timm.cli import main
from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.hub import verify as verify_module
from convmixer_timm.hub.verify import verifiable

NAME = "convmixer_128_4.e25_cifar10"


def test_bundled_checkpoints_are_good(capsys):
    assert NAME in verifiable()
    assert main(["verify"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"ok      {name}" for name in verifiable()]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The bundled file copied to where it may be harmed."""
    file = tmp_path / "model.safetensors"
    shutil.copy(WEIGHTS_DIR / NAME / "model.safetensors", file)
    manifest = tmp_path / "manifest.json"
    shutil.copy(verify_module.MANIFEST, manifest)
    monkeypatch.setattr(verify_module, "MANIFEST", manifest)
    monkeypatch.setattr(verify_module, "checkpoint_file", lambda name: file)
    return file


def trust_hash(file, manifest):
    """Records the file's present hash, so that the later checks have to find what is wrong."""
    content = json.loads(manifest.read_text())
    content[NAME]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:1000])


def other_size(file):
    save_file(timm.create_model("convmixer_128_8").state_dict(), file)


def other_weights(file):
    torch.manual_seed(0)
    save_file(timm.create_model("convmixer_128_4").state_dict(), file)


def not_finite(file):
    state_dict = load_file(file)
    state_dict["head.bias"][3] = float("nan")
    save_file(state_dict, file)


def lost_tensor(file):
    state_dict = load_file(file)
    del state_dict["head.bias"]
    save_file(state_dict, file)


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, other_size, other_weights, not_finite, lost_tensor])
def test_harm_is_found_by_the_hash(harm, copied, capsys):
    harm(copied)
    assert main(["verify", NAME]) == 1
    assert "SHA-256" in capsys.readouterr().out


@pytest.mark.parametrize(
    "harm, message",
    [
        (truncate, "can't be read as weights"),
        (other_size, "expected dim 128, depth 4"),
        (other_weights, "logits differ"),
        (not_finite, "not finite in head.bias"),
        (lost_tensor, "head.bias"),
    ],
)
def test_harm_is_found_without_the_hash(harm, message, copied, capsys):
    harm(copied)
    trust_hash(copied, verify_module.MANIFEST)
    assert main(["verify", NAME]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"FAILED  {NAME}: ")
    assert message in out
    assert out.count("\n") == 1


def test_missing_file_and_unknown_name(copied, capsys):
    copied.unlink()
    assert main(["verify", NAME, "convmixer_9"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "is missing" in first
    assert "no such checkpoint" in second


def test_a_bundled_checkpoint_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify_module, "MANIFEST", tmp_path / "manifest.json")
    assert main(["verify", NAME]) == 1
    assert "the manifest doesn't know it" in capsys.readouterr().out

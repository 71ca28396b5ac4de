"""What every command does alike: where its output can't go, where it is stopped, and with names that begin with ~."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from convmixer_timm.cli import main
from convmixer_timm.files import atomic_path

from .conftest import IMAGES

SHIP = IMAGES / "ship/0000.png"
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")


def recipes(stdout):
    """As in a shell: Python keeps what is printed until its end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-W", "ignore", "-m", "convmixer_timm", "recipes"]  # older timm has torch warn
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)


@needs_dev_full
def test_output_that_the_disk_cant_take_is_an_error():
    with open("/dev/full", "w") as full:
        done = recipes(full)
    assert done.returncode == 1
    assert done.stderr.startswith("convmixer-timm: error: reading or writing a file: ")
    assert "free some space" in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_none():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = recipes(writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
@pytest.mark.parametrize("output", ["csv", "json", "table"])
def test_a_stream_that_is_closed_takes_nothing(tmp_path, output, closed):
    """As a scheduler may start it; what goes to the one is not written to the other."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    predict = f"{sys.executable} -m convmixer_timm predict {SHIP} {tmp_path}/broken.png --format {output} {closed}"
    done = subprocess.run(["bash", "-c", predict], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    if closed == "2>&-":
        assert "ship" in done.stdout and "broken" not in done.stdout
    else:
        assert done.stdout == "" and "broken.png: " in done.stderr


def test_an_image_with_too_many_pixels_is_one_line(tmp_path):
    Image.new("1", (10_000, 9_500)).save(tmp_path / "large.png")
    predict = [sys.executable, "-m", "convmixer_timm", "predict", str(tmp_path / "large.png")]
    said = subprocess.run(predict, capture_output=True, text=True).stderr
    assert "DecompressionBomb" not in said and "too large, more than 89,478,485 pixels are not read" in said


def test_sigterm_leaves_nothing_half_written(tmp_path):
    code = """
import signal, sys
from pathlib import Path
from convmixer_timm import checkpoints
from convmixer_timm.cli import main
from convmixer_timm.files import atomic_path

def convert(source, target):
    with atomic_path(Path(target)) as temporary:
        temporary.write_text("the first half")
        signal.raise_signal(signal.SIGTERM)

checkpoints.convert = convert
before = signal.getsignal(signal.SIGTERM)
try:
    main(["convert", "in.pth", sys.argv[1]])
finally:
    print(signal.getsignal(signal.SIGTERM) == before)
"""
    # In a process of its own: pytest's workers don't always run a test in the main thread, which alone gets signals.
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out.safetensors"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "True\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_that_the_shell_left_is_the_home_directory(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Image.open(IMAGES / "cat/0000.png").save(tmp_path / "cat.png")
    assert main(["predict", "~/cat.png", "--topk", "1"]) == 0
    assert str(tmp_path / "cat.png") in capsys.readouterr().out
    assert main(["plot", "convmixer_128_4.e25_cifar10", "--output=~/pictures"]) == 0
    assert (tmp_path / "pictures/patch_filters.png").is_file()
    assert not (tmp_path / "~").exists()


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("before")
    (tmp_path / "link").symlink_to("real/file")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/file").read_text() == "after"

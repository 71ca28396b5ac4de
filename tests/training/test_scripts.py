"""timm's own scripts: found, downloaded, and run for real on a few CIFAR-10 images."""

import csv
import http.server
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import timm

from convmixer_timm.cli import main
from convmixer_timm.training import scripts

from ..conftest import torchrun
from .conftest import run, summary

TRAIN_ARGS = (
    "--model convmixer_128_4 --device cpu --epochs 2 -b 10 --val-split validation --opt adamw --lr 0.01"
    " --warmup-epochs 0 --aa rand-m10-n2-inc1 --scale 0.8 1.0 --amp --amp-dtype bfloat16 --channels-last -j 1"
    " --checkpoint-hist 1"
).split()


def launcher(*args):
    return [sys.executable, "-m", "convmixer_timm", "run", *map(str, args)]


def test_unmodified_train_script_with_device_modules(timm_scripts, data, tmp_path):
    script = shutil.copy(timm_scripts / "train.py", tmp_path)  # alone: a clone's timm/ would shadow the installed one
    command = [sys.executable, script, "--device-modules", "convmixer_timm", "--data-dir", data]
    run([*map(str, command), *TRAIN_ARGS, "--output", str(tmp_path), "--experiment", "run"])
    assert len(summary(tmp_path / "run")) == 2


def test_a_model_of_ones_own_is_known_before_the_data_are_looked_at(tmp_path, monkeypatch, capsys):
    """By ``--device-modules``, which train.py itself imports only later."""
    script = tmp_path / "train.py"
    script.write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--device-modules', nargs='+')\n"
    )
    (tmp_path / "own_models.py").write_text(
        "from timm.models import register_model\n@register_model\ndef my_own_model(**kwargs):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    scripts.script_options(script, ["--device-modules", "own_models"])
    assert timm.is_model("my_own_model")
    assert main(["run", "--timm-scripts", str(tmp_path), "train", "--device-modules", "no_such_module"]) == 1
    assert "this needs the package no_such_module" in capsys.readouterr().err


def test_train_then_validate(timm_scripts, data, tmp_path):
    train = launcher("--timm-scripts", timm_scripts, "train", "--data-dir", data, *TRAIN_ARGS)
    run([*train, "--output", str(tmp_path), "--experiment", "run"])
    rows = summary(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    checkpoint = tmp_path / "run" / "last.pth.tar"
    results = tmp_path / "results.csv"
    validate = [
        "validate",
        "--data-dir",
        data,
        "--split",
        "validation",
        "--model",
        "convmixer_128_4",
        "--device",
        "cpu",
    ]
    validate += ["--checkpoint", checkpoint, "--results-file", results, "-b", "10", "--channels-last", "-j", "1"]
    run(launcher(*validate), TIMM_SCRIPTS=str(timm_scripts))
    (row,) = csv.DictReader(results.open())
    assert float(row["top1"]) == pytest.approx(
        float(rows[-1]["eval_top1"]), abs=3.4
    )  # bf16 there, fp32 here: one image


def test_two_processes_train_and_save_once(timm_scripts, data, tmp_path):
    command = [*torchrun(2), "-m", "convmixer_timm", "run", "train", "--data-dir", str(data), *TRAIN_ARGS]
    result = run([*command, "--output", str(tmp_path), "--experiment", "run"], TIMM_SCRIPTS=str(timm_scripts))
    assert "Process 0, total 2" in result.stderr
    assert len(summary(tmp_path / "run")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert (tmp_path / "run" / "last.pth.tar").exists()


def test_a_clones_timm_does_not_shadow_the_installed_one(tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise ImportError('the clone was imported')")
    (tmp_path / "train.py").write_text(
        "import timm, sys; print(timm.__file__, sys.argv[1:], timm.is_model('convmixer_128_4'))"
    )
    for cwd in (tmp_path.parent, tmp_path):
        command = launcher("--timm-scripts", tmp_path, "train", "--lr", "1", "-h")
        result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
        assert result.stdout.split("\n")[0] == f"{timm.__file__} ['--lr', '1', '-h'] True", result.stderr


def test_exit_code_and_interrupt_pass_through(tmp_path):
    (tmp_path / "fail.py").write_text("import sys; sys.exit(7)")
    (tmp_path / "wait.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    assert subprocess.run(launcher("--timm-scripts", tmp_path, "fail")).returncode == 7
    waiting = subprocess.Popen(
        launcher("--timm-scripts", tmp_path, "wait.py"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests run under nohup or cron, SIGINT is ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert waiting.stdout.readline() == b"ready\n"
    waiting.send_signal(signal.SIGINT)
    start = time.monotonic()
    waiting.communicate(timeout=30)
    assert waiting.returncode in (-signal.SIGINT, 130)
    assert time.monotonic() - start < 20


def test_a_script_that_ends_quietly_after_an_interrupt_is_not_done(tmp_path):
    """``train.py`` does, and what comes after it (`train && publish`) would take the run for finished."""
    (tmp_path / "train.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('best metric')\n"
    )
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import sys; from convmixer_timm.cli import main; raise SystemExit(main(['run', *sys.argv[1:]]))"
    command = [sys.executable, "-c", code, "--timm-scripts", str(tmp_path), "train"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "best metric\n"), result.stderr


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server on loopback in the place of GitHub; gives its folder and the list of paths asked for."""
    root = tmp_path / "server"
    root.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=root)

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(scripts, "BASE_URL", f"http://127.0.0.1:{httpd.server_port}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("TIMM_SCRIPTS", raising=False)
        yield root, asked
        httpd.shutdown()


def test_download_once_of_the_installed_version(server, capsys):
    root, asked = server
    folder = root / f"v{timm.__version__}"
    folder.mkdir()
    (folder / "train.py").write_text("print('hello')")
    path = scripts.find_script("train")
    assert path.read_text() == "print('hello')"
    assert f"v{timm.__version__}/train.py" in capsys.readouterr().err
    assert scripts.find_script("train.py") == path
    assert capsys.readouterr().err == ""
    assert len(asked) == 1


def test_download_problems_tell_what_to_do(server, monkeypatch, capsys):
    assert main(["run", "train"]) == 1
    err = capsys.readouterr().err
    assert "HTTP 404" in err
    assert "--timm-scripts DIR" in err
    monkeypatch.setattr(scripts, "BASE_URL", "http://127.0.0.1:9")
    assert main(["run", "train"]) == 1
    assert "TIMM_SCRIPTS" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_no_network(server, monkeypatch, capsys, tmp_path):
    folder = server[0] / f"v{timm.__version__}"
    folder.mkdir()
    (folder / "hello.py").write_text("print('hello')")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["run", "hello"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path}/file is a file, so nothing can be put below it: set XDG_CACHE_HOME to a folder" in line


def test_missing_script_is_named(tmp_path, capsys):
    (tmp_path / "validate.py").touch()
    assert main(["run", "--timm-scripts", str(tmp_path), "train"]) == 1
    assert "'train.py'" in (err := capsys.readouterr().err)
    assert "validate" in err

"""What went wrong with a transfer: the disk, rights, the network or the Hub."""

import errno
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.errors import HubError, local_cause, one_line, printable, transfer_reason
from convmixer_timm.files import as_text
from convmixer_timm.inference import download
from convmixer_timm.inference.engines import unavailable

from ..conftest import IMAGES
from .conftest import Client, environment
from .server import HubServer, Repo

SOURCE = WEIGHTS_DIR / "convmixer_128_4.e25_cifar10"
SHIP = str(IMAGES / "ship/0000.png")


@pytest.fixture
def server(tmp_path):
    (tmp_path / "server").mkdir()
    server = HubServer(tmp_path / "server")
    repo = server.repos["ann/cifar"] = Repo(private=False, owner="ann")
    files = {name: server.store((SOURCE / name).read_bytes()) for name in ("config.json", "model.safetensors")}
    repo.branches["main"] = repo.add(files)
    yield server
    server.shutdown()


def predict(server, home, size=None, **settings):
    """Predicts in a process that may not write files of more than `size` bytes."""

    def limit():
        if size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, "-m", "convmixer_timm", "predict", SHIP, "--model", "hf-hub:ann/cifar", "--topk", "1"]
    environ = {**environment(server, home), **settings}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, preexec_fn=limit)
    return done.returncode, done.stdout, done.stderr


def test_a_full_disk_is_no_network(server, tmp_path):
    code, _, err = predict(server, tmp_path / "home", size=100_000)
    assert code == 1
    assert "file too large: free some space, or set HF_HOME to a folder on another disk" in err.splitlines()[-1]
    code, out, err = predict(server, tmp_path / "home")
    assert code == 0, err
    assert "ship" in out


def test_hf_home_that_is_no_folder(server, tmp_path):
    (tmp_path / "file").touch()
    for home in (tmp_path / "file", tmp_path / "file/deeper"):
        code, _, err = predict(server, home)
        line = f"ann/cifar: {tmp_path}/file is a file, so nothing can be put below it: set HF_HOME to a folder"
        assert (code, err.splitlines()[-1]) == (1, f"convmixer-timm: error: {line}")


def test_a_hub_that_does_not_answer_in_time(monkeypatch):
    def late(*args, **kwargs):
        raise LocalEntryNotFoundError("not found") from TimeoutError("timed out")

    monkeypatch.setattr(download, "hf_hub_download", late)
    with pytest.raises(HubError, match=r"ann/x is not in the cache, and .* didn't answer in time \(TimeoutError\)"):
        download.download("ann/x")


def test_what_the_hub_answers_is_not_the_network(server, tmp_path):
    client = Client(server, tmp_path / "home")
    for status, message in [
        (503, "ann/cifar is not in the cache, and the Hub answered 503"),
        (403, "the token may not read that: take another"),
        (401, "the token is wrong or expired: run `hf auth login`"),
    ]:
        server.fail("metadata", status)
        line = client.fails("predict", SHIP, "--model", "hf-hub:ann/cifar")
        assert message in line and "can't be reached" not in line
    client.stop()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"HF_HUB_OFFLINE": "1"}, "ann/cifar is not in the cache, and HF_HUB_OFFLINE is set: unset it"),
        ({"HF_ENDPOINT": "not-a-url"}, "HF_ENDPOINT is 'not-a-url', which is no address"),
        ({"HF_TOKEN": "ü"}, "the Hugging Face token has other characters than tokens have"),
    ],
)
def test_settings_that_cant_work_are_named(settings, message, server, tmp_path):
    code, _, err = predict(server, tmp_path / "home", **settings)
    assert code == 1 and message in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    "args",
    [
        ["convert", str(SOURCE / "model.safetensors"), "a.safetensors"],
        ["export", SOURCE.name, "--format", "torch-export", "-o", "a.pt2"],
        ["export", SOURCE.name, "--format", "openvino", "-o", "a.xml"],
        ["plot", SOURCE.name, "-o", "."],
    ],
)
def test_a_full_disk_is_told_in_one_line(args, tmp_path):
    if args[0] == "export" and (reason := unavailable("openvino")):
        pytest.skip(reason)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    done = subprocess.run(
        [sys.executable, "-m", "convmixer_timm", *args], cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 1, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("convmixer-timm: error: ") and (
        "file too large: free" in error or "disk may be full" in error
    )
    assert args[-1].strip(".") in error and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_publishing_without_a_place_for_files(server, tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "convmixer_timm", "publish", str(SOURCE), "--repo-id", "ann/new"]
    for settings, size, message in [
        ({"HF_HOME": str(tmp_path / "file")}, None, ""),  # nothing of it is needed
        ({}, 10_000, "file too large"),
    ]:

        def limit(size=size):
            if size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        env = {**environment(server, tmp_path / "home"), "HF_TOKEN": "hf_ann", **settings}
        done = subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=limit)
        assert done.returncode == bool(message), done.stderr
        assert message in done.stderr and "Traceback" not in done.stderr and "no answer" not in done.stderr


class Failed(Exception):
    """As the clients' own, whatever the operating system said to them."""


Failed.__module__ = "httpx._exceptions"


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: no space left on device: free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk quota exceeded: free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission denied: get the right to write"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: read-only file system: get the right to write"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), "this machine's, not the Hub's"),
        (RuntimeError("Data error: No space left on device (os error 28)"), "no space left on device: free some"),
        (caused(RuntimeError("while uploading"), OSError(errno.ENOSPC, "No space left")), "free some space"),
        (caused(LocalEntryNotFoundError("not found"), OSError(errno.ENOSPC, "No space left")), "free some space"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "ConnectionResetError): check the connection"),
        (caused(Failed(), PermissionError(errno.EPERM, "by a firewall")), "Failed): check the connection"),
        (TimeoutError(), "within HF_HUB_DOWNLOAD_TIMEOUT, 10 s: try again later"),
    ],
)
def test_causes(error, message):
    assert message in transfer_reason(error)


def test_what_was_handled_before_is_no_cause():
    try:
        try:
            Path("/nowhere/at/all").read_bytes()
        except FileNotFoundError:
            raise ConnectionError("lost")  # noqa: B904
    except ConnectionError as error:
        assert local_cause(error) is None


def test_text_for_terminals():
    assert one_line("\x1b[1mbold\x1b[0m\n\t(1) two\x00 \udce9") == "bold (1) two\\x00 \\udce9"
    assert printable("a  b\n猫") == "a  b\\n猫"
    assert as_text("\udcc3\udcbcn\udcff") == "ün\\xff"

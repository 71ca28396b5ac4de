"""A server that speaks the Hub's protocol, and a process with the command line that takes it for the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .server import HubServer


def environment(server, home):
    """Of a process that takes the server for the Hub, and has a cache of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    settings = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "TQDM_DISABLE": "1"}
    return {**clean, **settings, "NO_PROXY": "127.0.0.1", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}


class Client:
    """A process with convmixer-timm, which takes commands and gives exit code, stdout and stderr."""

    def __init__(self, server, home):
        self.home = home
        script = Path(__file__).with_name("client.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(server, home),
        )

    def __call__(self, *args, token="hf_ann"):
        self.process.stdin.write(json.dumps({"args": [str(arg) for arg in args], "token": token}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "hf_" not in (answer["out"] + answer["err"]).replace("hf_hub_download", ""), "a token was printed"
        assert "Signature" not in answer["out"] + answer["err"], "a signed address was printed"
        return answer["code"], answer["out"], answer["err"]

    def stop(self):
        self.process.stdin.close()
        self.process.wait(30)

    def fails(self, *args, token="hf_ann"):
        """Runs a command that has to fail, and gives the one line that says why."""
        code, _, err = self(*args, token=token)
        assert code == 1, err
        lines = [line for line in err.splitlines() if line.startswith("convmixer-timm: error: ")]
        assert len(lines) == 1 and lines[0] == err.splitlines()[-1]
        assert "Traceback" not in err
        return lines[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = HubServer(tmp_path_factory.mktemp("hub"))
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp("home"))
    yield client
    client.stop()


@pytest.fixture
def mended(server):
    """Afterwards the server has no faults any more."""
    yield
    server.mend()

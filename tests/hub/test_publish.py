"""Publishing and loading, against a server on loopback that speaks the Hub's protocol."""

import itertools
import json
import shutil
import subprocess
import sys
import time

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from convmixer_timm.convmixer import WEIGHTS_DIR

from ..conftest import IMAGES
from .conftest import Client, environment
from .server import Repo
from .test_packing import make_run

pytestmark = pytest.mark.usefixtures("mended")

SOURCE = WEIGHTS_DIR / "convmixer_128_4.e25_cifar10"
PICTURES = {"curve.png", "depthwise_kernels.png", "patch_filters.png"}
FILES = {"README.md", "args.yaml", "config.json", "model.safetensors", "summary.csv"} | PICTURES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of train.py on two classes, whose data are not on this machine."""
    folder = tmp_path_factory.mktemp("data")
    changes = {"data_dir": str(folder / "insects"), "num_classes": 2, "input_size": [3, 64, 64], "model_kwargs": {}}
    return make_run(folder / "run", ["ant", "bee"], **changes)


def changed(run, target):
    """The run with other weights."""
    shutil.copytree(run, target)
    checkpoint = torch.load(target / "last.pth.tar", weights_only=False)
    checkpoint["state_dict"]["head.bias"] += 1
    torch.save(checkpoint, target / "last.pth.tar")
    return target


def test_published_run_is_whole_and_described(server, client, run):
    code, out, err = client("publish", run, "--repo-id", "ann/insects", "--tag", "v1")
    assert code == 0, err
    assert f"Published: {server.url}/ann/insects/commit/" in out
    files = server.files("ann/insects")
    assert set(files) == FILES | {".gitattributes"}
    assert len(server.repos["ann/insects"].commits) == 2  # the empty repository's, and one with everything
    assert server.files("ann/insects", "v1") == files

    config = json.loads(files["config.json"])
    assert config["architecture"] == "convmixer_128_4"
    assert config["num_classes"] == 2
    assert "cifar10" not in json.dumps(config)
    assert config["label_names"] == ["ant", "bee"]
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert "label_names" not in config["pretrained_cfg"]
    args = yaml.safe_load(files["args.yaml"])
    assert args["data_dir"] == "insects"
    assert not any(str(run.parent).encode() in content for content in files.values())

    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.library_name == "timm"
    assert {"timm", "image-classification"} <= set(card.data.tags)
    assert card.data.datasets is None  # nothing of that name is on the Hub
    (result,) = card.data.eval_results  # of two classes a top-5 is always right
    assert (result.metric_name, result.metric_value, result.dataset_type) == (
        "Top 1 Accuracy",
        pytest.approx(69.25),
        "imagefolder",
    )
    assert card.data.metrics == ["accuracy"]
    assert 'timm.create_model("hf-hub:ann/insects", pretrained=True)' in card.text
    assert "import convmixer_timm" in card.text
    assert 'pipeline("image-classification", model="ann/insects")' in card.text
    assert "| top-1 | measured on |\n|---|---|\n| 69.25 | insects, validation, 40 images |" in card.text
    assert "trockman2023patches" in card.text
    assert "curve.png" in card.text


LOAD = """
import json, sys
import convmixer_timm, timm, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    print(json.dumps([timm.__version__, model.pretrained_cfg["input_size"], model(images).tolist()]))
"""


def load(name, server, home, **settings):
    env = {**environment(server, home), "HF_TOKEN": "hf_ann", **settings}
    return subprocess.run([sys.executable, "-c", LOAD, name], env=env, capture_output=True, text=True)


def test_fresh_process_loads_what_was_published(server, client, run, tmp_path):
    assert client("publish", run, "--repo-id", "ann/private", "--private", "--tag", "first")[0] == 0
    assert client("publish", changed(run, tmp_path / "run"), "--repo-id", "ann/private")[0] == 0
    outputs = {}
    for name in ("hf-hub:ann/private@first", "hf-hub:ann/private"):
        result = load(name, server, tmp_path / "cache")
        assert result.returncode == 0, result.stderr
        version, size, output = json.loads(result.stdout)
        assert version == timm.__version__  # no other one on the way
        assert size == [3, 64, 64]
        outputs[name] = torch.tensor(output)
    old, new = outputs.values()
    model = timm.create_model("convmixer_128_4", num_classes=2)
    model.load_state_dict(torch.load(run / "last.pth.tar", weights_only=False)["state_dict"])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(old, model.eval()(images))
    torch.testing.assert_close(new, old + 1)
    # The cache alone is enough, and nothing else is: the repository is private.
    offline = load("hf-hub:ann/private", server, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert load("hf-hub:ann/private", server, tmp_path / "empty", HF_HUB_OFFLINE="1").returncode != 0
    assert load("hf-hub:ann/private", server, tmp_path / "empty", HF_TOKEN="hf_bob").returncode != 0


def test_the_same_again_changes_nothing(server, client, run):
    assert client("publish", run, "--repo-id", "ann/same", "--tag", "v1")[0] == 0
    commits = dict(server.repos["ann/same"].commits)
    code, out, _ = client("publish", run, "--repo-id", "ann/same", "--tag", "v1")
    assert code == 0
    assert "Nothing to publish" in out
    assert server.repos["ann/same"].commits == commits


def test_another_model_takes_nothing_of_the_last_run_along(server, client, run, tmp_path):
    repo = "ann/replaced"
    assert client("publish", run, "--repo-id", repo)[0] == 0
    server.repos[repo].commits[server.repos[repo].branches["main"]]["notes.txt"] = server.store(b"mine")
    weights = torch.load(run / "last.pth.tar", weights_only=False)["state_dict"]
    torch.save(weights, tmp_path / "weights.pth")
    arguments = ("publish", tmp_path / "weights.pth", "--model", "convmixer_128_4", "--repo-id", repo)
    code, _, err = client(*arguments)
    assert code == 0, err
    left = set(server.files(repo))
    assert "notes.txt" in left and not left & {"args.yaml", "summary.csv", "curve.png"}


def test_a_diverged_model_is_named(client, run, tmp_path):
    weights = torch.load(run / "last.pth.tar", weights_only=False)["state_dict"]
    weights["head.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "weights.pth")
    arguments = ("publish", tmp_path / "weights.pth", "--model", "convmixer_128_4", "--repo-id", "ann/nan", "--dry-run")
    assert "its training diverged" in client.fails(*arguments)


def test_hand_written_part_of_the_card_survives(server, client, run, tmp_path):
    assert client("publish", run, "--repo-id", "ann/card")[0] == 0
    repo = server.repos["ann/card"]
    card = server.files("ann/card")["README.md"].decode()
    edited = card.replace("license: mit", "license: apache-2.0\nlanguage: fr").replace("69.25", "99.99")
    head, text = edited.split("<!--", 1)
    edited = f"{head}# Ants and bees of my garden\n\n<!--{text}\n## Thanks\n\nTo the bees.\n"
    table = dict(repo.commits[repo.branches["main"]], **{"README.md": server.store(edited.encode())})
    repo.branches["main"] = repo.add(table)

    assert client("publish", changed(run, tmp_path / "run"), "--repo-id", "ann/card")[0] == 0
    again = server.files("ann/card")["README.md"].decode()
    assert "# Ants and bees of my garden" in again and "To the bees." in again
    assert "license: apache-2.0" in again and "language: fr" in again
    assert "99.99" not in again and "69.25" in again  # a figure belongs to the weights
    assert again.count("## Use") == 1


def test_branch_and_pull_request(server, client, run, tmp_path):
    assert client("publish", run, "--repo-id", "ann/refs")[0] == 0
    before = server.files("ann/refs")
    other = changed(run, tmp_path / "run")
    assert client("publish", other, "--repo-id", "ann/refs", "--revision", "trial")[0] == 0
    assert b"hf-hub:ann/refs@trial" in server.files("ann/refs", "trial")["README.md"]
    # Somebody else may not write, but open a pull request.
    code, out, err = client("publish", other, "--repo-id", "ann/refs", "--create-pr", token="hf_bob")
    assert code == 0, err
    assert "/discussions/1" in out
    assert server.files("ann/refs") == before
    weights = "model.safetensors"
    assert (
        server.files("ann/refs", "refs/pr/1")[weights] == server.files("ann/refs", "trial")[weights] != before[weights]
    )


def test_dry_run_shows_and_sends_nothing(server, client):
    code, out, _ = client("publish", SOURCE, "--repo-id", "ann/dry", "--dry-run", token=None)
    assert code == 0
    assert "353,232  model.safetensors" in out
    assert 'create_model("hf-hub:ann/dry"' in out
    assert "Nothing was sent" in out
    assert server.seen == []


def test_bundled_folder_and_checkpoint_file(server, client, run, tmp_path):
    folder = tmp_path / "convmixer_128_4.e25_cifar10"
    shutil.copytree(SOURCE, folder)
    (folder / "optimizer.pth").write_bytes(b"a pickle")
    code, _, err = client("publish", folder, "--repo-id", "ann/bundled")
    assert code == 0
    assert "left out: optimizer.pth" in err
    assert set(server.files("ann/bundled")) == FILES | {".gitattributes"}
    assert server.files("ann/bundled")["model.safetensors"] == (SOURCE / "model.safetensors").read_bytes()

    file = tmp_path / "weights.safetensors"
    shutil.copy(SOURCE / "model.safetensors", file)
    assert "--model" in client.fails("publish", file, "--repo-id", "ann/file")
    code, _, err = client("publish", file, "--repo-id", "ann/file", "--model", "convmixer_128_4")
    assert code == 0
    assert "--labels" in err
    files = server.files("ann/file")
    # Ten classes of one's own are not CIFAR-10's.
    assert json.loads(files["config.json"])["label_names"] == [str(i) for i in range(10)]
    assert b"No accuracy was measured" in files["README.md"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["nowhere", "--repo-id", "ann/x"], "no such folder or file: nowhere"),
        ([SOURCE, "--repo-id", "x"], "must be OWNER/NAME"),
        ([SOURCE, "--repo-id", "ann/x y"], "ann/x y"),
        ([SOURCE.parent / "images", "--repo-id", "ann/x"], "neither config.json"),
        ([SOURCE, "--repo-id", "ann/x", "--create-pr", "--tag", "v1"], "leave out"),
        (
            [SOURCE / "model.safetensors", "--repo-id", "ann/x", "--model", "resnet18"],
            "no ConvMixer variant 'resnet18'",
        ),
        ([SOURCE / "model.safetensors", "--repo-id", "ann/x", "--model", "convmixer_256_8"], "is a convmixer_128_4"),
    ],
)
def test_bad_arguments_are_named(client, args, message):
    assert message in client.fails("publish", *args)


def test_other_architectures_are_refused(client, tmp_path):
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "resnet"), safe_serialization=True)
    assert "no ConvMixer" in client.fails("publish", tmp_path / "resnet", "--repo-id", "ann/x")


def test_run_that_began_with_a_checkpoint_of_the_hub(server, client, tmp_path):
    """Whose name has a dot in it, and which is not its architecture's."""
    assert client("publish", SOURCE, "--repo-id", "ann/mixer_v1.2")[0] == 0
    run = make_run(tmp_path / "run", model="hf-hub:ann/mixer_v1.2", pretrained=True, num_classes=10)
    code, _, err = client("publish", run, "--repo-id", "ann/tuned")
    assert code == 0, err
    files = server.files("ann/tuned")
    assert json.loads(files["config.json"])["architecture"] == "convmixer_128_4"
    metadata = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("ann/mixer_v1.2", "finetune")
    run = make_run(tmp_path / "gone", model="hf-hub:ann/gone", num_classes=10)
    assert "hf-hub:ann/gone" in client.fails("publish", run, "--repo-id", "ann/tuned")


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("ann/broken", b"---\ntags: [\n---\nhello", "the metadata at the top of its README.md can't be read, mend it"),
        ("ann/list", b"---\n- a list\n---\nhello", "the metadata at the top of its README.md can't be read, mend it"),
        ("ann/bytes", b"\xff\xfe", "its README.md is no text in UTF-8, mend it first"),
    ],
)
def test_a_card_that_cant_be_read_is_not_overwritten(name, text, said, server, client):
    repo = server.repos[name] = Repo(private=False, owner="ann")
    head = repo.branches["main"] = repo.add({"README.md": server.store(text)})
    error = client.fails("publish", SOURCE, "--repo-id", name)
    assert said in error and f"{name} has no new commit" in error and head == repo.branches["main"]


def test_metadata_of_one_word_stays_a_word(server, client):
    repo = server.repos["ann/word"] = Repo(private=False, owner="ann")
    card = b"---\ntags: mine\ndatasets: cifar10\n---\nhello"
    repo.branches["main"] = repo.add({"README.md": server.store(card)})
    assert client("publish", SOURCE, "--repo-id", "ann/word")[0] == 0
    data = ModelCard(server.files("ann/word")["README.md"].decode()).data
    assert "mine" in data.tags and "m" not in data.tags and "cifar10" in data.datasets


def test_labels_must_fit(client, run, tmp_path):
    (tmp_path / "labels.txt").write_text("ant\nbee\nwasp\n")
    assert "2 classes" in client.fails("publish", run, "--repo-id", "ann/x", "--labels", tmp_path / "labels.txt")
    for content, message in [
        (b"ant\nant\n", "more than once: ant"),
        (b"\n \n", "labels.txt has no labels"),
        ("ant\nbee\n".encode("utf-16"), "labels.txt is no text in UTF-8"),
    ]:
        (tmp_path / "labels.txt").write_bytes(content)
        assert message in client.fails("publish", run, "--repo-id", "ann/x", "--labels", tmp_path / "labels.txt")


def test_labels_of_a_windows_editor(client, server, run, tmp_path):
    (tmp_path / "labels.txt").write_bytes("ünï\r\nbee\r\n".encode("utf-8-sig"))
    assert client("publish", run, "--repo-id", "ann/bom", "--labels", tmp_path / "labels.txt")[0] == 0
    assert json.loads(server.files("ann/bom")["config.json"])["label_names"] == ["ünï", "bee"]


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        (None, "ann/faulty", "no Hugging Face token: run `hf auth login`"),
        ("hf_wrong", "ann/faulty", "answered 401"),
        ("hf_reader", "ann/faulty", "no write access"),
        ("hf_bob", "ann/faulty", "may not do this"),
        ("hf_ann", "bob/other", "under the namespace 'bob'"),
    ],
)
def test_refused_token(server, client, second, token, repo_id, message):
    assert client("publish", SOURCE, "--repo-id", "ann/faulty")[0] == 0
    before = dict(server.repos["ann/faulty"].commits)
    assert message in client.fails("publish", second, "--repo-id", repo_id, token=token)
    assert server.repos["ann/faulty"].commits == before
    assert "bob/other" not in server.repos


STEPS = ["create", "info", "metadata", "validate", "preupload", "batch", "upload", "verify", "commit"]


@pytest.fixture
def second(tmp_path):
    """A packed folder with weights that the server has never seen."""
    folder = tmp_path / "second"
    shutil.copytree(SOURCE, folder)
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"] += next(amounts)
    save_file(weights, folder / "model.safetensors")
    return folder


amounts = itertools.count(1)


@pytest.mark.parametrize(
    "step, status",
    # Who may not create a repository may still write to one that is there.
    [(step, status) for step in STEPS for status in (403, 503, "cut") if (step, status) != ("create", 403)],
)
def test_fault_leaves_the_last_commit_and_passes(server, client, second, step, status):
    """A step that keeps failing ends in one line and an unchanged repository; one that failed once ends well."""
    repo_id = f"ann/fault-{step}-{status}"
    assert client("publish", SOURCE, "--repo-id", repo_id)[0] == 0
    before = server.files(repo_id)
    server.fail(step, status)
    line = client.fails("publish", second, "--repo-id", repo_id)
    assert "no answer" in line if status == "cut" else str(status) in line
    unsure = step == "commit" and status == "cut"  # it may have been taken
    assert f"{repo_id} {'may have the' if unsure else 'has no'} new commit" in line
    assert server.files(repo_id) == before
    server.mend()
    if status != 403:
        server.fail(step, status, times=1)
    code, out, err = client("publish", second, "--repo-id", repo_id)
    assert code == 0, err
    assert "Published" in out
    assert server.files(repo_id)["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize(
    "step, status, message, advice",
    [
        ("commit", 403, "Private repository storage limit reached", "storage limit reached"),
        ("batch", 402, "storage quota exceeded", "is full"),
        ("commit", 409, "", "at the same time"),
        ("commit", 412, "A commit has happened since", "someone else changed"),
        ("commit", 429, "", "wait some minutes"),
        ("commit", 500, "", "again later"),
        ("info", 404, "", "no such repository"),
        ("upload", 400, "the content has another hash", "another hash"),
    ],
)
def test_each_refusal_tells_what_to_do(server, client, second, step, status, message, advice):
    assert client("publish", SOURCE, "--repo-id", "ann/refused")[0] == 0
    before = server.files("ann/refused")
    server.fail(step, status, message=message)
    assert advice in client.fails("publish", second, "--repo-id", "ann/refused")
    assert server.files("ann/refused") == before


def test_commit_whose_answer_is_lost_is_not_made_twice(server, client, second):
    server.after_commit_cut = True
    code, out, err = client("publish", second, "--repo-id", "ann/lost")
    assert code == 0, err
    assert "Published" in out
    assert len(server.repos["ann/lost"].commits) == 2


def test_slow_server(server, client):
    server.fail("commit", "slow", seconds=1)
    assert client("publish", SOURCE, "--repo-id", "ann/slow")[0] == 0
    server.fail("create", "slow", seconds=3)
    line = client.fails("publish", SOURCE, "--repo-id", "ann/slow", "--timeout", "1")
    assert "no answer within 1 s (Timeout): 127.0.0.1 didn't answer POST /api/repos/create" in line
    assert "or with a longer --timeout" in line


@pytest.mark.parametrize("step", ["upload", "batch", "commit", "preupload"])
def test_a_server_that_never_answers(step, server, client, second):
    server.fail(step, "slow", seconds=60)
    start = time.monotonic()
    line = client.fails("publish", second, "--repo-id", f"ann/hanging-{step}", "--timeout", "2")
    assert time.monotonic() - start < 20  # with packing
    assert f"no answer within 2 s (Timeout): 127.0.0.1 didn't {'take a file' if step == 'upload' else 'answer'}" in line


def test_what_is_waited_for_is_said(server, client):
    server.fail("create", "slow", seconds=6.5)
    code, _, err = client("publish", SOURCE, "--repo-id", "ann/patient")
    assert code == 0
    assert "waiting for 127.0.0.1 to answer POST /api/repos/create, for at most 60 s\n" in err


def test_a_tag_stays_with_its_content(server, client, second):
    assert client("publish", SOURCE, "--repo-id", "ann/tagged", "--tag", "v1")[0] == 0
    assert "choose another --tag" in client.fails("publish", second, "--repo-id", "ann/tagged", "--tag", "v1")
    assert client("publish", second, "--repo-id", "ann/tagged", "--tag", "v2")[0] == 0
    before = server.files("ann/tagged")
    assert "choose another --tag" in client.fails("publish", SOURCE, "--repo-id", "ann/tagged", "--tag", "v1")
    assert server.files("ann/tagged") == before


def test_private_is_not_public(server, client, second):
    assert client("publish", SOURCE, "--repo-id", "ann/public")[0] == 0
    before = server.files("ann/public")
    assert "there and public" in client.fails("publish", second, "--repo-id", "ann/public", "--private")
    assert server.files("ann/public") == before


def test_no_token_is_stored(client):
    stored = [path for path in client.home.rglob("*") if path.is_file() and b"hf_ann" in path.read_bytes()]
    assert stored == []


# Loading


@pytest.fixture(scope="module")
def published(server, client):
    assert client("publish", SOURCE, "--repo-id", "ann/cifar")[0] == 0
    return "hf-hub:ann/cifar"


@pytest.fixture
def fresh(server, tmp_path):
    """A client with an empty cache."""
    client = Client(server, tmp_path / "home")
    yield client
    client.stop()


def predict(client, model):
    return client(
        "predict", "--model", model, "--topk", "1", "--format", "csv", *sorted((IMAGES / "ship").glob("*.png"))
    )


def replace(server, repo_id, **files):
    """A commit past all checks."""
    repo = server.repos[repo_id]
    table = {**repo.commits[repo.branches["main"]], **{k: server.store(v) for k, v in files.items()}}
    repo.branches["main"] = repo.add({k: v for k, v in table.items() if server.blob(v).stat().st_size})


def test_prediction_verification_and_damage(server, published, fresh, client):
    code, out, err = predict(fresh, published)
    assert code == 0, err
    assert out == predict(client, "convmixer_128_4.e25_cifar10")[1]
    assert "ok      hf-hub:ann/cifar\n" in fresh("verify")[1]
    data_set = fresh.home / "hub/datasets--ann--set"
    shutil.copytree(fresh.home / "hub/models--ann--cifar", data_set, symlinks=True)
    assert "ann/set" not in fresh("verify")[1]
    shutil.rmtree(data_set)

    (blob,) = [path for path in fresh.home.rglob("blobs/*") if path.stat().st_size > 100_000]
    content = blob.read_bytes()
    for harmed in (content[:-1] + bytes([content[-1] ^ 1]), content[:-100]):
        blob.write_bytes(harmed)
        code, out, _ = fresh("verify", published)
        assert code == 1 and "SHA-256" in out
        line = fresh.fails("predict", "--model", published, IMAGES / "ship")
        assert f"{blob} is damaged" in line
    blob.unlink()
    assert predict(fresh, published)[0] == 0  # downloaded again


def test_a_cache_without_links(published, fresh):
    """As a copy of one, or that of a file system that has none: its files' names don't tell their hashes."""
    assert predict(fresh, published)[0] == 0
    shutil.copytree(fresh.home / "hub", fresh.home / "copy")
    shutil.rmtree(fresh.home / "hub")
    (fresh.home / "copy").rename(fresh.home / "hub")
    assert fresh("verify", published)[0] == 0
    (config,) = (fresh.home / "hub").rglob("config.json")
    config.write_text("{")
    code, out, _ = fresh("verify")
    assert code == 1 and f"FAILED  {published}: {config} doesn't describe a model" in out


def test_only_the_file_that_was_checked_is_read(server, published, fresh, client):
    """Whatever the description names: older timm would run a pickle that it does."""
    assert client("publish", SOURCE, "--repo-id", "ann/trap")[0] == 0
    config = json.loads((SOURCE / "config.json").read_text())
    told = {
        "hf_hub_filename": "evil.bin",
        "custom_load": "hf",
        "url": "http://127.0.0.1:9/evil.bin",
        "file": "evil.bin",
    }
    config["pretrained_cfg"] = {**config["pretrained_cfg"], **told}
    replace(server, "ann/trap", **{"config.json": json.dumps(config).encode(), "evil.bin": b"a pickle"})
    code, out, err = predict(fresh, "hf-hub:ann/trap")
    assert code == 0, err
    assert out == predict(fresh, published)[1]
    assert not list(fresh.home.rglob("evil.bin"))


def test_the_users_own_client_is_kept():
    code = """
import huggingface_hub as hub
from convmixer_timm.hub.waiting import limit_waiting
if hasattr(hub, "set_client_factory"):
    own, get, seconds = hub.utils._http.default_client_factory, hub.get_session, lambda client: client.timeout.read
    configure = hub.set_client_factory
else:
    import requests
    own, get, seconds = requests.Session, hub.utils.get_session, lambda client: client.timeout
    configure = hub.configure_http_backend

def mine():
    client = own()
    client.headers["x-company"] = "1"
    return client

configure(mine)
with limit_waiting(7):
    assert get().headers["x-company"] == "1" and seconds(get()) == 7
assert get().headers["x-company"] == "1" and "patient" not in str(get().send)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_faults_while_loading(server, published, fresh):
    server.fail("resolve", "wrong hash")
    assert "damaged" in fresh.fails("predict", "--model", published, IMAGES / "ship")
    shutil.rmtree(fresh.home / "hub")
    server.fail("resolve", 500)
    assert "answered 500" in fresh.fails("predict", "--model", published, IMAGES / "ship")
    server.fail("metadata", "cut")
    assert server.url in fresh.fails("predict", "--model", published, IMAGES / "ship")
    server.mend()
    server.fail("metadata", "slow", seconds=1, times=1)
    assert predict(fresh, published)[0] == 0
    shutil.rmtree(fresh.home / "hub")
    server.fail("resolve", "half", times=2)
    for _ in range(3):  # older huggingface_hub gives up at each cut, and goes on from there when it is asked again
        code, _, err = predict(fresh, published)
        assert code == 0 or "no answer" in err
    assert code == 0
    server.fail("metadata", 503)  # what is in the cache is enough
    assert predict(fresh, published)[0] == 0


def test_what_cannot_be_loaded_is_said(server, published, fresh, client):
    def error(model):
        return fresh.fails("predict", "--model", model, IMAGES / "ship")

    assert "no repository ann/nothing" in error("hf-hub:ann/nothing")
    assert "no revision v9" in error("hf-hub:ann/cifar@v9")
    for repo_id in ("ann/odd", "ann/misfit", "ann/pickle", "ann/nonsense"):
        assert client("publish", SOURCE, "--repo-id", repo_id)[0] == 0
    config = json.loads((SOURCE / "config.json").read_text())
    replace(server, "ann/odd", **{"config.json": json.dumps({**config, "architecture": "convmixer_1_1"}).encode()})
    assert "'convmixer_1_1', which is no architecture" in error("hf-hub:ann/odd")
    replace(server, "ann/misfit", **{"config.json": json.dumps({**config, "architecture": "convmixer_256_8"}).encode()})
    assert "expected dim 256, depth 8" in error("hf-hub:ann/misfit")
    replace(server, "ann/pickle", **{"model.safetensors": b"", "pytorch_model.bin": b"a pickle"})
    assert "has no model.safetensors" in error("hf-hub:ann/pickle")
    replace(server, "ann/nonsense", **{"config.json": b"not JSON"})
    assert "doesn't describe a model" in error("hf-hub:ann/nonsense")
    told = {**config, "model_args": {**config.get("model_args", {}), "pretrained_strict": False}}
    replace(server, "ann/odd", **{"config.json": json.dumps(told).encode()})
    assert "has the model argument pretrained_strict" in error("hf-hub:ann/odd")
    # The registered weights of timm's organisation, which this Hub hasn't got.
    assert "no repository timm/convmixer_768_32.in1k" in error("convmixer_768_32.in1k")


def test_imagenet_weights_come_from_timms_organisation(server, fresh, tmp_path):
    name = "convmixer_768_32.in1k"
    model = timm.create_model(name.split(".")[0])
    timm.models.save_for_hf(model, str(tmp_path / "packed"), safe_serialization=True)
    repo = server.repos[f"timm/{name}"] = Repo(private=False, owner="timm")
    files = [tmp_path / "packed" / file for file in ("config.json", "model.safetensors")]
    repo.branches["main"] = repo.add({file.name: server.store(file.read_bytes()) for file in files})
    assert "\nok      convmixer_768" not in fresh("verify")[1]
    assert predict(fresh, name)[0] == 0
    assert f"ok      {name}\n" in fresh("verify")[1]


def test_no_network_and_nothing_cached(server, tmp_path):
    env = {**environment(server, tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "convmixer_timm", "predict", "--model", "hf-hub:ann/cifar", str(IMAGES / "ship")]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "ann/cifar is not in the cache" in result.stderr.splitlines()[-1]

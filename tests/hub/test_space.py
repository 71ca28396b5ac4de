"""`publish --page`: the model's page as a static Space of the loopback server."""

import pytest
from huggingface_hub import ModelCard, SpaceCard

from convmixer_timm.inference.engines import unavailable

from .server import Repo
from .test_packing import make_run
from .test_publish import SOURCE

pytestmark = [
    pytest.mark.usefixtures("mended"),
    pytest.mark.skipif(unavailable("onnxruntime") is not None, reason=str(unavailable("onnxruntime"))),
]

PAGE = {"README.md", "index.html", "page.css", "page.js", "model.onnx", *(f"examples/{i}.png" for i in (1, 2, 3))}
TEMPLATE = {".gitattributes", "style.css"}  # what a new Space holds besides


def test_page_and_model_link_each_other(server, client):
    code, out, err = client("publish", SOURCE, "--repo-id", "ann/ships", "--page", "--tag", "v1")
    assert code == 0, err
    assert f"Published: {server.url}/ann/ships/commit/" in out
    assert out.count("Published: ") == 2 and "model.onnx" in out
    space = server.repos["spaces:ann/ships"]
    assert len(space.commits) == 2  # the new Space's, and one with everything
    files = server.files("spaces:ann/ships")
    assert set(files) == PAGE | TEMPLATE
    html = files["index.html"].decode()
    assert f'href="{server.url}/ann/ships"' in html and "<title>ships</title>" in html

    card = SpaceCard(files["README.md"].decode())
    assert (
        card.data.to_dict().items()
        >= {
            "title": "ships",
            "sdk": "static",
            "app_file": "index.html",
            "license": "mit",
            "models": ["ann/ships"],
        }.items()
    )
    model_card = server.files("ann/ships")["README.md"].decode()
    assert f"[Try it in your browser]({server.url}/spaces/ann/ships)" in model_card
    assert ModelCard(model_card).data.library_name == "timm"

    head = space.branches["main"]
    code, out, err = client("publish", SOURCE, "--repo-id", "ann/ships", "--page")
    assert code == 0, err
    assert space.branches["main"] == head and "Nothing to publish" in out


def test_what_people_wrote_into_a_spaces_card_stays(server, client):
    assert client("publish", SOURCE, "--repo-id", "ann/kept", "--page")[0] == 0
    space = server.repos["spaces:ann/kept"]
    card = server.files("spaces:ann/kept")["README.md"].decode()
    card = card.replace("title: kept", "title: Ships & co").replace("---\n\n", "---\n\nMy own words.\n\n", 1)
    card = card.replace("sdk: static", "sdk: static\npinned: true").replace("models:\n- ann/kept", "models: ann/other")
    table = {**space.commits[space.branches["main"]], "README.md": server.store(card.encode())}
    space.branches["main"] = space.add(table)
    assert client("publish", SOURCE, "--repo-id", "ann/kept", "--page")[0] == 0
    card = SpaceCard(server.files("spaces:ann/kept")["README.md"].decode())
    assert card.data.title == "Ships & co" and card.data.pinned is True
    assert card.data.models == ["ann/kept", "ann/other"]
    assert card.text.count("My own words.") == 1 and card.text.count("# kept") == 1


CARD = "---\ntitle: Demo\nsdk: {}\n---\n{}"
NEW = "Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference\n"
WELCOME = "<p>Welcome to your static Space!</p>"


OTHERS = {
    "own-text": {"README.md": CARD.format("gradio", "A demo of mine.\n"), "app.py": "mine"},
    "own-app": {"README.md": CARD.format("gradio", NEW), "app.py": "mine", "requirements.txt": "torch"},
    "own-page": {"README.md": CARD.format("static", NEW), "index.html": "<h1>My own</h1>", "style.css": "body {}"},
    "no-card": {"app.py": "mine"},
    "no-text": {"README.md": b"\xff\xfe", "index.html": WELCOME},
    "no-yaml": {"README.md": "---\ntitle: [\n---\nhello", "index.html": WELCOME},
}
SAID = {
    "no-text": "its README.md is no text in UTF-8, mend it first",
    "no-yaml": "the metadata at the top of its README.md can't be read",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_somebodys_other_space_is_left_alone(kind, server, client):
    name = f"ann/{kind}"
    space = server.repos[f"spaces:{name}"] = Repo(private=False, owner="ann")
    head = space.branches["main"] = space.add(
        {file: server.store(text if isinstance(text, bytes) else text.encode()) for file, text in OTHERS[kind].items()}
    )
    error = client.fails("publish", SOURCE, "--repo-id", name, "--page")
    assert f"the Space {name}: {SAID.get(kind, 'there is a Space of that name already')}" in error
    assert f"{name} is published; its Space has no new commit" in error
    assert space.branches["main"] == head


def test_a_space_that_nobody_touched_is_taken(server, client):
    for number, files in enumerate(
        [{}, {"README.md": CARD.format("static", NEW), "index.html": WELCOME, "style.css": "", ".gitattributes": ""}]
    ):
        name = f"ann/new-{number}"
        space = server.repos[f"spaces:{name}"] = Repo(private=False, owner="ann")
        space.branches["main"] = space.add({file: server.store(text.encode()) for file, text in files.items()})
        assert client("publish", SOURCE, "--repo-id", name, "--page")[0] == 0
        assert set(server.files(f"spaces:{name}")) == PAGE | set(files)


def test_the_link_to_the_page_stays_without_the_page(server, client):
    assert client("publish", SOURCE, "--repo-id", "ann/linked", "--page")[0] == 0
    card = server.files("ann/linked")["README.md"]
    code, _, err = client("publish", SOURCE, "--repo-id", "ann/linked")
    assert code == 0, err
    assert server.files("ann/linked")["README.md"] == card and b"Try it in your browser" in card


@pytest.mark.parametrize(
    "fault, said",
    [
        ((503, 2), None),
        (("cut", 1), None),
        ((403, 10**9), "the token may not do this"),
        ((500, 10**9), "publish again later"),
    ],
)
def test_faults_are_handled_as_the_models(fault, said, server, client):
    """The model is there already, so the commit that fails is the Space's."""
    name = f"ann/fault-{fault[0]}"
    assert client("publish", SOURCE, "--repo-id", name, "--page")[0] == 0
    space = server.repos[f"spaces:{name}"]
    card = SpaceCard(server.files(f"spaces:{name}")["README.md"].decode())
    changed = server.store(str(card).encode())
    head = space.branches["main"] = space.add(
        {**space.commits[space.branches["main"]], "README.md": changed, "page.js": changed}
    )
    server.fail("commit", *fault)
    if said is None:
        assert client("publish", SOURCE, "--repo-id", name, "--page")[0] == 0
        assert server.files(f"spaces:{name}")["page.js"] != str(card).encode()
    else:
        error = client.fails("publish", SOURCE, "--repo-id", name, "--page")
        assert said in error
        assert space.branches["main"] == head


def test_private_and_dry_run(server, client):
    code, out, err = client("publish", SOURCE, "--repo-id", "ann/dry", "--page", "--dry-run")
    assert code == 0, err
    assert "model.onnx" in out and "sdk: static" in out and "Nothing was sent" in out
    assert "ann/dry" not in server.repos and "spaces:ann/dry" not in server.repos
    assert client("publish", SOURCE, "--repo-id", "ann/secret", "--page", "--private")[0] == 0
    assert server.repos["ann/secret"].private and server.repos["spaces:ann/secret"].private
    error = client.fails("publish", SOURCE, "--repo-id", "ann/x", "--page", "--revision", "b")
    assert "leave out --revision and --create-pr, or --page" in error


def test_a_private_models_page_is_private(server, client):
    assert client("publish", SOURCE, "--repo-id", "ann/hidden", "--private")[0] == 0
    assert client("publish", SOURCE, "--repo-id", "ann/hidden", "--page")[0] == 0
    assert server.repos["ann/hidden"].private and server.repos["spaces:ann/hidden"].private
    # One that is public already gets nothing of it.
    assert client("publish", SOURCE, "--repo-id", "ann/shown", "--page")[0] == 0
    server.repos["ann/shown"].private = True
    head = server.repos["spaces:ann/shown"].branches["main"]
    assert "the Space ann/shown is there and public" in client.fails(
        "publish", SOURCE, "--repo-id", "ann/shown", "--page"
    )
    assert server.repos["spaces:ann/shown"].branches["main"] == head


def test_another_models_page_keeps_no_pictures_of_the_last(server, client, tmp_path):
    assert client("publish", SOURCE, "--repo-id", "ann/space", "--page")[0] == 0
    assert not any("/" in name for name in server.files("ann/space"))  # whatever the repository is called
    space = server.repos["spaces:ann/space"]
    table = {**space.commits[space.branches["main"]], "examples/mine.png": server.store(b"somebody's own")}
    space.branches["main"] = space.add(table)
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2)
    assert client("publish", run, "--repo-id", "ann/space", "--page")[0] == 0
    assert {name for name in server.files("spaces:ann/space") if "/" in name} == {"examples/mine.png"}

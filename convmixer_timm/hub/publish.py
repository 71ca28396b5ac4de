"""A trained model, published on the Hugging Face Hub in one commit."""

import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    utils,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils.sha import git_hash

from ..errors import (
    NETWORK,
    HubError,
    HubTimeout,
    check_hub_settings,
    hub_reason,
    hub_status,
    local_cause,
    local_reason,
)
from ..files import files_below, sha256
from ..version import version
from ..web.page import is_part
from .cards import is_marked, link_page, merge_cards
from .packing import pack
from .sources import read_source
from .space import build_space, is_untouched, merge_space_cards, space_url
from .waiting import limit_waiting

__all__ = ["Publication", "publish"]

TIMEOUT = 60.0
_WAITS = (1, 4)  # seconds before the second and the third attempt
# What a packed run has beside its weights, by its name there.
_OF_A_RUN = {"args.yaml", "summary.csv", "curve.png", "depthwise_kernels.png", "patch_filters.png"}
_TRANSIENT = {408, 429, 500, 502, 503, 504}

T = TypeVar("T")


@dataclass(frozen=True)
class Publication:
    """What was sent, or would be.

    Attributes:
        files: Size in bytes by name.
        card: The model card.
        sent: Whether the Hub has it now; not after a dry run.
        url: The commit's or the pull request's page.
        changed: Whether there was anything new to send.
        private: Whether the repository is; its page is then too, as it holds the weights.
        page: The same of its page, where that was asked for.
    """

    files: dict[str, int]
    card: str
    sent: bool = False
    url: str = ""
    changed: bool = False
    private: bool = False
    page: "Publication | None" = None

    def report(self) -> list[str]:
        """What happened, or would, as lines of text."""
        sizes = [f"{size:>12,}  {name}" for name, size in self.files.items()]
        page = self.page.report() if self.page else []
        if not self.sent:
            return [
                *sizes,
                f"\n{self.card}\nNothing was sent. This is the card of a new repository: one that is there keeps",
                "what people wrote into its own.",
                *page,
            ]
        if not self.changed:
            return [*sizes, "Nothing to publish: the repository has all of it already.", *page]
        return [*sizes, f"Published: {self.url}", *page]


def publish(
    source: str | Path,
    repo_id: str,
    *,
    architecture: str | None = None,
    labels: list[str] | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    page: bool = False,
    dry_run: bool = False,
    timeout: float = TIMEOUT,
) -> Publication:
    """Packs a trained model and sends it to a model repository on the Hub, everything in one commit.

    Before it is sent, the packed folder is loaded back and its output compared with the source's. What people wrote
    into the repository's card stays. What passes by itself (too many requests, a server's failure, a lost connection)
    is tried three times, beside what huggingface_hub tries again by itself.

    Args:
        source: What `sources.read_source` reads: a packed folder, a ``train.py`` output folder, or a checkpoint file.
        repo_id: OWNER/NAME; made where it isn't there.
        architecture: Variant, for a checkpoint file.
        labels: Names of the classes, where the source doesn't tell them.
        private: Make a new repository private; one that exists stays as it is. Its page is as private as the model.
        revision: Branch, made where it isn't there; main by default.
        create_pr: Open a pull request instead of writing to the branch.
        tag: Name for the commit.
        page: Then send the model's page (`convmixer_timm.page`) to a static Space of the same name, in one commit too;
            the card links it.
        dry_run: Only pack and compare; nothing is sent or asked.
        timeout: Seconds to wait for each of the Hub's answers; one that doesn't come by then ends it.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If the source can't be packed, its copy computes something else, or the arguments don't go together.
        HubError: If the Hub refuses or can't be reached. The repository is as it was before, unless the message says
            that it may have the commit, whose answer didn't come.
    """
    source = Path(source).expanduser()
    labels = labels if labels is None or isinstance(labels, str) else list(labels)
    if not isinstance(repo_id, str) or not re.fullmatch(r"[^/]+/[^/]+", repo_id):
        raise ValueError(f"--repo-id must be OWNER/NAME, got {repo_id!r}")
    utils.validate_repo_id(repo_id)
    if create_pr and (tag or revision):
        raise ValueError("a pull request goes to the main branch and has no tag yet: leave out --revision and --tag")
    if page and (create_pr or revision):
        raise ValueError("a page shows the model of the main branch: leave out --revision and --create-pr, or --page")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model" / repo_id.split("/")[1]
        load_name = f"hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
        found = read_source(Path(source), architecture, labels)
        pack(found, folder, load_name)
        _compare(found.model, folder)
        space = Path(temporary) / "page" / folder.name
        if page:
            build_space(folder, space, repo_id)
            card = folder / "README.md"
            card.write_text(link_page(card.read_text(encoding="utf-8"), space_url(repo_id)), encoding="utf-8")
        if dry_run:
            return _publication(folder, page=_publication(space) if page else None)
        if constants.HF_HUB_OFFLINE:
            raise HubError("HF_HUB_OFFLINE is set: unset it to publish")
        check_hub_settings()
        if get_token() is None:
            raise HubError("no Hugging Face token: run `hf auth login` with one that may write, or set HF_TOKEN")
        with limit_waiting(timeout):
            api = HfApi(library_name="convmixer-timm", library_version=version())
            sent = _send(api, folder, repo_id, private, revision, create_pr, tag)
            if page:
                sent = replace(sent, page=_send(api, space, repo_id, sent.private, repo_type="space"))
            return sent


def _compare(model: Any, folder: Path) -> None:
    """Loads the packed folder as its users will, and compares its output with the source's on the same input."""
    copy = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.eval()(images)
        if not expected.isfinite().all():
            raise ValueError("the model's outputs are no finite numbers: its training diverged; nothing was sent")
        if not torch.equal(expected, copy(images)):
            raise ValueError("the packed model doesn't compute what its source does; nothing was sent")


def _publication(folder: Path, **kwargs: Any) -> Publication:
    files = {name: path.stat().st_size for name, path in files_below(folder).items()}
    return Publication(files, (folder / "README.md").read_text(encoding="utf-8"), **kwargs)


def _send(
    api: HfApi,
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    repo_type: str = "model",
) -> Publication:
    space = repo_type == "space"
    where = f"the Space {repo_id}" if space else repo_id
    state = f"{repo_id} is published; its Space has no new commit" if space else f"{repo_id} has no new commit"

    def attempt(step: Callable[[], T], waits: tuple[int | None, ...] = (*_WAITS, None)) -> T:
        for wait in waits:
            try:
                return step()
            except Exception as raised:
                if (local := local_cause(raised)) is not None:
                    raise HubError(f"{local_reason(local)}. {state}.") from raised
                error = _cause(raised)
                if error is None:
                    raise
                if wait is None or not _passes_by_itself(error):
                    unsure = f"{where} may have the new commit, or pull request: look there first"
                    told = unsure if hub_status(error) is None and _asked_for_commit(raised) else state
                    raise HubError(_advice(error, repo_id, told)) from raised
                print(f"{hub_reason(error)}; trying again in {wait} s", file=sys.stderr)
                time.sleep(wait)
        raise AssertionError

    sdk = "static" if space else None
    attempt(lambda: api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk))
    if private and not attempt(lambda: api.repo_info(repo_id, repo_type=repo_type)).private:
        raise HubError(f"{where} is there and public: make it private in its settings first, or leave out --private")
    if revision:
        attempt(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    there: Any = attempt(lambda: api.repo_info(repo_id, revision=revision, repo_type=repo_type))
    head = str(there.sha)
    card = folder / "README.md"
    try:
        old = attempt(lambda: _read(repo_id, "README.md", head, repo_type))
        if space and not is_marked(old):
            index = attempt(lambda: _read(repo_id, "index.html", head, repo_type))
            if not is_untouched([file.rfilename for file in there.siblings or ()], index):
                raise ValueError("there is a Space of that name already, and it is no such page: rename it first")
        if old is not None:
            merge = merge_space_cards if space else merge_cards
            card.write_text(merge(card.read_text(encoding="utf-8"), old), encoding="utf-8")
    except ValueError as error:
        raise HubError(f"{where}: {error}. {state}.") from error
    tagged = None
    if tag:
        refs = attempt(lambda: api.list_repo_refs(repo_id))
        tagged = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    if tagged and not (tagged == head and attempt(lambda: _holds(api, repo_id, head, folder))):
        raise HubError(f"{repo_id} has a tag {tag}, on other content: choose another --tag. It has no new commit.")

    # What an earlier publication left of another run, which would stand beside these weights as theirs.
    here = files_below(folder)
    others = [file.rfilename for file in there.siblings or () if file.rfilename not in here] if is_marked(old) else []
    stale = [name for name in others if (is_part(name) if space else name in _OF_A_RUN)]

    def commit() -> Any:
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in here.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(
            repo_id,
            operations,
            repo_type=repo_type,
            commit_message=f"Publish {folder.name} with convmixer-timm {version()}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,  # so that nobody's commit in between is overwritten
        )

    # A commit whose answer was lost is found on the branch by the next attempt; a pull request would be opened twice.
    info = attempt(commit, (None,)) if create_pr else attempt(commit)
    changed = info.oid != head
    if tag and not tagged:
        try:
            api.create_tag(repo_id, tag=tag, revision=info.oid)
        except NETWORK as error:
            raise HubError(_advice(error, repo_id, "The checkpoint is published; only its tag is missing")) from error
    url = info.pr_url or info.commit_url
    return _publication(folder, sent=True, url=url, changed=changed, private=bool(there.private))


def _holds(api: HfApi, repo_id: str, commit: str, folder: Path) -> bool:
    """Whether a commit has these very files."""
    files = files_below(folder)
    there: list[Any] = api.get_paths_info(repo_id, list(files), revision=commit)
    same = [
        info.lfs.sha256 == sha256(files[info.path])
        if info.lfs
        else info.blob_id == git_hash(files[info.path].read_bytes())
        for info in there
    ]
    return len(same) == len(files) and all(same)


def _read(repo_id: str, name: str, commit: str, repo_type: str) -> str | None:
    """A text file of a commit; None where it has none of that name."""
    with tempfile.TemporaryDirectory() as cache:
        try:
            file = hf_hub_download(repo_id, name, revision=commit, cache_dir=cache, repo_type=repo_type)
            return Path(file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"its {name} is no text in UTF-8, mend it first") from error
        except LocalEntryNotFoundError as error:  # the Hub didn't answer, and this cache is empty
            raise ConnectionError(str(error).splitlines()[0]) from error
        except EntryNotFoundError:
            return None


def _cause(error: Exception) -> Exception | None:
    """The Hub's or the network's error in one of huggingface_hub's; None for an error of another kind."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # from an upload's thread
    # JSON that can't be read is the page of a failing proxy.
    return error if isinstance(error, (*NETWORK, json.JSONDecodeError)) else None


def _asked_for_commit(error: BaseException | None) -> bool:
    """Whether it was the commit itself that there was no answer to, which may have been a yes."""
    while error is not None:
        with contextlib.suppress(RuntimeError):  # httpx's, of an error that knows no request
            if "/commit/" in str(getattr(getattr(error, "request", None), "url", "")):
                return True
        error = error.__cause__ or error.__context__
    return False


def _passes_by_itself(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return hub_status(error) in _TRANSIENT
    return not isinstance(error, HubTimeout)


def _advice(error: Exception, repo_id: str, state: str) -> str:
    owner = repo_id.split("/")[0]
    what = {
        401: "the token is wrong or expired: run `hf auth login`, or set HF_TOKEN",
        402: f"the storage of {owner} is full: free some, or publish elsewhere",
        403: f"the token may not do this: take one that may write to {owner}, or another --repo-id",
        404: "no such repository for this token, or a private one of someone else: check --repo-id and the token",
        409: "something is there already or happening at the same time: look at the repository and publish again",
        412: "someone else changed the repository meanwhile: publish again",
        413: f"too much for the storage of {owner}: free some, or publish elsewhere",
        429: "too many requests: wait some minutes and publish again",
    }.get(
        hub_status(error) or 0, "publish again later" + ", or with a longer --timeout" * isinstance(error, HubTimeout)
    )
    return f"{hub_reason(error)}: {what}. {state}."

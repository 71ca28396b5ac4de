"""Checkpoints of the Hugging Face Hub, checked when they arrive."""

import json
from pathlib import Path

import timm
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import (
    NETWORK,
    HubError,
    check_hub_settings,
    local_cause,
    local_reason,
    timeout_cause,
    transfer_reason,
)
from ..files import cached_sha256, sha256

__all__ = ["download"]


def download(model_id: str, config: bool = True) -> Path:
    """Brings a checkpoint of the Hub into huggingface_hub's cache, if it isn't there, and checks it.

    Args:
        model_id: OWNER/NAME, or OWNER/NAME@REVISION.
        config: Whether the repository describes its model to timm, in ``config.json``.

    Returns:
        The weights' file, with ``config.json`` beside it.

    Raises:
        HubError: If it can't be had; the message tells what to do.
        ValueError: If timm has no such architecture, or the file isn't what the Hub says of it.
    """
    repo_id, at, revision = model_id.partition("@")
    if at and not revision:
        raise ValueError(f"{model_id} names no revision: leave the @ out, or give OWNER/NAME@REVISION")
    check_hub_settings()

    def get(name: str) -> Path:
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision or None))
        except LocalEntryNotFoundError as error:
            if (local := local_cause(error)) is not None:
                raise HubError(f"{model_id}: {local_reason(local)}") from error
            raise HubError(f"{model_id} is not in the cache, and {_why_not(error)}") from error
        except EntryNotFoundError as error:
            raise HubError(f"{model_id} has no {name}, so it is no checkpoint that can be loaded safely") from error
        except RevisionNotFoundError as error:
            raise HubError(f"{repo_id} has no revision {revision}") from error
        except GatedRepoError as error:
            address = f"{constants.ENDPOINT}/{repo_id}"
            raise HubError(f"{repo_id} has conditions: accept them at {address}, and run `hf auth login`") from error
        except RepositoryNotFoundError as error:
            raise HubError(
                f"no repository {repo_id} on the Hub, or a private one: for those, log in by `hf auth login`"
            ) from error
        except (*NETWORK, RuntimeError) as error:  # RuntimeError: the Rust library's, for whatever happened
            raise HubError(f"{model_id}: {transfer_reason(error)}") from error

    if config:
        file = get("config.json")
        try:
            architecture = json.loads(file.read_text(encoding="utf-8"))["architecture"]
            known = timm.is_model(architecture)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} doesn't describe a model to timm: it has no architecture") from error
        if not known:
            raise ValueError(
                f"{model_id} is a {architecture!r}, which is no architecture that timm or this package knows"
            )
    weights = get("model.safetensors")
    expected = cached_sha256(weights)
    if expected and sha256(weights) != expected:
        raise ValueError(f"{weights.resolve()} is damaged: its SHA-256 is not {expected}. Delete it and try again.")
    return weights


def _why_not(error: LocalEntryNotFoundError) -> str:
    """Why the Hub didn't give what the cache lacks, and what to do."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it, or copy the repository and use local-dir:FOLDER"
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError | FileMetadataError):
        return transfer_reason(cause)
    if (late := timeout_cause(error)) is not None:
        return f"{constants.ENDPOINT} didn't answer in time ({type(late).__name__}): try again later"
    return f"{constants.ENDPOINT} can't be reached: connect, or copy the repository and use local-dir:FOLDER"

"""What goes wrong, told in one line by its cause: the disk, rights, the network or the Hub; with what to do."""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HTTPError

__all__ = [
    "DISK",
    "NETWORK",
    "HubError",
    "HubTimeout",
    "RunError",
    "alike",
    "check_hub_settings",
    "closest",
    "file_in_place_of",
    "hub_reason",
    "hub_status",
    "local_cause",
    "local_reason",
    "nearest",
    "one_line",
    "os_reason",
    "printable",
    "timeout_cause",
    "transfer_reason",
]

# What huggingface_hub lets through: httpx's errors are no OSErrors, those of requests, which it used before 1.0, are.
NETWORK = (OSError, HTTPError)

_TIMEOUTS = ("ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout", "TimeoutError", "HubTimeout")
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")  # whose errors are the network's, whatever is behind them
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RIGHTS = {errno.EACCES, errno.EPERM, errno.EROFS}
_PATHS = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP}
_OTHERS = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.EBUSY}
_LOCAL = DISK | _RIGHTS | _PATHS | _OTHERS
# What to do about an answer of the Hub to who only reads.
_READING = {
    401: "the token is wrong or expired: run `hf auth login`, or unset HF_TOKEN",
    403: "the token may not read that: take another, by `hf auth login` or HF_TOKEN",
    404: "nothing of that name is there: check the name and HF_ENDPOINT",
    429: "too many requests: wait some minutes",
}


class RunError(Exception):
    """What this package refuses while one of timm's scripts runs, whose own errors pass through.

    No RuntimeError: ``validate.py`` takes those, of many models, for a want of memory and tries smaller batches.
    """

    def __init__(self, text: str):
        # A worker of a loader hands its errors on with the whole traceback for text, which ends in their own.
        super().__init__(text.rpartition(f"{__name__}.RunError: ")[2].strip())


class HubError(OSError):
    """What went wrong between here and the Hub, and what to do, in one line."""


class HubTimeout(HubError):
    """An answer that the Hub owed for too long."""


def printable(text: object) -> str:
    """A text that any terminal can show on one line: line ends, control codes and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(text: object) -> str:
    """A message, which may have several lines and colours, as one line that any terminal can show."""
    return printable(" ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(text)).split()))


def closest(name: str, known: Iterable[str]) -> str:
    """The known name that a wrong one is like; empty where it is like none."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), "")


def alike(name: str, known: Iterable[str]) -> str:
    """The end of a message on a wrong name: the one that it is like, or else, of a few, all."""
    known = list(known)
    if close := closest(name, known):
        return f": did you mean {close}?"
    return f": there are {', '.join(known)}" if 0 < len(known) <= 12 else ""


def os_reason(error: OSError) -> str:
    """What the operating system said, without the file's name, which the caller tells."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (error.strerror or os.strerror(error.errno or 0)).lower()


def nearest(path: Path) -> Path:
    """What there is of a path: itself, or what lies nearest above it."""
    return next((there for there in (path, *path.parents) if there.exists()), Path())


def file_in_place_of(folder: Path) -> Path | None:
    """The file that stands where a folder is to be, or one above it; None where no file is in the way."""
    there = nearest(folder)
    return None if there.is_dir() else there


def local_cause(error: BaseException | None) -> OSError | None:
    """The error of this machine's files that is behind another error; None if it is the network's or the Hub's."""
    while error is not None and not type(error).__module__.startswith(_CLIENTS):
        if isinstance(error, OSError) and error.errno in _LOCAL:
            return error
        # The transfer library in Rust tells the number in words only.
        if (found := re.search(r"\(os error (\d+)\)", str(error))) and int(found[1]) in _LOCAL:
            return OSError(int(found[1]), os.strerror(int(found[1])))
        error = error.__cause__
    return None


def timeout_cause(error: BaseException | None) -> BaseException | None:
    """The timeout that is behind an error; None if there is none."""
    while error is not None and type(error).__name__ not in _TIMEOUTS:
        error = error.__cause__ or error.__context__
    return error


def local_reason(error: OSError, setting: str = "HF_HOME") -> str:
    """What is wrong with this machine's files, and what to do; `setting` says where they are."""
    named = error.filename2 or error.filename
    where = os.fsdecode(named) if isinstance(named, str | bytes) else f"the folder of {setting}"
    said = f"{where}: {os_reason(error)}"
    if error.errno in DISK:
        return f"{said}: free some space, or set {setting} to a folder on another disk"
    if error.errno in _RIGHTS:
        return f"{said}: get the right to write there, or set {setting} to a folder of yours"
    if error.errno in _PATHS:
        if blocker := file_in_place_of(Path(where)):
            said = f"{blocker} is a file, so nothing can be put below it"
        return f"{said}: set {setting} to a folder"
    return f"{said}: the trouble is this machine's, not the Hub's"


def hub_status(error: BaseException) -> int | None:
    """The status that the Hub answered with; None for what is no answer of it."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def check_hub_settings() -> None:
    """Raises HubError where the settings of huggingface_hub name no address or no token."""
    address = urlsplit(constants.ENDPOINT)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise HubError(f"HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address: set it to https://…, or unset it")
    token = None
    with contextlib.suppress(OSError):  # a HF_HOME that is no folder, which matters where it is needed
        token = get_token()
    if not (token or "").isascii():
        raise HubError("the Hugging Face token has other characters than tokens have: set HF_TOKEN anew, or unset it")


def hub_reason(error: Exception) -> str:
    """What happened, without addresses: those of uploads are signed."""
    if isinstance(error, HubError):
        return str(error)
    if isinstance(error, HfHubHTTPError):
        said = f" ({' '.join(error.server_message.split())})" if error.server_message else ""
        return f"the Hub answered {hub_status(error)}{said}"
    if type(error).__name__ in _TIMEOUTS:
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        return f"no answer from {constants.ENDPOINT} within HF_HUB_DOWNLOAD_TIMEOUT, {seconds} s"
    return f"no answer from {constants.ENDPOINT} ({type(error).__name__})"


def transfer_reason(error: Exception) -> str:
    """Why a transfer failed and what to do, by its cause."""
    local = local_cause(error)
    if local is not None:
        return local_reason(local)
    if (status := hub_status(error)) is not None or type(error).__name__ in _TIMEOUTS:
        return f"{hub_reason(error)}: {_READING.get(status or 0, 'try again later')}"
    if isinstance(error, FileMetadataError):
        return f"{constants.ENDPOINT} answers as no Hub does: check HF_ENDPOINT, or what stands between"
    return f"{hub_reason(error)}: check the connection, or try again later"

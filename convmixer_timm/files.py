"""Where this package keeps files, and how it writes them: whole or not at all."""

import atexit
import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import file_in_place_of, local_cause

__all__ = [
    "as_text",
    "atomic_path",
    "cache_dir",
    "cached_sha256",
    "files_below",
    "folder_beside",
    "private_dir",
    "sha256",
]


def cache_dir() -> Path:
    """The user's folder for what this package builds or downloads.

    Without a home directory (a bare user number in a container, say) a folder of this process's own.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convmixer-timm"
    except RuntimeError:
        return private_dir()


@functools.cache
def private_dir() -> Path:
    """A new folder of this process's own, gone when it ends."""
    # Never a name that somebody else could have put there before: what lies in it is run.
    folder = tempfile.mkdtemp(prefix="convmixer-timm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, which becomes `path` when the block ends well and vanishes when it fails.

    It may become a file or a folder; a folder that exists is replaced as a whole, by a folder only. Where it is a
    link, what it leads to is replaced. Several processes may do so at once: the last rename wins.
    """
    path = Path(os.path.realpath(path))
    with folder_beside(path) as folder:
        temporary = folder / path.name
        yield temporary
        # Some writers, safetensors for one, make files that nobody else can read, whatever the user's umask says.
        usual = folder / ".usual"
        usual.touch()
        for file in (temporary, *temporary.rglob("*")):
            if file.is_file() and not file.is_symlink():
                file.chmod(file.stat().st_mode | usual.stat().st_mode)
        if path.is_dir():
            if not temporary.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder: name a file to write", str(path))
            os.replace(path, folder / ".old")
        try:
            os.replace(temporary, path)
        except OSError:
            if (folder / ".old").exists():
                os.replace(folder / ".old", path)
            raise


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `path`, whose own folder is made where it isn't there.

    Raises:
        OSError: If it can't be written there; it names `path`, whatever the library that wrote raised, or the file that
            stands in a folder's place.
    """
    inside = str(path.parent / ".tmp-")
    if blocker := file_in_place_of(path.parent):
        raise NotADirectoryError(errno.ENOTDIR, "is a file, so nothing can be put below it", str(blocker))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as name:
            yield Path(name)
    except Exception as error:
        cause = None if isinstance(error, OSError) and error.errno is None else local_cause(error)
        named = cause and (cause.filename2 or cause.filename)
        if cause is None or (named and named != str(path.parent) and not os.fsdecode(named).startswith(inside)):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def files_below(folder: Path) -> dict[str, Path]:
    """The files of a folder and of those in it, by their path there, in order."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def as_text(name: str) -> str:
    """A file's name as text that UTF-8 can hold, whatever the locale: bytes that Python couldn't decode are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def cached_sha256(path: Path) -> str | None:
    """What the SHA-256 of a file in the Hub's cache should be: it calls a large file by that. None for other files."""
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

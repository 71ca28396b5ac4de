"""Types of the benchmarks' arguments, for argparse: a wrong one gets its line before anything is measured."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named_errors(parser: ArgumentParser) -> Iterator[None]:
    """Around the package's own reading of what was named: its errors say what is wrong, in a line."""
    from convmixer_timm.errors import one_line

    try:
        yield
    except (OSError, ValueError) as error:
        parser.error(one_line(error))


def known(kind: str, name: str, names: Iterable[str]) -> str:
    from convmixer_timm.errors import alike

    if name not in (names := list(names)):
        raise ArgumentTypeError(f"no {kind} {name!r}{alike(name, names)}")
    return name


def existing_folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise ArgumentTypeError(f"no folder {text}")
    return Path(text)


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise ArgumentTypeError(f"no file {text}")
    return Path(text)


def new_folder(text: str) -> Path:
    """One that isn't there yet, or empty: what is left of another split would be trained on."""
    path = Path(text)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArgumentTypeError(f"{text} is there already, and not empty: name another folder, or remove it first")
    return path


def new_file(text: str) -> Path:
    if not (path := Path(text)).parent.is_dir() or path.is_dir():
        raise ArgumentTypeError(f"can't be written: {text}")
    return path


def missing_folders(path: Path, *names: str) -> str:
    """What to say of a folder that lacks some of these; empty where it has them."""
    missing = [name for name in names if not (path / name).is_dir()]
    return f"{path} has no folder {' or '.join(missing)}" if missing else ""


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"a whole number of 1 or more, not {text!r}")
    return int(text)


def registered_model(text: str) -> str:
    """A registered name, with a tag or without."""
    import timm

    import convmixer_timm  # noqa: F401  registers the variants

    return pretrained_model(text) if "." in text else known("model", text, timm.list_models("convmixer*"))


def pretrained_model(text: str) -> str:
    """The name of a model's weights."""
    import timm

    import convmixer_timm  # noqa: F401  registers the variants

    return known("checkpoint", text, timm.list_pretrained("convmixer*"))


def optimizer_name(text: str) -> str:
    from timm.optim import list_optimizers

    return known("optimizer", text, list_optimizers())


def model_pixels_batch(text: str) -> tuple[str, int, int]:
    """Of MODEL:PIXELS:BATCH."""
    name, *numbers = text.split(":")
    if len(numbers) != 2:
        raise ArgumentTypeError(f"MODEL:PIXELS:BATCH, not {text!r}")
    pixels, batch = map(positive, numbers)
    return registered_model(name), pixels, batch

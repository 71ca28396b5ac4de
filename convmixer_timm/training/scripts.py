"""timm's scripts (train, validate, inference, benchmark, …), found and run with the ConvMixer variants registered.

They live at the top of timm's repository and are not in its wheel.
"""

import importlib
import os
import runpy
import sys
import urllib.error
import urllib.request
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from ..errors import alike, local_cause, local_reason, one_line
from ..files import atomic_path, cache_dir
from .compat import mend_cpu_ddp, mend_mixup_off, mend_safetensors, mend_saver, mend_summary
from .decoding import use_one_reader

__all__ = [
    "TRAINERS",
    "check_config",
    "find_script",
    "import_modules",
    "read_config",
    "run_script",
    "script_flags",
    "script_options",
]

REPOSITORY = "huggingface/pytorch-image-models"
BASE_URL = f"https://raw.githubusercontent.com/{REPOSITORY}"
# Scripts that train; the second is the first as it was before timm's training tasks.
TRAINERS = ("train", "legacy_train")


def find_script(name: str, folder: str | Path | None = None) -> Path:
    """The file of one of timm's scripts: from `folder`, else ``$TIMM_SCRIPTS``, else downloaded once.

    The download is the file of the installed timm's version tag, kept in the user's cache; a line on stderr says so.

    Args:
        name: 'train', 'validate', …, with or without '.py'.
        folder: A clone of timm's repository.

    Raises:
        FileNotFoundError: If the folder has no such script.
        ConnectionError: If it can't be downloaded; the message tells how to use a clone instead.
        OSError: If it can't be kept here: the disk is full, say.
    """
    import timm

    filename = f"{name.removesuffix('.py')}.py"
    folder = folder or os.environ.get("TIMM_SCRIPTS")
    if folder:
        path = Path(folder).expanduser() / filename
        if not path.is_file():
            found = ", ".join(sorted(p.stem for p in path.parent.glob("*.py"))) or "none"
            raise FileNotFoundError(f"No timm script {filename!r} in {path.parent} (scripts there: {found}).")
        return path
    tag = f"v{timm.__version__}"
    path = cache_dir() / "timm-scripts" / tag / filename
    if not path.exists():
        url = f"{BASE_URL}/{tag}/{filename}"
        print(f"Downloading {url} to {path}", file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=30) as response, atomic_path(path) as temporary:
                temporary.write_bytes(response.read())
        except (urllib.error.URLError, OSError) as error:
            if (local := local_cause(error)) is not None:
                raise OSError(local_reason(local, "XDG_CACHE_HOME")) from error
            reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else error
            raise ConnectionError(
                f"timm's {filename} could not be downloaded ({reason}). Clone https://github.com/{REPOSITORY} "
                "and name the clone with --timm-scripts DIR or in $TIMM_SCRIPTS."
            ) from error
    return path


def _module(path: Path) -> dict[str, Any]:
    """What a script defines, without running it."""
    return runpy.run_path(str(path), run_name=path.stem)


def script_options(path: Path, args: list[str]) -> Namespace | None:
    """A script's arguments as it will understand them itself, by its own parser; but no model where none is named.

    None where it has none of timm's form. What it can't understand ends the process with argparse's message.

    Raises:
        ImportError: If one of ``--device-modules`` can't be imported.
        ValueError: If what takes NAME=VALUE has none.
    """
    if "argparse" not in path.read_text(encoding="utf-8"):
        return None
    module = _module(path)
    argv, sys.argv = sys.argv, [str(path), *args]
    try:
        parser: Any = module.get("parser")
        if parser and "--model" in parser._option_string_actions:
            parser.set_defaults(model=None)
        if "_parse_args" in module:
            options = module["_parse_args"]()[0]
        elif parser:
            options = parser.parse_args()
        else:
            return None
    except ValueError as error:
        if "values to unpack" not in str(error):  # of timm's own splitting at the '='
            raise
        names = [action.option_strings[0] for action in parser._actions if isinstance(action, ParseKwargs)]
        raise ValueError(f"{' and '.join(names)} take NAME=VALUE") from error
    finally:
        sys.argv = argv
    import_modules(getattr(options, "device_modules", None))
    return options


def read_config(file: Path) -> dict[Any, Any]:
    """The settings of a ``--config`` file.

    Raises:
        ValueError: With one line, for what is no YAML of NAME: VALUE, or names something twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)  # which keeps a key that stands twice
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {one_line(error)}") from error
    if not isinstance(content, dict) or node is None:
        raise ValueError(f"{file} is no recipe: it has to hold lines of NAME: VALUE")
    names = Counter(key.value for key, _ in node.value)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{file} has {twice[0]} more than once: leave one")
    return content


def check_config(path: Path, file: Path, complete: bool = True) -> list[str]:
    """Looks at a ``--config`` file's settings, which the script's own parser takes as they come.

    Args:
        path: The script; of one without a parser of timm's form only the YAML is looked at.
        file: In YAML.
        complete: The script has to know every setting.

    Returns:
        A line for each setting that it doesn't know.

    Raises:
        ValueError: With one line, for such a setting, or a value of another type than the script takes.
    """
    settings = read_config(file)
    unknown: list[str] = []
    parser = _module(path).get("parser")
    if parser is None:
        return unknown
    options: dict[Any, Any] = {action.dest: action for action in parser._actions}
    for name, value in settings.items():
        if name not in options:
            meant = alike(str(name).replace("-", "_"), options)
            unknown.append(f"{file}: {path.name} has no setting {name!r}{meant}")
            if complete:
                raise ValueError(unknown[-1])
            continue
        option = options[name]
        switch, several = option.nargs == 0, option.nargs not in (None, 0, "?")
        if value is None and (option.default is None or (switch and not complete)):
            continue
        if switch:
            wanted, fits = "true or false", isinstance(value, bool)
        elif isinstance(option, ParseKwargs):
            wanted, fits = "lines of NAME: VALUE below it", isinstance(value, dict)
        elif several:
            number = option.type in (int, float)
            count = option.nargs if isinstance(option.nargs, int) else None
            wanted = " ".join(["a list of", *[str(count)] * bool(count), "numbers" if number else "texts"])
            fits = (
                isinstance(value, list | tuple)
                and count in (None, len(value))
                and not (number and any(isinstance(v, bool) or not isinstance(v, int | float) for v in value))
            )
        elif option.choices:
            wanted, fits = f"one of {', '.join(map(str, option.choices))}", value in option.choices
        elif option.type is int:
            wanted, fits = "a whole number", isinstance(value, int | str) and not isinstance(value, bool)
        elif option.type is float:
            wanted, fits = "a number", isinstance(value, int | float | str) and not isinstance(value, bool)
        else:
            wanted, fits = f"a text, '{value}'" if value is not None else "a text", isinstance(value, str)
        if not fits:
            raise ValueError(f"{file}: {name} has to be {wanted}, and is {'empty' if value is None else repr(value)}")
    return unknown


def import_modules(names: list[str] | None) -> None:
    """Imports what ``train.py`` was given as ``--device-modules``, which may register the model that it trains.

    Raises:
        ImportError: If one can't be imported.
    """
    for name in names or []:
        importlib.import_module(name)


def script_flags(path: Path) -> set[str]:
    """The options that a script's parser knows, '--model' for one."""
    return set(_module(path)["parser"]._option_string_actions)


def run_script(path: Path, args: list[str], image_mode: str | None = None) -> None:
    """Runs a script in this process as ``python path args…`` would, but without its folder on ``sys.path``.

    So a clone's own ``timm/`` doesn't take the place of the installed timm. What the script raises passes through,
    `SystemExit` and `KeyboardInterrupt` too.

    Args:
        path: The script.
        args: Its arguments.
        image_mode: Pillow's mode of its images, if it doesn't tell timm.
    """
    mend_cpu_ddp()
    mend_mixup_off()
    mend_safetensors()
    mend_saver()
    mend_summary()
    use_one_reader(training=path.stem in TRAINERS, mode=image_mode)
    sys.argv = [str(path), *args]
    runpy.run_path(str(path), run_name="__main__")

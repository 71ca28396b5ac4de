"""Building, caching and loading the kernels, and what glibc is told."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convmixer_timm import ConvMixer, files
from convmixer_timm.kernels import build, memory, operators

from .helpers import has_openmp, needs_compiler

LOADS = "from convmixer_timm.kernels.build import library; assert library() is not None"


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture
def fresh():
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", 'g++ "'])
def test_a_failed_build_is_a_warning_that_says_what_to_do(fresh, monkeypatch, tmp_path, caplog, compiler):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert not build.available()
    (record,) = caplog.records
    assert "Install g++" in record.message and compiler in record.message and "\n" not in record.message
    assert not list((tmp_path / "convmixer-timm").iterdir())
    ConvMixer(32, 1, 3, 2)(torch.randn(2, 3, 8, 8)).sum().backward()
    x, c = torch.randn(2, 32, 4, 4), torch.ones(32)
    with pytest.raises(RuntimeError, match="could not be built"):
        operators.act_norm(x, None, c, c, True, 1e-5)


def test_where_no_compiler_would_help_nothing_is_warned_of(fresh, monkeypatch, caplog):
    monkeypatch.setattr(sys, "platform", "darwin")
    with caplog.at_level("INFO"):
        assert not build.available()
    (record,) = caplog.records
    assert record.levelname == "INFO" and "Linux" in record.message


@pytest.fixture(scope="module")
def library_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    python(LOADS, XDG_CACHE_HOME=str(folder))
    (built,) = (folder / "convmixer-timm").iterdir()
    return built


BUILDS = """
import sys
from pathlib import Path
from convmixer_timm.kernels import build
build._FLAGS = [flag.replace("-O3", "-O0") for flag in build._FLAGS]  # quick to build, and nothing runs it
for file in map(Path, sys.argv[1:]):
    build._load(file, "c++")
    assert file.is_file() and build._is_whole(file), file
"""


@needs_compiler
def test_a_damaged_cache_is_built_anew(library_file, tmp_path):
    content = library_file.read_bytes()
    wrong = bytearray(content)
    wrong[len(wrong) // 2] ^= 1
    foreign = bytearray(content[:-32])
    foreign[18:20] = (183).to_bytes(2, "little")  # e_machine: AArch64
    damaged = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "a flipped bit": wrong,
        "another machine's": foreign + build.hashlib.sha256(foreign).digest(),
    }
    for name, damage in damaged.items():
        (tmp_path / name).write_bytes(damage)
    (tmp_path / "folder").mkdir()
    (tmp_path / "whole").write_bytes(content)
    subprocess.run([sys.executable, "-c", BUILDS, *sorted(tmp_path.iterdir())], check=True)
    assert (tmp_path / "whole").read_bytes() == content
    assert all((tmp_path / name).read_bytes() not in (damage, content) for name, damage in damaged.items())


@needs_compiler
def test_what_was_built_needs_no_compiler_any_more(library_file, tmp_path):
    (tmp_path / "convmixer-timm").mkdir()
    (tmp_path / "convmixer-timm" / library_file.name).write_bytes(library_file.read_bytes())
    python(LOADS, XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))


@pytest.mark.skipif(not (shutil.which("clang++") and has_openmp("clang++")), reason="no Clang with OpenMP")
def test_clang_builds_it_too(tmp_path):
    python(LOADS, XDG_CACHE_HOME=str(tmp_path), CXX="clang++")


@needs_compiler
def test_a_compiler_may_have_a_space_in_its_name_or_arguments(tmp_path):
    own = tmp_path / "my compiler"
    own.write_text('#!/bin/sh\nexec c++ "$@"\n')
    own.chmod(0o755)
    for compiler in (str(own), "c++ -g0"):
        python(LOADS, XDG_CACHE_HOME=str(tmp_path), CXX=compiler)


EVALUATES = """
import torch
from convmixer_timm import ConvMixer
with torch.no_grad():
    ConvMixer(32, 1, 3, 2).eval()(torch.randn(2, 3, 8, 8))
"""


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").touch()  # no folder can be made below it, whoever runs this
    for code in (LOADS, EVALUATES):
        python(code, XDG_CACHE_HOME=str(tmp_path / "file"))


@needs_compiler
def test_a_full_cache_is_done_without(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "private_dir", lambda: tmp_path)
    monkeypatch.setattr(build, "_FLAGS", [flag.replace("-O3", "-O0") for flag in build._FLAGS])
    original = build.atomic_path

    @contextlib.contextmanager
    def atomic_path(path):
        with original(path) as temporary:
            yield temporary if path.parent == tmp_path else Path("/dev/full")

    monkeypatch.setattr(build, "atomic_path", atomic_path)
    assert build.library() is not None
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [build._name()]


CHECKPOINTS = """
import timm, torch
import convmixer_timm
from torch.utils.checkpoint import checkpoint
model = timm.create_model("convmixer_128_4")
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.eval()
x = model.stem(torch.randn(8, 3, 32, 32))
for block in model.blocks:
    x = checkpoint(block, x, use_reentrant=False)
model.forward_head(x).sum().backward()
assert convmixer_timm.kernels.build.library.cache_info().currsize
"""


@needs_compiler
def test_layers_under_a_checkpoint_go_one_way_from_the_first_step_on(tmp_path):
    """Also where every norm is frozen, so that it is the backward pass that needs the kernels first."""
    python(CHECKPOINTS, XDG_CACHE_HOME=str(tmp_path))


def test_without_a_home_directory_it_builds_in_a_folder_of_its_own(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    folder = files.cache_dir()
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    assert folder == files.cache_dir()


# ---- the allocator ----

TELLS = """
import ctypes, torch
from convmixer_timm import ConvMixer, set_fast_training
from convmixer_timm.kernels import memory
ConvMixer(32, 1, 3, 2)(torch.randn(2, 3, 8, 8)).sum().backward()
print(memory._tell_glibc.cache_info().currsize and memory.keep_freed())
"""


@pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="no glibc")
@pytest.mark.parametrize(
    "environment, told",
    [
        ({}, "True"),
        ({"CONVMIXER_TIMM_FAST": "0"}, "0"),
        ({"MALLOC_TRIM_THRESHOLD_": "100000"}, "False"),
        ({"MALLOC_TOP_PAD_": "100000"}, "False"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=1"}, "False"),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=1"}, "True"),
    ],
)
def test_glibc_is_told_at_the_first_step_unless_the_user_chose(environment, told):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD", "CONVMIXER"))}
    out = subprocess.run(
        [sys.executable, "-c", TELLS], check=True, capture_output=True, text=True, env={**clean, **environment}
    )
    assert out.stdout.strip() == told


def test_another_allocator_is_left_alone():
    assert memory._chosen({"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"})
    assert memory._chosen({"LD_PRELOAD": "/usr/lib/libjemalloc.so"})
    assert not memory._chosen({"LD_PRELOAD": "/usr/lib/libiomp5.so"})


PAGE_FAULTS = """
import resource, sys, torch
from convmixer_timm import ConvMixer, set_fast_training
set_fast_training(sys.argv[1] == "on")
model, x = ConvMixer(64, 2, 5, 2), torch.randn(64, 3, 32, 32)
faults = []
for step in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(x).sum().backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[3:]))  # the heap may still grow once
"""


@pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="no glibc")
def test_a_later_step_gets_no_new_memory():
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD", "CONVMIXER"))}
    faults = {
        switch: int(subprocess.check_output([sys.executable, "-c", PAGE_FAULTS, switch], env=clean, text=True))
        for switch in ("on", "off")
    }
    assert faults["on"] < 200 < faults["off"]

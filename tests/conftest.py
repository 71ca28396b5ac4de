import os
import sys
from pathlib import Path

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before PyTorch: threads that wait for a busy core spin
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import convmixer_timm  # noqa: F401  registers the variants

IMAGES = Path(__file__).parent / "images"


def torchrun(processes: int) -> list[str]:
    """The launcher on a port that nobody else uses."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


@pytest.fixture
def cifar_images() -> list[tuple[Path, str]]:
    """30 CIFAR-10 test images, three a class, with their labels."""
    return [(path, path.parent.name) for path in sorted(IMAGES.glob("*/*.png"))]


@pytest.fixture(scope="session")
def timm_scripts() -> Path:
    """A clone of timm's repository: timm's own scripts are not in its wheel."""
    folder = os.environ.get("TIMM_SCRIPTS")
    if not folder:
        pytest.skip("set TIMM_SCRIPTS to a clone of huggingface/pytorch-image-models")
    return Path(folder)

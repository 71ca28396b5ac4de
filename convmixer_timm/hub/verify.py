"""Checks checkpoint files against what was recorded of them: their hash, their parameters, their logits."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import timm
import torch
from huggingface_hub import CacheNotFound, constants, scan_cache_dir, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from ..checkpoints import checkpoint_filter_fn, not_finite, read_checkpoint
from ..convmixer import WEIGHTS_DIR
from ..errors import one_line
from ..files import cached_sha256, sha256
from ..images import image_loader
from ..inference.loading import load_folder

__all__ = ["checkpoint_file", "record", "verifiable", "verify", "verify_all"]

MANIFEST = WEIGHTS_DIR / "manifest.json"
IMAGES = WEIGHTS_DIR / "images"
TOLERANCE = 1e-3  # of logits, between machines; another checkpoint's differ by whole units


def checkpoint_file(name: str) -> Path | None:
    """The local file of a registered checkpoint: bundled, or in the Hub's cache; None where there is none."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    assert cfg is not None
    if cfg.file:
        return Path(cfg.file)
    cached = try_to_load_from_cache(str(cfg.hf_hub_id), "model.safetensors")
    return Path(cached) if isinstance(cached, str) else None


def _cached_from_hub() -> dict[str, Path]:
    """Everybody's ConvMixers in the Hub's cache, by ``hf-hub:OWNER/NAME[@REVISION]``."""
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return {}
    except ValueError as error:
        raise ValueError(f"HF_HUB_CACHE is {constants.HF_HUB_CACHE}, which is no folder: set it to one") from error
    found = {}
    models = [repo for repo in repos if repo.repo_type == "model"]
    for repo in sorted(models, key=lambda repo: repo.repo_id):
        for revision in repo.revisions:
            files = {file.file_name: Path(file.file_path) for file in revision.files}
            if "config.json" not in files or "model.safetensors" not in files:
                continue
            config = _read_json(files["config.json"])
            ours = str(config.get("architecture")).startswith("convmixer")
            if not (ours if config else _is_convmixer(files["model.safetensors"])):
                continue
            ref = "main" if "main" in revision.refs else next(iter(sorted(revision.refs)), revision.commit_hash)
            found[f"hf-hub:{repo.repo_id}" + (f"@{ref}" if ref != "main" else "")] = files["model.safetensors"]
    return found


def _is_convmixer(weights: Path) -> bool:
    """Whether weights whose description can't be read are a ConvMixer's, by their names."""
    try:
        with safe_open(weights, "pt") as tensors:
            return "blocks.0.0.fn.0.weight" in tensors.keys()  # noqa: SIM118  it is no dict
    except (OSError, SafetensorError):
        return False


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def verifiable() -> dict[str, Path]:
    """ConvMixer checkpoints on this machine, with their files: of registered names, and others in the Hub's cache."""
    registered = {name: checkpoint_file(name) for name in timm.list_pretrained("convmixer*")}
    return {name: file for name, file in registered.items() if file} | _cached_from_hub()


def _manifest() -> dict[str, dict]:
    return json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.exists() else {}


def _logits(model) -> list[list[float]]:
    load = image_loader(model)
    batch = torch.stack([load(path) for path in sorted(IMAGES.glob("*.png"))])
    with torch.inference_mode():
        return model.eval()(batch).tolist()


def verify(name: str, files: dict[str, Path] | None = None) -> None:
    """Checks one checkpoint that is on this machine.

    Args:
        name: A name from `verifiable`.
        files: What that gave, so as not to look for them again.

    Raises:
        ValueError: If there is no such checkpoint here, or it is not what was recorded; the message tells what differs.
    """
    files = verifiable() if files is None else files
    if name not in files:
        raise ValueError(f"no such checkpoint on this machine; there are: {', '.join(files)}")
    file = files[name]
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    recorded = _manifest().get(name)
    if not recorded and file.is_relative_to(WEIGHTS_DIR):
        raise ValueError(f"{name} is bundled, and the manifest doesn't know it")
    expected = recorded["sha256"] if recorded else cached_sha256(file)
    found = sha256(file)
    if expected is not None and found != expected:  # a cache without links doesn't tell its files' hashes
        raise ValueError(f"{file} has SHA-256 {found}, not {expected}: it is damaged or another file")
    model = load_folder(file.parent) if name.startswith("hf-hub:") else timm.create_model(name)
    state_dict = checkpoint_filter_fn(read_checkpoint(file), model)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"{file} doesn't fit {name}: {error}") from error
    if infinite := not_finite(state_dict):
        raise ValueError(f"{file} has values that are not finite in {', '.join(infinite)}")
    if recorded:
        difference = (torch.tensor(_logits(model)) - torch.tensor(recorded["logits"])).abs().max().item()
        if not difference < TOLERANCE:
            raise ValueError(f"{name}'s logits differ from the recorded ones by {difference:.2g}")


def verify_all(names: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """Checks the named checkpoints, by default all on this machine: each name with what is wrong, or nothing."""
    files = verifiable()
    for name in names or files:
        try:
            verify(name, files)
            yield name, ""
        except (OSError, ValueError) as error:
            yield name, one_line(error)


def record(names: Iterable[str]) -> None:
    """Writes hash and logits of bundled checkpoints to the manifest, for `verify` to compare with from now on."""
    manifest = _manifest()
    for name in names:
        file = WEIGHTS_DIR / name / "model.safetensors"
        model = timm.create_model(name)
        model.load_state_dict(checkpoint_filter_fn(read_checkpoint(file), model))
        logits = [[round(v, 4) for v in row] for row in _logits(model)]
        manifest[name] = {"sha256": sha256(file), "logits": logits}
    MANIFEST.write_text(json.dumps(dict(sorted(manifest.items())), indent=1) + "\n", encoding="utf-8")

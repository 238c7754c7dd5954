"""Checkpoints: tensors in safetensors, the rest in JSON, in a folder that is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fallline.errors import RunDirectoryError

TENSORS = "tensors.safetensors"
STATE = "state.json"


def write(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint folder, replacing the one of that name only once the new one is complete.

    It is written beside its place and moved there by renaming. Should the process die between the two renamings of a
    replacement, `read` finds the complete old one.

    Raises:
        RunDirectoryError: when the disk is full or the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            safetensors.torch.save_file(own, temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(state, indent=1))
            for path in (temporary / TENSORS, temporary / STATE):
                _to_disk(path)
            old = _old(folder)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(f"the checkpoint {folder} could not be written: {_reason(error)}.") from error


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the state of a checkpoint, or None where there is none.

    Raises:
        RunDirectoryError: when the folder is there but is not a checkpoint.
    """
    place = folder if folder.exists() else _old(folder)
    if not place.exists():
        return None
    try:
        # Copies lie where torch puts tensors; from other addresses its products round differently.
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(place / TENSORS).items()}
        return tensors, json.loads((place / STATE).read_text())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(f"{place} is not a checkpoint that can be read: {_reason(error)}.") from error


def remove(folder: Path) -> None:
    """Deletes a checkpoint, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(_old(folder), ignore_errors=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all: to a temporary name, to disk, then renamed.

    Raises:
        RunDirectoryError: when the disk is full or the folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            temporary.write_bytes(data)
            _to_disk(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{path} could not be written: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """What the system said, without its number."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-old")


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

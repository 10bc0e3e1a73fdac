"""Weights on disk: safetensors, one metadata key, the same bytes for the same weights and description."""
# torch is imported when a tensor is touched, so that ``read_description`` stays cheap.

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altopt.errors import ArtifactError
from cache.files import atomic_path, canonical_json, file_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Header = dict[str, dict[str, Any]]  # of a tensor: dtype, shape and data_offsets
METADATA_KEY = "altopt"
MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors format
WRAPPERS = ("state_dict", "model")  # where training programs put the weights beside their epoch and optimizer
DTYPES = {
    **{f"float{bits}": f"F{bits}" for bits in (64, 32, 16)},
    **{f"int{bits}": f"I{bits}" for bits in (64, 32, 16, 8)},
    **{"bfloat16": "BF16", "uint8": "U8", "bool": "BOOL"},
}


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, object]) -> None:
    """Write ``tensors`` and the JSON-able ``description`` to ``path``, whole or not at all.

    Raises ResourceError when there is no room, TypeError for a dtype outside ``DTYPES``.
    """
    # Written here: safetensors' ``save_file`` goes through a random temporary name, which a killed process leaves
    # behind, and ``save`` through a second copy of the weights. The bytes depend on names, values and description
    # alone, not on the order or the device of the tensors.
    # Wide types first, which keeps every tensor aligned; safetensors does the same.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: Header = {"__metadata__": {METADATA_KEY: canonical_json(description)}}
    end = 0
    for name in names:
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {dtype}, which a checkpoint cannot hold")
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = canonical_json(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(raw_bytes(tensors[name]).data)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the description, which is empty in a safetensors file of other origin.

    Raises ArtifactError when the file is missing, cut short or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = read_description(path)
    try:
        return load_file(path), description
    except OSError as error:
        raise file_error(path, error, "read") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise _corrupt(path, str(error)) from error


def read_description(path: Path) -> dict[str, Any]:
    """Return the description of a checkpoint from its header alone; empty when it has none. Errors: load_checkpoint."""
    try:
        header, _ = read_header(path)
        description = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
    except OSError as error:
        raise file_error(path, error, "read") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON as expected, {error}") from error
    if not isinstance(description, dict):
        raise _corrupt(path, "its description is not a mapping")
    return description


def read_header(path: Path) -> tuple[Header, int]:
    """Return the header of a safetensors file, and where its values begin; ValueError when it cannot be one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("it begins like no such file")
        return json.loads(file.read(length)), 8 + length


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the weights in ``path``, on the CPU: a safetensors file by its suffix, else what ``torch.save`` wrote.

    A file that holds its weights under "state_dict" or "model" is unwrapped. Nothing but tensors is unpickled: a file
    that would run code is refused with ArtifactError, and so is one that is missing, corrupt or holds no weights.
    """
    if path.suffix == ".safetensors":
        return load_checkpoint(path)[0]
    import torch

    try:
        path.open("rb").close()
    except OSError as error:
        raise file_error(path, error, "read") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # about formats, beside the errors that follow
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        cause = "it holds other objects than tensors, or is corrupt, and reading those could run code"
        remedy = "save model.state_dict() and bring that, or a .safetensors file"
        raise ArtifactError(f"{path} is refused: {cause}: {remedy}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise _corrupt(path, str(error)) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ArtifactError(f"{path} holds no weights by name: save model.state_dict() and bring that")
    other = next((name for name, value in content.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise ArtifactError(f"{path} holds {other!r}, which is not a tensor: save model.state_dict() and bring that")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes; neither order, device nor strides matter."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hasher.update(raw_bytes(tensor).data)
    return hasher.hexdigest()


def first_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """Return in words the first tensor, in the order of ``a``, that is not bit-equal in ``b``; None when all are."""
    # By their bytes: equal NaNs are equal, 0.0 and -0.0 are not.
    for name, tensor in a.items():
        words = _difference(tensor, b[name]) if name in b else "is missing on the other side"
        if words:
            return f"{name} {words}"
    extra = next((name for name in b if name not in a), None)
    return f"{extra} exists on the other side only" if extra is not None else None


def raw_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the values of a tensor in row-major order as uint8 [bytes]; no copy when they lie so on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _difference(a: Tensor, b: Tensor) -> str | None:
    if a.dtype != b.dtype:
        return f"has dtype {a.dtype}, and {b.dtype} on the other side".replace("torch.", "")
    if a.shape != b.shape:
        return f"has shape {tuple(a.shape)}, and {tuple(b.shape)} on the other side"
    unequal = (raw_bytes(a) != raw_bytes(b)).reshape(-1, max(a.element_size(), 1)).any(axis=1)
    if not unequal.any():
        return None
    apart = (a.detach().cpu().double() - b.detach().cpu().double()).abs().flatten()
    finite = apart[apart.isfinite()]
    largest = finite.max().item() if len(finite) else float("nan")
    return f"differs in {unequal.sum()} of {a.numel()} values, by at most {largest:.3g}"


def _corrupt(path: Path, cause: str) -> ArtifactError:
    words = " ".join(cause.split())[:200]
    return ArtifactError(f"{path} is corrupt or not a checkpoint ({words}): make it again, or bring a whole copy")

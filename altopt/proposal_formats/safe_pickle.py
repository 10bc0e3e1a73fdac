"""Pickles of numpy arrays and plain containers, read without executing anything.

A pickle is a program: it may call whatever it can name. Here it can name only what stands in ``ADMITTED``, and what it
gets are stand-ins that remember their arguments; numpy itself sees the bytes when all is read. Everything else is
refused by name. Protocols 0 to 5, of Python 3 and of Python 2.
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from altopt.errors import ArtifactError

PLAIN = re.compile(r"[<>=|]?([biuf][1-8]|[US]\d{1,4})")  # numbers, and texts for ids
DEPTH = 8  # of containers in containers; a list of arrays needs two
REMEDY = "save it again as plain numpy arrays, lists and dicts, or as json or HDF5"


class _Dtype:
    """A type of numbers or texts; ``code`` is numpy's, "O" for any object, None for what is not plain."""

    def __init__(self, code: object, *_: object) -> None:
        text = _text(code)
        self.code = "O" if text in ("O", "O4", "O8") else text if PLAIN.fullmatch(text) else None

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if self.code not in (None, "O"):
            self.code = _text(state[1]).replace("|", "") + str(self.code).lstrip("<>=|")

    def read(self, raw: object, shape: tuple[int, ...]) -> NDArray[np.generic]:
        if self.code in (None, "O"):
            raise ValueError("an array of neither numbers nor texts")
        if not isinstance(raw, str | bytes | bytearray | pickle.PickleBuffer):
            raise ValueError(f"a {type(raw).__name__} in place of bytes")
        # Python 2 wrote raw bytes as its str, which arrives as latin1 text.
        content = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        return np.frombuffer(content, np.dtype(self.code), count=math.prod(shape))


class _Array:
    """An array whose state is remembered, not applied."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()  # as the pickle has it: numpy looks at it when all is read

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.state = state

    def read(self) -> NDArray[np.generic] | list[object]:
        """Return the array; one of objects as the flat list of what it holds."""
        _, shape, dtype, fortran, raw = self.state
        if dtype.code == "O":
            if not isinstance(raw, list):
                raise ValueError("an array of objects made of bytes")
            return raw
        values: NDArray[np.generic] = dtype.read(raw, shape)
        return values.reshape(shape, order="F" if fortran else "C")


class _Scalar:
    def __init__(self, dtype: _Dtype, raw: object) -> None:
        self.dtype, self.raw = dtype, raw

    def read(self) -> object:
        return self.dtype.read(self.raw, (1,))[0].item()


def _from_buffer(raw: object, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    """Stand for numpy's way of protocol 5."""
    array = _Array()
    array.state = (1, shape, dtype, _text(order) == "F", raw)
    return array


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand for ``_codecs.encode``, by which Python 3 writes bytes into old protocols."""
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding}")
    return text.encode("latin1")


class _Named:
    """What the pickle gets for a name: it can be called, and has nothing that the pickle could change."""

    __slots__ = ("_function",)
    _function: Callable[..., object]

    def __init__(self, function: Callable[..., object]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: object) -> None:
        raise ValueError(f"an attribute {name} for a function")

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)


NUMPY: dict[str, Callable[..., object]] = {
    "multiarray _reconstruct": _Array, "multiarray scalar": _Scalar, "numeric _frombuffer": _from_buffer,
}
ADMITTED: dict[str, Callable[..., object]] = {
    **{f"{core}.{name}": stand_in for core in ("numpy.core", "numpy._core") for name, stand_in in NUMPY.items()},
    "numpy ndarray": _Array,
    "numpy dtype": _Dtype,
    "_codecs encode": _encode,
    "collections OrderedDict": dict,
    "__builtin__ bytes": lambda: b"",  # how old protocols spell it; called with a size, bytes would fill the memory
    "builtins bytes": lambda: b"",
    "detectron2.structures.boxes BoxMode": lambda value: int(value),
}


class _ForbiddenError(Exception):
    """The name that a pickle asked for."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Named:
        if f"{module} {name}" not in ADMITTED:
            raise _ForbiddenError(f"{module}.{name}")
        return _Named(ADMITTED[f"{module} {name}"])


def load_pickle(path: Path) -> object:
    """Return what a pickle holds: arrays of numbers, numbers, texts and None in lists, tuples and dicts.

    Raises ArtifactError when it names anything else, cannot be read or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _plain(_Unpickler(file, encoding="latin1").load(), DEPTH, {})
    except _ForbiddenError as error:
        name = str(error).encode("ascii", "backslashreplace").decode()
        raise ArtifactError(f"{path} is not read: it asks to run {name[:100]!r}, and proposals need nothing but "
                            f"arrays and containers: {REMEDY}") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can lead to any
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtifactError(f"{path} is not a pickle of arrays, or is damaged ({cause}): {REMEDY}") from error


def _plain(value: object, depth: int, known: dict[int, object]) -> object:
    """Return the value with arrays and numbers in place of their stand-ins."""
    if depth == 0:
        raise ValueError(f"containers more than {DEPTH} deep")
    if value is None or isinstance(value, str | bytes | int | float):
        return value
    if id(value) not in known:  # what occurs twice is made once: nested lists could else grow without end
        made = value.read() if isinstance(value, _Array | _Scalar) else value
        if isinstance(made, dict):
            made = {_plain(key, depth - 1, known): _plain(each, depth - 1, known) for key, each in made.items()}
        elif isinstance(made, list | tuple):
            made = [_plain(each, depth - 1, known) for each in made]
        elif made is value:
            raise ValueError(f"a {type(value).__name__.strip('_').lower()} in place of numbers")
        known[id(value)] = made
    return known[id(value)]


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)

"""What torch's files may hold beside tensors: values that mean nothing but themselves. Nothing else is unpickled.

torch.load with `weights_only` calls what is listed here and no more. Some stand-ins are simpler than what was pickled:
paths touch no file system, a defaultdict is a dict.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import pickletools
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import IO, Any

import numpy as np
import torch

from graftwork.models.checkpoints.errors import UnfitCheckpoint

LFS = b"version https://git-lfs.github.com/"
NO_TENSORS = "holds no tensors in torch's format"
GLOBAL = r"[A-Za-z_][\w.]*\.\w+"  # module and name; in text taken for a pickle, hardly ever
CONVERT = (
    "tensors, numbers, text and paths; if you trust the file, save its state dict alone: "
    "torch.save(torch.load(FILE, weights_only=False)[NAME], NEW_FILE)"
)


class _Mapping:
    """Makes a plain dict of a pickled subclass of it."""

    def __new__(cls, *_: object) -> Any:
        return {}


class _Text:
    """Makes plain text of a pickled subclass of it."""

    def __new__(cls, text: str = "") -> Any:
        return text


def _sequence(items: tuple[Any, ...] = (), *_: object) -> list[Any]:
    """Return what a pickled deque begins as."""
    return list(items)


def _harmless() -> Iterator[tuple[Any, str]]:
    """Yield what a pickle may name, with the names that it has there."""
    for value in (argparse.Namespace, types.SimpleNamespace, decimal.Decimal):
        yield value, f"{value.__module__}.{value.__name__}"
    for moment in (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone):
        yield moment, f"datetime.{moment.__name__}"
    for builtin in (bool, int, float, str, bytes, tuple, list, dict, frozenset, slice):
        yield builtin, f"builtins.{builtin.__name__}"
    yield _Mapping, "collections.defaultdict"
    yield _sequence, "collections.deque"
    for module in ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "pytorch_lightning.utilities"):
        yield _Mapping, f"{module}.AttributeDict"
    yield _Mapping, "pytorch_lightning.utilities.parsing.AttributeDict"
    yield _Text, "torch.torch_version.TorchVersion"
    for module in ("pathlib", "pathlib._local"):  # the second: Python 3.13
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath"):
            yield PurePosixPath, f"{module}.{name}"
        for name in ("WindowsPath", "PureWindowsPath"):
            yield PureWindowsPath, f"{module}.{name}"
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # NumPy 2, and before
        yield np.float64(0).__reduce__()[0], f"{module}.scalar"
        yield np.zeros(0).__reduce__()[0], f"{module}._reconstruct"
    yield np.ndarray, "numpy.ndarray"
    yield np.dtype, "numpy.dtype"
    for name in np.dtypes.__all__:
        yield getattr(np.dtypes, name), f"numpy.dtypes.{name}"


HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = list(_harmless())


def read_torch(path: Path) -> Any:
    """Return what torch.save wrote, of tensors and HARMLESS values; tensors are mapped, not read.

    Raises UnfitCheckpoint for any other pickle, of which nothing is run.
    """
    require_content(path)
    try:
        mappable = zipfile.is_zipfile(path)  # torch's format since 1.6
        if mappable and _inflates(path):
            raise UnfitCheckpoint(f"{path}: refused, it is compressed, which torch's files are not")
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except UnpicklingError as error:
        name = _refused_global(path, str(error))
        if name is None:
            raise UnfitCheckpoint(f"{path}: {NO_TENSORS}") from None
        # A library's class may be harmless where it comes from; the standard library's functions are not, in a file.
        accepted = "" if name.split(".")[0] in sys.stdlib_module_names else CONVERT
        raise UnfitCheckpoint(f"{path}: refused, unpickling it would call {name}", accepted) from None
    except UnfitCheckpoint:
        raise
    except (RuntimeError, OSError) as error:  # the two that say what is wrong
        raise UnfitCheckpoint(f"{path}: cannot be read as tensors: {first_line(error)}") from None
    except Exception:  # text or noise, taken for a pickle, raises whatever its bytes happen to stand for
        raise UnfitCheckpoint(f"{path}: {NO_TENSORS}") from None


def require_content(path: Path) -> None:
    """Raise UnfitCheckpoint for what Git LFS leaves in a clone in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UnfitCheckpoint(f"{path}: is Git LFS's pointer to a file", "the file, which git lfs pull fetches")


def _inflates(path: Path) -> bool:
    """Whether a zip file holds more than it has bytes."""
    with zipfile.ZipFile(path) as file:
        parts = file.infolist()
    return any(part.compress_type != zipfile.ZIP_STORED for part in parts) or (
        sum(part.file_size for part in parts) > path.stat().st_size
    )


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _refused_global(path: Path, message: str) -> str | None:
    """What torch would not call: named in its message, or in a pickle too new for it."""
    if found := re.search(rf"GLOBAL ({GLOBAL})", message):
        return found[1]
    known = {"collections.OrderedDict", *(one[1] for one in HARMLESS if isinstance(one, tuple))}
    with _pickle(path) as file:
        names = (name for name in _globals(file) if re.fullmatch(GLOBAL, name))
        plain = ("torch._utils.", "torch.storage.", "torch.serialization.")
        unknown = (name for name in names if name not in known and not name.startswith(plain))
        return next((name for name in unknown if not re.fullmatch(r"torch\.\w+", name)), None)


def _pickle(path: Path) -> IO[bytes]:
    """Return the pickle of a torch file: the file itself, or what its archive calls data.pkl."""
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    archive = zipfile.ZipFile(path)
    return archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _globals(file: IO[bytes]) -> Iterator[str]:
    """The globals that a pickle names, in order; it is looked at, not run."""
    strings: list[str] = []  # as pushed; the last two are what STACK_GLOBAL takes
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                yield ".".join(str(argument).rsplit(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else ""
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                strings.append(memo.get(int(str(argument)), ""))
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, OverflowError, MemoryError):  # no pickle, or the end of a torn one
        return

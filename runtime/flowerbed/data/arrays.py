"""Turn rows of a data set into named arrays: by the app's function, or column by column."""

import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerbed.data.plan import AppArrays, DataError

Arrays = dict[str, NDArray[Any]]
Convert = Callable[[Any], Arrays]
"""A `datasets.Dataset` to its arrays."""

_BATCH = 1024
_KEPT_MODES = ("L", "LA", "RGB", "RGBA", "I", "I;16", "F")
"""Modes of Pillow whose pixels are values. Black-and-white images become grey, all others RGB."""


class _UnfitError(Exception):
    """Values that do not make an array; the message is the reason."""


# --- column by column --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """What each value of a column must be, as the first example of the data set is."""

    image: bool
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def convert_columns(train: Any, left_out: str = "") -> Convert:
    """Make each column an array of its name: numbers, lists of one length, images of one size.

    Shape and type are those of the first example of `train`, so that they are the same on every
    device.

    Args:
        train: the whole training split.
        left_out: a column that is left out where it holds no numbers (a natural id).

    Raises:
        DataError: a column cannot become an array.
    """
    from datasets import Image

    columns: dict[str, _Column] = {}
    for name, kind in train.features.items():
        image = isinstance(kind, Image)
        try:
            first = _read(train.select([0]), name, image=image)[0]
        except _UnfitError as error:
            if name == left_out:
                continue
            raise _unfit(name, error) from None
        columns[name] = _Column(image, first.dtype, first.shape)

    def convert(dataset: Any) -> Arrays:
        arrays = {}
        for name, column in columns.items():
            try:
                arrays[name] = _convert(dataset, name, column)
            except _UnfitError as error:
                raise _unfit(name, error) from None
        return arrays

    return convert


def _unfit(name: str, error: _UnfitError) -> DataError:
    return DataError(
        f"the column {name} cannot become an array: {error}. Write a function that turns a Dataset "
        "into named arrays, and name it in the app's pyproject.toml: [tool.flowerbed] arrays = "
        '"package.module:function"'
    )


def _convert(dataset: Any, name: str, column: _Column) -> NDArray[Any]:
    result = np.empty((len(dataset), *column.shape), column.dtype)
    for start in range(0, len(dataset), _BATCH):
        rows = dataset.select(range(start, min(start + _BATCH, len(dataset))))
        values = _read(rows, name, image=column.image)
        if values.shape[1:] != column.shape or values.dtype != column.dtype:
            raise _UnfitError(_differ(values.dtype, values.shape[1:], column.dtype, column.shape))
        result[start : start + len(values)] = values
    return result


def _differ(*found: Any) -> str:
    dtype, shape, first_dtype, first_shape = found
    return (
        f"its values differ in shape or type ({dtype} {shape}, and {first_dtype} {first_shape} in "
        "the first example)"
    )


def _read(rows: Any, name: str, *, image: bool) -> NDArray[Any]:
    """Some rows of one column."""
    rows = rows.select_columns([name])
    if image:
        return _pixels(rows[:][name])
    return _dense(rows.with_format("arrow")[:].column(name).combine_chunks())


def _pixels(pictures: list[Any]) -> NDArray[Any]:
    """Images of one size and mode: (n, height, width), or (n, height, width, channels)."""
    pixels = []
    for picture in pictures:
        if picture is None:
            raise _UnfitError("an image is missing")
        if picture.mode not in _KEPT_MODES:
            picture = picture.convert("L" if picture.mode == "1" else "RGB")  # noqa: PLW2901
        pixels.append(np.asarray(picture))
        first, last = pixels[0], pixels[-1]
        if (first.shape, first.dtype) != (last.shape, last.dtype):
            raise _UnfitError(_differ(last.dtype, last.shape, first.dtype, first.shape))
    return np.stack(pixels)


def _dense(column: Any) -> NDArray[Any]:
    """An Arrow array of numbers, or of lists of one length, however deep."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.storage if isinstance(column.type, pa.ExtensionType) else column
    shape = [len(values)]
    while not values.null_count and _is_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) > 1:
            raise _UnfitError(f"its lists have unequal lengths ({lengths[0]} and {lengths[1]})")
        shape.append(lengths[0])
        values = values.flatten()
    kind = values.type
    if values.null_count:
        raise _UnfitError("it has missing values")
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise _UnfitError(f"it holds {kind}")
    dense: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(shape)
    return dense


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    is_list: bool = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    return is_list


# --- the app's function ------------------------------------------------------------------------


def convert_by_app(app: AppArrays) -> tuple[Convert, str]:
    """Import the app's function.

    Returns:
        The function, its result checked, and a hash of the app's modules that it was loaded from.

    Raises:
        DataError: it cannot be imported; when it is called: it fails, or its result is no
            dictionary of named arrays of the same first dimension.
    """
    where = f"[tool.flowerbed] arrays = {app.arrays!r} in the app's pyproject.toml"
    sys.path.insert(0, app.directory)
    importlib.invalidate_caches()
    module, _, name = app.arrays.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        traceback.print_exc()
        lacking = " It can use the packages of the image" if isinstance(error, ImportError) else ""
        raise DataError(
            f"{where} cannot be imported: {_shown(error, app.directory)}.{lacking}"
        ) from error

    def convert(dataset: Any) -> Arrays:
        try:
            result = function(dataset)
        except Exception as error:
            traceback.print_exc()
            raise DataError(f"{where} failed: {_shown(error, app.directory)}") from error
        if problem := _problem(result):
            raise DataError(f"{where} {problem}: return a dictionary of named numpy arrays")
        return {key: np.ascontiguousarray(array) for key, array in result.items()}

    return convert, _hash_of_modules(Path(app.directory))


def _problem(result: Any) -> str:
    """What is wrong with the result of the app's function."""
    if not isinstance(result, dict) or not result:
        return f"returned {'an empty' if result == {} else 'a'} {type(result).__name__}"
    for name, array in result.items():
        if not isinstance(name, str) or not name:
            return f"returned the name {name!r}"
        if not isinstance(array, np.ndarray):
            return f"returned a {type(array).__name__} as {name}"
        if array.dtype.hasobject:
            return f"returned Python objects as {name}"
        if not array.ndim:
            return f"returned a single value as {name}"
    if len({len(array) for array in result.values()}) > 1:
        sizes = ", ".join(f"{len(array)} of {name}" for name, array in result.items())
        return f"returned arrays of unequal first dimensions ({sizes})"
    return ""


def _shown(error: Exception, directory: str) -> str:
    """An exception in a line, with the place in the app's code that it came from."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(directory)]
    return f"{words} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else words


def _hash_of_modules(directory: Path) -> str:
    """Hash of the source of all modules that were imported from a directory (SHA-256)."""
    root = directory.resolve()
    files = [
        Path(getattr(module, "__file__", None) or "/") for module in list(sys.modules.values())
    ]
    digest = hashlib.sha256()
    for file in sorted({file.resolve() for file in files if file.resolve().is_relative_to(root)}):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()

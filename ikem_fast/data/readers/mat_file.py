"""Arrays of numbers in MATLAB 5 files (``save -v6`` and ``-v7``), read so that no bytes whatever can do harm.

``scipy.io.loadmat`` reads more, but ends the process on some damaged files.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

_HEADER_BYTES = 128
_MAX_BYTES = 2**28  # far beyond any recording; what a few compressed bytes may grow to
_MATRIX, _COMPRESSED = 14, 15
_NAME_TYPES = (1, 2, 16)  # 8-bit characters and UTF-8
_DIMENSIONS_TYPE, _FLAGS_TYPE = 5, 6
_NUMBER_TYPES = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"},
    **{7: "f4", 9: "f8", 12: "i8", 13: "u8"},
}
_NUMBER_CLASSES = range(6, 16)  # double, single, and whole numbers of 8 to 64 bits
_COMPLEX_FLAG = 0x0800


def read_array(content: bytes, name: str) -> np.ndarray:
    """The numbers of one variable.

    Args:
        content: of the file.
        name: of the variable.

    Returns:
        The array, with its dimensions as MATLAB has them, in the type it is stored in.

    Raises:
        ValueError: this is no MATLAB 5 file or a damaged one, or it has no such variable or something else in it than
            an array of real numbers.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER_BYTES])
    if order is None or struct.unpack_from(order + "H", content, 124)[0] != 0x0100:
        raise ValueError("not a MATLAB 5 file")
    found = None
    for kind, data in _elements(content, _HEADER_BYTES, order):
        if kind == _COMPRESSED:
            inner = list(_elements(_decompress(data), 0, order))
            if len(inner) != 1:
                raise ValueError(f"damaged: {len(inner)} elements are compressed together")
            ((kind, data),) = inner
        if kind != _MATRIX:
            raise ValueError(f"damaged: an element of type {kind} where a variable must be")
        parts = _elements(data, 0, order)
        flags = _numbers(next(parts, None), order, (_FLAGS_TYPE,), "array flags")
        dimensions = _numbers(next(parts, None), order, (_DIMENSIONS_TYPE,), "dimensions")
        text = next(parts, (None, b""))
        if len(flags) != 2 or len(dimensions) < 2 or (dimensions < 0).any() or text[0] not in _NAME_TYPES:
            raise ValueError("damaged: a variable's flags, dimensions or name")
        if text[1] != name.encode():
            continue
        if found is not None:
            raise ValueError(f"has the variable {name!r} twice")
        if (int(flags[0]) & 0xFF) not in _NUMBER_CLASSES or int(flags[0]) & _COMPLEX_FLAG:
            raise ValueError(f"{name!r} must be an array of numbers")
        values = _numbers(next(parts, None), order, tuple(_NUMBER_TYPES), repr(name))
        shape = tuple(dimensions.tolist())
        if len(values) != math.prod(shape) or next(parts, None) is not None:
            raise ValueError(f"damaged: {name!r} has {len(values)} numbers for dimensions {shape}")
        found = values.reshape(shape, order="F")
    if found is None:
        raise ValueError(f"has no variable {name!r}")
    return found


def _elements(content: bytes, position: int, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and data of the elements from a position to the end."""
    while position < len(content):
        if position + 8 > len(content):
            raise ValueError("damaged: cut off within an element's tag")
        kind, size = struct.unpack_from(order + "II", content, position)
        begin, padded = position + 8, kind != _COMPRESSED
        if kind >> 16:  # up to four bytes, which lie in the tag itself
            kind, size, begin, padded = kind & 0xFFFF, kind >> 16, position + 4, False
            if size > 4:
                raise ValueError(f"damaged: {size} bytes in an element of four")
            position += 8
        else:
            position = begin + size
        if begin + size > len(content):
            raise ValueError(f"cut off: an element of {size} bytes, of which {len(content) - begin} are there")
        if padded:
            position += -size % 8
        yield kind, content[begin : begin + size]


def _decompress(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, _MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"damaged: {error}") from None
    if not stream.eof:
        raise ValueError("cut off within compressed data, or far too long")
    return content


def _numbers(element: tuple[int, bytes] | None, order: str, kinds: tuple[int, ...], what: str) -> np.ndarray:
    if element is None or element[0] not in kinds:
        raise ValueError(f"damaged: no numbers where {what} must be")
    kind = np.dtype(order + _NUMBER_TYPES[element[0]])
    if len(element[1]) % kind.itemsize:
        raise ValueError(f"damaged: {what} ends within a number")
    return np.frombuffer(element[1], dtype=kind)

"""What the fuzz tests share: how many cases they try, how files are damaged, and what may come of it.

A reader may do one of two things with whatever it is given: return a correct value, or raise one of the package's own
errors, which says what is wrong. Every other exception, a crash, a hang, a wrong number taken for a right one, and any
file that is written, is a finding.

By default few cases are tried, always the same ones. ``pytest --hypothesis-profile thorough`` tries many more, other
ones each time: 4000 for most tests, or as many as the environment variable ``IKEM_FAST_FUZZ_CASES`` says.
"""

from __future__ import annotations

import faulthandler
import hashlib
import math
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import ikem_fast

Value = TypeVar("Value")

_PACKAGE_FOLDER = Path(ikem_fast.__file__).parent
# Longer than anything here takes on a busy machine; a case that takes as long hangs.
_HANG_SECONDS = 300

_COMMON = {
    "deadline": None,
    # Fixtures give the undamaged files, which every case copies or only reads.
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    "database": None,
    # Not "explain", which takes longer than all the rest.
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
}
settings.register_profile("brief", max_examples=60, derandomize=True, **_COMMON)
settings.register_profile(
    "thorough", max_examples=int(os.environ.get("IKEM_FAST_FUZZ_CASES", "4000")), print_blob=True, **_COMMON
)
settings.load_profile("brief")


def share_of_cases(share: float) -> settings:
    """Settings for a test whose cases take longer: so much of the profile's number of cases."""
    return settings(max_examples=max(5, int(settings.default.max_examples * share)))


# ---- what is given ---------------------------------------------------------------------------------------------------


# What formats are sensitive to.
_TOKENS = (
    *(b"9" * 5000, b"[" * 3000, b"NaN", b"true", b"null", b"Infinity", b"1e999", b"-1", b"-", b"."),
    *(
        b'"',
        b"'",
        b",",
        b"\n",
        b"\r\n",
        b"\0",
        b":",
        b"{",
        b"}",
        b"]",
        b"#",
        b"&a ",
        b"*a",
        b"!!python/object:os.system ",
    ),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"PK\x03\x04", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"),
)


_pieces = st.sampled_from(_TOKENS) | st.binary(min_size=1, max_size=16)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's bytes with something wrong: cut off, bits flipped, bytes replaced, inserted, removed or moved."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        size = len(data)
        start = draw(st.integers(0, size))
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(("cut", "flip", "replace", "insert", "remove", "repeat", "zero"))):
            case "cut":
                del data[start:]
            case "flip":
                if start < size:
                    data[start] ^= 1 << draw(st.integers(0, 7))
            case "replace":
                data[start : start + length] = draw(_pieces)
            case "insert":
                data[start:start] = draw(_pieces)
            case "remove":
                del data[start : start + length]
            case "repeat":
                data[start:start] = data[start : start + length]
            case "zero":
                data[start : start + length] = bytes(len(data[start : start + length]))
    return bytes(data)


odd_numbers = st.one_of(
    st.sampled_from((0, 1, -1, True, False, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)),
    st.sampled_from((0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan)),
    st.integers(),
    st.floats(),
)
odd_words = st.one_of(
    st.sampled_from(("", " ", "\0", "null", "nan", "1e999", "-1", "0x10", "1_000", "٣", "${seed}", "${", "[", "a\nb")),
    st.text(max_size=20),
)
odd_scalars = st.one_of(st.none(), st.booleans(), odd_numbers, odd_words)
odd_values = st.recursive(
    odd_scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(odd_words, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn, tree: Any, values: st.SearchStrategy = odd_values) -> Any:
    """A nested value of dicts and lists with one thing changed, left out, added or given another name, somewhere."""
    if draw(st.integers(0, 5)) == 0 or not isinstance(tree, dict | list) or not tree:
        return draw(values)
    if isinstance(tree, list):
        position = draw(st.integers(0, len(tree) - 1))
        match draw(st.sampled_from(("inside", "inside", "remove", "repeat", "insert"))):
            case "inside":
                return [*tree[:position], draw(changed(tree[position], values)), *tree[position + 1 :]]
            case "remove":
                return [*tree[:position], *tree[position + 1 :]]
            case "repeat":
                return [*tree[:position], tree[position], *tree[position:]]
            case _:
                return [*tree[:position], draw(values), *tree[position:]]
    key = draw(st.sampled_from(list(tree)))
    match draw(st.sampled_from(("inside", "inside", "inside", "remove", "rename", "add"))):
        case "inside":
            return {**tree, key: draw(changed(tree[key], values))}
        case "remove":
            return {name: value for name, value in tree.items() if name != key}
        case "rename":
            new = draw(odd_words)
            return {new if name == key else name: value for name, value in tree.items()}
        case _:
            return {**tree, draw(odd_words): draw(values)}


# ---- what may come of it ---------------------------------------------------------------------------------------------


def outcome(call: Callable[[], Value], *, names: str | Path | None = None) -> tuple[Value | None, Exception | None]:
    """What a call returns, or the error of the package that it raises. Anything else fails the test.

    Args:
        call: what is tested.
        names: a file that the message of an error must name.
    """
    faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
    try:
        return call(), None
    except Exception as raised:
        if not _is_own(raised):
            raise
        error = raised
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert str(error).strip(), "an error must say something"
    if names is not None:
        assert str(names) in str(error), f"the message does not name {names}: {error}"
    return None, error


def _is_own(error: Exception) -> bool:
    """Whether an error is one that the package raises itself, as against one that slipped through it."""
    if type(error).__module__.startswith("ikem_fast"):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    # What compiled code raises counts for the line that calls it.
    return type(error) in (ValueError, OSError) and _PACKAGE_FOLDER in raised_in.parents


def digest(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of change of every file in a folder."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """Fails the test where the block changes, makes or removes a file."""
    before = digest(folder)
    yield
    assert digest(folder) == before

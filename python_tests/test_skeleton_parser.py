"""The C++ parser of NTU skeleton text: what it reads, and that no damage to a file gets past it or brings it down."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from skeleton_text import BODY_LINE, make_lines, make_text

from ikem_fast import _extension

V = 3


@pytest.fixture
def parse(tmp_path):
    def parse_text(text, num_joints=V, **limits):
        path = tmp_path / "clip.skeleton"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return _extension.require().parse_skeleton(str(path), num_joints, **limits)

    return parse_text


def check_error(parse, lines, line, reason, **limits):
    with pytest.raises(ValueError) as caught:
        parse("\n".join(lines) + "\n", **limits)
    where = rf"line {line}: " if line else ""
    assert re.search(rf"clip\.skeleton: {where}{reason}", str(caught.value)), caught.value


def test_reads_the_first_two_bodies_in_file_order(parse):
    lines, expected = make_lines([1, 3, 0, 2])
    xyz, num_frames, num_bodies = parse("\n".join(lines), num_joints=25)
    assert (xyz.shape, xyz.dtype, num_frames, num_bodies) == ((3, 4, 25, 2), np.float64, 4, 3)
    np.testing.assert_array_equal(xyz, expected[..., :2])
    assert not xyz[:, 2].any()
    assert not xyz[:, 0, :, 1].any()


@pytest.mark.parametrize("max_bodies", [1, 2, 5])
def test_keeps_as_many_bodies_as_asked_for(parse, max_bodies):
    lines, expected = make_lines([3, 1], V)
    xyz, _, num_bodies = parse("\n".join(lines), max_bodies=max_bodies)
    padded = np.zeros((3, 2, V, 5))
    padded[..., :3] = expected
    np.testing.assert_array_equal(xyz, padded[..., :max_bodies])
    assert num_bodies == 3


def test_line_ends_blanks_and_the_missing_last_newline_do_not_matter(parse):
    text = make_text([1, 2], V)
    expected = parse(text)[0]
    variants = [
        text.replace("\n", "\r\n"),
        text.rstrip("\n"),
        text.replace(" ", "\t ").replace("\n", " \n"),
        text + "\n \r\n",
    ]
    for variant in variants:
        np.testing.assert_array_equal(parse(variant)[0], expected)


def test_all_spellings_of_numbers(parse):
    lines, _ = make_lines([1], 1)
    for word, value in {"1": 1, "+.5": 0.5, "-1e-3": -0.001, "2.5E+1": 25, "1e-400": 0, "007.50": 7.5, "-0": 0}.items():
        lines[4] = " ".join([word] * 12)
        np.testing.assert_array_equal(parse("\n".join(lines), num_joints=1)[0][:, 0, 0, 0], value)


def test_fields_that_are_not_used_may_be_nan_as_sensors_write_them(parse):
    lines, expected = make_lines([1], V)
    lines[4] = " ".join(lines[4].split()[:3] + ["nan", "-inf", "NaN"] + ["0"] * 6)
    np.testing.assert_array_equal(parse("\n".join(lines))[0][..., :1], expected)


NUMBERS = "7 -7 +7 007 -0 1. .5 -.5 1.5 -12.25 +1.5 1e5 1.5e-3 1e-400 -1.e2 12345678901234567890123 0.00000000000000001"
NO_NUMBERS = "- + . -. -- 1.. 1.2.3 1-2 -1- 1,5 1e 1e+ e5 .e5 0x10 1_0 1.5x -1.5x 12a 1\x000 nano infx"


@pytest.mark.parametrize("word", [*NUMBERS.split(), *NO_NUMBERS.split()])
def test_fields_that_are_not_used_are_as_strictly_numbers_as_the_others(parse, word):
    for field in (1, 7, 12):
        lines, _ = make_lines([1], 1)
        lines[4] = " ".join(word if number == field else "0" for number in range(1, 13))
        if word in NUMBERS.split():
            parse("\n".join(lines), num_joints=1)
        else:
            check_error(parse, lines, 5, f"joint line: field {field} must be a number", num_joints=1)


# With V = 3 a frame of one body has lines: 2 the body count, 3 the body, 4 the joint count, 5 to 7 the joints.
@pytest.mark.parametrize(
    ("number", "content", "reason"),
    [
        (1, "", "frame count must be a whole number, got ''"),
        (1, "two", "frame count must be a whole number, got 'two'"),
        (1, "2.0", "frame count must be a whole number, got '2.0'"),
        (1, "2 2", "frame count must stand alone on its line, got '2' after it"),
        (1, "0", "frame count must be 1 to 300, got 0"),
        (1, "-1", "frame count must be 1 to 300, got -1"),
        (1, "301", "frame count must be 1 to 300, got 301"),
        (1, "9223372036854775807", "frame count must be 1 to 300"),
        (1, "99999999999999999999", "frame count must be a whole number"),
        (2, "-1", "body count must not be negative, got -1"),
        (2, "x", "body count must be a whole number, got 'x'"),
        (2, "4000000000", "the file ends too early for a body count of 4000000000"),
        (2, "9223372036854775807", "the file ends too early for a body count"),
        (3, BODY_LINE + " 1", "body line must have 10 fields, got 11"),
        (3, "1 2 3", "body line must have 10 fields, got 3"),
        (3, BODY_LINE.replace("-0.2345", "left"), "body line: field 9 must be a number, got 'left'"),
        (4, "25", "joint count must be 3, got 25"),
        (4, "-3", "joint count must be 3, got -3"),
        (4, "1000000000000", "joint count must be 3, got 1000000000000"),
        (5, "0 0 0 0 0 0 0 0 0 0 0", "joint line must have 12 fields, got 11"),
        (5, "0 0 0 0 0 0 0 0 0 0 0 0 0", "joint line must have 12 fields, got 13"),
        (6, "", "joint line must have 12 fields, got 0"),
        (6, "0 0,1 0 0 0 0 0 0 0 0 0 0", "joint line: field 2 must be a number, got '0,1'"),
        (6, "0 0 0 0 0 0 0 0 0 0 0 1.5x", "joint line: field 12 must be a number, got '1.5x'"),
        (6, "0 0 +-1 0 0 0 0 0 0 0 0 0", r"joint line: field 3 must be a number, got '\+-1'"),
        (7, "0 nan 0 0 0 0 0 0 0 0 0 0", "joint line: coordinate y must be finite, got 'nan'"),
        (7, "-inf 0 0 0 0 0 0 0 0 0 0 0", "joint line: coordinate x must be finite, got '-inf'"),
        (7, "0 0 1e999 0 0 0 0 0 0 0 0 0", "joint line: coordinate z must be finite, got '1e999'"),
        (13, "0 0 \x01\xe9 0 0 0 0 0 0 0 0 0", r"joint line: field 3 must be a number, got '\\x01\\xc3\\xa9'"),
    ],
)  # fmt: skip
def test_damaged_lines_are_named_with_their_number(parse, number, content, reason):
    lines, _ = make_lines([1, 1], V)
    lines[number - 1] = content
    check_error(parse, lines, number, reason)


def test_counts_that_promise_more_or_less_than_the_file_holds(parse):
    lines, _ = make_lines([1, 1], V)
    check_error(parse, ["3", *lines[1:]], 14, "the file ends before the body count in frame 3 of 3")
    check_error(parse, ["1", *lines[1:]], 8, "the file must end after its 1 frames, got '1'")
    check_error(parse, [*lines, "garbage"], 14, "the file must end after its 2 frames, got 'garbage'")
    check_error(parse, lines[:11], 12, "the file ends before a joint in frame 2 of 2")
    check_error(parse, lines[:9], 8, "the file ends too early for a body count of 1")
    lines[7] = "2"
    check_error(parse, lines, 14, "the file ends before a body in frame 2 of 2")


def test_files_without_any_frame_or_body(parse):
    check_error(parse, ["3", "0", "0", "0"], None, "no body in any of the 3 frames")
    with pytest.raises(ValueError, match=r"line 1: the file ends before the frame count"):
        parse("")
    with pytest.raises(ValueError, match=r"line 2: the file ends before the body count in frame 1 of 5"):
        parse("5")


def test_wrong_joint_count_of_the_layout(parse):
    check_error(parse, make_lines([1], 20)[0], 4, "joint count must be 25, got 20", num_joints=25)


def test_three_hundred_frames_and_one_more(parse):
    assert parse(make_text([1] * 300, V))[1] == 300
    with pytest.raises(ValueError, match="line 1: frame count must be 1 to 300, got 301"):
        parse(make_text([1] * 301, V))
    assert parse(make_text([1] * 301, V), max_frames=301)[1] == 301


def test_every_truncation_is_an_error_or_loses_only_the_end_of_the_last_number(parse):
    text = make_text([1, 0, 2], 2).encode()
    expected = parse(text, num_joints=2)[0]
    accepted = []
    for length in range(len(text)):
        with contextlib.suppress(ValueError):
            np.testing.assert_array_equal(parse(text[:length], num_joints=2)[0], expected)
            accepted.append(length)
    assert accepted == [len(text) - 1]  # without the last newline


def test_random_damage_ends_in_an_error_or_in_finite_numbers(parse):
    text = make_text([2, 1], 2).encode()
    generator = np.random.default_rng(5)
    interesting = b"\x00\n\r 0-+.e9n\xff"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        damaged = bytearray(text)
        for _ in range(generator.integers(1, 5)):
            position = int(generator.integers(len(damaged)))
            if generator.random() < 0.3:
                del damaged[position : position + int(generator.integers(1, 40))]
            else:
                damaged[position] = interesting[generator.integers(len(interesting))]
        try:
            xyz, num_frames, _ = parse(bytes(damaged), num_joints=2)
        except ValueError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert xyz.shape == (3, num_frames, 2, 2)
            assert np.isfinite(xyz).all()
    assert min(outcomes.values()) > 20


def test_lying_counts_do_not_take_memory(parse):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), limits[1]))
    try:
        for count_line in (0, 1, 3):
            for count in ("300", "2000000000", "9000000000000000000"):
                lines, _ = make_lines([1], V)
                lines[count_line] = count
                with pytest.raises(ValueError, match="line "):  # and no MemoryError
                    parse("\n".join(lines))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_paths(parse, tmp_path):
    function = _extension.require().parse_skeleton
    with pytest.raises(FileNotFoundError) as caught:
        function(str(tmp_path / "none.skeleton"), 25)
    assert caught.value.filename == str(tmp_path / "none.skeleton")
    with pytest.raises(IsADirectoryError):
        function(tmp_path, 25)
    with pytest.raises(ValueError, match="is no regular file"):
        function("/dev/null", 25)
    odd = os.fsencode(tmp_path) + b"/\xff\xc3\xa9.skeleton"
    with open(odd, "wb") as file:
        file.write(make_text([1], V).encode())
    assert function(os.fsdecode(odd), V)[1] == 1
    with pytest.raises(ValueError) as caught:
        function(os.fsdecode(odd), 25)
    assert str(caught.value).startswith(os.fsdecode(odd))


def test_a_file_too_large_to_be_a_skeleton_is_refused_unread(tmp_path):
    path = tmp_path / "huge.skeleton"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="has 1099511627776 bytes, more than any skeleton file"):
        _extension.require().parse_skeleton(str(path), 25)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_joints": 0}, "num_joints must be 1 to 1024, got 0"),
        ({"max_bodies": 0}, "max_bodies must be 1 to 64, got 0"),
        ({"max_frames": -5}, "max_frames must be 1 to 65536, got -5"),
    ],
)
def test_limits_are_checked(parse, limits, message):
    with pytest.raises(ValueError, match=message):
        parse(make_text([1], V), **limits)


def test_threads_parse_side_by_side(tmp_path):
    function = _extension.require().parse_skeleton
    expected = {}
    for number in range(4):
        lines, expected[number] = make_lines([2] * 40, 25, seed=number)
        (tmp_path / f"{number}.skeleton").write_text("\n".join(lines))
    wrong = []

    def work(number):
        for _ in range(10):
            if not np.array_equal(function(tmp_path / f"{number}.skeleton", 25)[0], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

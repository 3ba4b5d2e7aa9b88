"""Layouts and configurations as arbitrary and as nearly right text: understood exactly, or refused with a reason."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hypothesis")

import yaml
from fuzzing import changed, damaged, nothing_written, odd_scalars, odd_values, odd_words, outcome, share_of_cases
from hypothesis import given
from hypothesis import strategies as st

from ikem_fast import layouts
from ikem_fast.engine import ConfigError, config, load_config
from ikem_fast.layouts import LayoutError

BUILTIN = {name: layouts.get(name).to_dict() for name in layouts.names()}
DEFAULT = config.to_dict(load_config())
KEYS = sorted(config._LEAVES)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def check_layout(layout):
    assert layouts.from_dict(layout.to_dict()) == layout
    num_joints = layout.num_joints
    assert sum(joint == parent for joint, parent in enumerate(layout.bone_parents)) == 1
    distances = layout.hop_distances()
    assert min(distances) == 0
    assert max(distances) < num_joints
    adjacency = layout.adjacency()
    assert adjacency.shape == (3, num_joints, num_joints)
    assert adjacency.isfinite().all()
    np.testing.assert_allclose(adjacency.sum(dim=(0, 1)).numpy(), 1, rtol=1e-5)


def own_layout(draw):
    """A layout that is nearly one of the package's, or one of a few joints."""
    if draw(st.booleans()):
        return BUILTIN[draw(st.sampled_from(sorted(BUILTIN)))]
    joints = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6))
    pick = st.sampled_from(joints)
    return {
        "name": "own",
        "joints": joints,
        "bones": draw(st.dictionaries(pick, pick, max_size=6)),
        "center": draw(pick),
        "chest_normal": draw(st.lists(pick, min_size=2, max_size=4)),
        **draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "graph_edges": st.lists(st.lists(pick, min_size=1, max_size=3), max_size=6),
                    "previous_bones": st.dictionaries(pick, pick, max_size=3),
                    "shoulders": st.lists(pick, max_size=3),
                    "presence_joint": pick,
                },
            )
        ),
    }


@given(data=st.data())
def test_layouts_with_other_values(data):
    fields = own_layout(data.draw)
    joints = st.sampled_from(fields["joints"]) if fields["joints"] else odd_words
    if data.draw(st.booleans()):
        fields = data.draw(changed(fields, odd_values | joints))
    layout, error = outcome(lambda: layouts.from_dict(fields))
    assert error is None or isinstance(error, LayoutError)
    if layout is not None:
        check_layout(layout)


@given(data=st.data())
def test_layout_files(tmp_path, data):
    path = tmp_path / "own.yaml"
    text = yaml.safe_dump(own_layout(data.draw), sort_keys=False).encode()
    content = data.draw(
        st.one_of(damaged(text), st.binary(max_size=100), odd_words.map(lambda w: w.encode("utf-8", "surrogatepass")))
    )
    path.write_bytes(content)
    with nothing_written(tmp_path):
        layout, error = outcome(lambda: layouts.from_yaml(path), names=path)
    assert error is None or isinstance(error, LayoutError)
    if layout is not None:
        check_layout(layout)


@given(name=odd_words)
def test_layout_names(name):
    layout, error = outcome(lambda: layouts.get(name))
    assert (layout is None) == (name not in layouts.names())
    assert error is None or isinstance(error, LayoutError)


# ---- configurations --------------------------------------------------------------------------------------------------


def check_config(result):
    """What is accepted is of the declared types, in range, and survives writing and reading."""
    config.validate(result)
    values = config.to_dict(result)
    for key, value in config._flatten(values, ""):
        for scalar in value if isinstance(value, list) else [value]:
            allowed = config._scalar_types(config._LEAVES[key])
            assert Any in allowed or type(scalar) in allowed, key
            assert not isinstance(scalar, float) or math.isfinite(scalar), key
            # Nothing that follows could count so far.
            assert type(scalar) is not int or abs(scalar) < 2**63, key
    assert load_config(values) == result
    assert load_config(yaml.safe_load(config.to_yaml(result))) == result


def accept(call, **options):
    result, error = outcome(call, **options)
    assert error is None or isinstance(error, ConfigError)
    if result is not None:
        check_config(result)
    return result


near = st.one_of(
    st.integers(-2, 400),
    st.floats(0, 1),
    st.sampled_from(("joint", "motion", "auto", "cpu", "release", "float16", "stream", "bf16")),
    st.lists(st.integers(0, 300), max_size=3),
    st.lists(st.sampled_from(("joint", "motion", "bone", "acceleration", "limb")), max_size=3),
    odd_values,
)


@share_of_cases(0.7)
@given(data=st.data())
def test_nested_values(data):
    values = DEFAULT
    for _ in range(data.draw(st.integers(1, 3))):
        values = data.draw(changed(values, near))
        if not isinstance(values, dict):
            return  # a mapping is what load_config takes
    accept(lambda: load_config(values))


@share_of_cases(0.4)
@given(data=st.data())
def test_configuration_files(tmp_path, data):
    path = tmp_path / "own.yaml"
    written = data.draw(
        st.sampled_from((yaml.safe_dump(DEFAULT).encode(), b"base: cpu-small\npretrain: {epochs: 5}\nseed: 3\n"))
    )
    path.write_bytes(data.draw(st.one_of(damaged(written), st.binary(max_size=100))))
    with nothing_written(tmp_path):
        accept(lambda: load_config(path))


@share_of_cases(0.3)
@given(source=st.one_of(odd_words, st.sampled_from(("cpu-smal", "/", ".", "..", "presets/cpu-small.yaml", "a" * 5000))))
def test_names_of_presets_and_files(tmp_path, source):
    _, error = outcome(lambda: load_config(source))
    assert isinstance(error, ConfigError)


def as_text(value):
    try:
        return json.dumps(value)
    except ValueError:
        return str(value)


@share_of_cases(0.4)
@given(
    overrides=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(KEYS), near.map(as_text)).map("=".join),
            st.tuples(st.sampled_from(KEYS), odd_words).map("=".join),
            st.tuples(st.sampled_from([key.rpartition(".")[2] for key in KEYS]), near.map(as_text)).map("=".join),
            st.tuples(odd_words, odd_words).map("=".join),
            odd_words,
            st.tuples(st.sampled_from(KEYS), damaged(b"[joint, motion]").map(lambda b: b.decode("latin-1"))).map(
                "=".join
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    command=st.sampled_from((None, *config.COMMANDS)),
)
def test_overrides(overrides, command):
    accept(lambda: load_config("cpu-small", overrides, command))


@share_of_cases(0.3)
@given(key=st.sampled_from(KEYS), value=odd_scalars)
def test_accepted_values_are_those_that_were_given(key, value):
    """Nothing is rounded, cut off or taken for something else on its way."""
    values = {key: value} if "." not in key else {key.partition(".")[0]: {key.partition(".")[2]: value}}
    result = accept(lambda: load_config(values))
    if result is not None:
        found = dict(config._flatten(config.to_dict(result), ""))[key]
        assert found == value
        assert type(found) in (type(value), float)

import copy

import pytest
import reference_vectors as vectors
import torch
import yaml

from ikem_fast import layouts
from ikem_fast.layouts import LayoutError

SMALL = {
    "name": "stick",
    "joints": ["hip", "spine", "left", "right", "head"],
    "bones": {"hip": "spine", "left": "spine", "right": "spine", "head": "spine"},
    "center": "spine",
    "chest_normal": ["hip", "left", "right"],
}


def changed(**fields):
    return {**copy.deepcopy(SMALL), **fields}


def test_builtin_layouts_have_the_joints_of_their_sets():
    assert {name: layouts.get(name).num_joints for name in layouts.names()} == {
        "ntu-rgb+d": 25,
        "nw-ucla": 20,
        "utd-mhad": 20,
    }


def test_ntu_bones_follow_the_published_table():
    # docs/method.md section 3, numbered from 1; joint 21 is the root.
    pairs = (
        "1 2, 2 21, 3 21, 4 3, 5 21, 6 5, 7 6, 8 7, 9 21, 10 9, 11 10, 12 11, 13 1, 14 13, 15 14, 16 15, 17 1, 18 17,"
        "19 18, 20 19, 21 21, 22 8, 23 8, 24 12, 25 12"
    )
    expected = {int(joint): int(parent) for joint, parent in (pair.split() for pair in pairs.split(","))}
    layout = layouts.get("ntu-rgb+d")
    assert {j + 1: p + 1 for j, p in enumerate(layout.bone_parents)} == expected
    assert layout.root == 20
    assert {j + 1: p + 1 for j, p in enumerate(layout.previous_bones)} == {**expected, 23: 22, 25: 24}
    assert [j + 1 for j in layout.chest_normal] == [2, 5, 9]
    assert [j + 1 for j in layout.shoulders] == [5, 9]


def test_ntu_adjacency_is_the_released_one():
    assert torch.equal(layouts.get("ntu-rgb+d").adjacency(), torch.tensor(vectors.load("stgcn.npz")["state/A"]))


@pytest.mark.parametrize("name", ["ntu-rgb+d", "nw-ucla", "utd-mhad"])
@pytest.mark.parametrize("distance_limit", [1, None])
def test_adjacency_is_column_normalised_and_has_every_edge_both_ways(name, distance_limit):
    layout = layouts.get(name)
    adjacency = layout.adjacency(distance_limit)
    torch.testing.assert_close(adjacency.sum(dim=(0, 1)), torch.ones(layout.num_joints))
    assert adjacency.count_nonzero() == layout.num_joints + 2 * len(layout.graph_edges)
    if distance_limit is None:
        assert [int(part.count_nonzero()) for part in adjacency[1:]] == [len(layout.graph_edges)] * 2


def test_a_layout_of_ones_own_from_yaml(tmp_path):
    path = tmp_path / "stick.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    layout = layouts.get(path)
    assert layout == layouts.get(str(path)) == layouts.from_dict(SMALL)
    assert layout.root == 1
    assert layout.presence_joint == 0
    assert layout.shoulders == (2, 3)
    assert layouts.from_dict(layout.to_dict()) == layout


@pytest.mark.parametrize("name", ["ntu-rgb+d", "nw-ucla", "utd-mhad"])
def test_to_dict_reads_back(name):
    layout = layouts.get(name)
    assert layouts.from_dict(layout.to_dict()) == layout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            changed(bones={"hip": "spine", "left": "right", "right": "left", "head": "spine"}),
            "cycle: left -> right -> left",
        ),
        (changed(bones={**SMALL["bones"], "spine": "spine"}), "cycle: spine -> spine"),
        (
            changed(bones={"hip": "spine", "left": "spine"}),
            "exactly one joint without a parent, got 3: spine, right, head",
        ),
        (changed(bones={**SMALL["bones"], "haed": "spine"}), "'haed', which is not one .* did you mean 'head'"),
        (changed(joints=[*SMALL["joints"], "head"]), "joints must be distinct, got head"),
        (changed(center="middle"), "center names 'middle'"),
        (changed(chest_normal=["hip", "left"]), "chest_normal must be a list of 3"),
        (changed(chest_normal=["hip", "left", "left"]), "chest_normal must name 3 different"),
        (changed(centre="spine"), "unknown key 'centre'; did you mean 'center'"),
        ({key: value for key, value in SMALL.items() if key != "bones"}, "missing bones"),
        (changed(graph_edges=[["hip", "spine"]]), "do not connect left, right, head"),
        (changed(graph_edges=[["hip", "spine"], ["spine", "hip"]]), "an edge twice"),
        (changed(previous_bones={"spine": "hip"}), "spine is the root"),
        (changed(joints=[]), "joints must be a non-empty list"),
        (["hip"], "must be a mapping"),
    ],
)
def test_unusable_layouts_say_why(fields, message):
    with pytest.raises(LayoutError, match=message):
        layouts.from_dict(fields)


def test_a_bone_given_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "center: hip\n")
    with pytest.raises(LayoutError, match=r"twice\.yaml: line \d+: 'center' is given twice"):
        layouts.get(path)


def test_unknown_names_and_files_are_errors(tmp_path):
    with pytest.raises(LayoutError, match="must be 'ntu-rgb\\+d', 'nw-ucla', 'utd-mhad' or the path"):
        layouts.get("kinect")
    with pytest.raises(LayoutError, match=r"none\.yaml"):
        layouts.get(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [unclosed")
    with pytest.raises(LayoutError, match=r"broken\.yaml"):
        layouts.get(broken)

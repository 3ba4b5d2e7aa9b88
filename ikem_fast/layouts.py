"""Skeleton layouts: joints, bones and the encoder's graph, each from one YAML file.

The layouts that come with the package are the files of ``ikem_fast/skeletons``; a user's own is a file of the
same form, given by its path wherever a layout's name is accepted.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ikem_fast.yaml_size import check_size

_BUILTIN_FOLDER = Path(__file__).parent / "skeletons"
MAX_JOINTS = 1024
_REQUIRED_KEYS = ("name", "joints", "bones", "center", "chest_normal")
_OPTIONAL_KEYS = ("graph_edges", "previous_bones", "shoulders", "presence_joint", "stand_ins")


class LayoutError(ValueError):
    """A skeleton layout that is not a usable skeleton; the message names the file, the key and the joint."""


@dataclass(frozen=True)
class Layout:
    """One skeleton: what every reader, modality and encoder needs to know of it. Joint numbers are 0-based.

    Attributes:
        name: the layout's name.
        joint_names: V distinct names, in file order.
        bone_parents: for each joint its parent; the one root has itself.
        previous_bones: for each bone the bone before it (METHOD section 3, ``p(j)``); the root has itself.
        graph_edges: undirected edges of the encoder's graph.
        center: joint that is subtracted in preparation and from which the graph's partitions are measured.
        chest_normal: joints (a, b, c) of the chest normal ``normalize((b_a - b_c) x (b_b - b_c))`` over bones.
        shoulders: joints (left, right) whose line the y-rotation of preparation makes parallel to x.
        presence_joint: a frame counts as detected when this joint of the first person is not all zero.
        stand_ins: which joints may take a joint's place between two layouts, see ``map_joints``. No part of what makes
            two layouts the same.
    """

    name: str
    joint_names: tuple[str, ...]
    bone_parents: tuple[int, ...]
    previous_bones: tuple[int, ...]
    graph_edges: tuple[tuple[int, int], ...]
    center: int
    chest_normal: tuple[int, int, int]
    shoulders: tuple[int, int]
    presence_joint: int
    stand_ins: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)

    @property
    def num_joints(self) -> int:
        return len(self.joint_names)

    @property
    def root(self) -> int:
        """The joint without a parent; its "bone" is the chest normal."""
        return next(joint for joint, parent in enumerate(self.bone_parents) if joint == parent)

    def hop_distances(self) -> list[int]:
        """Number of graph edges between each joint and the centre."""
        neighbours: list[list[int]] = [[] for _ in self.joint_names]
        for first, second in self.graph_edges:
            neighbours[first].append(second)
            neighbours[second].append(first)
        distances = [-1] * self.num_joints
        distances[self.center] = 0
        queue = deque([self.center])
        while queue:
            joint = queue.popleft()
            for neighbour in neighbours[joint]:
                if distances[neighbour] < 0:
                    distances[neighbour] = distances[joint] + 1
                    queue.append(neighbour)
        return distances

    def adjacency(self, distance_limit: int | None = 1) -> Tensor:
        """The (3, V, V) partitioned, column-normalised adjacency of the ST-GCN (METHOD section 4).

        Partition 0 joins a joint with itself, partition 1 collects from neighbours that are as far from the centre or
        farther, partition 2 from neighbours nearer to it. ``[k, v, w]`` weighs what joint w receives from joint v.

        Args:
            distance_limit: distances above it count as equal. 1 is what the released encoders use: beyond the
                centre's own neighbours all edges fall into partition 1. ``None`` compares true distances.
        """
        distances = self.hop_distances()
        if distance_limit is not None:
            distances = [min(distance, distance_limit + 1) for distance in distances]
        adjacency = torch.zeros(3, self.num_joints, self.num_joints, dtype=torch.float64)
        adjacency[0].fill_diagonal_(1.0)
        for first, second in self.graph_edges:
            for source, target in ((first, second), (second, first)):
                partition = 1 if distances[source] >= distances[target] else 2
                adjacency[partition, source, target] = 1.0
        return (adjacency / adjacency.sum(dim=(0, 1))).float()

    def to_dict(self) -> dict[str, Any]:
        """The layout in the form of its YAML file; ``from_dict`` reads it back."""
        names = self.joint_names
        return {
            "name": self.name,
            "joints": list(names),
            "bones": {names[j]: names[p] for j, p in enumerate(self.bone_parents) if j != p},
            "center": names[self.center],
            "chest_normal": [names[j] for j in self.chest_normal],
            "previous_bones": {names[j]: names[p] for j, p in enumerate(self.previous_bones) if j != self.root},
            "graph_edges": [[names[a], names[b]] for a, b in self.graph_edges],
            "shoulders": [names[j] for j in self.shoulders],
            "presence_joint": names[self.presence_joint],
            **(
                {"stand_ins": {name: list(others) for name, others in self.stand_ins.items()}} if self.stand_ins else {}
            ),
        }


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML itself lets the last of two equal keys win, which would drop a bone without a word."""


def _construct_unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise LayoutError(f"line {key_node.start_mark.line + 1}: a key must be a word, got a {type(key).__name__}")
        if key in seen:
            raise LayoutError(f"line {key_node.start_mark.line + 1}: '{key}' is given twice")
        seen.add(key)
    return loader.construct_mapping(node)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique_mapping)


def _joint_number(names: tuple[str, ...], joint: Any, where: str) -> int:
    if joint in names:
        return names.index(joint)
    close = difflib.get_close_matches(str(joint), names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise LayoutError(f"{where} names '{joint}', which is not one of the layout's joints{hint}")


def _joint_list(names: tuple[str, ...], joints: Any, length: int, where: str) -> tuple[int, ...]:
    if not isinstance(joints, list | tuple) or len(joints) != length:
        raise LayoutError(f"{where} must be a list of {length} joint names, got {joints!r}")
    numbers = tuple(_joint_number(names, joint, where) for joint in joints)
    if len(set(numbers)) != length:
        raise LayoutError(f"{where} must name {length} different joints, got {list(joints)}")
    return numbers


def _joint_map(names: tuple[str, ...], pairs: Any, where: str) -> dict[int, int]:
    if not isinstance(pairs, Mapping):
        raise LayoutError(f"{where} must map joint names to joint names, got {type(pairs).__name__}")
    return {
        _joint_number(names, joint, where): _joint_number(names, other, f"{where}: {joint}")
        for joint, other in pairs.items()
    }


def _read_stand_ins(names: tuple[str, ...], entries: Any) -> dict[str, tuple[str, ...]]:
    """Each entry speaks of this layout on one side at least: its joint is one of ours, or all that stand in are."""
    if not isinstance(entries, Mapping):
        raise LayoutError(f"stand_ins must map joint names to lists of joint names, got {type(entries).__name__}")
    stand_ins = {}
    for joint, others in entries.items():
        where = f"stand_ins: {joint}"
        if not isinstance(others, list | tuple) or not others or not all(isinstance(other, str) for other in others):
            raise LayoutError(f"{where} must be a non-empty list of joint names, got {others!r}")
        if len(set(others)) != len(others) or joint in others:
            raise LayoutError(f"{where} must list different joints other than itself, got {', '.join(others)}")
        if joint not in names:
            for other in others:
                _joint_number(names, other, f"{where}, which is not one of the layout's joints,")
        stand_ins[str(joint)] = tuple(others)
    return stand_ins


def _check_tree(names: tuple[str, ...], parents: Mapping[int, int]) -> int:
    """The root of the bones, which must form one tree over all joints."""
    roots = [joint for joint in range(len(names)) if joint not in parents]
    settled: set[int] = set()  # joints from which the parents lead to a root
    for start in parents:
        joint, path = start, [start]
        while joint in parents and joint not in settled:
            joint = parents[joint]
            if joint in path:
                cycle = " -> ".join(names[j] for j in [*path[path.index(joint) :], joint])
                raise LayoutError(f"bones form a cycle: {cycle}")
            path.append(joint)
        settled.update(path)
    if len(roots) != 1:
        raise LayoutError(
            f"bones must leave exactly one joint without a parent, got {len(roots)}: "
            f"{', '.join(names[j] for j in roots)}"
        )
    return roots[0]


def from_dict(fields: Mapping[str, Any]) -> Layout:
    """A layout from the fields of its YAML file (see ``ikem_fast/skeletons/ntu-rgb+d.yaml`` for a commented one).

    Raises:
        LayoutError: a key or joint that is unknown, missing or given twice, or bones that do not form one tree.
    """
    if not isinstance(fields, Mapping):
        raise LayoutError(f"a layout must be a mapping of {', '.join(_REQUIRED_KEYS)}, got {type(fields).__name__}")
    for key in fields:
        if key not in _REQUIRED_KEYS + _OPTIONAL_KEYS:
            close = difflib.get_close_matches(str(key), _REQUIRED_KEYS + _OPTIONAL_KEYS, n=1)
            raise LayoutError(f"unknown key '{key}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    missing = [key for key in _REQUIRED_KEYS if key not in fields]
    if missing:
        raise LayoutError(f"missing {', '.join(missing)}")
    joints = fields["joints"]
    if not isinstance(joints, list) or not joints or not all(isinstance(joint, str) for joint in joints):
        raise LayoutError("joints must be a non-empty list of names")
    if len(joints) > MAX_JOINTS:
        raise LayoutError(f"joints must be at most {MAX_JOINTS}, got {len(joints)}")
    if not isinstance(fields["name"], str) or not fields["name"]:
        raise LayoutError(f"name must be text, got {fields['name']!r}")
    names = tuple(joints)
    duplicates = sorted({joint for joint in names if names.count(joint) > 1})
    if duplicates:
        raise LayoutError(f"joints must be distinct, got {', '.join(duplicates)} more than once")

    parents = _joint_map(names, fields["bones"], "bones")
    root = _check_tree(names, parents)
    bone_parents = tuple(parents.get(joint, root) for joint in range(len(names)))
    overrides = _joint_map(names, fields.get("previous_bones") or {}, "previous_bones")
    if overrides.get(root, root) != root:
        raise LayoutError(f"previous_bones: {names[root]} is the root and has no bone before it")
    previous_bones = tuple(overrides.get(joint, bone_parents[joint]) for joint in range(len(names)))
    edges = fields.get("graph_edges")
    if edges is None:
        graph_edges = tuple(sorted(parents.items()))
    elif isinstance(edges, list):
        graph_edges = tuple(_joint_list(names, edge, 2, f"graph_edges[{i}]") for i, edge in enumerate(edges))
    else:
        raise LayoutError(f"graph_edges must be a list of joint pairs, got {type(edges).__name__}")
    if len({frozenset(edge) for edge in graph_edges}) != len(graph_edges):
        raise LayoutError("graph_edges must be distinct, got an edge twice")

    chest_normal = _joint_list(names, fields["chest_normal"], 3, "chest_normal")
    layout = Layout(
        name=fields["name"],
        joint_names=names,
        bone_parents=bone_parents,
        previous_bones=previous_bones,
        graph_edges=graph_edges,
        center=_joint_number(names, fields["center"], "center"),
        chest_normal=chest_normal,
        shoulders=_joint_list(names, fields.get("shoulders") or [names[j] for j in chest_normal[1:]], 2, "shoulders"),
        presence_joint=_joint_number(names, fields.get("presence_joint", names[0]), "presence_joint"),
        stand_ins=_read_stand_ins(names, fields.get("stand_ins") or {}),
    )
    unreachable = [name for name, distance in zip(names, layout.hop_distances(), strict=True) if distance < 0]
    if unreachable:
        raise LayoutError(f"graph_edges do not connect {', '.join(unreachable)} with center '{fields['center']}'")
    return layout


def list_differences(layout: Layout, other: Layout) -> list[str]:
    """In words, what a layout has that another has not; nothing where they are equal."""
    if layout == other:
        return []
    differences = []
    if layout.name != other.name:
        differences.append(f"the layout is '{layout.name}', not '{other.name}'")
    if layout.num_joints != other.num_joints:
        differences.append(f"it has {layout.num_joints} joints, not {other.num_joints}")
    added = [joint for joint in layout.joint_names if joint not in other.joint_names]
    missing = [joint for joint in other.joint_names if joint not in layout.joint_names]
    for joints, how in ((added, "more"), (missing, "fewer")):
        if joints:
            differences.append(f"it has {how} joints: {_listed(joints)}")
    if not added and not missing and layout.joint_names != other.joint_names:
        differences.append("its joints are in another order")
    if not added and not missing:
        own, others = (_without_order(each.to_dict()) for each in (layout, other))
        changed = [key for key in own if key not in ("name", "joints") and own[key] != others.get(key)]
        differences += [f"its {key} {_shortly(own[key], others.get(key))}" for key in changed]
    return differences


def _without_order(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a layout with its edges as a map, so that the same edges in another order are no difference."""
    edges = {" - ".join(sorted(edge)): True for edge in fields["graph_edges"]}
    return {**fields, "graph_edges": edges}


def _shortly(own: Any, other: Any) -> str:
    if isinstance(own, Mapping) and isinstance(other, Mapping):
        differing = [joint for joint in {**own, **other} if own.get(joint) != other.get(joint)]
        return f"differ at {_listed(differing[:5])}" + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
    return f"is {own}, not {other}"


def from_yaml(path: str | Path) -> Layout:
    """The layout in a YAML file.

    Raises:
        LayoutError: the file cannot be read, is no YAML or no usable skeleton; the message names file and reason.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        check_size(text)
        return from_dict(yaml.load(text, Loader=_UniqueKeyLoader))
    # ValueError is also what yaml raises for a date or number that is none.
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise LayoutError(f"layout file {path}: {error}") from None


def names() -> tuple[str, ...]:
    """Names of the layouts that come with the package."""
    return tuple(sorted(path.stem for path in _BUILTIN_FOLDER.glob("*.yaml")))


@cache
def _builtin(name: str) -> Layout:
    return from_yaml(_BUILTIN_FOLDER / f"{name}.yaml")


def get(layout: str | Path | Layout) -> Layout:
    """A layout by its name (``"ntu-rgb+d"``, ``"nw-ucla"``, ``"utd-mhad"``), by the path of a YAML file, or itself.

    Raises:
        LayoutError: no layout has that name, or the file is not a usable skeleton.
    """
    if isinstance(layout, Layout):
        return layout
    if str(layout) in names():
        return _builtin(str(layout))
    if Path(layout).suffix in (".yaml", ".yml"):
        return from_yaml(layout)
    raise LayoutError(f"layout must be {_listed(names())} or the path of a .yaml file, got '{layout}'")


def map_joints(source: Layout, target: Layout) -> tuple[int, ...]:
    """For each joint of ``target`` the joint of ``source`` that takes its place, so that clips of one skeleton can be
    put into an encoder of another.

    It is the joint of the same name; otherwise the first that ``target.stand_ins`` lists for it and ``source`` has;
    otherwise the first that ``source.stand_ins`` lists. One joint may stand in for several: bones between those are
    zero. A layout without stand-ins that equals one of the package (as kept by an older data set or checkpoint) has
    that one's.

    Returns:
        (target.num_joints) joint numbers of ``source``.

    Raises:
        LayoutError: nothing stands in for some joints; the message lists them.
    """
    of_target, of_source = _declared_stand_ins(target), _declared_stand_ins(source)
    numbers = {name: number for number, name in enumerate(source.joint_names)}
    mapping, missing = [], []
    for joint in target.joint_names:
        candidates = (joint, *of_target.get(joint, ()), *of_source.get(joint, ()))
        found = next((numbers[name] for name in candidates if name in numbers), None)
        mapping.append(found)
        if found is None:
            missing.append(joint)
    if missing:
        raise LayoutError(
            f"nothing in layout '{source.name}' stands in for {', '.join(missing)} of layout '{target.name}': name "
            f"joints under stand_ins in the file of either layout"
        )
    return tuple(mapping)


def _declared_stand_ins(layout: Layout) -> Mapping[str, tuple[str, ...]]:
    if not layout.stand_ins and layout.name in names() and _builtin(layout.name) == layout:
        return _builtin(layout.name).stand_ins
    return layout.stand_ins


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)

"""What was run on what: data, encoders, recipes, times, hardware, versions and configurations."""

from __future__ import annotations

import os

import torch

from ikem_fast.data import ClipSet
from ikem_fast.hardware import cpu_name, usable_cores
from ikem_fast.report import page
from ikem_fast.report.page import Section
from ikem_fast.report.records import Material, clock
from ikem_fast.report.sections.runs import KIND_TITLES


def render(material: Material) -> list[Section]:
    values = []
    sets = dict.fromkeys((data_words(clip_set), _clip_words(clip_set)) for clip_set in material.clip_sets())
    for of_set, of_clips in sets:
        values += [("data set", of_set), ("clips", of_clips)]
    shapes = {}
    for run in material.runs:
        model = run.config["model"]
        words = (
            f"ST-GCN, {model['hidden_channels']} hidden channels, features of {model['feature_size']}, embeddings of "
            f"{model['embedding_size']}, queues of {model['queue_size']}"
        )
        shapes.setdefault(words, []).append(run.name)
    for words, names in shapes.items():
        values.append(("encoders", words if len(shapes) == 1 else f"{words} ({', '.join(names)})"))
    for run in material.runs:
        speed = run.clips_per_second()
        rate = f"{run.section['learning_rate']:g}"
        title = KIND_TITLES[run.kind].lower()
        values.append(
            (
                title if len(material.runs_of(run.kind)) == 1 else f"{title}, {run.name}",
                f"{run.step} steps of {run.section['batch_size']} clips, learning rate {rate}, {clock(run.seconds)}"
                + (f", {speed:.0f} clips/s" if speed is not None else ""),
            )
        )
    values += [(name, clock(seconds)) for name, seconds in material.phases]
    versions = dict.fromkeys(
        ", ".join(f"{name} {text}" for name, text in run.versions.items()) for run in material.runs
    )
    values += [("page written on", hardware()), ("versions of the runs", "; ".join(versions))]
    configs = [
        page.folded(f"resolved configuration of {run.name}", page.preformatted(run.config_text))
        for run in material.runs
        if run.config_text is not None
    ]
    return [Section("What was run", (page.facts(values), *configs))]


def data_words(clip_set: ClipSet) -> str:
    """A data set, its protocol and the sizes of its splits."""
    num_train, num_test = (int((clip_set.splits == split).sum()) for split in ("train", "test"))
    return (
        f"{clip_set.metadata['kind']}, protocol {clip_set.metadata['protocol']}: {num_train} training and {num_test} "
        f"test clips of {clip_set.num_classes} actions"
    )


def _clip_words(clip_set: ClipSet) -> str:
    metadata = clip_set.metadata
    prepared = [text for text, on in (("centred", metadata["centring"]), ("rotated", metadata["rotation"])) if on]
    persons = clip_set.num_persons
    return (
        f"{clip_set.clip_length} frames, {clip_set.layout.num_joints} joints ({clip_set.layout.name}), "
        f"{'one person' if persons == 1 else f'up to {persons} persons'}, "
        f"{' and '.join(prepared) or 'neither centred nor rotated'}"
    )


def hardware() -> str:
    """The machine in words: processor, cores this process may use, memory, and the GPU if torch sees one."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        memory_words = f", {memory:.0f} GiB memory"
    except (OSError, ValueError):
        memory_words = ""
    cores = usable_cores()
    threads = f"{cores} {'core' if cores == 1 else 'cores'}, {torch.get_num_threads()} threads"
    words = f"{cpu_name()}, {threads}{memory_words}"
    if torch.cuda.is_available():
        words += f"; {torch.cuda.get_device_name()}"
    return words

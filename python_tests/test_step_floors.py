"""The floors of whole steps count what the trainers have."""

import pytest

from benchmarks import step_floors
from benchmarks.step_floors import Shapes
from ikem_fast import floors, layouts, ops
from ikem_fast.floors import Work
from ikem_fast.methods import IKEM

PUBLISHED = Shapes()


def test_parameters_are_those_of_the_encoders():
    module = IKEM(queue_size=16)
    of_encoders = sum(parameter.numel() for parameter in module.query_encoders.parameters())
    head = step_floors.head_parameters(256, 256, 128)
    assert 6 * (step_floors.encoder_parameters(PUBLISHED) + head) == of_encoders
    of_exchange = sum(parameter.numel() for parameter in module.exchange_heads.parameters())
    assert 6 * step_floors.head_parameters(256, 768, 768) == of_exchange


def test_the_graph_is_that_of_the_layout():
    edges = ops.graph_edges(layouts.get("ntu-rgb+d").adjacency()).tolist()
    assert len(edges) == PUBLISHED.edges
    assert len({(partition, end) for partition, _, end in edges}) == PUBLISHED.groups
    assert floors.edges_and_groups(edges) == (PUBLISHED.edges, PUBLISHED.groups)


def test_published_sizes():
    """Operations of stage 2, and its activations in bfloat16: what there is to say of a step in round numbers."""
    work = step_floors.pretraining_step(Shapes(kind="bf16"), "cross")
    assert work.operations == pytest.approx(3.02e12, rel=0.01)
    assert work.bytes == pytest.approx(24e9, rel=0.05)
    assert work.kind == "bf16"
    single = step_floors.pretraining_step(PUBLISHED, "single")
    assert single.operations < work.operations < 1.1 * single.operations
    assert step_floors.distillation_step(PUBLISHED).operations < single.operations
    # 306 M multiply-adds a person and modality if joints are gathered after the products and padding is multiplied.
    of_clip = step_floors.features(Shapes(clips=1))
    assert 0.7 * 306e6 < of_clip.operations / 2 / 6 / 2 < 306e6


def test_a_head_and_an_update_by_hand():
    assert step_floors.head_parameters(3, 5, 2) == (3 * 5 + 5) + (5 * 2 + 2)
    forward = step_floors.head(2, 7, 3, 5, 2, kind="fp32")
    x, hidden, y, weights = 7 * 3, 7 * 5, 7 * 2, 32
    assert forward == Work(4 * 2 * (x + 2 * hidden + y + weights), 2 * 2 * 7 * (15 + 10))
    both = step_floors.head(2, 7, 3, 5, 2, kind="fp32", backward=True)
    assert both == Work(4 * 2 * (3 * x + (2 + 3) * hidden + 2 * y + 3 * weights), 3 * forward.operations)
    assert floors.sgd(10) == Work(200)
    assert floors.sgd(10, momentum=False) == Work(120)


@pytest.mark.parametrize("modalities", [2, 3, 6])
def test_more_modalities_are_more_work_in_proportion(modalities):
    sizes = {"clips": 2, "width": 2, "queue": 64}
    one, several = (step_floors.pretraining_step(Shapes(**sizes, modalities=s), "single") for s in (1, modalities))
    assert several.operations == modalities * one.operations
    # Across modalities, the joint embeddings grow as well.
    one, several = (step_floors.pretraining_step(Shapes(**sizes, modalities=s), "cross") for s in (1, modalities))
    assert several.operations > modalities * one.operations

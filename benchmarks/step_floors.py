"""The least work of whole steps, composed of the floors of their ops (floors.py), from shapes alone.

Counted for a step of training: both augmented views from stored clips; every encoder that runs, block by block, its
activations written once and read once, the trained ones forward and backward; heads; losses with the gradient of the
embeddings; momentum update and enqueue; SGD with momentum. Activations are in ``kind``, weights and what is between
steps in float32. For stage 2 at the published sizes (six modalities, 128 clips) that is 3.0 TFLOP and, in bfloat16,
24 GB; taking joints together after the products, and multiplying with the zeros that frames are padded with, would make
it 3.65 TFLOP. Not counted: losses' exponentials, what an implementation keeps for itself, and the launches of kernels.

Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ikem_fast import floors
from ikem_fast.floors import Work

PARTITIONS, TAPS = 3, 9


@dataclass(frozen=True)
class Shapes:
    """Sizes of a trainer and its batch. The default is the published one, on Kinect v2's skeleton.

    Attributes:
        clips: N of a batch.
        width: h; features have 16 h numbers and embeddings 8 h.
        queue: K.
        modalities: S.
        students: of a distillation.
        edges: entries of the partitioned adjacency that are not zero.
        groups: pairs of a partition and a joint that an edge of that partition leads to.
        kind: of activations and products.
    """

    clips: int = 128
    width: int = 16
    queue: int = 32768
    modalities: int = 6
    students: int = 3
    frames: int = 50
    joints: int = 25
    persons: int = 2
    edges: int = 73
    groups: int = 57
    kind: str = "fp32"

    @property
    def feature(self) -> int:
        return 16 * self.width

    @property
    def embedding(self) -> int:
        return 8 * self.width

    @property
    def joint_embedding(self) -> int:
        return self.modalities * self.embedding

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Output channels and stride of each of the encoder's blocks."""
        h = self.width
        return [(h, 1)] * 4 + [(2 * h, 2)] + [(2 * h, 1)] * 2 + [(4 * h, 2), (4 * h, 1), (self.feature, 1)]


def encoder_parameters(shapes: Shapes) -> int:
    """Weights of one encoder without its head."""
    channels, joints = 3, shapes.joints
    parameters = 2 * joints * channels
    for number, (out, stride) in enumerate(shapes.blocks):
        parameters += PARTITIONS * (out * channels + out + joints**2)
        parameters += TAPS * out**2 + out + 2 * 2 * out
        if number and (out != channels or stride != 1):
            parameters += out * channels + 3 * out
        channels = out
    return parameters


def head_parameters(*sizes: int) -> int:
    """Weights of linear layers one after another."""
    return sum(before * after + after for before, after in pairwise(sizes))


def head(streams: int, clips: int, *sizes: int, kind: str, backward: bool = False) -> Work:
    """Linear layers from the first size to the last on ``streams`` times ``clips`` features."""
    layers = (floors.linear(streams, clips, *pair, kind=kind, backward=backward) for pair in pairwise(sizes))
    return sum(layers, Work(0, 0, kind))


def pretraining_step(shapes: Shapes, stage: str) -> Work:
    """A step of stage ``"single"`` (1) or ``"cross"`` (2)."""
    s, n, kind = shapes.modalities, shapes.clips, shapes.kind
    losses = {"kind": kind, "backward": True}
    sizes = (shapes.feature, shapes.feature, shapes.embedding)
    work = _views(shapes, s, s) + _encoders(shapes, s, backward=True) + _encoders(shapes, s)
    work += head(s, n, *sizes, kind=kind, backward=True) + head(s, n, *sizes, kind=kind)
    trained = moved = s * (encoder_parameters(shapes) + head_parameters(*sizes))
    contrast = (s, n, shapes.embedding, shapes.queue)
    if stage == "single":
        work += floors.info_nce(*contrast, **losses)
    else:
        exchange = (shapes.feature, shapes.joint_embedding, shapes.joint_embedding)
        work += head(s, n, *exchange, kind=kind, backward=True)
        # Of a single modality there is nothing to exchange context with.
        work += floors.context_loss(*contrast, **losses) if s > 1 else Work(0, 0, kind)
        work += floors.exchange_loss(*contrast, **losses)
        trained += s * head_parameters(*exchange)
        moved = moved // s * (s // 2)  # quirk Q1 moves every other one of them
    return work + floors.momentum_update(moved) + floors.enqueue(s, n, shapes.embedding) + floors.sgd(trained)


def distillation_step(shapes: Shapes) -> Work:
    """A step with a frozen teacher of S modalities and some students."""
    s, students, n, kind = shapes.modalities, shapes.students, shapes.clips, shapes.kind
    joint = shapes.joint_embedding
    of_teacher, of_students = (shapes.feature, shapes.feature, shapes.embedding), (shapes.feature, joint, joint)
    work = _views(shapes, s, students)
    work += _encoders(shapes, s) + head(s, n, *of_teacher, kind=kind)
    work += _encoders(shapes, students, backward=True) + head(students, n, *of_students, kind=kind, backward=True)
    work += floors.relational_distillation_loss(
        students, s, n, shapes.embedding, shapes.queue, kind=kind, backward=True
    )
    work += floors.enqueue(s, n, shapes.embedding) + floors.enqueue(1, n, joint)
    return work + floors.sgd(students * (encoder_parameters(shapes) + head_parameters(*of_students)))


def features(shapes: Shapes) -> Work:
    """Features of N clips for an evaluation: their modalities, and the encoders in inference."""
    views = floors.clip_views(
        shapes.clips, shapes.frames, shapes.joints, shapes.persons, shapes.modalities, 1, shapes.kind
    )
    return views + _encoders(shapes, shapes.modalities)


def _views(shapes: Shapes, *modalities: int) -> Work:
    """Views of the batch in so many modalities each."""
    sizes = (shapes.clips, shapes.frames, shapes.joints, shapes.persons)
    one, *others = (floors.clip_views(*sizes, number, 1, shapes.kind) for number in modalities)
    return sum(others, one) + floors.draw_views(shapes.clips, len(modalities))


def _encoders(shapes: Shapes, streams: int, *, backward: bool = False) -> Work:
    return floors.encoder(
        streams, shapes.clips, shapes.persons, shapes.frames, shapes.joints, shapes.blocks, shapes.edges, shapes.groups,
        kind=shapes.kind, backward=backward,
    )  # fmt: skip

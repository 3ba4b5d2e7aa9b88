"""The pieces of the method as a competent researcher writes them in PyTorch: for whole batches, all bones at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ikem_fast.layouts import Layout
from ikem_fast.modalities.vectors import NORM_FLOOR, REFERENCE_FRAMES

SHOULDER_EPSILON = 1e-4  # of the published preparation
CROP_PADDING_RATIO = 6
SHEAR_AMPLITUDE = 0.5


def prepare_clip(xyz: np.ndarray, layout: Layout, num_frames: int) -> tuple[np.ndarray, int]:
    """A recording as a clip of T frames (docs/method.md section 1).

    Args:
        xyz: (3, F, V, M) float64 in metres, zero where a person is absent.
        layout: the skeleton.
        num_frames: T.

    Returns:
        (3, T, V, M) float32, and L, the number of frames in which the first person was detected.
    """
    recording = torch.from_numpy(xyz)
    length = int(recording[:, :, layout.presence_joint, 0].any(dim=0).sum())
    recording = recording[:, :length]
    centred = recording - recording[:, :, layout.center, None]
    rows = centred.permute(0, 2, 3, 1)  # frames last
    resampled = functional.interpolate(rows.flatten(1, 2), num_frames, mode="linear", align_corners=False)
    clip = resampled.unflatten(1, rows.shape[1:3]).permute(0, 3, 1, 2)
    first, second = layout.shoulders
    u_x, _, u_z = clip[:, :, second] - clip[:, :, first]  # (T, M)
    theta = torch.arccos(u_x / (torch.hypot(u_x, u_z) + SHOULDER_EPSILON))
    theta = torch.where(u_z.sum(dim=0) >= 0, -theta, theta)[:, None]
    (x, y, z), cosine, sine = clip, theta.cos(), theta.sin()
    return torch.stack([cosine * x - sine * z, y, sine * x + cosine * z]).float().numpy(), length


class Augmentation(NamedTuple):
    """Random numbers that turn N clips into one view of them (docs/method.md section 2)."""

    start: Tensor  # (N,) int64, the crop's first frame in 0 ... 2p
    first: Tensor  # (N, 3), the shear's coefficients a
    second: Tensor  # (N, 3), the shear's coefficients b


def draw_augmentation(num_clips: int, num_frames: int, device: torch.device) -> Augmentation:
    """Of clips of T = ``num_frames`` frames, by the device's own random numbers."""
    start = torch.randint(2 * (num_frames // CROP_PADDING_RATIO) + 1, (num_clips,), device=device)
    first, second = (torch.rand(2, num_clips, 3, device=device) * 2 - 1) * SHEAR_AMPLITUDE
    return Augmentation(start, first, second)


def augment(clips: Tensor, drawn: Augmentation) -> Tensor:
    """Crop and shear of clips (N, 3, T, V, M)."""
    num_frames = clips.shape[2]
    padding = num_frames // CROP_PADDING_RATIO
    mirrored = torch.arange(-padding, num_frames + padding, device=clips.device)
    mirrored = torch.where(mirrored < 0, -1 - mirrored, mirrored)
    mirrored = torch.where(mirrored >= num_frames, 2 * num_frames - 1 - mirrored, mirrored)
    frames = mirrored[drawn.start[:, None] + torch.arange(num_frames, device=clips.device)]  # (N, T)
    cropped = clips.gather(2, frames[:, None, :, None, None].expand(clips.shape))
    one = torch.ones_like(drawn.start, dtype=clips.dtype)
    (a1, a2, a3), (b1, b2, b3) = drawn.first.to(clips.dtype).T, drawn.second.to(clips.dtype).T
    matrices = torch.stack([one, a1, b1, a2, one, b2, a3, b3, one], dim=1).view(-1, 3, 3)
    return torch.bmm(matrices, cropped.flatten(2)).view_as(clips)


def derive_modalities(
    clips: Tensor, num_frames: Tensor, layout: Layout, modalities: Sequence[str]
) -> dict[str, Tensor]:
    """The modalities (N, 3, T, V, M) of clips, each intermediate result made once (docs/method.md section 3).

    Args:
        clips: (N, 3, T, V, M) joint coordinates in metres.
        num_frames: (N,) frames of each recording.
        layout: the skeleton.
        modalities: which of the six.
    """
    scale = (REFERENCE_FRAMES / num_frames.to(clips.dtype)).view(-1, 1, 1, 1, 1)
    derived = {"joint": clips}
    if "motion" in modalities or "acceleration" in modalities:
        velocity = scale * clips.diff(dim=2)
        derived["motion"] = _pad_frames(velocity, 1)
        derived["acceleration"] = _pad_frames(scale * velocity.diff(dim=2), 2)
    if set(modalities) & {"bone", "rotation_axis", "angular_velocity"}:
        bones = clips - clips[:, :, :, _index(layout.bone_parents, clips.device)]
        a, b, c = (bones[:, :, :, joint] for joint in layout.chest_normal)
        bones[:, :, :, layout.root] = _normalize(_cross(a - c, b - c))
        derived["bone"] = bones
    if "rotation_axis" in modalities or "angular_velocity" in modalities:
        previous = _index(layout.previous_bones, clips.device)
        axes = _cross(bones, bones[:, :, :, previous])
        derived["rotation_axis"] = axes
    if "angular_velocity" in modalities:
        directions = _normalize(bones)
        before = directions[:, :, :, previous]
        sine = torch.linalg.vector_norm(_cross(directions, before), dim=1, keepdim=True)
        angles = torch.atan2(sine, (directions * before).sum(dim=1, keepdim=True))
        turning = scale * angles.diff(dim=2) * _normalize(axes)[:, :, :-1]
        derived["angular_velocity"] = _pad_frames(turning, 1)
    return {name: derived[name] for name in modalities}


@functools.cache
def _index(joints: tuple[int, ...], device: torch.device) -> Tensor:
    """Joint numbers on the device, where they stay: copying them there would make the host wait in every call."""
    return torch.tensor(joints, device=device)


def _pad_frames(values: Tensor, number: int) -> Tensor:
    return functional.pad(values, (0, 0, 0, 0, 0, number))


def _normalize(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors, dim=1, eps=NORM_FLOOR)


def _cross(first: Tensor, second: Tensor) -> Tensor:
    return torch.linalg.cross(first, second, dim=1)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of [q·k, q·queue] / temperature with the first as target (docs/method.md section 5), a scalar.

    Args:
        q: (N, D) unit queries.
        k: (N, D) unit keys of the same clips.
        queue: (D, K) unit keys of earlier clips.
        temperature: divides the similarities.
    """
    positive = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, q @ queue], dim=1) / temperature
    return functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def context_losses(
    q: Mapping[str, Tensor],
    k: Mapping[str, Tensor],
    queues: Tensor,
    temperature: float,
    topk: int,
    loss_of_pair: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:
    """Each modality's context loss, the mean over its partners (docs/method.md section 6), scalars.

    Args:
        q: unit queries (N, D) of every modality.
        k: unit keys (N, D).
        queues: (S, D, K) in the order of the modalities.
        temperature: divides the similarities.
        topk: neighbours mined in the partner's queue.
        loss_of_pair: ``mined_loss``, or that compiled.
    """
    loss_of_pair = loss_of_pair or mined_loss
    names = list(q)
    similarity = {name: q[name] @ queue for name, queue in zip(names, queues, strict=True)}
    neighbours = {name: similarity[name].topk(topk, dim=1).indices for name in names}
    losses = {}
    for a in names:
        positive = (q[a] * k[a]).sum(dim=1, keepdim=True)
        of_pairs = [
            loss_of_pair(positive, similarity[a], similarity[b], neighbours[b], temperature) for b in names if b != a
        ]
        losses[a] = torch.stack(of_pairs).mean()
    return losses


def relational_distillation_losses(
    students: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    joint_embedding: Tensor,
    queues: Sequence[Tensor],
    joint_queue: Tensor,
    temperature: float,
    topk: int,
    loss_of_pair: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:
    """Each student's loss, the mean over the teacher's modalities (docs/method.md section 7), scalars.

    Args:
        students: unit outputs (N, S·D).
        teacher: unit embeddings (N, D) of every modality.
        joint_embedding: t, (N, S·D).
        queues: (D, K) of every modality, as the teacher is compared with them.
        joint_queue: (S·D, K).
        temperature: divides the similarities.
        topk: neighbours mined in each of the teacher's queues.
        loss_of_pair: ``mined_loss``, or that compiled.
    """
    loss_of_pair = loss_of_pair or mined_loss
    similarities = [embedding @ queue for embedding, queue in zip(teacher.values(), queues, strict=True)]
    neighbours = [similarity.topk(topk, dim=1).indices for similarity in similarities]
    losses = {}
    for name, output in students.items():
        positive = (output * joint_embedding).sum(dim=1, keepdim=True)
        relation = output @ joint_queue
        of_modalities = [
            loss_of_pair(positive, relation, similarity, nearest, temperature)
            for similarity, nearest in zip(similarities, neighbours, strict=True)
        ]
        losses[name] = torch.stack(of_modalities).mean()
    return losses


def mined_loss(own: Tensor, similarity: Tensor, other: Tensor, neighbours: Tensor, temperature: float) -> Tensor:
    """Minus the mean log-softmax of [own, similarity, similarity * other] / temperature at the positives: the first,
    and in both other parts the ``neighbours``.
    """
    logits = torch.cat([own, similarity, similarity * other], dim=1) / temperature
    positives = [torch.zeros_like(neighbours[:, :1]), neighbours + 1, neighbours + 1 + similarity.shape[1]]
    return -logits.log_softmax(dim=1).gather(1, torch.cat(positives, dim=1)).mean()


@torch.no_grad()
def momentum_update_(keys: Sequence[Tensor], queries: Sequence[Tensor], momentum: float) -> None:
    """k <- m k + (1 - m) q for all tensors in one go."""
    torch._foreach_lerp_(list(keys), list(queries), 1 - momentum)

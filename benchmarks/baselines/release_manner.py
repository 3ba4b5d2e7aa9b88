"""The pieces of the method in the manner of research releases: a call for each bone, clip and pair, nothing fused.

Functions have the names, arguments and results of those in ``eager``; the docstrings there say what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.baselines.eager import CROP_PADDING_RATIO, SHOULDER_EPSILON, Augmentation, draw_augmentation
from ikem_fast.layouts import Layout
from ikem_fast.modalities.vectors import NORM_FLOOR, REFERENCE_FRAMES

__all__ = [
    "augment",
    "context_losses",
    "derive_modalities",
    "draw_augmentation",
    "info_nce",
    "momentum_update_",
    "prepare_clip",
    "relational_distillation_losses",
]


def prepare_clip(xyz: np.ndarray, layout: Layout, num_frames: int) -> tuple[np.ndarray, int]:
    """Frame by frame and person by person."""
    length = 0
    for frame in range(xyz.shape[1]):
        if np.any(xyz[:, frame, layout.presence_joint, 0] != 0):
            length += 1
    centred = np.zeros_like(xyz[:, :length])
    for frame in range(length):
        for person in range(xyz.shape[3]):
            centre = xyz[:, frame, layout.center, person]
            centred[:, frame, :, person] = xyz[:, frame, :, person] - centre[:, None]
    rows = torch.from_numpy(centred.transpose(0, 2, 3, 1).reshape(3, -1, length))
    resampled = functional.interpolate(rows, num_frames, mode="linear", align_corners=False).numpy()
    clip = resampled.reshape(3, *xyz.shape[2:], num_frames).transpose(0, 3, 1, 2).copy()
    first, second = layout.shoulders
    for person in range(xyz.shape[3]):
        angles, depth = [], 0.0
        for frame in range(num_frames):
            u = clip[:, frame, second, person] - clip[:, frame, first, person]
            depth += u[2]
            u[1] = 0
            angles.append(np.arccos(u[0] / (np.linalg.norm(u) + SHOULDER_EPSILON)))
        sign = -1 if depth >= 0 else 1
        for frame, angle in enumerate(angles):
            cosine, sine = np.cos(sign * angle), np.sin(sign * angle)
            rotation = np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
            clip[:, frame, :, person] = np.dot(rotation, clip[:, frame, :, person])
    return clip.astype(np.float32), length


class _AugmentedClips(Dataset):
    """Clips that are augmented one by one in numpy as they are loaded."""

    def __init__(self, clips: np.ndarray, drawn: Augmentation) -> None:
        self.clips = clips
        self.start, self.first, self.second = (values.cpu().numpy() for values in drawn)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> np.ndarray:
        return _shear(_crop(self.clips[index], self.start[index]), self.first[index], self.second[index])


def _crop(clip: np.ndarray, start: int) -> np.ndarray:
    num_frames = clip.shape[1]
    padding = num_frames // CROP_PADDING_RATIO
    padded = np.concatenate((clip[:, :padding][:, ::-1], clip, clip[:, num_frames - padding :][:, ::-1]), axis=1)
    return padded[:, start : start + num_frames]


def _shear(clip: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    matrix = np.array([[1, first[0], second[0]], [first[1], 1, second[1]], [first[2], second[2], 1]])
    sheared = np.dot(clip.transpose(1, 2, 3, 0), matrix.T).transpose(3, 0, 1, 2)
    return np.ascontiguousarray(sheared, dtype=clip.dtype)


def augment(clips: Tensor, drawn: Augmentation) -> Tensor:
    """Clip by clip on the CPU, through a data loader."""
    loader = DataLoader(_AugmentedClips(clips.cpu().numpy(), drawn), batch_size=len(clips))
    (batch,) = loader
    return batch.to(clips.device)


def derive_modalities(
    clips: Tensor, num_frames: Tensor, layout: Layout, modalities: Sequence[str]
) -> dict[str, Tensor]:
    """Every modality by itself, from the joints on."""
    scales = [REFERENCE_FRAMES / frames for frames in num_frames.tolist()]
    functions = {
        "joint": lambda: clips,
        "motion": lambda: _motion(clips, scales),
        "bone": lambda: _bones(clips, layout),
        "acceleration": lambda: _motion(_motion(clips, scales), scales, last=2),
        "rotation_axis": lambda: _rotation_axes(_bones(clips, layout), layout),
        "angular_velocity": lambda: _angular_velocity(_bones(clips, layout), scales, layout),
    }
    return {name: functions[name]() for name in modalities}


def _motion(values: Tensor, scales: Sequence[float], last: int = 1) -> Tensor:
    motion = torch.zeros_like(values)
    motion[:, :, :-1] = values[:, :, 1:] - values[:, :, :-1]
    for clip, scale in enumerate(scales):
        motion[clip] = motion[clip] * scale
    motion[:, :, -last:] = 0
    return motion


def _bones(clips: Tensor, layout: Layout) -> Tensor:
    bones = torch.zeros_like(clips)
    for joint, parent in enumerate(layout.bone_parents):
        bones[:, :, :, joint] = clips[:, :, :, joint] - clips[:, :, :, parent]
    a, b, c = (bones[:, :, :, joint] for joint in layout.chest_normal)
    normal = torch.cross(a - c, b - c, dim=1)
    bones[:, :, :, layout.root] = functional.normalize(normal, dim=1, eps=NORM_FLOOR)
    return bones


def _rotation_axes(bones: Tensor, layout: Layout) -> Tensor:
    axes = torch.zeros_like(bones)
    for joint, before in enumerate(layout.previous_bones):
        axes[:, :, :, joint] = torch.cross(bones[:, :, :, joint], bones[:, :, :, before], dim=1)
    return axes


def _angular_velocity(bones: Tensor, scales: Sequence[float], layout: Layout) -> Tensor:
    axes = functional.normalize(_rotation_axes(bones, layout), dim=1, eps=NORM_FLOOR)
    directions = functional.normalize(bones, dim=1, eps=NORM_FLOOR)
    angles = torch.zeros_like(bones[:, :1])
    for joint, before in enumerate(layout.previous_bones):
        one, other = directions[:, :, :, joint], directions[:, :, :, before]
        sine = torch.norm(torch.cross(one, other, dim=1), dim=1)
        angles[:, 0, :, joint] = torch.atan2(sine, torch.sum(one * other, dim=1))
    return _motion(angles, scales) * axes


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([positive, negative], dim=1)
    logits /= temperature
    return functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def context_losses(
    q: Mapping[str, Tensor], k: Mapping[str, Tensor], queues: Tensor, temperature: float, topk: int
) -> dict[str, Tensor]:
    negatives = {
        name: torch.einsum("nc,ck->nk", q[name], queue.clone().detach()) for name, queue in zip(q, queues, strict=True)
    }
    losses = {}
    for a in q:
        loss = 0.0
        for b in q:
            if a != b:
                positive = torch.einsum("nc,nc->n", q[a], k[a]).unsqueeze(-1)
                loss = loss + _mined_loss(positive, negatives[a], negatives[b], negatives[b], temperature, topk)
        losses[a] = loss / (len(q) - 1)
    return losses


def relational_distillation_losses(
    students: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    joint_embedding: Tensor,
    queues: Sequence[Tensor],
    joint_queue: Tensor,
    temperature: float,
    topk: int,
) -> dict[str, Tensor]:
    losses = {}
    for name, output in students.items():
        loss = 0.0
        for embedding, queue in zip(teacher.values(), queues, strict=True):
            positive = torch.einsum("nc,nc->n", output, joint_embedding).unsqueeze(-1)
            relation = torch.einsum("nc,ck->nk", output, joint_queue.clone().detach())
            similarity = torch.einsum("nc,ck->nk", embedding, queue.clone().detach())
            loss = loss + _mined_loss(positive, relation, similarity, similarity, temperature, topk)
        losses[name] = loss / len(teacher)
    return losses


def _mined_loss(
    own: Tensor, similarity: Tensor, other: Tensor, mined_in: Tensor, temperature: float, topk: int
) -> Tensor:
    """The positives as a mask over all logits."""
    logits = torch.cat([own, similarity, similarity * other], dim=1)
    logits /= temperature
    _, neighbours = torch.topk(mined_in, topk, dim=1)
    mined = torch.zeros_like(mined_in)
    mined.scatter_(1, neighbours, 1)
    mask = torch.cat([torch.ones_like(own), mined, mined], dim=1)
    log_probability = functional.log_softmax(logits, dim=1)
    return -((mask * log_probability).sum(dim=1) / mask.sum(dim=1)).mean()


@torch.no_grad()
def momentum_update_(keys: Sequence[Tensor], queries: Sequence[Tensor], momentum: float) -> None:
    """Tensor by tensor."""
    for key, query in zip(keys, queries, strict=True):
        key.copy_(key * momentum + query * (1 - momentum))

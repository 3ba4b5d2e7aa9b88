"""Where the paper's method and its released code differ: each difference is one named switch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Quirks:
    """Behaviours of the authors' release (docs/method.md, section "Quirks"); ``True`` is what the release does.

    The defaults keep what is a choice about training and correct what is a slip.

    Attributes:
        partial_momentum_update: Q1, in stage 2 only the key encoders of motion, acceleration and angular velocity
            follow their query encoders; the others stay as stage 1 left them.
        bone_queue_for_angular_velocity: Q2, distillation compares the teacher's angular velocity with the bone queue.
        teacher_in_training_mode: Q3, the frozen teacher uses batch statistics and dropout.
        early_fusion_student: Q4, with exactly joint, motion and bone there is one student fed their nine channels,
            and the bone modality leaves the chest normal out.
        rederive_evaluation_features: Q5, the linear evaluation recomputes its constant features every epoch.
        file_frame_count: Q6, the time scale counts a recording's frames also where no one was detected.
        redraw_key_weights: Q7, key encoders start from other random weights than the query encoders.
        best_epoch_on_test: Q8, the evaluation reports its best epoch as judged on the test set.
        one_hop_graph: Q9, the encoder's graph tells distances from the centre apart only up to one edge.
    """

    partial_momentum_update: bool = True
    bone_queue_for_angular_velocity: bool = False
    teacher_in_training_mode: bool = True
    early_fusion_student: bool = False
    rederive_evaluation_features: bool = False
    file_frame_count: bool = True
    redraw_key_weights: bool = False
    best_epoch_on_test: bool = False
    one_hop_graph: bool = True

    @classmethod
    def default(cls) -> Quirks:
        return cls()

    @classmethod
    def release(cls) -> Quirks:
        """Every quirk on: the behaviour of the authors' release."""
        return cls(**{field.name: True for field in fields(cls)})

    @classmethod
    def of_fidelity(cls, fidelity: str) -> Quirks:
        """The quirks of ``"default"`` or ``"release"``."""
        if fidelity not in ("default", "release"):
            raise ValueError(f"fidelity must be 'default' or 'release', got {fidelity!r}")
        return cls.release() if fidelity == "release" else cls.default()

    def to_dict(self) -> dict[str, bool]:
        return asdict(self)

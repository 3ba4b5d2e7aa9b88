"""The names of the phases that training marks with ``ikem_fast.ranges.phase``, in the order in which they are shown."""

from __future__ import annotations

FORWARD = "forward"
Phase = tuple[str, str]  # a phase and its pass, "forward" or "backward"

STEP = "training step"
BACKWARD = "backward"
DATA = "reading data"
# Every one of them once a step, or as often as the batch has parts; a step has those of its method and stage.
STEP_PHASES = (
    DATA,
    "momentum update",
    "views",
    *("query encoders", "heads", "key encoders"),
    *("teacher encoders", "student encoders"),
    *("single contrast", "context exchange", "implicit exchange", "relational distillation"),
    BACKWARD,
    *("gather of keys", "enqueue"),
    *("gradient limit", "optimiser step"),
)
# Not in every step.
OCCASIONAL = ("reading losses back", "kNN", "checkpoint")
# In a thread of its own, which torch's profiler does not follow.
READING_AHEAD = "reading ahead"

"""Views: the modalities, and the combinations of them, that are judged."""

from __future__ import annotations

from collections.abc import Sequence

from ikem_fast.methods.common import THREE_MODALITIES


def views_of(modalities: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names and modalities of the views that are judged, the fullest last.

    They are each modality; joint, motion and bone where there are more; and all of them.
    """
    views = {name: (name,) for name in modalities}
    if len(modalities) > len(THREE_MODALITIES) and set(THREE_MODALITIES) <= set(modalities):
        views["+".join(THREE_MODALITIES)] = THREE_MODALITIES
    if len(modalities) > 1:
        views["all"] = tuple(modalities)
    return views

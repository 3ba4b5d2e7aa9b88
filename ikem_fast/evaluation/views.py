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


def fusion_weights(modalities: Sequence[str], of_three: Sequence[float]) -> tuple[float, ...]:
    """Weights by which scores of a view's modalities are fused, in the order of the modalities.

    Args:
        modalities: of the view.
        of_three: weights of joint, motion and bone, which are taken where a view is of exactly these; all modalities of
            any other view count the same, 1 / their number.
    """
    if set(modalities) != set(THREE_MODALITIES):
        return (1.0 / len(modalities),) * len(modalities)
    by_name = dict(zip(THREE_MODALITIES, of_three, strict=True))
    return tuple(float(by_name[name]) for name in modalities)

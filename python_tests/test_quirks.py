from dataclasses import fields

import pytest

from ikem_fast.quirks import Quirks


def test_defaults_keep_choices_and_correct_slips():
    on = {name for name, value in Quirks.default().to_dict().items() if value}
    assert on == {"partial_momentum_update", "teacher_in_training_mode", "file_frame_count", "one_hop_graph"}
    assert Quirks() == Quirks.default() == Quirks.of_fidelity("default")


def test_release_has_all_on():
    assert Quirks.release() == Quirks.of_fidelity("release")
    assert all(getattr(Quirks.release(), field.name) for field in fields(Quirks))
    assert len(fields(Quirks)) == 9


def test_unknown_fidelity():
    with pytest.raises(ValueError, match="'paper'"):
        Quirks.of_fidelity("paper")

import pytest
import reference_vectors as vectors
import small_trainers
import torch

from ikem_fast import load_reference
from ikem_fast.evaluation import LinearClassifier
from ikem_fast.methods import IKEM, RelationalDistillation
from ikem_fast.quirks import Quirks
from ikem_fast.reference import ReferenceCheckpointError, to_reference


@pytest.fixture
def cross():
    return vectors.checkpoint("cross_reference_checkpoint.pt")


@pytest.mark.parametrize("name", ["cross_reference_checkpoint.pt", "distill_reference_checkpoint.pt"])
def test_released_checkpoints_are_read_whole_and_written_back(name):
    module = load_reference(vectors.FOLDER / name)
    assert type(module) is (IKEM if name.startswith("cross") else RelationalDistillation)
    state, written = vectors.checkpoint(name), to_reference(module)
    assert set(written) == set(state)
    assert all(torch.equal(written[key], state[key]) for key in state)


def test_sizes_are_read_off_the_tensors(cross):
    module = load_reference(cross)
    assert (module.hidden_channels, module.feature_size, module.embedding_size, module.queue_size) == (4, 16, 8, 64)
    assert module.layout.name == "ntu-rgb+d"
    assert module.quirks == Quirks.release()
    assert (module.temperature, module.momentum, module.topk, module.dropout) == (0.07, 0.999, 1, 0.5)


def test_overrides_and_fidelity(cross):
    module = load_reference(cross, fidelity="default", dropout=0.25, temperature=0.1, topk=3, momentum=0.9)
    assert (module.temperature, module.momentum, module.topk, module.dropout) == (0.1, 0.9, 3, 0.25)
    assert module.quirks == Quirks.default()
    assert load_reference(cross, quirks=Quirks(partial_momentum_update=False)).quirks == Quirks(
        partial_momentum_update=False
    )


def test_any_module_of_ours_survives_the_round_trip(tmp_path):
    for index, module in enumerate(
        [
            small_trainers.ikem(modalities=("joint", "bone")),
            small_trainers.distillation(quirks=Quirks.release()),
            small_trainers.distillation(
                small_trainers.ikem(modalities=("joint", "motion", "bone"), quirks=Quirks.release())
            ),
            LinearClassifier("utd-mhad", ("motion",), num_classes=7, hidden_channels=2, feature_size=4),
        ]
    ):
        path = tmp_path / f"{index}.pt"
        torch.save(to_reference(module), path)
        again = load_reference(path, quirks=module.quirks)
        assert type(again) is type(module)
        assert again.layout == module.layout
        assert again.modalities == module.modalities
        copied = again.state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(copied[key], tensor), key


def test_every_wrong_key_is_listed(cross):
    del cross["encoder_q_bone.fc.0.weight"]
    cross["encoder_q.fc.4.weight"] = torch.zeros(2)
    cross["mlp2a.0.bias"] = torch.zeros(3)
    with pytest.raises(ReferenceCheckpointError) as error:
        load_reference(cross)
    message = str(error.value)
    assert "missing encoder_q_bone.fc.0.weight" in message
    assert "unexpected encoder_q.fc.4.weight" in message
    assert "mlp2a.0.bias must be (48,), got (3,)" in message


def test_queue_pointers_must_agree_and_lie_in_the_queue(cross):
    cross["queue_ptr_bone"] = torch.tensor([8])
    with pytest.raises(ReferenceCheckpointError, match="queue pointers must agree"):
        load_reference(cross)
    for key in cross:
        if key.startswith("queue_ptr"):
            cross[key] = torch.tensor([64])
    with pytest.raises(ReferenceCheckpointError, match=r"queue pointers must be in 0 ... 63, got 64"):
        load_reference(cross)


def test_another_graph_is_refused(cross):
    for key in cross:
        if key.endswith(".A"):
            cross[key] = cross[key].flip(1)
    with pytest.raises(ReferenceCheckpointError, match=r"encoder_q.A \(3, 25, 25\) is not the graph of layout"):
        load_reference(cross)


def test_one_encoder_with_another_graph_is_refused(cross):
    cross["encoder_k_motion.A"] = cross["encoder_k_motion.A"].flip(1)
    with pytest.raises(ReferenceCheckpointError, match=r"encoder_k_motion.A is not the graph of layout 'ntu-rgb\+d'"):
        load_reference(cross)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ReferenceCheckpointError, match=r"none\.pt: no such file"):
        load_reference(tmp_path / "none.pt")
    whole = (vectors.FOLDER / "distill_reference_checkpoint.pt").read_bytes()
    for name, content in (("empty.pt", b""), ("cut.pt", whole[: len(whole) // 2]), ("text.pt", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ReferenceCheckpointError, match=f"{name}: not a readable checkpoint"):
            load_reference(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ReferenceCheckpointError, match=r"other\.pt: expected a flat dict of tensors"):
        load_reference(tmp_path / "other.pt")
    with pytest.raises(ReferenceCheckpointError, match=r"missing encoder_q\.A"):
        load_reference({"weight": torch.zeros(1)})


def test_overrides_that_do_not_exist_are_named(cross):
    with pytest.raises(ValueError, match=r"temprature is no override; .*did you mean temperature"):
        load_reference(cross, temprature=0.1)
    with pytest.raises(ValueError, match="queue_size is read off the checkpoint"):
        load_reference(cross, queue_size=7)
    with pytest.raises(ValueError, match="fidelity must be 'default' or 'release', got 'exact'"):
        load_reference(cross, fidelity="exact")

"""Linear heads: the stack against one head trained the plain way, the result's meaning, and the classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from evaluation_helpers import small_ikem, write_clip_set

from ikem_fast import MODALITIES
from ikem_fast.engine.config import LinearConfig
from ikem_fast.engine.randomness import epoch_order
from ikem_fast.evaluation import Features, build_classifier, extract, linear, train_heads
from ikem_fast.evaluation.accuracy import confusion_matrix, top_k_accuracy
from ikem_fast.evaluation.linear import evaluate_linear, train_heads_of_seeds
from ikem_fast.evaluation.views import fusion_weights, views_of
from ikem_fast.methods import RelationalDistillation
from ikem_fast.quirks import Quirks

NAMES = ("joint", "motion", "bone", "acceleration")


def some_features(num_clips, seed, names=NAMES, num_classes=4, noise=0.6):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(names), num_classes, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num_clips) % num_classes
    rows = centres[:, labels] + noise * torch.randn(len(names), num_clips, 8, generator=generator)
    return Features(rows, names, labels, tuple(f"clip{i}" for i in range(num_clips)))


def plain_training(features, members, weights, biases, settings, seed):
    """A view's heads trained one at a time, as the definition says it."""
    weights = [weight.clone().requires_grad_() for weight in weights]
    biases = [bias.clone().requires_grad_() for bias in biases]
    optimizer = torch.optim.SGD([*weights, *biases], lr=settings.learning_rate, momentum=0.9)
    for epoch in range(settings.epochs):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (0.1 if epoch >= settings.milestones[0] else 1.0)
        order = epoch_order(len(features.labels), seed, epoch)
        for start in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
            clips = order[start : start + settings.batch_size]
            heads = zip(members, weights, biases, strict=True)
            logits = [features.features[row, clips] @ weight.T + bias for row, weight, bias in heads]
            optimizer.zero_grad()
            F.cross_entropy(torch.stack(logits).mean(dim=0), features.labels[clips]).backward()
            optimizer.step()
    return weights, biases


@pytest.mark.parametrize("view", ["motion", "joint+motion+bone", "all"])
def test_the_stack_trains_each_view_as_if_it_were_alone(view):
    train, test = some_features(50, 1), some_features(20, 2)
    settings = LinearConfig(epochs=6, batch_size=16, learning_rate=0.5, milestones=[4])
    members = [NAMES.index(name) for name in views_of(NAMES)[view]]
    stack = linear._HeadStack(views_of(NAMES), NAMES, 8, 4, seeds=[5])
    weights = stack.weight.detach()[0, stack.heads_of(view)].transpose(1, 2)
    biases = stack.bias.detach()[0, stack.heads_of(view), 0]
    weights, biases = plain_training(train, members, weights, biases, settings, seed=5)
    result = train_heads(train, test, list("abcd"), settings, seed=5)
    torch.testing.assert_close(result.weights[view], torch.stack(weights).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.biases[view], torch.stack(biases).detach(), rtol=1e-4, atol=1e-5)
    logits = [test.features[row] @ w.T + b for row, w, b in zip(members, weights, biases, strict=True)]
    logits = torch.stack(logits).mean(dim=0).detach()
    torch.testing.assert_close(result.scores[view], logits, rtol=1e-4, atol=1e-5)
    row = next(row for row in result.rows if row.name == view)
    assert row.top1 == pytest.approx((logits.argmax(dim=1) == test.labels).double().mean().item())
    assert row.top5 == 1.0


def test_initial_heads_are_as_the_method_says():
    stack = linear._HeadStack(views_of(NAMES), NAMES, 256, 60, seeds=[0])
    assert stack.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not stack.bias.any()


def test_views():
    assert list(views_of(("joint",))) == ["joint"]
    assert list(views_of(("joint", "motion", "bone"))) == ["joint", "motion", "bone", "all"]
    assert list(views_of(("bone", "motion", "joint", "rotation_axis")))[-2:] == ["joint+motion+bone", "all"]
    assert list(views_of(("joint", "motion", "rotation_axis", "acceleration")))[-1] == "all"


def test_last_epoch_is_the_result_and_the_best_one_only_with_the_quirk():
    train, test = some_features(40, 1, noise=2.5), some_features(60, 2, noise=2.5)
    settings = LinearConfig(epochs=12, batch_size=16, learning_rate=3.0, milestones=[10])
    last = train_heads(train, test, list("abcd"), settings)
    best = train_heads(train, test, list("abcd"), settings, best_epoch_on_test=True)
    assert any(row.best_top1 > row.top1 for row in last.rows)
    for before, after in zip(last.rows, best.rows, strict=True):
        history = last.history[before.name]
        assert best.history[before.name] == history
        assert before.top1 == pytest.approx(history[-1])
        assert before.best_top1 == after.best_top1 == max(history)
        assert history[before.best_epoch - 1] == max(history)
        assert after.top1 == pytest.approx(max(history))
        accuracy = (best.scores[before.name].argmax(dim=1) == test.labels).double().mean().item()
        assert accuracy == pytest.approx(max(history))


def test_same_seed_same_numbers_and_other_seed_others():
    train, test = some_features(40, 1), some_features(20, 2)
    settings = LinearConfig(epochs=2, batch_size=16, milestones=[1])
    first, again, other = (train_heads(train, test, list("abcd"), settings, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.scores["all"], again.scores["all"])
    assert not torch.equal(first.scores["all"], other.scores["all"])


def test_seeds_side_by_side_are_as_one_by_one():
    train, test = some_features(40, 1), some_features(20, 2)
    settings = LinearConfig(epochs=4, batch_size=16, milestones=[3], learning_rate=0.5)
    together = train_heads_of_seeds(train, test, list("abcd"), settings, seeds=[7, 3])
    for seed, result in zip((7, 3), together, strict=True):
        alone = train_heads(train, test, list("abcd"), settings, seed=seed)
        for view, scores in alone.scores.items():
            torch.testing.assert_close(result.scores[view], scores, rtol=1e-5, atol=1e-6)
        assert result.history == alone.history
        assert result.rows == alone.rows


def test_heads_that_were_trained_apart_are_fused_by_weights():
    train, test = some_features(40, 1, noise=2.0), some_features(60, 2, noise=2.0)
    weights = [0.5, 2.0, 0.0]
    settings = LinearConfig(epochs=3, batch_size=16, milestones=[], learning_rate=0.5, fusion_weights=weights)
    result = train_heads(train, test, list("abcd"), settings)
    assert [row.name for row in result.late_rows] == ["late_joint+motion+bone", "late_all"]
    three = 0.5 * result.scores["joint"] + 2.0 * result.scores["motion"]
    every = sum(result.scores[name] for name in NAMES) / 4
    for row, expected in zip(result.late_rows, (three, every), strict=True):
        torch.testing.assert_close(result.scores[row.name], expected)
        assert row.top1 == pytest.approx((expected.argmax(dim=1) == test.labels).double().mean().item())
        assert row.top1 == pytest.approx(result.history[row.name][-1])
        assert row.best_top1 == pytest.approx(max(result.history[row.name]))
    assert result.late_rows[0].weights == (0.5, 2.0, 0.0)
    assert result.late_rows[1].weights == (0.25,) * 4
    # They are other scores than those of heads that were trained on the mean.
    assert not torch.allclose(result.scores["late_all"], result.scores["all"])
    names = [*NAMES, "late_joint+motion+bone", "late_all", "joint+motion+bone", "all"]
    assert [row.name for row in result.all_rows] == names


def test_weights_go_by_the_modality_and_not_by_its_place():
    assert fusion_weights(("bone", "joint", "motion"), [0.6, 0.5, 0.4]) == (0.4, 0.6, 0.5)
    assert fusion_weights(("joint", "motion"), [0.6, 0.5, 0.4]) == (0.5, 0.5)


def test_accuracy_among_the_highest():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([0, 1, 0, 2])
    assert [top_k_accuracy(logits, labels, k).item() for k in (1, 2, 3, 5)] == [0.5, 0.75, 1.0, 1.0]
    assert top_k_accuracy(torch.stack([logits, -logits]), labels, 1).tolist() == [0.5, 0.25]


def test_confusion_has_true_classes_down():
    labels, predictions = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 2])
    assert confusion_matrix(labels, predictions, 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_fewer_clips_than_a_batch_train_all_the_same():
    train, test = some_features(12, 1), some_features(20, 2)
    result = train_heads(train, test, list("abcd"), LinearConfig(epochs=40, milestones=[30], learning_rate=0.5))
    assert result.rows[-1].name == "all"
    assert result.rows[-1].top1 > 0.9
    assert result.confusion.sum() == 20


def test_diverged_heads_are_named():
    train = some_features(40, 1)
    huge = Features(1e30 * train.features, train.names, train.labels, train.sample_names)
    with pytest.warns(UserWarning, match="diverged") as warnings:
        train_heads(huge, huge, list("abcd"), LinearConfig(epochs=8, batch_size=16, milestones=[]))
    messages = [str(warning.message) for warning in warnings]
    assert len(messages) == len(views_of(NAMES))
    assert messages[0].startswith("the linear head of 'joint' diverged: its logits are not finite")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("joint", "motion", "bone", "rotation_axis")}, "same modalities"),
        ({"labels": torch.full((20,), 4)}, "labels of test must lie in 0 to 3, got 4 to 4"),
    ],
)
def test_features_that_do_not_fit(change, message):
    train, test = some_features(40, 1), some_features(20, 2)
    test = Features(**{**vars(test), **change})
    with pytest.raises(ValueError, match=message):
        train_heads(train, test, list("abcd"), LinearConfig(epochs=1, milestones=[]))


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory):
    return write_clip_set(tmp_path_factory.mktemp("data") / "prepared")


SETTINGS = LinearConfig(epochs=3, batch_size=8, milestones=[2])


def test_deriving_features_again_changes_no_number(clip_set, monkeypatch):
    calls = []
    extract = linear.extract
    monkeypatch.setattr(linear, "extract", lambda *args, **kwargs: calls.append(1) or extract(*args, **kwargs))
    scores = []
    for again in (False, True):
        method = small_ikem(modalities=("joint", "motion"), quirks=Quirks(rederive_evaluation_features=again))
        scores.append(evaluate_linear(method, clip_set.split("train"), clip_set.split("test"), SETTINGS).scores["all"])
    assert torch.equal(*scores)
    assert len(calls) == 2 + 2 + 2 * SETTINGS.epochs


@pytest.mark.parametrize("view", ["joint", "all", "joint+motion+bone"])
def test_classifier_gives_the_scores_from_clips(clip_set, view):
    method = small_ikem()
    test = clip_set.split("test")
    result = evaluate_linear(method, clip_set.split("train"), test, SETTINGS)
    classifier = build_classifier(method, result, view=view)
    batch = test.batch(range(len(test)))
    with torch.no_grad():
        logits = classifier(batch.clips, batch.num_frames)
    torch.testing.assert_close(logits, result.scores[view], rtol=1e-4, atol=1e-5)


def test_classifier_of_student_and_teacher(clip_set):
    distillation = RelationalDistillation.from_teacher(small_ikem())
    test = clip_set.split("test")
    batch = test.batch(range(len(test)))
    for part in ("student", "teacher"):
        result = evaluate_linear(distillation, clip_set.split("train"), test, SETTINGS, part=part)
        classifier = build_classifier(distillation, result, part=part)
        with torch.no_grad():
            logits = classifier(batch.clips, batch.num_frames)
        torch.testing.assert_close(logits, result.scores["all"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="view must be one of joint, motion"):
        build_classifier(distillation, result, part=part, view="elbow")


def test_early_fusion_student_has_no_classifier(clip_set):
    quirks = Quirks(early_fusion_student=True)
    teacher = small_ikem(modalities=("joint", "motion", "bone"), quirks=quirks)
    distillation = RelationalDistillation.from_teacher(teacher)
    result = evaluate_linear(distillation, clip_set.split("train"), clip_set.split("test"), SETTINGS)
    assert [row.name for row in result.rows] == ["early_fusion"]
    with pytest.raises(ValueError, match="early-fusion"):
        build_classifier(distillation, result, view="early_fusion")


@pytest.mark.parametrize(
    ("modalities", "view"), [(("joint", "motion", "bone"), "bone"), (MODALITIES, "joint+motion+bone")]
)
def test_classifier_leaves_the_chest_normal_out_where_its_method_does(clip_set, modalities, view):
    """Quirk Q4 depends on all modalities of the method, of which a view may have fewer."""
    method = small_ikem(modalities=modalities, quirks=Quirks(early_fusion_student=True))
    test = clip_set.split("test")
    result = evaluate_linear(method, clip_set.split("train"), test, SETTINGS)
    batch = test.batch(range(len(test)))
    with torch.no_grad():
        logits = build_classifier(method, result, view=view)(batch.clips, batch.num_frames)
    torch.testing.assert_close(logits, result.scores[view], rtol=1e-4, atol=1e-5)


def test_rescaled_features_have_one_size_a_modality(clip_set, monkeypatch):
    """The tiny features of an untrained module are scaled by the training clips alone, and then learned from."""
    method, sets = small_ikem(modalities=("joint", "motion")), (clip_set.split("train"), clip_set.split("test"))
    plain = [extract(method, clips) for clips in sets]
    seen = []

    def catch(train, test, *arguments, **options):
        seen.extend([train, test])
        return train_heads_of_seeds(train, test, *arguments, **options)

    monkeypatch.setattr(linear, "train_heads_of_seeds", catch)
    evaluate_linear(method, *sets, LinearConfig(epochs=2, milestones=[1]), rescale=True)
    torch.testing.assert_close(seen[0].features.square().mean(dim=(1, 2)), torch.ones(2))
    for before, after in zip(plain, seen, strict=True):
        factors = after.features / before.features
        assert (factors[before.features != 0].min() > 100).item()
        for row in range(2):
            used = factors[row][before.features[row] != 0]
            torch.testing.assert_close(used, used[:1].expand_as(used))

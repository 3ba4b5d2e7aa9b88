"""Configuration: presets, files, overrides, and the errors that mistakes end in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ikem_fast.engine import config as configuration
from ikem_fast.engine.config import ConfigError, load_config
from ikem_fast.ops.augment import AugmentationConfig
from ikem_fast.quirks import Quirks

PUBLISHED = ("ntu60-xsub", "ntu60-xview", "ntu120-xsub", "ntu120-xset")


def test_presets_of_every_data_set_are_there():
    assert {*PUBLISHED, "nw-ucla", "utd-mhad", "cpu-small"} <= set(configuration.preset_names())


@pytest.mark.parametrize("name", configuration.preset_names())
def test_preset_loads_and_shows_its_launch_command(name):
    load_config(name)
    text = (configuration._PRESET_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "python -m ikem_fast.train" in text
    assert configuration.preset_title(name) in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe(name):
    config = load_config(name)
    assert (config.model.hidden_channels, config.model.feature_size, config.model.embedding_size) == (16, 256, 128)
    assert (config.model.queue_size, config.model.temperature, config.model.momentum) == (32768, 0.07, 0.999)
    pretrain, distill, linear = config.pretrain, config.distill, config.linear
    assert (pretrain.epochs, pretrain.cross_epoch, pretrain.milestones) == (300, 151, [250])
    assert (distill.epochs, distill.milestones) == (150, [125])
    for section in (pretrain, distill):
        assert (section.batch_size, section.learning_rate, section.gamma) == (128, 0.1, 0.1)
        assert (section.sgd_momentum, section.weight_decay) == (0.9, 1e-4)
    assert (linear.epochs, linear.learning_rate, linear.milestones, linear.weight_decay) == (100, 3.0, [80], 0.0)
    # The published recipe is also what the fields say by themselves.
    assert config == configuration.Config()


def test_how_processes_share_a_run():
    config = load_config(None, ["queue=sharded", "batch_statistics=per_rank", "pretrain.accumulate_steps=4"])
    assert (config.distributed.queue, config.distributed.batch_statistics) == ("sharded", "per_rank")
    for override, message in (
        ("distributed.queue=half", r"distributed\.queue must be one of whole, sharded, got 'half'"),
        ("batch_statistics=own", r"distributed\.batch_statistics must be one of synchronised, per_rank, got 'own'"),
        ("timeout_minutes=0", r"distributed\.timeout_minutes must be above 0 and below 1e\+06, got 0"),
        ("pretrain.accumulate_steps=3", r"pretrain\.batch_size must be a multiple of pretrain\.accumulate_steps = 3"),
        ("distill.accumulate_steps=0", r"distill\.accumulate_steps must be at least 1, got 0"),
        ("distill.reference_batch_size=0", r"distill\.reference_batch_size must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(None, [override])


def test_what_an_older_configuration_lacks_is_no_difference():
    new = configuration.to_dict(load_config())
    old = {key: value for key, value in new.items() if key != "distributed"}
    assert configuration.differences(old, new) == {}
    changed = configuration.to_dict(load_config(None, ["queue=sharded"]))
    assert configuration.differences(old, changed) == {"distributed.queue": ("whole", "sharded")}


def test_queues_of_small_sets_are_no_longer_than_the_set():
    assert load_config("nw-ucla").model.queue_size <= 1020
    assert load_config("utd-mhad").model.queue_size <= 431


def test_sections_mirror_what_they_are_handed_to():
    assert {f.name for f in dataclasses.fields(configuration.QuirksConfig)} == {
        f.name for f in dataclasses.fields(Quirks)
    }
    assert configuration.augmentation_settings(load_config()) == AugmentationConfig()


def test_fidelity_decides_quirks_that_are_null():
    assert configuration.resolve_quirks(load_config()) == Quirks.default()
    assert configuration.resolve_quirks(load_config(None, ["fidelity=release"])) == Quirks.release()
    mixed = load_config(None, ["fidelity=release", "redraw_key_weights=false"])
    assert configuration.resolve_quirks(mixed) == dataclasses.replace(Quirks.release(), redraw_key_weights=False)
    single = load_config(None, ["quirks.early_fusion_student=true"])
    assert configuration.resolve_quirks(single) == dataclasses.replace(Quirks.default(), early_fusion_student=True)


@pytest.mark.parametrize(
    ("command", "override", "path", "value"),
    [
        ("pretrain", "batch_size=32", "pretrain.batch_size", 32),
        ("distill", "batch_size=32", "distill.batch_size", 32),
        ("linear", "batch_size=90", "linear.batch_size", 90),
        ("distill", "temperature=0.1", "distill.temperature", 0.1),
        ("pretrain", "temperature=0.1", "model.temperature", 0.1),
        ("pretrain", "queue_size=4096", "model.queue_size", 4096),
        ("pretrain", "hidden_channels=8", "model.hidden_channels", 8),
        ("pretrain", "distill.queue_size=1024", "distill.queue_size", 1024),
        ("pretrain", "modalities=[joint, bone]", "model.modalities", ["joint", "bone"]),
        ("pretrain", "weight_decay=1e-3", "pretrain.weight_decay", 1e-3),
        ("pretrain", "learning_rate=1", "pretrain.learning_rate", 1.0),
        ("pretrain", "max_steps=5", "max_steps", 5),
        ("pretrain", "cross_epoch=null", "pretrain.cross_epoch", None),
        ("knn", "k=[3]", "knn.k", [3]),
        ("semi", "fractions=[0.02]", "semi.fractions", [0.02]),
        ("semi", "learning_rate=0.01", "semi.learning_rate", 0.01),
        ("finetune", "dropout=0.1", "finetune.dropout", 0.1),
        ("linear", "fusion_weights=[1,1,0]", "linear.fusion_weights", [1, 1, 0]),
        ("retrieval", "gallery=test", "retrieval.gallery", "test"),
        ("linear", "seeds=3", "evaluation.seeds", 3),
        ("knn", "seeds=[4, 2]", "evaluation.seeds", [4, 2]),
        (None, "knn_every_epochs=0", "logging.knn_every_epochs", 0),
        (None, "device=cuda:1", "device", "cuda:1"),
    ],
)
def test_override_reaches_the_key_it_means(command, override, path, value):
    given = configuration.to_dict(load_config(None, [override], command))
    plain = configuration.to_dict(load_config())
    assert set(configuration.differences(plain, given)) == {path}
    assert configuration.differences(plain, given)[path][1] == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bach_size=3", r"unknown key 'bach_size'; did you mean 'pretrain\.batch_size'"),
        ("model.hiden=3", r"unknown key 'model\.hiden'; did you mean 'model\.hidden_channels'"),
        ("temprature=1", r"did you mean 'model\.temperature'"),
        ("lr=1", r"did you mean 'pretrain\.learning_rate'"),
        ("distill.lr=1", r"did you mean 'distill\.learning_rate'"),
        ("model=3", "model is a section"),
        ("batch_size", "must have the form key=value"),
        ("=3", "must have the form key=value"),
        ("feature_batch_size=3", "could mean linear.feature_batch_size or knn.feature_batch_size"),
        ("batch_size=abc", r"pretrain\.batch_size must be a whole number, got 'abc' \(str\)"),
        ("batch_size=2.5", r"pretrain\.batch_size must be a whole number, got 2\.5 \(float\)"),
        ("batch_size=true", r"must be a whole number, got True"),
        ("batch_size=???", r"must be a whole number, got '\?\?\?'"),
        ("batch_size=${nothing}", "the value is not YAML"),
        ("batch_size=[", "the value is not YAML"),
        ("shear=null", r"augmentation\.shear must be a number, got None"),
        ("cross_epoch=soon", r"must be a whole number or null, got 'soon'"),
        ("modalities=joint", "must be a list of text, got 'joint'"),
        ("milestones=[a]", "must be a list of whole numbers"),
        ("device=3", "device must be text, got 3"),
        ("context=maybe", "must be true or false, got 'maybe'"),
        ("batch_size=0", r"pretrain\.batch_size must be at least 1, got 0"),
        ("batch_size=40000", r"model\.queue_size must be at least pretrain\.batch_size = 40000, got 32768"),
        ("temperature=0", r"model\.temperature must be above 0, got 0"),
        ("momentum=1", r"model\.momentum must be at least 0 and below 1, got 1"),
        ("dropout=-0.1", r"model\.dropout must be at least 0 and below 1"),
        ("learning_rate=.inf", "learning_rate must be above 0 and below .*, got inf"),
        ("milestones=[250, 200]", "increasing epochs"),
        ("milestones=[300]", r"pretrain\.milestones must be increasing epochs below pretrain\.epochs = 300"),
        ("cross_epoch=301", r"pretrain\.cross_epoch must be an epoch from 1 to pretrain\.epochs = 300"),
        ("modalities=[]", r"model\.modalities must be a non-empty sequence of names, got \[\]"),
        ("modalities=[joint, joint]", r"model\.modalities must be distinct, got joint, joint"),
        (
            "modalities=[moton]",
            r"model\.modalities: modality must be one of joint, .* got 'moton'; did you mean 'motion'",
        ),
        ("modalities=[joint]", "cross_epoch must be null when joint is the only modality"),
        ("topk=32769", r"model\.topk must be at most model\.queue_size"),
        ("fidelity=relase", "fidelity must be 'default' or 'release', got 'relase'"),
        ("seed=-1", "seed must be from 0"),
        ("storage.place=disk", r"storage\.place must be one of auto, resident, stream, got 'disk'"),
        ("storage.dtype=float64", r"storage\.dtype must be float32 or float16, got 'float64'"),
        ("k=[1, 1]", r"knn\.k must be distinct"),
        ("seeds=0", r"evaluation\.seeds must be a number of seeds, at least 1, or a list of distinct seeds .* got 0"),
        ("seeds=[1, 1]", r"evaluation\.seeds must be .* got \[1, 1\]"),
        ("seeds=1.5", r"evaluation\.seeds must be .* got 1\.5"),
        ("seeds={a: 1}", r"evaluation\.seeds must be "),
        ("fractions=[0]", r"semi\.fractions must be distinct parts of the training clips, above 0 and at most 1"),
        ("linear.fusion_weights=[1, 1]", r"linear\.fusion_weights must be three numbers, of joint, motion and bone"),
        ("finetune.fusion_weights=[0, 0, 0]", "at least 0 and not all 0"),
        ("semi.dropout=1", r"semi\.dropout must be at least 0 and below 1"),
        ("gallery=val", r"retrieval\.gallery must be 'train' or 'test', got 'val'"),
        ("recall_at=[]", r"retrieval\.recall_at must be distinct numbers of found clips"),
        ("semi.milestones=[100]", r"semi\.milestones must be increasing epochs below semi\.epochs = 100"),
    ],
)
def test_wrong_override_is_explained(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override], "pretrain")


def test_one_modality_trains_stage_one_throughout():
    config = load_config(None, ["modalities=[joint]", "cross_epoch=null"], "pretrain")
    assert config.model.modalities == ["joint"]


def test_file_with_base_gives_only_what_differs(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: cpu-small\npretrain:\n  epochs: 90\n", encoding="utf-8")
    (tmp_path / "second.yaml").write_text("base: mine.yaml\nseed: 5\npretrain:\n", encoding="utf-8")
    config = load_config(tmp_path / "second.yaml")
    assert (config.seed, config.pretrain.epochs, config.model.hidden_channels) == (5, 90, 8)


def test_empty_file_changes_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text("# nothing yet\n", encoding="utf-8")
    assert load_config(tmp_path / "mine.yaml") == load_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle:\n  topk: 1\n", r"mine\.yaml: unknown key 'modle'; did you mean 'model'"),
        ("model:\n  top_k: 1\n", r"mine\.yaml: unknown key 'model\.top_k'; did you mean 'model\.topk'"),
        ("model:\n  queue_size: long\n", r"mine\.yaml: model\.queue_size must be a whole number, got 'long'"),
        ("model: 3\n", "model must be a section"),
        ("- joint\n", "expected a mapping of sections at the top, got a list"),
        ("model: [\n", "is no readable YAML file"),
        ("seed: 1\nseed: 2\n", "is no readable YAML file.*duplicate key"),
        ("base: mine.yaml\n", "base leads back"),
        ("base: ntu61\n", "unknown preset 'ntu61'; did you mean"),
        ("base: 3\n", "base must be the name of a preset or of a file, got 3"),
        ("model:\n  temperature: 0\n", r"model\.temperature must be above 0"),
    ],
)
def test_wrong_file_is_explained(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cpu-smal", "unknown preset 'cpu-smal'; did you mean 'cpu-small'"),
        ("missing.yaml", "config file missing.yaml does not exist"),
    ],
)
def test_unknown_source_is_explained(source, message):
    with pytest.raises(ConfigError, match=message):
        load_config(source)


def test_unreadable_bytes_are_explained(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(ConfigError, match="is no readable YAML file"):
        load_config(tmp_path / "mine.yaml")


def test_capture_is_true_or_false():
    assert load_config().capture is True
    assert load_config(None, ["capture=false"], "distill").capture is False
    with pytest.raises(ConfigError, match=r"capture must be true or false, got 1 \(int\)"):
        load_config(None, ["capture=1"])


def test_saved_configuration_reads_back(tmp_path):
    config = load_config("cpu-small", ["modalities=[joint,bone]", "weight_decay=1e-5", "threads=2"], "pretrain")
    configuration.save_config(config, tmp_path / "config.yaml", "two\nlines")
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8").startswith("# two\n# lines\nseed: 0\n")
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(configuration.to_dict(config)) == config


def test_values_changed_in_python_are_checked_again():
    config = load_config()
    config.pretrain.batch_size = 0
    with pytest.raises(ConfigError, match=r"pretrain\.batch_size must be at least 1, got 0"):
        configuration.validate(config)


def test_device_is_checked():
    assert configuration.resolve_device(load_config(None, ["device=cpu"])) == torch.device("cpu")
    for text, message in (("gpu", "device must be"), ("meta", "device must be"), ("cuda:99", "CUDA device")):
        with pytest.raises(ConfigError, match=message):
            configuration.resolve_device(load_config(None, [f"device={text}"]))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["epochs=6"], (6, 4, [5])),
        (["epochs=2"], (2, 2, [])),
        (["epochs=1"], (1, None, [])),
        (["epochs=600"], (600, 301, [500])),
        (["epochs=6", "milestones=[2, 4]"], (6, 4, [2, 4])),
        (["epochs=6", "cross_epoch=null"], (6, None, [5])),
    ],
)
def test_another_number_of_epochs_keeps_the_schedules_proportions(overrides, expected):
    section = load_config("ntu60-xsub", overrides, "pretrain").pretrain
    assert (section.epochs, section.cross_epoch, section.milestones) == expected


def test_a_file_says_its_whole_schedule(tmp_path):
    (tmp_path / "short.yaml").write_text("base: ntu60-xsub\npretrain:\n  epochs: 100\n", encoding="utf-8")
    with pytest.raises(configuration.ConfigError, match=r"pretrain\.milestones must be increasing epochs below"):
        load_config(tmp_path / "short.yaml")

"""The training loop of ``pretrain`` and ``distill``, from the data order to the checkpoint, top to bottom."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ikem_fast import ops
from ikem_fast.data import ClipSet, DataError, open_source
from ikem_fast.engine import checkpoints, randomness
from ikem_fast.engine.config import Config, ConfigError, augmentation_settings, load_config, to_dict
from ikem_fast.engine.interruption import StopRequest, TrainingInterrupted
from ikem_fast.engine.run_log import LogError, RunLog
from ikem_fast.engine.step import ACCURACY, TrainingStep
from ikem_fast.engine.world import ALONE, RankError, World
from ikem_fast.evaluation.features import Features, extract
from ikem_fast.evaluation.knn import evaluate_knn
from ikem_fast.methods import IKEM, RelationalDistillation
from ikem_fast.ranges import phase

NONE_YET = "; there is no checkpoint yet"


class NonFiniteError(RuntimeError):
    """A loss or a weight became infinite or not a number; the message names where and the last good checkpoint."""


@dataclass
class Progress:
    """Where a run is; all of it is kept in the checkpoint.

    Attributes:
        epoch: the current epoch, from 1; one more than ``epochs`` when all are done.
        step_in_epoch: steps of this epoch that are done.
        step: steps that are done in all.
        seconds: training time so far.
        unlogged: names and values of the losses and accuracies of steps done since the last log line, oldest first.
    """

    epoch: int = 1
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    unlogged_names: list[str] = field(default_factory=list)
    unlogged: list[Tensor] = field(default_factory=list)


def learning_rate(section: Any, epoch: int) -> float:
    """The rate of an epoch: it falls by ``gamma`` after each epoch in ``milestones``.

    With a ``reference_batch_size`` it is in proportion to the batch size.
    """
    rate = section.learning_rate * section.gamma ** sum(epoch > milestone for milestone in section.milestones)
    if section.reference_batch_size is None:
        return rate
    return rate * section.batch_size / section.reference_batch_size


def stage_of(kind: str, section: Any, epoch: int) -> str:
    if kind == "distill":
        return "distill"
    return "cross" if section.cross_epoch is not None and epoch >= section.cross_epoch else "single"


def count_steps(train_set: ClipSet, kind: str, config: Config, num_ranks: int = 1) -> int:
    """Steps of an epoch, its last incomplete batch left out.

    Raises:
        ConfigError: fewer clips than a batch, or a batch that ranks cannot share in equal parts.
    """
    section = getattr(config, kind)
    batch_size, parts = section.batch_size, num_ranks * section.accumulate_steps
    if batch_size % parts:
        times = f" times {kind}.accumulate_steps = {section.accumulate_steps}" if section.accumulate_steps > 1 else ""
        raise ConfigError(
            f"{kind}.batch_size must be a multiple of the number of processes, {num_ranks}{times}, got {batch_size}"
        )
    if batch_size > len(train_set):
        raise ConfigError(
            f"{kind}.batch_size must be at most the number of training clips, {len(train_set)}, got {batch_size}"
        )
    return len(train_set) // batch_size


def clips_of_statistics(config: Config, kind: str, num_ranks: int) -> int:
    """Over how many clips batch statistics are taken."""
    section = getattr(config, kind)
    shares = 1 if config.distributed.batch_statistics == "synchronised" else num_ranks
    return section.batch_size // (section.accumulate_steps * shares)


def parts_of_batch(positions: np.ndarray, rank: int, num_ranks: int, accumulate_steps: int) -> list[np.ndarray]:
    """What a rank takes of a batch, and in which parts: its slice of all ranks' and that in order."""
    return np.split(np.split(positions, num_ranks)[rank], accumulate_steps)


def train(
    method: IKEM | RelationalDistillation,
    train_set: ClipSet,
    *,
    kind: str,
    config: Config,
    run_folder: Path,
    test_set: ClipSet | None = None,
    checkpoint: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    progress: bool = True,
    world: World = ALONE,
    after_step: Callable[[int], None] = lambda step: None,
) -> Progress:
    """Trains a method to the last epoch or ``max_steps``, whichever comes first.

    With a checkpoint it goes on from there, in the middle of an epoch too, and on the CPU every later loss is bit for
    bit what it would have been without the interruption: the clips' order is drawn anew from (seed, epoch), a clip's
    augmentation from (seed, epoch, its number, view), and dropout goes on from the saved state of torch's generator.

    On several ranks each trains on its slice of every batch; the first one alone reads and writes ``run_folder``. With
    synchronised batch statistics the losses are those of one process up to rounding, but for dropout, of which every
    rank draws its own. A checkpoint goes on with any number of ranks; with another number than before, dropout is drawn
    anew from (seed, step, rank).

    Args:
        method: the module to train; with a checkpoint, its weights are replaced.
        train_set: clips to train on; an epoch's last incomplete batch is dropped.
        kind: ``"pretrain"`` or ``"distill"``, which names the config section with the recipe.
        config: the whole configuration.
        run_folder: where log and checkpoints go.
        test_set: clips for the kNN accuracy along the way; None = no kNN.
        checkpoint: what ``checkpoints.load`` gave, to go on from.
        extra: entries added to every checkpoint (where data and teacher came from).
        progress: whether to show a bar.
        world: the processes that train; all of them call this alike.
        after_step: called with the number of steps that are done, after each.

    Raises:
        ConfigError: fewer clips than a batch, or a batch that ranks cannot share in equal parts.
        NonFiniteError: a loss or weight became infinite or NaN.
        DataError: the clips cannot be read.
        CheckpointError, LogError: a checkpoint or the log cannot be written.
        TrainingInterrupted: SIGTERM or SIGINT came to any rank; a checkpoint was written first.
        RankError: ranks start from different weights.
    """
    section = getattr(config, kind)
    logging = config.logging
    device = world.device(config)
    progress = progress and world.is_writer
    source = open_source(
        train_set,
        device=device,
        dtype=getattr(torch, config.storage.dtype),
        place=config.storage.place,
        file_frame_count=method.quirks.file_frame_count,
        # On a CPU the memory is that of all processes of the machine.
        resident_share=0.5 / (world.local_size if device.type == "cpu" else 1),
    )
    batch_size, num_parts = section.batch_size, section.accumulate_steps
    steps_per_epoch = count_steps(train_set, kind, config, world.size)
    last_step = section.epochs * steps_per_epoch
    if config.max_steps is not None:
        last_step = min(last_step, config.max_steps)

    checkpoint_folder = run_folder / checkpoints.FOLDER
    last_path = checkpoint_folder / checkpoints.LAST
    state = Progress()
    log_position = 0
    if checkpoint is not None:
        checkpoints.load_weights(method, last_path, checkpoint)
    if world.size > 1 and len(set(world.gather_all(_checksum(method)))) > 1:
        raise RankError("ranks start from different weights: all machines must have the same versions of torch")
    shared = world.share_steps(device, config)
    if shared is not None and shared.groups.queue is not None:
        method.shard_queues(shared.groups.queue)
    method.to(device).train()
    ranks_before = world.size
    if checkpoint is not None:
        random_states = [checkpoint["random_state"], *checkpoint.get("random_states_of_other_ranks", [])]
        ranks_before = len(random_states)
        state = Progress(
            checkpoint["epoch"] + checkpoint["epoch_done"],
            checkpoint["step_in_epoch"],
            checkpoint["step"],
            checkpoint["seconds"],
            checkpoint["unlogged_names"],
            [row.to(device) for row in checkpoint["unlogged"]],
        )
        log_position = checkpoint["log_position"]
    own_generator = device if world.size > 1 else None
    if checkpoint is not None and ranks_before == world.size:
        with checkpoints.using(last_path, "random state"):
            randomness.set_random_state(random_states[world.rank], own_generator)
    elif checkpoint is not None or world.size > 1:
        randomness.seed_rank(config.seed, state.step, world.rank)

    last_good = ""  # the last good checkpoint in words, for the end of a message
    if checkpoint is not None:
        last_good = f"; the last good checkpoint is {checkpoints.describe(last_path, checkpoint)}"
    world.when_another_ends(lambda: last_good or NONE_YET)

    log = world.on_writer(
        lambda: RunLog(run_folder, position=log_position, step=state.step, tensorboard=logging.tensorboard)
    )
    if progress:
        tqdm.write(source.describe(), file=sys.stderr)
    bar = tqdm(total=last_step, initial=state.step, unit="step", disable=not progress, dynamic_ncols=True)
    clock = time.perf_counter()
    steps_since_reading = 0
    saved_at = None if checkpoint is None else (state.epoch, state.step_in_epoch)

    def write_note(text: str) -> None:
        world.on_writer(lambda: log.write({"kind": "note", "epoch": state.epoch, "step": state.step, "text": text}))
        if progress:
            tqdm.write(text, file=sys.stderr)

    training_step = TrainingStep(
        method,
        section,
        seed=config.seed,
        clip_length=train_set.clip_length,
        augmentation=augmentation_settings(config),
        capture=config.capture,
        shared=shared,
        note=write_note,
    )
    if checkpoint is not None:
        with checkpoints.using(last_path, "state of the optimiser"):
            training_step.load_optimizer_state(checkpoint["optimizer"])
    if ranks_before != world.size:
        text = f"goes on with {_count(world.size)}, not {ranks_before} as before: dropout is drawn anew"
        before = clips_of_statistics(load_config(checkpoint["config"]), kind, ranks_before)
        now = clips_of_statistics(config, kind, world.size)
        write_note(text if now == before else f"{text}, and batch statistics are of {now} clips, not {before}")

    signal_number: int | None = None

    def stopped(stop: StopRequest) -> bool:
        """Whether a signal came to any rank; all of them ask after the same steps."""
        nonlocal signal_number
        if signal_number is None:
            signal_number = world.agree(stop.signal_number)
        return signal_number is not None

    @phase("reading losses back")
    def read_losses() -> np.ndarray:
        """(steps, losses) values since the last log line; the only place where the host waits for the device."""
        values = torch.stack(state.unlogged).double().cpu().numpy()
        bad_steps, bad_losses = np.nonzero(~np.isfinite(values))
        if len(bad_steps):
            step = state.step - len(values) + 1 + int(bad_steps[0])
            name, value = state.unlogged_names[bad_losses[0]], values[bad_steps[0], bad_losses[0]]
            epoch = (step - 1) // steps_per_epoch + 1
            raise NonFiniteError(f"loss {name} is {value} in epoch {epoch}, step {step}{last_good or NONE_YET}")
        return values

    def write_losses(events: bool = True) -> None:
        nonlocal clock, steps_since_reading
        if not state.unlogged:
            return
        values = read_losses()
        now = time.perf_counter()
        state.seconds += now - clock
        # Steps of a window that another process began took no time in this one.
        speed = steps_since_reading * batch_size / max(now - clock, 1e-9)
        clock, steps_since_reading = now, 0
        epoch = (state.step - 1) // steps_per_epoch + 1  # state.epoch may be the next one already
        means = dict(zip(state.unlogged_names, values.mean(axis=0).tolist(), strict=True))
        losses = {name: mean for name, mean in means.items() if not name.startswith(ACCURACY)}
        accuracies = {name.removeprefix(ACCURACY): mean for name, mean in means.items() if name.startswith(ACCURACY)}
        total = math.fsum(losses.values())
        line = {
            "kind": "train",
            "epoch": epoch,
            "step": state.step,
            "stage": stage_of(kind, section, epoch),
            "learning_rate": learning_rate(section, epoch),
            "loss": total,
            "losses": losses,
            "contrast_accuracy": accuracies,
            "steps": len(values),
            "clips_per_second": round(speed, 2),
            "seconds": round(state.seconds, 3),
        }
        world.on_writer(lambda: log.write(line, events))
        shown = losses if len(losses) <= 3 else _by_kind(losses)
        bar.set_postfix_str(
            ", ".join([f"{name} {value:.3f}" for name, value in shown.items()] + [f"{speed:.0f} clips/s"])
        )
        state.unlogged_names, state.unlogged = [], []

    @phase("checkpoint")
    def write_checkpoint(keep: bool = False) -> str:
        """``last.pt``, never with a loss or weight that is not finite; returns it in words."""
        nonlocal clock, saved_at, last_good
        if state.unlogged:
            read_losses()
        now = time.perf_counter()
        model = dict(method.state_dict())
        if shared is not None and shared.groups.queue is not None:
            model.update({name: ops.gather_queue(model[name], shared.groups.queue) for name in method.queue_names})
        random_states = world.gather(randomness.random_state(own_generator))
        described = world.from_writer(lambda: save(model, random_states, state.seconds + now - clock, keep))
        last_good = f"; the last good checkpoint is {described}"
        saved_at = (state.epoch, state.step_in_epoch)
        clock += time.perf_counter() - now  # writing is no training time
        return described

    def save(model: dict[str, Tensor], random_states: list[dict[str, Any]], seconds: float, keep: bool) -> str:
        """``write_checkpoint`` on the writer."""
        floats = {name: tensor for name, tensor in model.items() if tensor.is_floating_point()}
        finite = torch.stack([torch.isfinite(tensor).all().cpu() for tensor in floats.values()]).tolist()
        for name, is_finite in zip(floats, finite, strict=True):
            if not is_finite:
                raise NonFiniteError(f"{name} is not finite after step {state.step}{last_good or NONE_YET}")
        complete = {
            "kind": kind,
            "method": method.config(),
            "model": model,
            "optimizer": training_step.optimizer_state(),
            "random_state": random_states[0],
            "random_states_of_other_ranks": random_states[1:],
            # The epoch of the last step that was done, which is what a reader of the checkpoint wants to know.
            "epoch": state.epoch if state.step_in_epoch else state.epoch - 1,
            "epoch_done": state.step_in_epoch == 0,
            "step_in_epoch": state.step_in_epoch,
            "step": state.step,
            "seconds": seconds,
            "unlogged_names": state.unlogged_names,
            "unlogged": state.unlogged,
            "log_position": log.position(),
            "config": to_dict(config),
            "versions": checkpoints.versions(),
            **(extra or {}),
        }
        path = checkpoints.rotate_and_save(checkpoint_folder, complete)
        if keep:
            checkpoints.keep(path, checkpoint_folder / f"epoch-{state.epoch - 1:04d}.pt", complete)
        return checkpoints.describe(path, complete)

    @phase("kNN")
    def knn_accuracy(stop: StopRequest) -> dict[str, float] | None:
        """By name, on every rank; None if a signal came. Ranks share the encoding."""
        features = world.gather(stop.unless_stopped(own_features))

        def evaluate() -> dict[str, float] | None:
            if any(of_rank is None for of_rank in features):
                return None
            of_train, of_test = (_put_together(parts) for parts in zip(*features, strict=True))
            return stop.unless_stopped(
                lambda: {row.name: row.accuracy[1] for row in evaluate_knn(of_train, of_test, ks=(1,))}
            )

        return world.from_writer(evaluate)

    def own_features() -> list[Features | None]:
        """Of this rank's share of the training and of the test clips; None for a share of none."""
        features: list[Features | None] = []
        for clips in (_evenly_spaced(clips, logging.knn_max_clips) for clips in (train_set, test_set)):
            own = np.array_split(np.arange(len(clips)), world.size)[world.rank]
            of_share = {"batch_size": config.knn.feature_batch_size, "device": device}
            features.append(extract(method, clips.subset(own), **of_share) if len(own) else None)
        return features

    try:
        with StopRequest() as stop:
            if checkpoint is None:
                # A folder that cannot be written to, or a full disk, shows before any work is done.
                write_checkpoint()
            # A run that was stopped after an epoch's last step still owes what comes at the epoch's end.
            while state.epoch <= section.epochs and (state.step < last_step or state.step_in_epoch == steps_per_epoch):
                stage = stage_of(kind, section, state.epoch)
                training_step.begin_epoch(state.epoch, stage, learning_rate(section, state.epoch))
                order = randomness.epoch_order(len(train_set), config.seed, state.epoch).numpy()
                whole = order[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)
                parts = [parts_of_batch(batch, world.rank, world.size, num_parts) for batch in whole]
                batches = source.batches(part for batch in parts[state.step_in_epoch :] for part in batch)
                shown_stage = "" if stage == kind else f" {stage}"
                bar.set_description_str(f"{kind} epoch {state.epoch}/{section.epochs}{shown_stage}")

                # Closing it ends the reading ahead of an epoch that is left early.
                with closing(batches):
                    while state.step_in_epoch < steps_per_epoch and state.step < last_step:
                        with phase("reading data"):
                            batch = tuple(islice(batches, num_parts))
                        names, values = training_step(*batch)
                        state.step += 1
                        state.step_in_epoch += 1
                        state.unlogged_names = list(names)
                        state.unlogged.append(values)
                        steps_since_reading += 1
                        bar.update()
                        if state.step % logging.log_every_steps == 0:
                            write_losses()
                        after_step(state.step)
                        if state.step % world.steps_between_agreements == 0 and stopped(stop):
                            break

                if not stopped(stop) and state.step_in_epoch == steps_per_epoch:
                    if stage != stage_of(kind, section, state.epoch + 1) or state.epoch == section.epochs:
                        write_losses()  # the next line has other losses, or there is none
                    every = logging.knn_every_epochs
                    owed = test_set is not None and every > 0 and state.epoch % every == 0
                    if owed:
                        before = time.perf_counter()
                        accuracy = knn_accuracy(stop)
                        clock += time.perf_counter() - before  # no training time either
                        owed = accuracy is None
                        if not owed:
                            line = {"kind": "knn", "epoch": state.epoch, "step": state.step, "accuracy": accuracy}
                            world.on_writer(lambda line=line: log.write(line))
                    if not owed:
                        finished = state.epoch
                        state.epoch, state.step_in_epoch = finished + 1, 0
                        keep = logging.keep_every_epochs > 0 and finished % logging.keep_every_epochs == 0
                        if keep or finished % logging.save_every_epochs == 0 or finished == section.epochs:
                            write_checkpoint(keep)
                if stopped(stop):
                    raise TrainingInterrupted(signal_number, write_checkpoint())
            if saved_at != (state.epoch, state.step_in_epoch):
                write_checkpoint()
            # The line of an unfinished window comes after the checkpoint: a run that goes on cuts it off again, which
            # TensorBoard's events cannot be.
            write_losses(events=False)
    except (LogError, DataError) as error:
        raise type(error)(f"{error}{last_good or NONE_YET}") from error
    finally:
        bar.close()
        if log is not None:
            log.close()
    return state


def _count(num_ranks: int) -> str:
    return f"{num_ranks} processes" if num_ranks > 1 else "1 process"


def _checksum(method: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in method.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _put_together(parts: Sequence[Features | None]) -> Features:
    """Features of a set's clips from those of its parts, in order."""
    features = [part for part in parts if part is not None]
    return Features(
        torch.cat([part.features for part in features], dim=1),
        features[0].names,
        torch.cat([part.labels for part in features]),
        tuple(name for part in features for name in part.sample_names),
    )


def _by_kind(losses: dict[str, float]) -> dict[str, float]:
    """``single/joint``, ``single/motion`` … summed to ``single``, to fit on a line."""
    sums: dict[str, float] = {}
    for name, value in losses.items():
        kind = name.partition("/")[0]
        sums[kind] = sums.get(kind, 0.0) + value
    return sums


def _evenly_spaced(clip_set: ClipSet, at_most: int) -> ClipSet:
    if not at_most or len(clip_set) <= at_most:
        return clip_set
    return clip_set.subset(np.linspace(0, len(clip_set) - 1, at_most).round().astype(np.int64))

"""Training what a sweep has still to train, and writing it down as it comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fallline.sweeps import memory, packs, workers
from fallline.sweeps.packs import Block, Job, Pack
from fallline.sweeps.result import best_trial, with_results
from fallline.sweeps.store import TRIALS, RunDirectory, evaluation_steps, history_of
from fallline.training import checkpoint
from fallline.training.interrupt import Interrupt
from fallline.training.progress import Progress

# New blocks are written at most so often, in seconds; what a killed sweep loses.
SECONDS_BETWEEN_WRITES = 0.2
# How often the memory of a long sweep is looked at.
SECONDS_BETWEEN_LOOKS = 0.5
STOPPING = "stopping at the next evaluation; Ctrl-C again stops at once"


def run(
    job: Job,
    directory: RunDirectory,
    processes: int | None,
    progress: bool | None,
    title: str,
    began: float,
    *,
    much: bool,
) -> None:
    """Trains what is not trained yet and writes it down.

    Args:
        much: whether it is worth a rehearsal to foresee the memory, and a look at it now and then.
    """
    seconds_before = float(directory.spec["seconds"])
    planned = [Pack(i, tuple(trials)) for i, trials in enumerate(directory.spec["packs"])]
    waiting, done = _still_to_do(job, directory, planned)
    interrupt = Interrupt()
    started = time.monotonic()
    with contextlib.ExitStack() as watching:
        watch = watching.enter_context(memory.Watch(SECONDS_BETWEEN_LOOKS)) if much and memory.can_look() else None
        if waiting:
            told = memory.predict(job, waiting, processes, rehearse=much)
            directory.note(memory={"predicted": told.total, "measured": None})
            started = time.monotonic()
            with Progress(title, len(job.plans), "trial", show=progress) as bar, interrupt.listening():
                bar.say(f"memory: about {told}")
                bar.start_from(done)
                messages = workers.train_packs(job, waiting, processes, lambda: interrupt.requested)
                with contextlib.closing(messages):
                    _record(job, directory, messages, bar, interrupt)
        _conclude(job, directory, seconds_before, began, started)
    if watch is not None:
        directory.note(memory={**directory.spec.get("memory", {}), "measured": watch.peak})


def _record(job: Job, directory: RunDirectory, messages: Iterator[Any], bar: Progress, interrupt: Interrupt) -> None:
    """Writes what packs send, as it comes."""
    pending: list[Block] = []
    written = time.monotonic()
    try:
        for message in messages:
            if isinstance(message, Block):
                pending.append(message)
            share = _share_done(job, message) if isinstance(message, Block) else 0.0
            bar.advance(share, STOPPING if interrupt.requested else "")
            if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
                unwritten, pending = pending, []
                directory.append(unwritten)
                written = time.monotonic()
    finally:
        directory.append(pending)


def _conclude(job: Job, directory: RunDirectory, seconds_before: float, began: float, started: float) -> None:
    """Writes how each trial ended, and how long all took."""
    trained = directory.spec.get("training_seconds", 0.0) + time.monotonic() - started
    recorded = directory.recorded()
    history = history_of(recorded, len(job.plans), job.steps, job.evaluate_every, np.float64)
    higher = job.task.metric.higher_is_better
    trials = with_results(directory.table(TRIALS), recorded, history, higher)
    complete = bool((trials["status"] != "interrupted").all())
    seconds = seconds_before + time.monotonic() - began
    ended = int((trials["status"] != "interrupted").sum())
    directory.finish(
        trials,
        complete=complete,
        seconds=seconds,
        training_seconds=trained,
        trials_per_second=ended / seconds,
    )
    if complete and job.keep_parameters == "best":
        _keep_best_parameters(directory.path, trials, higher)


def _share_done(job: Job, block: Block) -> float:
    """How many trials' worth of work is behind when this block is: a diverged trial is done at once."""
    share = (block.evaluated_at - block.start) / job.steps * len(block.trials)
    left = int(np.isnan(block.validation_loss).sum()) * (job.steps - block.evaluated_at) / job.steps
    return share + left


def _still_to_do(job: Job, directory: RunDirectory, planned: list[Pack]) -> tuple[list[Pack], float]:
    """The packs that have not ended, and how many trials' worth is done. A checkpoint ahead of the history goes."""
    table = (
        directory.recorded()
        .sort("start")
        .group_by("trial")
        .agg(
            pl.col("evaluated_at").last(),
            pl.len().alias("blocks"),
            pl.col("train_loss").last().list.last().alias("last_loss"),
        )
    )
    state = {row["trial"]: row for row in table.to_dicts()}
    ends = evaluation_steps(job.steps, job.evaluate_every).tolist()
    waiting: list[Pack] = []
    done = 0.0
    for pack in planned:
        steps_recorded = []
        for trial in pack.trials:
            row = state.get(trial)
            if row is None:
                steps_recorded.append(0)
                continue
            whole = row["blocks"] == ends.index(row["evaluated_at"]) + 1
            ended = row["last_loss"] is None or not np.isfinite(row["last_loss"])
            steps_recorded.append(0 if not whole else job.steps if ended else row["evaluated_at"])
        reached_step = min(steps_recorded)
        if reached_step == job.steps:
            done += len(pack.trials)
            continue
        place = job.folder / "packs" / f"{pack.index:05d}"
        found = checkpoint.read(place)
        if found is not None and found[1]["begin"] > reached_step:
            checkpoint.remove(place)
            found = None
        done += len(pack.trials) * (found[1]["step"] / job.steps if found is not None else 0.0)
        waiting.append(pack)
    return waiting, done


def _keep_best_parameters(path: Path, trials: pl.DataFrame, higher_is_better: bool) -> None:
    """Of each configuration, only the best trial's parameters stay."""
    folder = path / "parameters"
    kept = {int(p.stem) for p in folder.glob("*.safetensors")}
    for _, group in trials.filter(pl.col("trial").is_in(list(kept))).group_by("configuration"):
        best = best_trial(group.sort("trial"), higher_is_better)
        for trial in group["trial"]:
            if trial != best:
                packs.parameters_file(path, trial).unlink()

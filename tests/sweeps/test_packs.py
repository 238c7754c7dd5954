"""A pack stops and goes on anywhere, with the same bits."""

import numpy as np
import torch

import fallline as fl
from fallline.sweeps import packs, search
from fallline.sweeps.packs import Block, Job, Pack, PackEnd, train_pack
from fallline.training.batches import BatchOrder
from small_sweep import assert_same, small_sweep


def job(folder, steps=40):
    task = fl.tasks.diabetes().check()
    optimizers = [fl.optim.sgd(lr=fl.grid([0.01, 0.02, 0.03, 1e38]), momentum=0.9), fl.optim.adam(lr=0.01)]
    chosen = search.configurations(optimizers, [task.loss], samples=1, search_seed=0)
    plans = search.trials(chosen, [0, 1, 2])[1:]  # one of three diverging ones would leave at once
    plans = [search.TrialPlan(i, p.configuration, p.seed) for i, p in enumerate(p for p in plans if p.index != 9)]
    (folder / "parameters").mkdir(parents=True)
    return Job(task, plans, "vectorised", torch.device("cpu"), steps, 20, folder, "best")


def test_a_pack_that_stops_in_the_middle_of_a_block_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "SECONDS_PER_PIECE", 0.0)
    whole_job, cut_job = job(tmp_path / "whole"), job(tmp_path / "cut")
    pack = Pack(0, tuple(range(len(whole_job.plans))))
    whole = [m for m in train_pack(whole_job, pack, lambda: False) if isinstance(m, Block)]
    blocks, ends = [], 0
    while True:
        asked = iter([False] * 7)
        messages = list(train_pack(cut_job, pack, lambda asked=asked: next(asked, True)))
        blocks += [m for m in messages if isinstance(m, Block)]
        assert isinstance(messages[-1], PackEnd)
        if messages[-1].complete:
            break
        ends += 1
    assert ends > 2
    assert len(blocks) == len(whole) == 2
    for ours, theirs in zip(blocks, whole, strict=True):
        assert ours.train_loss.shape[1] == 20
        for name in ("trials", "start", "train_loss", "metric", "validation_loss"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
    assert len(whole[1].trials) < len(whole[0].trials), "a trial diverged in the first block"


def test_batches_can_be_asked_for_in_any_order():
    order = BatchOrder(n=10, batch_size=4, seed=3)
    forwards = [order.at(step).tolist() for step in range(9)]
    assert [order.at(step).tolist() for step in reversed(range(9))] == forwards[::-1]
    assert forwards[0] != forwards[3]


def test_what_a_killed_process_left_half_written_goes_when_the_sweep_is_resumed(tmp_path):
    whole = small_sweep(tmp_path / "run")
    for folder in ("", "history", "parameters"):
        (tmp_path / "run" / folder / ".half.123").write_text("torn")
    again = small_sweep(tmp_path / "run", resume=True)
    assert not list((tmp_path / "run").rglob(".half*"))
    assert_same(again, whole)

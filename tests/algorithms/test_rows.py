"""What a batch holds beside padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmix.algorithms import REGISTRY, EpisodeBatch, Scheme, make
from fastmix.algorithms.rows import Rows, episode_lengths, live_steps
from fastmix.testing import assert_close
from tests.generators import Shape, episodes

AGENTS, ACTIONS, STATE, OBS = 3, 4, 6, 5
LENGTHS = torch.tensor([5, 2, 0, 3])


def batch_of(lengths: Tensor = LENGTHS, steps: int = 5) -> EpisodeBatch:
    batch = EpisodeBatch(*episodes(Shape(AGENTS, ACTIONS, STATE, OBS), len(lengths), steps))
    mask = (torch.arange(steps) < lengths.unsqueeze(-1)).unsqueeze(-1).to(batch.mask.dtype)
    return EpisodeBatch(**(vars(batch) | {"mask": mask, "terminated": batch.terminated * mask}))


@pytest.mark.parametrize("bootstrap", [False, True])
def test_rows_are_the_steps_that_exist(bootstrap: bool) -> None:
    batch = batch_of()
    rows = Rows(live_steps(batch), bootstrap=bootstrap)
    taken = rows.take(batch.states)
    steps = [(b, t) for b, n in enumerate(LENGTHS.tolist()) for t in range(n + bootstrap)]
    assert_close(taken, torch.stack([batch.states[b, t] for b, t in steps]), 0.0)
    put = rows.put(taken)
    assert put.shape == (4, 5 + bootstrap, STATE)
    exists = torch.zeros(4, 5 + bootstrap, 1, dtype=torch.bool)
    for b, t in steps:
        exists[b, t] = True
    assert_close(put, torch.where(exists, batch.states[:, : 5 + bootstrap], 0), 0.0)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_nothing_is_moved_where_nothing_is_left_out(bootstrap: bool) -> None:
    batch = batch_of(torch.full((4,), 5))
    rows = Rows(live_steps(batch), bootstrap=bootstrap)
    taken = rows.take(batch.states)
    assert taken.data_ptr() == batch.states.data_ptr() and taken.shape == (4, 5 + bootstrap, STATE)
    assert rows.put(taken) is taken


def test_gradients_go_to_the_steps_that_exist() -> None:
    batch = batch_of()
    values = torch.randn(4, 6, 2, requires_grad=True)
    rows = Rows(live_steps(batch))
    (grad,) = torch.autograd.grad(rows.put(3 * rows.take(values)).sum(), values)
    assert_close(grad[:, :-1], 3 * batch.mask.expand(4, 5, 2), 0.0)
    assert (grad[:, -1] == 0).all()


def test_lengths_count_the_step_after_the_last() -> None:
    def lengths(of: Tensor) -> list[int] | None:
        found = episode_lengths(live_steps(batch_of(of)))
        return None if found is None else found.tolist()

    assert lengths(LENGTHS) == [6, 3, 1, 4]
    assert lengths(torch.full((4,), 5)) is None
    assert lengths(torch.zeros(4, dtype=torch.int64)) == [1] * 4


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_leaving_padding_out_changes_nothing(name: str) -> None:
    """Loss and gradients are those of networks that see every step."""
    results = []
    for leave_out in (True, False):
        algorithm = make(name, Scheme(AGENTS, ACTIONS, OBS, STATE, 5), seed=1).double()
        batch = EpisodeBatch(*episodes(Shape(AGENTS, ACTIONS, STATE, OBS), 4, 5, dtype=torch.float64))
        assert not batch.mask.all()
        assert algorithm.skips_padding
        algorithm.skips_padding = leave_out
        loss = algorithm.losses(batch)["loss"]
        parameters = [p for network in algorithm.networks.values() for p in network.parameters() if p.requires_grad]
        results.append([loss, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for ours, whole in zip(*results, strict=True):
        assert (ours is None) == (whole is None)
        if ours is not None and whole is not None:
            assert_close(ours, whole, 1e-9)

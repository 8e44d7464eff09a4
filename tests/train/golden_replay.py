"""PyMARL's replay ring after three insertions (golden kind ``replay_ring``)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from fastmix.algorithms import Scheme
from fastmix.train.replay import ReplayBuffer


def check(data: dict[str, Any]) -> None:
    """Insert what the file inserts, and read the whole ring back through ``sample``.

    A sample of as many episodes as there are comes back in order, so it shows the ring. Numbers are stored as float32.
    """
    hp = json.loads(str(data["meta/hp_json"]))
    scheme = Scheme(hp["A"], hp["U"], hp["O"], hp["S"], episode_limit=hp["T"] - 1)
    replay = ReplayBuffer(scheme, hp["buffer_size"], seed=0, bucket=1)
    for i, n in enumerate(hp["sizes"]):
        filled, reward, actions = (data[f"in/{name}_{i}"] for name in ("filled", "reward", "actions"))
        assert len(filled) == n
        replay.insert(
            obs=np.ones((n, hp["T"], hp["A"], hp["O"])),
            states=np.ones((n, hp["T"], hp["S"])),
            actions=actions[..., 0],
            avail=np.ones((n, hp["T"], hp["A"], hp["U"])),
            rewards=reward[..., 0],
            terminated=np.zeros((n, hp["T"])),
            filled=filled[..., 0],
        )
        assert replay.index == data[f"out/index_{i}"]
        assert replay.count == data[f"out/count_{i}"]
        _compare_ring(
            replay, {name: data[f"out/{name}_{i}"] for name in ("reward", "filled", "actions", "actions_onehot")}
        )
    batch, _ = replay.sample(replay.count)
    assert batch.obs.shape[1] == data["out/max_t_filled"][0]


def _compare_ring(replay: ReplayBuffer, expected: dict[str, np.ndarray]) -> None:
    batch, positions = replay.sample(replay.count)
    n, stored = batch.actions.shape[:2]
    np.testing.assert_array_equal(positions, np.arange(n))
    # The batch is cut to the longest episode; what lies beyond must be unused in PyMARL's ring too.
    assert not expected["filled"][:n, stored:].any()
    assert not expected["filled"][n:].any()
    np.testing.assert_array_equal(batch.actions.numpy(), expected["actions"][:n, :stored, :, 0])
    np.testing.assert_array_equal(
        batch.rewards.numpy()[..., 0], expected["reward"][:n, : stored - 1, 0].astype(np.float32)
    )
    np.testing.assert_array_equal(batch.mask.numpy()[..., 0], expected["filled"][:n, 1:stored, 0])
    # What the agents see as last actions: PyMARL's one-hot of the step before, nothing where nothing was stored.
    onehot = torch.from_numpy(expected["actions_onehot"][:n, : stored - 1])
    seen = onehot.argmax(-1).masked_fill(onehot.sum(-1) == 0, -1)
    seen = seen.masked_fill(batch.mask[..., 0, None] == 0, -1)
    assert (batch.last_actions[:, 0] == -1).all()
    assert torch.equal(batch.last_actions[:, 1:], seen)

"""Every road from replay to the learner delivers the same numbers; the CPU stands in for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmix.algorithms import EpisodeBatch, Scheme
from fastmix.train.feed import Feed, HostFeed, ResidentFeed, StreamedFeed, make_feed
from fastmix.train.learner import Delivery
from fastmix.train.replay import Prioritised, ReplayBuffer
from fastmix.train.storage import HostStorage, ObsDtype
from tests.train.test_replay import SCHEME, episode, insert, mixed_episodes, play

CPU = torch.device("cpu")
ROADS = ["resident", "streamed"]


def feed(
    road: str,
    *,
    scheme: Scheme = SCHEME,
    prioritised: Prioritised | None = None,
    obs_dtype: ObsDtype = "float32",
    capacity: int = 40,
) -> Feed:
    replay = ReplayBuffer(
        scheme, capacity, 2, seed=3, bucket=2, prioritised=prioritised, obs_dtype=obs_dtype,
        device="cpu" if road == "resident" else None,
    )  # fmt: skip
    if road == "streamed":
        assert isinstance(replay.storage, HostStorage)
        return StreamedFeed(replay, replay.storage, CPU)
    return make_feed(replay, CPU)


def read(batch: EpisodeBatch | Delivery) -> EpisodeBatch:
    return batch.read() if isinstance(batch, Delivery) else batch


def assert_same(a: EpisodeBatch, b: EpisodeBatch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert (value is None) == (other is None), name
        if value is not None:
            assert value.dtype == other.dtype and torch.equal(value, other), name


def test_the_road_is_chosen_by_where_episodes_and_learner_are() -> None:
    host, resident = ReplayBuffer(SCHEME, 2), ReplayBuffer(SCHEME, 2, device="cpu")
    assert isinstance(make_feed(host, CPU), HostFeed)
    assert isinstance(make_feed(resident, CPU), ResidentFeed)
    assert isinstance(make_feed(host, torch.device("meta")), StreamedFeed)


@pytest.mark.parametrize("kind", ["uniform", "prioritised", "float16"])
@pytest.mark.parametrize("road", ROADS)
def test_numbers_and_order_are_those_of_a_plain_sample(road: str, kind: str) -> None:
    """Episodes come in between, replace what was fetched ahead, and batches change their size."""
    prioritised = Prioritised(t_max=400) if kind == "prioritised" else None
    obs_dtype: ObsDtype = "float16" if kind == "float16" else "float32"
    ours = feed(road, prioritised=prioritised, obs_dtype=obs_dtype)
    plain = feed("host", prioritised=prioritised, obs_dtype=obs_dtype)
    chance, episodes = np.random.default_rng(0), mixed_episodes(300)
    for i, made in enumerate(episodes):
        for each in (ours, plain):
            if i % 5 == 0:
                insert(each.replay, [made])
            else:
                play(each.replay, i % 2, made)
        size = 4 if chance.random() < 0.9 else 6
        if ours.replay.can_sample(size) and chance.random() < 0.7:
            (a, at), (b, expected) = ours.next(size, t_env=i), plain.next(size, t_env=i)
            np.testing.assert_array_equal(at, expected)
            assert_same(read(a), read(b))
            if prioritised is not None:
                for each, batch in ((ours, a), (plain, b)):
                    each.replay.update_priorities(at, read(batch).rewards, read(batch).mask)
            ours.prefetch(4)
        if i % 17 == 0:
            steps = np.zeros(2, dtype=int)
            assert ours.replay.state_dict(steps)["rng"] == plain.replay.state_dict(steps)["rng"]


@pytest.mark.parametrize("n_actions", [2, 8, 9, 300])
def test_every_width_of_availability_is_unpacked(n_actions: int) -> None:
    scheme = Scheme(2, n_actions, 3, 4, 6)
    made = [episode(np.random.default_rng(i), 4, terminated=True, scheme=scheme) for i in range(3)]
    batches = []
    for road in ("host", *ROADS):
        each = feed(road, scheme=scheme)
        insert(each.replay, made)
        batches.append(read(each.next(2)[0]))
    assert_same(batches[0], batches[1])
    assert_same(batches[0], batches[2])


@pytest.mark.parametrize("road", ROADS)
def test_deliveries_of_one_key_are_read_from_the_same_memory(road: str) -> None:
    """What a graph captured for one batch must see in every later one."""
    each = feed(road)
    insert(each.replay, mixed_episodes(40))
    first: dict[object, Delivery] = {}
    for _ in range(30):
        delivery, _ = each.next(3)
        assert isinstance(delivery, Delivery)
        earlier = first.setdefault(delivery.key, delivery)
        assert_same(earlier.read(), delivery.read())
    assert len(first) > 1


def test_fetching_ahead_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    each = feed("streamed")
    assert isinstance(each, StreamedFeed)
    insert(each.replay, mixed_episodes(40))
    gathered: list[np.ndarray] = []
    storage = each.replay.storage
    assert isinstance(storage, HostStorage)
    original = storage.copy_raw

    def counted(positions: np.ndarray, out: dict[str, torch.Tensor]) -> None:
        gathered.append(positions)
        original(positions, out)

    monkeypatch.setattr(storage, "copy_raw", counted)
    each.next(3)
    each.prefetch(3)
    assert each._pending is not None
    each._pending[1].result()
    assert len(gathered) == 2
    _, positions = each.next(3)
    assert len(gathered) == 2 and gathered[-1] is positions
    # An episode that is replaced in the meantime makes the same choice be gathered again.
    each.prefetch(3)
    assert each._pending is not None
    each.replay.index = int(each._pending[0].positions[0])
    insert(each.replay, mixed_episodes(1, seed=5))
    _, again = each.next(3)
    assert len(gathered) == 4
    np.testing.assert_array_equal(gathered[-1], gathered[-2])
    np.testing.assert_array_equal(again, gathered[-1])


def test_a_failure_while_fetching_ahead_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    each = feed("streamed")
    insert(each.replay, mixed_episodes(40))

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(each.replay.storage, "copy_raw", fail)
    each.prefetch(3)
    with pytest.raises(RuntimeError, match="no memory"):
        each.next(3)

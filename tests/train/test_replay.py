"""The replay ring against an episode list kept in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastmix.algorithms import EpisodeBatch, Scheme
from fastmix.train import replay as replay_module
from fastmix.train.checkpoint import load, save
from fastmix.train.memory import human_bytes
from fastmix.train.replay import Prioritised, ReplayBuffer, describe_memory, replay_bytes

SCHEME = Scheme(n_agents=2, n_actions=11, obs_dim=3, state_dim=4, episode_limit=6)


@pytest.fixture(params=[None, "cpu"], ids=["host", "device"])
def device(request: pytest.FixtureRequest) -> str | None:
    """Where finished episodes are kept; the CPU stands in for a GPU."""
    kept: str | None = request.param
    return kept


def episode(
    rng: np.random.Generator, length: int, *, terminated: bool, scheme: Scheme = SCHEME
) -> dict[str, np.ndarray]:
    """One episode of ``length`` transitions in PyMARL's layout, padded with zeros to ``episode_limit + 1`` steps."""
    stored, a, u = scheme.episode_limit + 1, scheme.n_agents, scheme.n_actions
    made = {
        "obs": rng.standard_normal((stored, a, scheme.obs_dim)),
        "states": rng.standard_normal((stored, scheme.state_dim)),
        "actions": rng.integers(0, u, (stored, a)),
        "avail": rng.integers(0, 2, (stored, a, u)),
        "rewards": rng.standard_normal(stored),
        "terminated": np.zeros(stored),
        "filled": np.ones(stored),
    }
    for array in made.values():
        array[length + 1 :] = 0
    for name in ("actions", "rewards"):
        made[name][length] = 0  # nothing leaves the last step
    made["terminated"][length - 1] = float(terminated)
    return made


def insert(buffer: ReplayBuffer, episodes: list[dict[str, np.ndarray]]) -> None:
    buffer.insert(**{name: np.stack([e[name] for e in episodes]) for name in episodes[0]})


def play(buffer: ReplayBuffer, writer: int, made: dict[str, np.ndarray]) -> None:
    """The same episode through the door that rollouts use, while the other writers stay at their first step."""
    length = int(made["filled"].sum()) - 1
    n, s = buffer.n_writers, buffer.scheme
    for t in range(length + 1):
        steps = np.where(np.arange(n) == writer, t, 0)
        obs = np.full((n, s.n_agents, s.obs_dim), 9.0)
        states, avail = np.full((n, s.state_dim), 9.0), np.ones((n, s.n_agents, s.n_actions), dtype=bool)
        obs[writer], states[writer], avail[writer] = made["obs"][t], made["states"][t], made["avail"][t] != 0
        buffer.write_observations(steps, obs, states, avail)
        if t < length:
            actions, rewards, ended = np.full((n, s.n_agents), 7), np.full(n, 9.0), np.ones(n, dtype=bool)
            actions[writer], rewards[writer], ended[writer] = (
                made["actions"][t],
                made["rewards"][t],
                made["terminated"][t],
            )
            buffer.write_transitions(steps, actions, rewards, ended)
    buffer.commit(np.array([writer]), np.array([length]))


def assert_matches(batch: EpisodeBatch, episodes: list[dict[str, np.ndarray]], length: int) -> None:
    """``batch`` holds exactly these episodes, cut to ``length`` transitions."""
    stack = {name: np.stack([e[name] for e in episodes]) for name in episodes[0]}
    filled, ended = stack["filled"][:, : length + 1], stack["terminated"][:, : length + 1]
    np.testing.assert_array_equal(batch.obs.numpy(), stack["obs"][:, : length + 1].astype(np.float32))
    np.testing.assert_array_equal(batch.states.numpy(), stack["states"][:, : length + 1].astype(np.float32))
    np.testing.assert_array_equal(batch.actions.numpy(), stack["actions"][:, : length + 1])
    np.testing.assert_array_equal(batch.avail_actions.numpy(), stack["avail"][:, : length + 1] != 0)
    np.testing.assert_array_equal(batch.rewards.numpy()[..., 0], stack["rewards"][:, :length].astype(np.float32))
    np.testing.assert_array_equal(batch.terminated.numpy()[..., 0], ended[:, :length])
    mask = filled[:, :length].copy()  # PyMARL: m[0] = filled[0]; m[t] = filled[t] (1 - terminated[t-1])
    mask[:, 1:] *= 1 - ended[:, : length - 1]
    np.testing.assert_array_equal(batch.mask.numpy()[..., 0], mask)
    last = np.full_like(stack["actions"][:, : length + 1], -1)
    last[:, 1:] = np.where(filled[:, 1:, None] != 0, stack["actions"][:, :length], -1)
    np.testing.assert_array_equal(batch.last_actions.numpy(), last)
    assert batch.actions.dtype == batch.last_actions.dtype == torch.int64
    assert batch.avail_actions.dtype == torch.bool
    assert batch.obs.dtype == batch.rewards.dtype == batch.mask.dtype == batch.terminated.dtype == torch.float32


def mixed_episodes(n: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Episodes of all lengths, full ones by time limit or by a true end, shorter ones by a true end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, SCHEME.episode_limit + 1, n)
    return [
        episode(rng, int(length), terminated=bool(length < SCHEME.episode_limit or rng.integers(2)))
        for length in lengths
    ]


@pytest.mark.parametrize("door", ["insert", "play"])
def test_ring_holds_the_newest_episodes_whatever_way_they_come(door: str, device: str | None) -> None:
    capacity, episodes = 5, mixed_episodes(17)
    buffer = ReplayBuffer(SCHEME, capacity, n_writers=3, bucket=1, device=device)
    ring: list[dict[str, np.ndarray]] = []
    for i, made in enumerate(episodes):
        if door == "insert":
            insert(buffer, [made])
        else:
            play(buffer, i % 3, made)
        if len(ring) < capacity:
            ring.append(made)
        else:
            ring[i % capacity] = made
        assert (buffer.index, buffer.count) == ((i + 1) % capacity, len(ring))
        batch, positions = buffer.sample(len(ring))
        np.testing.assert_array_equal(positions, np.arange(len(ring)))
        assert_matches(batch, ring, int(max(e["filled"].sum() for e in ring)) - 1)


def test_insert_splits_where_the_ring_wraps(device: str | None) -> None:
    episodes = mixed_episodes(8)
    buffer = ReplayBuffer(SCHEME, 5, bucket=SCHEME.episode_limit, device=device)
    insert(buffer, episodes[:4])
    insert(buffer, episodes[4:])
    batch, _ = buffer.sample(5)
    assert_matches(batch, [*episodes[5:8], episodes[3], episodes[4]], SCHEME.episode_limit)
    assert (buffer.index, buffer.count) == (3, 5)


def test_commit_order_is_the_order_given(device: str | None) -> None:
    buffer = ReplayBuffer(SCHEME, 4, n_writers=3, bucket=1, device=device)
    zeros = np.zeros((3, 2, 3)), np.zeros((3, 4)), np.ones((3, 2, 11), dtype=bool)
    buffer.write_observations(np.zeros(3, dtype=int), *zeros)
    buffer.write_transitions(np.zeros(3, dtype=int), np.zeros((3, 2), dtype=int), np.array([10.0, 11, 12]), np.ones(3))
    buffer.commit(np.array([2, 0]), np.array([1, 1]))
    batch, _ = buffer.sample(2)
    assert batch.rewards.flatten().tolist() == [12.0, 10.0]


@pytest.mark.parametrize(("bucket", "expected"), [(1, 2), (2, 2), (4, 4), (5, 5), (16, 6)])
def test_lengths_go_into_buckets_up_to_the_limit(bucket: int, expected: int, device: str | None) -> None:
    rng = np.random.default_rng(0)
    episodes = [episode(rng, length, terminated=True) for length in (1, 2)]
    buffer = ReplayBuffer(SCHEME, 4, bucket=bucket, device=device)
    insert(buffer, episodes)
    batch, _ = buffer.sample(2)
    assert_matches(batch, episodes, expected)


def test_samples_are_uniform_and_without_replacement() -> None:
    buffer = ReplayBuffer(SCHEME, 10, seed=1)
    insert(buffer, mixed_episodes(10))
    counts = np.zeros(10)
    for _ in range(2000):
        _, positions = buffer.sample(3)
        assert len(set(positions.tolist())) == 3
        counts[positions] += 1
    # Each position: binomial(2000, 0.3), standard deviation 20.5.
    assert (abs(counts - 600) < 5 * 20.5).all()


def test_samples_follow_the_seed() -> None:
    def draws(seed: int) -> list[list[int]]:
        buffer = ReplayBuffer(SCHEME, 10, seed=seed)
        insert(buffer, mixed_episodes(10))
        return [buffer.sample(4)[1].tolist() for _ in range(5)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


@pytest.mark.parametrize("n_actions", [2, 8, 9, 300])
def test_availability_and_actions_survive_packing(n_actions: int, device: str | None) -> None:
    scheme = Scheme(2, n_actions, 3, 4, 6)
    made = episode(np.random.default_rng(0), 4, terminated=True, scheme=scheme)
    buffer = ReplayBuffer(scheme, 2, bucket=1, device=device)
    insert(buffer, [made])
    assert_matches(buffer.sample(1)[0], [made], 4)


def test_float16_observations_come_back_as_float32(device: str | None) -> None:
    made = mixed_episodes(1)[0]
    buffer = ReplayBuffer(SCHEME, 2, bucket=SCHEME.episode_limit, obs_dtype="float16", device=device)
    insert(buffer, [made])
    batch, _ = buffer.sample(1)
    assert batch.obs.dtype == torch.float32
    np.testing.assert_array_equal(batch.obs[0].numpy(), made["obs"].astype(np.float16).astype(np.float32))


def test_whole_numbers_are_kept_exactly_in_a_byte(device: str | None) -> None:
    made = {
        name: np.round(40 * value) if name in ("obs", "states") else value
        for name, value in mixed_episodes(1)[0].items()
    }
    buffer = ReplayBuffer(SCHEME, 2, bucket=SCHEME.episode_limit, obs_dtype="int8", device=device)
    insert(buffer, [made])
    batch, _ = buffer.sample(1)
    assert batch.obs.dtype == torch.float32 and batch.obs.min() < -1
    np.testing.assert_array_equal(batch.obs[0].numpy(), made["obs"])
    np.testing.assert_array_equal(batch.states[0].numpy(), made["states"])


def test_nothing_of_a_sample_is_a_view_of_the_ring(device: str | None) -> None:
    buffer = ReplayBuffer(SCHEME, 3, device=device)
    insert(buffer, mixed_episodes(3))
    before, _ = buffer.sample(3)
    kept = {name: value.clone() for name, value in vars(before).items() if value is not None}
    for value in kept:
        getattr(before, value).zero_()
    after, _ = buffer.sample(3)
    assert all(torch.equal(kept[name], getattr(after, name)) for name in kept)


def test_stores_every_number_once() -> None:
    scheme = Scheme(n_agents=5, n_actions=12, obs_dim=80, state_dim=98, episode_limit=70)
    n_bytes = replay_bytes(scheme, 100, 8)
    assert n_bytes == ReplayBuffer(scheme, 100, 8).nbytes == ReplayBuffer(scheme, 100, 8, device="cpu").nbytes
    # obs and state once as float32; an action a byte, 12 flags in two bytes, a reward, a flag.
    assert n_bytes == 108 * 71 * (5 * 80 * 4 + 98 * 4 + 5 + 5 * 2 + 4 + 1)
    halved = replay_bytes(scheme, 100, 8, obs_dtype="float16")
    assert n_bytes - halved == 108 * 71 * (5 * 80 + 98) * 2


def test_memory_is_announced_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "available_memory", lambda: 10_000_000)
    small = replay_bytes(SCHEME, 100, 1)
    assert "100 episodes" in describe_memory(small, 100, SCHEME) and "10 MB available" in describe_memory(
        small, 100, SCHEME
    )
    ReplayBuffer(SCHEME, 100)
    with pytest.raises(
        MemoryError, match=r"100000 episodes takes .* and 10 MB of memory are available; lower --buffer-size"
    ):
        ReplayBuffer(SCHEME, 100_000)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (7.5e9, "7.5 GB"), (2e15, "2e+03 TB")]
)
def test_bytes_for_people(n: float, text: str) -> None:
    assert human_bytes(int(n)) == text


def test_wrong_use_is_explained() -> None:
    buffer = ReplayBuffer(SCHEME, 3)
    insert(buffer, mixed_episodes(2))
    assert buffer.can_sample(2) and not buffer.can_sample(3)
    with pytest.raises(ValueError, match="batch_size is 3; the buffer holds 2"):
        buffer.sample(3)
    with pytest.raises(ValueError, match="insert of 4 episodes"):
        insert(buffer, mixed_episodes(4))
    broken = mixed_episodes(1)[0]
    with pytest.raises(ValueError, match="obs has shape"):
        insert(buffer, [broken | {"obs": broken["obs"][..., :2]}])
    with pytest.raises(ValueError, match="filled must be ones"):
        insert(buffer, [broken | {"filled": np.array([1.0, 0, 1, 0, 0, 0, 0])}])
    with pytest.raises(ValueError, match="prioritised"):
        buffer.update_priorities(np.array([0]), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    for arguments, message in (
        ({"capacity": 0}, "buffer_size is 0"),
        ({"n_writers": 0}, "n_writers is 0"),
        ({"bucket": 0}, "bucket is 0"),
        ({"obs_dtype": "int4"}, "obs_dtype is 'int4'"),
    ):
        with pytest.raises(ValueError, match=message):
            ReplayBuffer(SCHEME, **({"capacity": 2} | arguments))


# ---- prioritised ----


def test_priorities_follow_pymarl2s_rule() -> None:
    buffer = ReplayBuffer(SCHEME, 4, prioritised=Prioritised(alpha=0.5, beta=0.4, t_max=100))
    insert(buffer, mixed_episodes(4))
    td = torch.tensor([[3.0, -1.0, 99.0], [0.5, 0.5, 0.5]])[..., None]
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])[..., None]
    buffer.update_priorities(np.array([2, 0]), td, mask)
    expected = np.array([1.5 / 3**0.5 + 1e-6, 1.0, 4 / 2**0.5 + 1e-6, 1.0]) ** 0.5
    np.testing.assert_allclose(buffer.state_dict(np.zeros(1, dtype=int))["priorities"], expected, rtol=1e-6)
    # A new episode gets the largest priority seen.
    insert(buffer, mixed_episodes(1))
    np.testing.assert_allclose(buffer.state_dict(np.zeros(1, dtype=int))["priorities"][0], expected[2], rtol=1e-6)


def test_prioritised_sampling_is_proportional_and_weighted() -> None:
    buffer = ReplayBuffer(SCHEME, 4, seed=0, prioritised=Prioritised(alpha=1.0, beta=0.5, t_max=100))
    insert(buffer, mixed_episodes(4))
    sums = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    buffer.update_priorities(np.arange(4), sums, torch.ones(4, 1, 1))
    counts = np.zeros(4)
    for _ in range(3000):
        batch, positions = buffer.sample(2, t_env=50)
        np.add.at(counts, positions, 1)
    np.testing.assert_allclose(counts / counts.sum(), [0.1, 0.2, 0.3, 0.4], atol=0.02)
    # beta has grown to 0.75; the rarest episode has weight 1.
    assert batch.weights is not None and batch.weights.shape == (2, 1, 1)
    np.testing.assert_allclose(batch.weights.flatten(), (np.array([1, 2, 3, 4])[positions] / 1.0) ** -0.75, rtol=1e-5)


def test_beta_ends_at_one() -> None:
    prioritised = Prioritised(beta=0.4, t_max=100)
    assert [prioritised.beta_at(t) for t in (0, 50, 100, 200)] == [0.4, 0.7, 1.0, 1.0]
    with pytest.raises(ValueError, match="per_alpha is 2"):
        Prioritised(alpha=2.0)


# ---- checkpoints ----


@pytest.mark.parametrize("prioritised", [None, Prioritised(t_max=100)])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same storage", "other storage"])
def test_a_restored_buffer_goes_on_identically(
    tmp_path: Any, prioritised: Prioritised | None, device: str | None, elsewhere: bool
) -> None:
    episodes = mixed_episodes(30)

    def make(device: str | None) -> ReplayBuffer:
        return ReplayBuffer(SCHEME, 5, n_writers=2, seed=7, bucket=1, prioritised=prioritised, device=device)

    ours = make(device)
    for i, made in enumerate(episodes[:13]):
        play(ours, i % 2, made)
        if ours.can_sample(3):
            ours.sample(3)
    # Writer 1 is in the middle of an episode when the checkpoint is taken.
    running = episodes[20]
    steps = np.array([0, 0])
    avail = np.ones((2, 2, 11), dtype=bool)

    def observe(buffer: ReplayBuffer, t: int) -> None:
        avail[1] = running["avail"][t] != 0
        obs, states = np.stack([running["obs"][t]] * 2), np.stack([running["states"][t]] * 2)
        buffer.write_observations(np.array([0, t]), obs, states, avail)

    def move(buffer: ReplayBuffer, t: int) -> None:
        actions, rewards = np.stack([running["actions"][t]] * 2), np.full(2, running["rewards"][t])
        buffer.write_transitions(np.array([0, t]), actions, rewards, np.full(2, running["terminated"][t]))

    length = int(running["filled"].sum()) - 1
    assert length >= 2
    observe(ours, 0)
    move(ours, 0)
    observe(ours, 1)
    steps[1] = 1
    save(tmp_path / "buffer.safetensors", ours.state_dict(steps))
    theirs = make(device if not elsewhere else "cpu" if device is None else None)
    theirs.load_state_dict(load(tmp_path / "buffer.safetensors"))

    for buffer in (ours, theirs):
        for t in range(1, length):
            move(buffer, t)
            observe(buffer, t + 1)
        buffer.commit(np.array([1]), np.array([length]))
    for i, made in enumerate(episodes[21:28]):
        a, b = ours.sample(3), theirs.sample(3)
        np.testing.assert_array_equal(a[1], b[1])
        for name, value in vars(a[0]).items():
            other = getattr(b[0], name)
            assert (value is None and other is None) or torch.equal(value, other), name
        if prioritised is not None:
            for buffer, (batch, positions) in ((ours, a), (theirs, b)):
                buffer.update_priorities(positions, batch.rewards * 3, batch.mask)
        play(ours, i % 2, made)
        play(theirs, i % 2, made)
    assert (ours.index, ours.count) == (theirs.index, theirs.count)


def test_states_of_many_episodes_pass_between_storages(device: str | None) -> None:
    ours, theirs = (ReplayBuffer(SCHEME, 200, 2, device=where) for where in (device, "cpu" if device is None else None))
    insert(ours, mixed_episodes(150))
    steps = np.array([3, 0])
    insert(theirs, mixed_episodes(200, seed=1))  # all of which has to go
    theirs.load_state_dict(ours.state_dict(steps))
    assert theirs.count == 150
    a, b = ours.state_dict(steps), theirs.state_dict(steps)
    assert a["episodes"]["obs"].shape == (152, SCHEME.episode_limit + 1, 2, 3)
    assert all(torch.equal(saved, b["episodes"][name]) for name, saved in a["episodes"].items())
    for buffer in (ours, theirs):
        insert(buffer, mixed_episodes(50, seed=2))
    for x, y in zip(vars(ours.sample(200)[0]).values(), vars(theirs.sample(200)[0]).values(), strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


# ---- draws made ahead of time ----


def test_a_draw_made_ahead_changes_nothing() -> None:
    """Whatever happens between it and the draw that asks for it, draws and saved states are those without it."""
    episodes = mixed_episodes(400)
    chance = np.random.default_rng(1)
    ours, theirs = (ReplayBuffer(SCHEME, 12, n_writers=2, seed=3, bucket=2, device=where) for where in (None, "cpu"))
    used = 0
    for made in episodes:
        play(ours, 0, made)
        play(theirs, 0, made)
        if chance.random() < 0.3:
            continue
        size = int(chance.integers(1, 4))
        if ours.can_sample(size):
            ahead = ours.draw_ahead(size)
            if chance.random() < 0.3:
                ahead = ours.draw_ahead(size)
            if chance.random() < 0.5:
                insert(ours, [made])
                insert(theirs, [made])
            states = (buffer.state_dict(np.zeros(2, dtype=int)) for buffer in (ours, theirs))
            assert next(states)["rng"] == next(states)["rng"]
            size = size if chance.random() < 0.8 else 1
            a, b = ours.draw(size), theirs.draw(size)
            used += a is ahead
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_array_equal(a.n_filled, b.n_filled)
            assert a.length == b.length
            for x, y in zip(vars(ours.sample(size)[0]).values(), vars(theirs.sample(size)[0]).values(), strict=True):
                assert (x is None and y is None) or torch.equal(x, y)
    assert used > 50


def test_a_draw_made_ahead_is_exchanged_when_one_of_its_episodes_is() -> None:
    buffer = ReplayBuffer(SCHEME, 5, bucket=1)
    insert(buffer, mixed_episodes(5))
    ahead = buffer.draw_ahead(5)
    insert(buffer, [episode(np.random.default_rng(0), 6, terminated=True)])
    draw = buffer.draw(5)
    assert ahead is not None and draw is not ahead
    np.testing.assert_array_equal(draw.positions, ahead.positions)
    assert draw.n_filled[0] == 7


def test_nothing_is_drawn_ahead_where_it_cannot_be_known() -> None:
    buffer = ReplayBuffer(SCHEME, 4, prioritised=Prioritised())
    insert(buffer, mixed_episodes(4))
    assert buffer.draw_ahead(2) is None
    assert ReplayBuffer(SCHEME, 4).draw_ahead(1) is None

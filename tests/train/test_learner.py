"""The learner: a recorded step is the step, whatever its bucket, and asks nothing of the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmix.algorithms import REGISTRY, Algorithm, EpisodeBatch, Scheme, make
from fastmix.algorithms.optimiser import Optimiser
from fastmix.backends import backend
from fastmix.testing import assert_close
from fastmix.train.feed import Feed, StreamedFeed, make_feed
from fastmix.train.learner import CudaRecorder, Learner, Terms
from fastmix.train.replay import Prioritised, ReplayBuffer
from fastmix.train.storage import HostStorage
from tests.cuda.device import no_waiting
from tests.generators import Shape, episodes, own_presets
from tests.train.tape import Tape, TapeRecorder

SHAPE = Shape(3, 5, 11, 7)
ALL = [(name, preset) for name in REGISTRY for preset in own_presets(name)]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cw": ("qmix", {"weighting": "cw"}),
    "ow": ("qmix", {"weighting": "ow"}),
    "q_lambda": ("qmix", {"targets": "q_lambda"}),
    "n_step": ("qmix", {"targets": "n_step", "n_step": 3}),
    "no double_q": ("qmix", {"double_q": False}),
    "weight_decay": ("qmix", {"weight_decay": 0.01}),
    "adam": ("qmix", {"optimizer": "adam"}),
    "rmsprop": ("qmix", {"optimizer": "rmsprop"}),
    "standardise_rewards": ("qmix", {"standardise_rewards": True}),
    "qatten: dead, utilities in keys": ("qatten", {"mixer": "qatten_pymarl", "mask_dead": True, "nonlinear": True}),
    "qtran: coma_critic": ("qtran", {"qtran_arch": "coma_critic", "network_size": "big", "double_q": False}),
    "qplex: attention": ("qplex", {"mixer": "qplex_dmaq_qatten", "targets": "q_lambda"}),
    "qplex: no double_q": ("qplex", {"weighted_head": False, "double_q": False, "compat": "released"}),
    "cw_qmix: no double_q": ("cw_qmix", {"double_q": False, "central_mixer": "central_atten"}),
    "ow_qmix: wide actions": ("ow_qmix", {"central_action_embed": 3}),
    "powqmix: other choices": ("powqmix", {"recogniser_weights": "importance", "recogniser_target": True}),
    "resq: max_larger": ("resq", {"condition": "max_larger", "residual_mixer": "vdn", "central_mixer": "vdn"}),
    "resq: hysteretic": ("resq", {"condition": "hysteretic", "mixer": "qatten_pymarl2", "central_action_embed": 2}),
    "resq: no mask": ("resq", {"condition": "none", "residual_mixer": "qatten_pymarl2", "compat": "released"}),
}
"""Settings that take other roads through a step than any preset's."""


def build_variant(variant: str, **where: Any) -> Algorithm:
    name, settings = VARIANTS[variant]
    return build(name, **where, **settings)


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and the optimiser's reference counting its steps where a graph can read them."""
    torch.set_num_threads(1)  # conftest puts it back
    monkeypatch.setattr(Optimiser, "_steps_as_factor", lambda self: self.steps.double())


def scheme_of(episode_limit: int, shape: Shape = SHAPE) -> Scheme:
    return Scheme(shape.n_agents, shape.n_actions, shape.obs_dim, shape.state_dim, episode_limit)


def build(
    name: str, preset: str = "pymarl2", *, episode_limit: int = 9, device: str = "cpu", **settings: Any
) -> Algorithm:
    return make(name, scheme_of(episode_limit), preset=preset, device=device, **settings)


def batch_of(steps: int, seed: int = 0, size: int = 4) -> EpisodeBatch:
    return EpisodeBatch(*episodes(SHAPE, size, steps, seed=seed))


def assert_same_state(a: Algorithm, b: Algorithm) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_result(a: Terms, b: Terms) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# ---- recorded steps ----


def check_recorded(make_algorithm: Callable[[], Algorithm], weighted: bool = False) -> None:
    """Steps of many lengths, recorded and not, with all that happens between steps in a run."""
    with backend("reference"):  # whose every operator passes the tape
        recorded, plain = make_algorithm(), make_algorithm()
        learner = Learner(recorded, recorder=TapeRecorder())
        assert plain.skips_padding and not recorded.skips_padding
        plain.skips_padding = False  # for the same bits
        lengths = [9, 5, 9, 9, 7, 5, 9, 7]
        for i, length in enumerate(lengths):
            batch = batch_of(length, seed=i)
            if weighted:
                batch.weights = torch.rand(4, 1, 1) + 0.5
            detailed = i % 3 == 2
            assert_same_result(learner.step(batch, detailed=detailed), plain.step(batch, detailed=detailed))
            assert_same_state(recorded, plain)
            assert learner.captures == len(set(lengths[: i + 1]))
            if i == 3:
                recorded.update_targets()
                plain.update_targets()
            if i == 5:  # as on resuming, or when an evaluation puts the best weights back
                state = {name: tensor.clone() for name, tensor in make_algorithm().state_dict().items()}
                recorded.load_state_dict(state)
                plain.load_state_dict(state)


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_a_recorded_step_is_the_step(name: str, preset: str) -> None:
    check_recorded(lambda: build(name, preset))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recorded_step_is_the_step_whatever_the_settings(variant: str) -> None:
    check_recorded(lambda: build_variant(variant))


def test_a_recorded_step_weighs_episodes() -> None:
    check_recorded(lambda: build("qmix"), weighted=True)


def test_recording_has_to_be_undone() -> None:
    """The comparison above can fail: a recorder that does not put back what it changed makes another algorithm."""

    class Careless(TapeRecorder):
        def __call__(self, learn: Callable[[], Terms], restore: Callable[[], None]) -> Tape:
            return super().__call__(learn, lambda: None)

    with backend("reference"):
        careless, plain = build("qmix"), build("qmix")
        Learner(careless, recorder=Careless()).step(batch_of(9))
        plain.step(batch_of(9))
    assert not torch.equal(careless.state_dict()["agent.fc1.weight"], plain.state_dict()["agent.fc1.weight"])


def test_what_is_made_from_weights_sees_a_replayed_step() -> None:
    """Packed copies of weights are renewed when their versions change, which a graph's writes do not make them do."""
    algo = build("qmix")
    learner = Learner(algo, recorder=lambda learn, restore: _Nothing(learn()))
    before = [p._version for p in algo.optimiser.parameters]
    learner.step(batch_of(9))
    learner.step(batch_of(9))
    after = [p._version for p in algo.optimiser.parameters]
    assert all(b >= a + 2 for a, b in zip(before, after, strict=True))
    assert algo.updates == 2
    assert all(p.grad is None for p in algo.optimiser.parameters)


@dataclasses.dataclass
class _Nothing:
    terms: Terms

    def replay(self) -> None:
        pass


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets `CudaRecorder` run where there is no CUDA, and lists what it did."""
    done: list[str] = []

    class Stream:
        def __init__(self, *_: object) -> None: ...
        def wait_stream(self, _: object) -> None: ...

    @contextmanager
    def note(*_: object, **__: object) -> Iterator[None]:
        done.append("begin")
        yield
        done.append("end")

    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    for name, value in {
        "Stream": Stream,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": Stream,
        "device": lambda _: nullcontext(),
        "stream": lambda _: nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": note,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: done.append("clear"), raising=False)
    return done


def test_a_capture_is_warmed_up_undone_and_kept_to_itself(pretended_cuda: list[str]) -> None:
    terms: Terms = {}

    def learn() -> Terms:
        pretended_cuda.append("learn")
        return terms

    recording = CudaRecorder(torch.device("cpu"))(learn, lambda: pretended_cuda.append("restore"))
    recording.replay()
    assert pretended_cuda == ["learn", "learn", "restore", "clear", "begin", "learn", "end", "clear", "replay"]
    assert recording.terms is terms


def test_a_step_that_cannot_be_captured_says_what_to_do(pretended_cuda: list[str]) -> None:
    def learn() -> Terms:
        if "begin" in pretended_cuda:
            raise RuntimeError("operation not permitted when stream is capturing")
        return {}

    with pytest.raises(RuntimeError, match=r"cannot be captured as a CUDA graph; it runs without one by --no-graphs"):
        CudaRecorder(torch.device("cpu"))(learn, lambda: None)


def test_without_graphs_a_step_is_the_algorithms_own() -> None:
    ours, theirs = build("qmix"), build("qmix")
    for graphs in (True, False):
        learner = Learner(ours, graphs=graphs)
        assert_same_result(learner.step(batch_of(9), detailed=True), theirs.step(batch_of(9), detailed=True))
        assert learner.captures == 0
    assert_same_state(ours, theirs)


# ---- buckets ----


def ragged_replay(limit: int, bucket: int, *, seed: int = 0, device: str | None = None, **options: Any) -> ReplayBuffer:
    """A replay buffer of 12 episodes of at most 13 transitions, in an environment whose limit is ``limit``."""
    replay = ReplayBuffer(scheme_of(limit), 12, seed=seed, bucket=bucket, device=device, **options)
    fill(replay, 12, 13)
    return replay


def fill(replay: ReplayBuffer, n: int, longest: int, seed: int = 0) -> None:
    """Insert ``n`` random episodes of at most ``longest`` transitions."""
    made = episodes(SHAPE, n, longest, seed=seed)
    filled = torch.cat([torch.ones(n, 1, 1), made.mask], 1)[..., 0]
    pad = torch.zeros(n, 1)
    replay.insert(
        obs=made.obs.numpy(), states=made.states.numpy(), actions=made.actions.numpy(),
        avail=made.avail_actions.numpy(), rewards=torch.cat([made.rewards[..., 0], pad], 1).numpy(),
        terminated=torch.cat([made.terminated[..., 0], pad], 1).numpy(), filled=filled.numpy(),
    )  # fmt: skip


def with_garbage(batch: EpisodeBatch) -> EpisodeBatch:
    """The same episodes with finite nonsense where nothing is stored."""
    stored = torch.cat([torch.ones_like(batch.mask[:, :1]), batch.mask], 1)
    junk = torch.Generator().manual_seed(9)
    changed = {}
    for name in ("obs", "states", "rewards"):
        value = getattr(batch, name)
        live = batch.mask if name == "rewards" else stored.view(*stored.shape[:2], *(1,) * (value.dim() - 2))
        noise = 100 * torch.randn(value.shape, generator=junk, dtype=value.dtype)
        changed[name] = torch.where(live != 0, value, noise)
    return dataclasses.replace(batch, **changed)


def double(batch: EpisodeBatch) -> EpisodeBatch:
    made = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        made[field.name] = value.double() if value is not None and value.is_floating_point() else value
    return EpisodeBatch(**made)


def stepped(algo: Algorithm, batch: EpisodeBatch) -> dict[str, Tensor]:
    """Everything that comes of a step: loss, norm, gradients, weights and the rest of the state."""
    algo.double()
    algo.update_targets()
    result = algo.step(double(batch), detailed=True)
    for name in ("td_error", "mask"):
        del result[name]  # as long as the bucket
    grads = {f"grad.{i}": p.grad for i, p in enumerate(algo.optimiser.parameters) if p.grad is not None}
    assert grads
    return result | grads | algo.state_dict()


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_results_do_not_depend_on_the_bucket(name: str, preset: str) -> None:
    check_buckets(lambda limit: build(name, preset, episode_limit=limit))


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_do_not_depend_on_the_bucket_whatever_the_settings(variant: str) -> None:
    check_buckets(lambda limit: build_variant(variant, episode_limit=limit))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("qatten", {"mixer": "qatten_pymarl", "nonlinear": True}), ("qtran", {})],
    ids=["qatten", "qtran"],
)
def test_what_released_code_makes_of_padding_does_not_depend_on_the_bucket(name: str, settings: dict[str, Any]) -> None:
    """Where padded steps count, those of the longest episode's length do and no others."""
    check_buckets(lambda limit: build(name, episode_limit=limit, compat="released", **settings), garbage=False)


def check_buckets(make_algorithm: Callable[[int], Algorithm], *, garbage: bool = True) -> None:
    """The same episodes, padded to their own length, to 16, 32 and 48 steps, and to the limit of 50."""
    expected = None
    for bucket, length in ((1, 13), (16, 16), (32, 32), (48, 48), (64, 50)):
        batch, _ = ragged_replay(50, bucket).sample(12)
        assert batch.mask.shape[1] == length
        for given in (batch, with_garbage(batch)) if garbage else (batch,):
            actual = stepped(make_algorithm(50), given)
            expected = expected or actual
            assert actual.keys() == expected.keys()
            for key, value in actual.items():
                assert torch.isfinite(value).all(), (bucket, key)
                assert_close(value.double(), expected[key].double(), 1e-9, name=f"{key} in a bucket of {bucket}")


# ---- what the host has to do ----


class _Strangers(TorchDispatchMode):
    """Notes operators that touch the host's memory, or decide the size of their result by its values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs or {}, result)) if isinstance(t, Tensor)]
        waits = func.overloadpacket.__name__ in (
            "multinomial",
            "nonzero",
            "masked_select",
            "unique",
            "_local_scalar_dense",
        )
        if waits or any(t.device.type == "cpu" for t in tensors):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("road", ["resident", "streamed"])
@pytest.mark.parametrize(
    "make_algorithm",
    [
        *(pytest.param(partial(build, name, preset), id=f"{name}-{preset}") for name, preset in ALL),
        *(pytest.param(partial(build_variant, variant), id=variant) for variant in VARIANTS),
    ],
)
def test_a_step_needs_nothing_of_the_host(make_algorithm: Callable[..., Algorithm], road: str) -> None:
    """On the meta device there are no values: what looks at one raises, and what comes from the host is seen."""
    algo = make_algorithm(device="meta")
    delivery, _ = road_to("meta", road).next(4)
    with _Strangers() as strangers:
        assert not isinstance(delivery, EpisodeBatch)
        algo.finish(algo.learn(delivery.read()), detailed=True)
        algo.update_targets()
    assert strangers.found == []


def test_acting_needs_nothing_of_the_host_but_its_observations() -> None:
    algo = build("qmix", device="meta")
    obs, last = torch.empty(6, 3, 7, device="meta"), torch.zeros(6, 3, dtype=torch.int64, device="meta")
    avail, hidden = torch.ones(6, 3, 5, dtype=torch.bool, device="meta"), algo.initial_hidden(6)
    with _Strangers() as strangers:
        algo.act(obs, last, avail, hidden, epsilon=0.5)
    assert strangers.found == []


def test_what_waits_for_the_device_is_seen() -> None:
    with _Strangers() as strangers:
        torch.zeros(3, device="meta").add_(1)
        assert strangers.found == []
        torch.multinomial(torch.ones(2, 3, device="meta"), 1)
        torch.ones(3).to("meta")
    assert [name.split(".")[1] for name in strangers.found] == ["multinomial", "ones", "_to_copy"]


def road_to(device: str, road: str, **options: Any) -> Feed:
    """A filled replay buffer and its road to ``device``."""
    where = torch.device(device)
    if road == "resident":
        replay = ragged_replay(50, 16, device=device, **options)
    else:
        replay = ragged_replay(50, 16, **options)
    if road == "streamed":
        assert isinstance(replay.storage, HostStorage)
        return StreamedFeed(replay, replay.storage, where)
    return make_feed(replay, where)


# ---- from replay ----


def train(learner: Learner, feed: Feed, steps: int, size: int = 4) -> Learner:
    """``steps`` updates of random lengths while episodes are replaced and other work uses the device's memory.

    A step is captured when its length is first seen, and never again.
    """
    chance, seen = np.random.default_rng(5), set()
    for i in range(steps):
        if i % 2:
            fill(feed.replay, 3, int(chance.integers(1, 45)), seed=i)
        batch, positions = feed.next(size, t_env=i)
        result = learner.step(batch, detailed=i % 10 == 9)
        seen.add(result["mask"].shape[1])
        assert learner.captures in (0, len(seen))
        if feed.replay.prioritised is not None:
            feed.replay.update_priorities(positions, result["td_error"], result["mask"])
        noise = torch.full((int(chance.integers(1, 300)), 64), float("nan"), device=learner.algo.device)
        noise = noise @ noise.t()
        if i % 7 == 6:
            learner.algo.update_targets()
        feed.prefetch(size)
    assert seen == {16, 32, 48}
    return learner


@pytest.mark.parametrize("weighted", [False, True])
def test_every_road_ends_with_the_same_weights(weighted: bool) -> None:
    """Recorded or not, from host memory or the device's, with episodes coming in between and fetching ahead."""
    prioritised = Prioritised(t_max=100) if weighted else None
    ends = []
    with backend("reference"):
        for road, recorder in (
            ("host", None),
            ("resident", None),
            ("resident", TapeRecorder()),
            ("streamed", None),
            ("streamed", TapeRecorder()),
        ):
            algo, feed = build("qmix", episode_limit=50), road_to("cpu", road, prioritised=prioritised)
            algo.skips_padding = False  # for the same bits
            learner = train(Learner(algo, recorder=recorder), feed, 25)
            assert learner.captures == (3 if recorder else 0)
            ends.append(algo)
    for algo in ends[1:]:
        assert_same_state(algo, ends[0])


# ---- on a GPU ----


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def check_graphs(road: str, steps: int, name: str = "qmix", preset: str = "pymarl2", **options: Any) -> None:
    """Captured and uncaptured runs from the same seed end with the same state, bit for bit."""
    ends = []
    for graphs in (True, False):
        algo = build(name, preset, episode_limit=50, device="cuda")
        learner = train(Learner(algo, graphs=graphs), road_to("cuda", road, **options), steps)
        assert learner.captures == (3 if graphs else 0)
        ends.append(algo)
    assert_same_state(*ends)
    assert ends[0].updates == steps


@needs_gpu
@pytest.mark.parametrize("road", ["resident", "streamed"])
def test_a_thousand_captured_updates_are_those_without_graphs(road: str) -> None:
    check_graphs(road, 1000)


@needs_gpu
@pytest.mark.parametrize(("name", "preset"), ALL)
def test_captured_updates_of_every_algorithm_are_those_without_graphs(name: str, preset: str) -> None:
    check_graphs("resident", 60, name, preset)


@needs_gpu
def test_captured_updates_weigh_episodes() -> None:
    check_graphs("resident", 60, prioritised=Prioritised(t_max=100))


@needs_gpu
def test_where_episodes_are_kept_changes_nothing_on_a_gpu() -> None:
    ends = []
    for road in ("resident", "streamed"):
        algo = build("qmix", episode_limit=50, device="cuda")
        train(Learner(algo), road_to("cuda", road), 60)
        ends.append(algo)
    assert_same_state(*ends)


@needs_gpu
def test_a_captured_step_takes_batches_from_anywhere() -> None:
    """Batches of the host's and of the device's memory, one after another, on the same graph."""
    captured, plain = build("qmix", device="cuda"), build("qmix", device="cuda")
    learner = Learner(captured)
    for i in range(6):
        batch = batch_of(9, seed=i)
        result = learner.step(batch if i % 2 else batch.to("cuda"), detailed=True)
        assert_same_result(result, plain.step(batch.to("cuda"), detailed=True))
    assert learner.captures == 1
    assert_same_state(captured, plain)


@needs_gpu
@pytest.mark.parametrize("road", ["resident", "streamed"])
def test_a_warm_update_never_waits_for_the_device(road: str) -> None:
    algo, feed = build("qmix", episode_limit=50, device="cuda"), road_to("cuda", road)
    learner = train(Learner(algo), feed, 40)
    captures, replay = learner.captures, feed.replay
    obs, states = np.ones((1, 3, SHAPE.obs_dim)), np.ones((1, SHAPE.state_dim))
    avail = np.ones((1, 3, SHAPE.n_actions), dtype=bool)
    with no_waiting():
        for i in range(30):
            for t in range(3):
                replay.write_observations(np.array([t]), obs, states, avail)
                replay.write_transitions(np.array([t]), np.zeros((1, 3), dtype=int), np.ones(1), np.zeros(1))
            replay.commit(np.array([0]), np.array([2]))
            learner.step(feed.next(4)[0], detailed=i % 5 == 0)
            algo.update_targets()
            feed.prefetch(4)
        feed.next(4)
    assert learner.captures == captures


@needs_gpu
def test_waiting_is_noticed() -> None:
    value = torch.ones((), device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@needs_gpu
def test_acting_never_waits_for_the_device() -> None:
    algo = build("qmix", device="cuda")
    obs, last = torch.randn(6, 3, SHAPE.obs_dim, device="cuda"), torch.full((6, 3), -1, device="cuda")
    avail = torch.ones(6, 3, SHAPE.n_actions, dtype=torch.bool, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    _, hidden = algo.act(obs, last, avail, algo.initial_hidden(6), epsilon=0.5, generator=generator)
    with no_waiting():
        algo.act(obs, last, avail, hidden, epsilon=0.5, generator=generator)

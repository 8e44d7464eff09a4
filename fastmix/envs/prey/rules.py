"""The rules of predator-prey and their published settings, under the names of the public configurations."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Final

from fastmix.envs.options import changed

ACTIONS: Final = ("right", "down", "left", "up", "stay", "catch")
COMPAT: Final = ("paper", "released")
_MOST: Final = 2**14  # entities, and cells along a side: what the core's indices are made for


@dataclass(frozen=True)
class PreyRules:
    """One game of predator-prey ("stag hunt"). The defaults are pymarl2's ``stag_hunt``.

    ``n_agents`` predators hunt ``n_stags`` and ``n_hare`` prey on a grid of ``world_shape`` (rows, columns). Lists are
    (stag, hare) where two numbers are asked for. All rewards, the punishment included, are added to the reward.

    ``compat="released"`` keeps what look like slips of the public code; ``"paper"`` mends them:

    * with ``toroidal`` only movement crosses the border; catching and observations do not
    * an agent that stays, catches or walks against the border collides with itself and is paid ``reward_collision``

    Raises ``ValueError`` naming a rule, its value and what it must be.
    """

    world_shape: tuple[int, int] = (10, 10)
    toroidal: bool = False
    n_agents: int = 8
    n_stags: int = 8
    n_hare: int = 0
    episode_limit: int = 200

    agent_obs: tuple[int, int] = (2, 2)  # half-widths of the window that an agent sees
    observe_walls: bool = False  # -1 in the agents' channel beyond the border
    observe_ids: bool = False  # index + 1 instead of 1

    agent_move_block: tuple[int, ...] = (0, 1, 2)  # what an agent cannot walk into: 0 agents, 1 stags, 2 hares
    p_stags_rest: float = 0.0
    p_hare_rest: float = 0.0

    capture_action: bool = True  # False: prey with too little room are captured
    capture_action_conditions: tuple[int, int] = (2, 1)  # catchers that a capture takes
    capture_conditions: tuple[int, int] = (0, 1)  # without capture_action: most free cells around a captured prey
    capture_freezes: bool = True  # whoever takes part in a capture leaves the game
    remove_frozen: bool = True  # ... and the grid
    capture_terminal: bool = False
    prevent_cannibalism: bool = True  # a capture needs an agent beside the prey

    reward_stag: float = 10.0
    reward_hare: float = 1.0
    reward_collision: float = 0.0
    reward_time: float = 0.0
    miscapture_punishment: float = 0.0  # for each prey that too few agents tried to catch

    compat: str = "paper"

    def __post_init__(self) -> None:
        rows, cols = self.world_shape
        self._check("world_shape", 1 <= rows <= _MOST and 1 <= cols <= _MOST, f"two numbers from 1 to {_MOST}")
        self._check("agent_obs", all(0 <= k <= _MOST for k in self.agent_obs), "two half-widths of at least 0")
        self._check("n_agents", self.n_agents >= 1, "at least 1")
        for name in ("n_stags", "n_hare"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("n_stags", self.n_prey >= 1, "at least 1 where there are no hares")
        entities = self.n_agents + self.n_prey
        self._check("world_shape", entities <= rows * cols, f"a world with room for all {entities} agents and prey")
        self._check("n_agents", self.n_agents <= _MOST and self.n_prey <= _MOST, f"at most {_MOST}, as the prey")
        self._check("episode_limit", self.episode_limit >= 1, "at least 1")
        self._check("agent_move_block", set(self.agent_move_block) <= {0, 1, 2}, "of 0, 1 and 2")
        for name in ("p_stags_rest", "p_hare_rest"):
            self._check(name, 0.0 <= getattr(self, name) <= 1.0, "a probability")
        self._check("capture_action_conditions", min(self.capture_action_conditions) >= 1, "two numbers from 1")
        self._check("capture_conditions", min(self.capture_conditions) >= 0, "two numbers from 0")
        for name in ("reward_stag", "reward_hare", "reward_collision", "reward_time", "miscapture_punishment"):
            self._check(name, math.isfinite(getattr(self, name)), "finite")
        self._check("compat", self.compat in COMPAT, " or ".join(map(repr, COMPAT)))
        if self.compat == "released":
            square = self.agent_obs[0] == self.agent_obs[1]
            self._check("agent_obs", square, "square with compat 'released', whose other windows show wrong cells")

    @property
    def n_prey(self) -> int:
        """Stags and hares; stags have the lower indices."""
        return self.n_stags + self.n_hare

    @property
    def n_actions(self) -> int:
        """Four moves, staying and, with ``capture_action``, catching; see ``ACTIONS``."""
        return len(ACTIONS) if self.capture_action else len(ACTIONS) - 1

    @property
    def obs_dim(self) -> int:
        """Three channels (agents, stags, hares) of every cell of a window, channel fastest."""
        return (2 * self.agent_obs[0] + 1) * (2 * self.agent_obs[1] + 1) * 3

    @property
    def state_dim(self) -> int:
        """The same of the whole world."""
        return self.world_shape[0] * self.world_shape[1] * 3

    def is_stag(self, prey: int) -> bool:
        """Whether a prey of that index is a stag."""
        return prey < self.n_stags

    def _check(self, name: str, ok: bool, must: str) -> None:
        if not ok:
            raise ValueError(f"prey: {name} is {getattr(self, name)!r}; it must be {must}")


@dataclass(frozen=True)
class Preset:
    """Published rules, and how they were trained on: environment steps, and settings over those of the algorithm."""

    rules: PreyRules
    t_max: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


TEST_INTERVAL: Final = 10_000
TEST_NEPISODE: Final = 16
"""Steps between evaluations and episodes of one, in all public configurations."""

PUNISHED_ANNEAL_TIME: Final = 1_500_000
"""POWQMIX, appendix: environment steps of the epsilon schedule where the punishment is not 0."""


def powqmix_preset(punishment: float) -> Preset:
    """POWQMIX's experiment with this punishment: pymarl2's game and settings, and a longer epsilon schedule."""
    anneal = {"epsilon_anneal_time": PUNISHED_ANNEAL_TIME} if punishment != 0 else {}
    rules = PreyRules(miscapture_punishment=punishment)
    return Preset(rules, t_max=2_050_000, settings={"obs_agent_id": False, **anneal})


PRESETS: Final[dict[str, Preset]] = {
    "wqmix": Preset(PreyRules(miscapture_punishment=-2.0), t_max=1_000_000),
    "pymarl2": Preset(PreyRules(), t_max=2_050_000, settings={"obs_agent_id": False}),
}

EXAMPLE: Final = "prey:wqmix, prey:pymarl2, prey:p-2 (any punishment), prey:p-2,n_agents=4,world_shape=6x7"


def parse(spec: str) -> Preset:
    """What follows ``prey:``, a preset and rules that differ from it: ``p-1.5,toroidal=true,world_shape=6x7``.

    Raises ``ValueError`` naming what is known for an unknown preset or rule, or a value that is none.
    """
    name, *changes = spec.split(",")
    if name in PRESETS:
        preset = PRESETS[name]
    elif re.fullmatch(r"p-?\d+(\.\d+)?", name):
        punishment = float(name[1:])
        if punishment > 0:
            raise ValueError(f"env is 'prey:{spec}'; the punishment is added to the reward, so write p-{name[1:]}")
        preset = powqmix_preset(punishment or 0.0)
    else:
        raise ValueError(f"env is 'prey:{spec}'; it must be like {EXAMPLE}")
    return dataclasses.replace(preset, rules=changed(f"prey:{spec}", preset.rules, changes))


_INACTIVE: Final[dict[str, Any]] = {
    "directed_observations": False, "intersection_global_view": False, "intersection_unknown": False,
    "mountain_slope": 0.0, "mountain_spawn": False, "observe_one_hot": False, "observe_state": False,
    "random_ghosts": False, "state_as_graph": False,
}  # fmt: skip
"""Options of the public class that no published configuration uses, by the value that switches them off."""


def from_public(config: dict[str, Any], compat: str = "paper") -> PreyRules:
    """The rules of a complete ``env_args`` of the public class; options that change nothing are left out.

    Raises ``ValueError`` naming an option that is switched on and not supported.
    """
    for name, off in _INACTIVE.items():
        if config.get(name, off) != off:
            raise ValueError(f"prey: {name} is {config[name]!r}; only {off!r} is supported, as in all published work")
    known = {field.name for field in dataclasses.fields(PreyRules)}
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return PreyRules(**{**{name: value for name, value in given.items() if name in known}, "compat": compat})

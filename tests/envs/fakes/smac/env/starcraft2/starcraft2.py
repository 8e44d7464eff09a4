"""The interface of oxwhirl/smac 1.0.0 around a battle of our own: its calls, types, sizes, errors and traps.

The battle: an attack takes 9 of an enemy's 45 health; every step one living ally, drawn by the seed, loses 5 of 45.
With every unit attacking the first living enemy three allies win in 6 steps; without any attack they are dead after 27.

``FAKE_SMAC`` (JSON) makes it fail: ``{"ledger": folder, "fail": kind, "episode": e, "step": t, "times": n}`` fails in
step t of the e-th episode of an environment (from 0; resets are step 0), n times in all, over all processes. Kinds:
``crash`` (swallowed, as smac does), ``raise``, ``exit``, ``kill``, ``hang``, ``join``, ``never_starts``,
``no_install``, ``no_map``.
``ledger`` also gets a file ``game-PID`` for every game launched, whose process is real. ``damage`` replaces the 5.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from pysc2.lib import protocol, remote_controller
from s2clientprotocol import sc2api_pb2  # noqa: F401

warnings.warn("invalid escape sequence", DeprecationWarning, stacklevel=1)  # one of about a hundred
if len(sys.argv) > 1:
    raise SystemExit(f"FATAL Flags parsing error: Unknown command line flag {sys.argv[1]}")

MAPS = {"3m": (3, 3, 60), "8m": (8, 8, 120)}
HEALTH = 45.0


class StarCraft2Env:
    def __init__(
        self,
        map_name: str = "8m",
        step_mul: int = 8,
        move_amount: float = 2,
        difficulty: str = "7",
        game_version: str | None = None,
        seed: int | None = None,
        continuing_episode: bool = False,
        obs_all_health: bool = True,
        obs_own_health: bool = True,
        obs_last_action: bool = False,
        obs_pathing_grid: bool = False,
        obs_terrain_height: bool = False,
        obs_instead_of_state: bool = False,
        obs_timestep_number: bool = False,
        state_last_action: bool = True,
        state_timestep_number: bool = False,
        reward_sparse: bool = False,
        reward_only_positive: bool = True,
        reward_death_value: float = 10,
        reward_win: float = 200,
        reward_defeat: float = 0,
        reward_negative_scale: float = 0.5,
        reward_scale: bool = True,
        reward_scale_rate: float = 20,
        replay_dir: str = "",
        replay_prefix: str = "",
        window_size_x: int = 1920,
        window_size_y: int = 1200,
        heuristic_ai: bool = False,
        heuristic_rest: bool = False,
        debug: bool = False,
    ) -> None:
        self.n_agents, self.n_enemies, self.episode_limit = MAPS[map_name]
        if difficulty not in set("123456789A"):
            raise KeyError(difficulty)
        self.map_name, self.replay_dir, self.replay_prefix = map_name, replay_dir, replay_prefix
        self.continuing_episode, self.obs_instead_of_state = continuing_episode, obs_instead_of_state
        self.obs_timestep_number = obs_timestep_number
        self.n_actions = 6 + self.n_enemies
        self.shield_bits_ally = self.unit_type_bits = 0
        self.reward_scale_rate = reward_scale_rate
        self.max_reward = self.n_enemies * reward_death_value + reward_win
        self.battles_game = self.battles_won = self.timeouts = self.force_restarts = 0
        self._episode_count = self._episode_steps = 0
        self._agents: dict[int, float] = {}
        self._enemies: dict[int, float] = {}
        self._rng = np.random.default_rng(seed)
        self._controller: Any = None
        self._game: subprocess.Popen[bytes] | None = None
        self._failing = json.loads(os.environ.get("FAKE_SMAC", "{}"))

    def get_env_info(self) -> dict[str, int]:
        obs = 4 + 5 * self.n_enemies + 5 * (self.n_agents - 1) + 1
        state = 4 * self.n_agents + 3 * self.n_enemies + self.n_agents * self.n_actions
        return {
            "state_shape": obs * self.n_agents if self.obs_instead_of_state else state,
            "obs_shape": obs,
            "n_actions": self.n_actions,
            "n_agents": self.n_agents,
            "episode_limit": self.episode_limit,
        }

    def reset(self) -> tuple[list[np.ndarray], np.ndarray]:
        self._episode_steps = 0
        if self._episode_count == 0:
            self._launch()
            self.max_reward += HEALTH * self.n_enemies  # again and again, until an episode has ended
        self.last_action = np.zeros((self.n_agents, self.n_actions))
        self._agents = {a: HEALTH for a in range(self.n_agents)}
        self._enemies = {e: HEALTH for e in range(self.n_enemies)}
        if self._fails("crash"):
            self._relaunch()
            if self._episode_count == 0:
                self._agents = {}
                self.get_obs()  # KeyError: 0
            self._agents = {a: 0.0 for a in range(self.n_agents)}
        return self.get_obs(), self.get_state()

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        actions = [int(a) for a in actions]
        self.last_action = np.eye(self.n_actions)[np.array(actions)]
        for a, action in enumerate(actions):
            assert self.get_avail_agent_actions(a)[action] == 1, f"Agent {a} cannot perform action {action}"
        self._episode_steps += 1
        if self._fails("crash"):
            self._relaunch()
            return 0, True, {}
        before = sum(self._enemies.values())
        alive = sum(health > 0 for health in self._enemies.values())
        for action in actions:
            if action >= 6:
                self._enemies[action - 6] = max(0.0, self._enemies[action - 6] - 9)
        living = [a for a, health in self._agents.items() if health > 0]
        victim = int(self._rng.choice(living))
        self._agents[victim] -= self._failing.get("damage", 5)
        left = sum(health > 0 for health in self._enemies.values())
        reward = before - sum(self._enemies.values()) + 10 * (alive - left)
        info: dict[str, Any] = {"battle_won": False, "dead_allies": 0, "dead_enemies": self.n_enemies - left}
        terminated = True
        if not left:
            self.battles_game += 1
            self.battles_won += 1
            info["battle_won"] = True
            reward += 200
        elif all(health <= 0 for health in self._agents.values()):
            self.battles_game += 1
        elif self._episode_steps >= self.episode_limit:
            if self.continuing_episode:
                info["episode_limit"] = True
            self.battles_game += 1
            self.timeouts += 1
        else:
            terminated = False
        self._episode_count += terminated
        return reward / (self.max_reward / self.reward_scale_rate), terminated, info

    def get_obs(self) -> list[np.ndarray]:
        return [self._get_obs_agent(a) for a in range(self.n_agents)]

    def get_state(self) -> np.ndarray:
        if self.obs_instead_of_state:
            return np.concatenate(self.get_obs()).astype(np.float32)
        allies = [[h / HEALTH, 0, 0, 0] if h > 0 else [0] * 4 for h in self._agents.values()]
        enemies = [[h / HEALTH, 0, 0] for h in self._enemies.values()]
        return np.concatenate([np.ravel(allies), np.ravel(enemies), np.ravel(self.last_action)]).astype(np.float32)

    def get_avail_actions(self) -> list[list[int]]:
        return [self.get_avail_agent_actions(a) for a in range(self.n_agents)]

    def get_avail_agent_actions(self, a: int) -> list[int]:
        if self._agents[a] <= 0:
            return [1] + [0] * (self.n_actions - 1)
        return [0, 1, 1, 1, 1, 1] + [int(health > 0) for health in self._enemies.values()]

    def save_replay(self) -> None:
        prefix = self.replay_prefix or self.map_name
        if "/" in prefix:
            raise ValueError(f"Replay prefix '{prefix}' contains '/', use replay_dir instead.")
        assert self._controller is not None
        (Path(self.replay_dir) / f"{prefix}_2026-01-01-00-00-00.SC2Replay").write_bytes(b"MPQ")

    def close(self) -> None:
        if self._game is not None:
            self._game.kill()
            self._game.wait()
            self._game = None

    def _get_obs_agent(self, a: int) -> np.ndarray:
        size = self.get_env_info()["obs_shape"]
        obs = np.zeros(size + self.obs_timestep_number, np.float64 if self.obs_timestep_number else np.float32)
        if self._agents[a] > 0:
            obs[:4] = 1
            obs[4 : 4 + 5 * self.n_enemies : 5] = [health > 0 for health in self._enemies.values()]
            obs[size - 1] = self._agents[a] / HEALTH
        return obs

    def _launch(self) -> None:
        if self._fails("no_install"):
            raise FileNotFoundError("[Errno 2] No such file or directory: '~/StarCraftII/Versions'")
        if self._fails("never_starts"):
            raise remote_controller.ConnectError("Failed to connect to the SC2 websocket. Is it up?")
        if self._game is None:
            self._game = subprocess.Popen(["sleep", "600"])
            if "ledger" in self._failing:
                (Path(self._failing["ledger"]) / f"game-{self._game.pid}").touch()
        if self._fails("no_map"):
            raise ValueError(f"Map {self.map_name} not found.")
        if self._fails("join"):
            raise protocol.ConnectionError("Error during join_game: Socket error: socket is already closed.")
        ping = SimpleNamespace(game_version="4.10.0", base_build=75689)
        self._controller = SimpleNamespace(ping=lambda: ping)

    def _relaunch(self) -> None:
        self.close()
        self._launch()
        self.force_restarts += 1

    def _fails(self, kind: str) -> bool:
        """Whether to do what ``kind`` says here and now; what ends the process is done at once."""
        wanted = self._failing.get("fail")
        at = (self._failing.get("episode", 0), self._failing.get("step", 0))
        if wanted is None or at != (self._episode_count, self._episode_steps):
            return False
        if wanted != kind and not (kind == "crash" and wanted in ("raise", "exit", "kill", "hang")):
            return False
        for number in range(self._failing.get("times", 1)):
            try:
                (Path(self._failing["ledger"]) / f"failure-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            break
        else:
            return False
        if wanted == "raise":
            raise remote_controller.ConnectError("Websocket closed")
        if wanted == "exit":
            os._exit(3)
        if wanted == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if wanted == "hang":
            time.sleep(600)
        return True

"""An environment of your own, by the name of the function that makes it: ``python:my_games.make_tag,n_agents=4``."""

from __future__ import annotations

import importlib

from fastmix.envs.protocol import BatchedEnv


def make_custom(spec: str, n_envs: int, seed: int) -> BatchedEnv:
    """What ``module.function(spec, n_envs, seed)`` returns, ``spec`` being what follows the first comma.

    The module is imported, so it has to be on Python's path, in worker processes as well.

    Raises:
        ValueError: there is no such module or function, or what it made is no ``BatchedEnv``.
    """
    name, _, rest = spec.partition(",")
    path, dot, function = name.rpartition(".")
    if not dot:
        raise ValueError(f"env is 'python:{spec}'; it must be python:module.function, the function that makes it")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise  # the module is there, and lacks something itself
        raise ValueError(
            f"env is 'python:{spec}', and there is no module {path}; is its folder on the path (PYTHONPATH=.)?"
        ) from error
    factory = getattr(module, function, None)
    if not callable(factory):
        raise ValueError(f"env is 'python:{spec}', and {path} has no function {function}")
    env = factory(rest, n_envs, seed)
    if not isinstance(env, BatchedEnv):
        lacking = [name for name in _members() if not hasattr(env, name)]
        raise ValueError(f"{name} made a {type(env).__name__}, which lacks {', '.join(lacking)} of a BatchedEnv")
    return env


def _members() -> list[str]:
    methods = [name for name in vars(BatchedEnv) if not name.startswith("_") and callable(getattr(BatchedEnv, name))]
    return [*BatchedEnv.__annotations__, *methods]

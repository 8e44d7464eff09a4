"""The epsilon schedules of the public trainers (golden kind ``epsilon_schedule``)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fastmix.train.schedules import EpsilonSchedule


def check(data: dict[str, Any]) -> None:
    """Compare with every epsilon of one golden file, to the last bits of float64."""
    settings = json.loads(str(data["meta/hp_json"]))
    schedule = EpsilonSchedule(settings["start"], settings["finish"], settings["time_length"], settings["decay"])
    ours = [schedule(int(t)) for t in data["in/t"]]
    np.testing.assert_allclose(ours, data["out/epsilon"], rtol=1e-14, atol=0)

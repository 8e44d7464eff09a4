"""Where a training step, or any other function, spends its time: dispatches, kernels, host time, memory, by part.

`profile` measures one function, `profile_together` several against each other, `table` prints them; `part` names the
parts of a function, and `CountDispatches` is the counter alone. ``docs/profiling.md`` says what each number means.
"""

from fastmix._parts import part
from fastmix.testing.profiler.dispatch import CountDispatches
from fastmix.testing.profiler.measure import Part, Profile, profile, profile_together
from fastmix.testing.profiler.table import summary, table

__all__ = ["CountDispatches", "Part", "Profile", "part", "profile", "profile_together", "summary", "table"]

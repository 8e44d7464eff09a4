"""Tools for tests and measurements, installed with the package so that users can check it on their own machine."""

from fastmix.testing.compare import assert_close, rms_ratio
from fastmix.testing.poison import poison_, poisoned_allocations
from fastmix.testing.profiler import CountDispatches, Part, Profile, part, profile

__all__ = [
    "CountDispatches",
    "Part",
    "Profile",
    "assert_close",
    "part",
    "poison_",
    "poisoned_allocations",
    "profile",
    "rms_ratio",
]

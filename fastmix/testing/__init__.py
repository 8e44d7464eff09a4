"""Tools for tests and measurements, installed with the package so that users can check it on their own machine."""

from fastmix.testing.compare import assert_close, rms_ratio
from fastmix.testing.poison import poison_, poisoned_allocations

__all__ = ["assert_close", "poison_", "poisoned_allocations", "rms_ratio"]

"""The same computations written the public way: what fastmix is timed against.

Plain PyTorch in the form the public trainers use (one agent call per time step, separate layers per hypernetwork,
Python recursions over time), written from the equations. `learner` holds whole learner steps, `networks` the modules
in them, `operators` single operators and the matrix products that bound them, `training` whole runs. Tests hold them to
the same numbers as fastmix, so that a ratio compares two ways of computing one thing.

The wheel carries this folder as ``fastmix.baselines``; `fastmix.experiments.bench.baselines` finds it in either place.
"""

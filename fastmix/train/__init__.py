"""The trainer: configuration, replay, rollouts, evaluation, checkpoints, logs, sweeps of seeds."""

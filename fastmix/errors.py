"""Errors of our own. Nothing is imported for them, so that the command line can tell them from bugs."""


class EnvironmentFailed(RuntimeError):  # noqa: N818 - what happened, as KeyboardInterrupt
    """An environment broke down again and again. What was learnt until then is worth keeping."""

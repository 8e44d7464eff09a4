"""Random problems for every op: the compiled core against plain PyTorch (``python -m tests.fuzz --help``)."""

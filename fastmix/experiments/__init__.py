"""The papers' tables and figures, and the commands of the command line, each with ``add_arguments`` and ``run``."""

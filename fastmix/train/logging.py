"""What a run writes while it trains: JSON lines always, TensorBoard when asked for, a progress bar on a terminal."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm


class RunLogger:
    """Appends one JSON object a call to ``metrics.jsonl`` and mirrors its numbers to TensorBoard.

    ``offset`` is the length of the file after the last record; a resumed run gives the offset of its checkpoint, and
    what a killed run wrote beyond it is cut off, so that no step is logged twice.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, offset: int = 0, t_env: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        self._writer: SummaryWriter | None = None
        if tensorboard:
            check_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=t_env or None)
        self._file = self.path.open("ab")
        self._file.truncate(offset)
        self._file.seek(offset)
        self.offset = offset

    def write(self, t_env: int, record: dict[str, Any]) -> None:
        """One record at ``t_env`` environment steps. NaN and infinity become ``null``: the file stays JSON."""
        clean = {key: _finite(value) for key, value in {"t_env": t_env, **record}.items()}
        self.offset += self._file.write(json.dumps(clean).encode() + b"\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(key, value, t_env)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def check_tensorboard() -> None:
    """Raise ``ImportError`` with the command that fixes it where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("--tensorboard needs the tensorboard package: pip install 'fastmix[train]'")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def progress_bar(total: int, description: str, *, enabled: bool, initial: int = 0) -> tqdm[Any]:
    """A tqdm bar over environment steps with the time left; silent when ``enabled`` is off or stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit="step",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not (enabled and sys.stderr.isatty()),
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value

"""`metrics.csv`: the metrics of a run as one table, a row an optimizer step, columns named as in TensorBoard.

Lightning's own CSVLogger deletes the file of a run that goes on and writes several rows a step.
"""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lit_tune.errors import SaveError

FILE = "metrics.csv"
Row = dict[str, str]


class MetricsCsv(Logger):
    """Append metrics to `metrics.csv` in a run's directory.

    Args:
        directory: The run's directory.
        first_step: Rows from this step on are dropped first: a continued run makes them anew. What it still adds to the
            step before, such as a validation, goes into that step's row.
    """

    def __init__(self, directory: Path, *, first_step: int = 0) -> None:
        super().__init__()
        self.path = directory / FILE
        self.first_step = first_step
        self._columns: list[str] = []
        self._pending: Row = {}

    @property
    @override
    def name(self) -> str:
        return self.path.parent.name

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def log_dir(self) -> str:
        return str(self.path.parent)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` beside the table holds the settings."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        number = str(step or 0)
        if self._pending.get("step") not in (None, number):
            self._write_pending()
        values = {name: f"{float(value):.9g}" for name, value in metrics.items()}
        self._pending |= {"step": number} | values

    @override
    @rank_zero_only
    def save(self) -> None:
        """Do nothing: a row is written when its step is over."""

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Bring all rows to the disk; only between two steps, when nothing is to be added to the last one.

        Raises:
            SaveError: The disk is full, read-only or gone.
        """
        self._write_pending()
        if self._columns:
            with self._told(), self.path.open("rb") as stream:
                os.fsync(stream.fileno())

    def _write_pending(self) -> None:
        if self._pending:
            with self._told():
                self._write_row()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(f"{self.path}: the metrics could not be written ({error.strerror}).") from error

    def _write_row(self) -> None:
        if self._pending.keys() <= set(self._columns):
            with self.path.open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns).writerow(self._pending)
        else:
            # The table's head changes: for the first row, for a metric that comes later, and for a run that goes on.
            rows = self._rows_that_hold()
            if rows and rows[-1]["step"] == self._pending["step"]:
                self._pending = {name: value for name, value in rows.pop().items() if value} | self._pending
            known = {name for row in [*rows, self._pending] for name in row} | set(self._columns)
            self._columns = ["step", *sorted(known - {"step"})]
            self._rewrite([*rows, self._pending])
        self._pending = {}

    def _rows_that_hold(self) -> list[Row]:
        """Return the rows on disk: this process's own, or an earlier one's up to where the run goes on."""
        if not self.path.is_file():
            return []
        rows = read_metrics(self.path)
        if self._columns:
            return rows
        # A row with cells missing is the last of a process that was killed while it wrote, so it is no row that holds.
        return [row for row in rows if None not in row.values() and int(row["step"]) < self.first_step]

    def _rewrite(self, rows: list[Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".csv.partial")
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.path)


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a `metrics.csv`, cells as text."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))

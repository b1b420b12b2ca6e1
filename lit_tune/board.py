"""TensorBoard with the memory of a run drawn as what it is made of: bands, one upon the other.

TensorBoard's charts do not stack. So beside each category the sum of it and those below is written, and a chart fills
the space between two sums. The sums go to TensorBoard alone: a table has the categories.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
from tensorboard.plugins.custom_scalar import layout_pb2, metadata  # type: ignore[import-untyped]
from typing_extensions import override

from lit_tune.memory import CATEGORIES

STACK = "memory_stack"
FLOOR = f"{STACK}/0_gib"


def stacked(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the sums of the categories up to each one by name; nothing where no categories were measured."""
    if any(f"memory/{name}_gib" not in metrics for name in CATEGORIES):
        return {}
    sums, total = {FLOOR: 0.0}, 0.0
    for number, name in enumerate(CATEGORIES, start=1):
        total += float(metrics[f"memory/{name}_gib"])
        sums[f"{STACK}/{number}_{name}_gib"] = total
    return sums


def layout(names: Collection[str]) -> Any:
    """Return the charts of the tab Custom Scalars for the metrics that a run has."""
    edges = [FLOOR, *(f"{STACK}/{number}_{name}_gib" for number, name in enumerate(CATEGORIES, start=1))]
    bands = [
        layout_pb2.MarginChartContent.Series(value=upper, lower=lower, upper=upper) for lower, upper in pairwise(edges)
    ]
    stack = layout_pb2.Chart(title=f"{' + '.join(CATEGORIES)}, GiB", margin=layout_pb2.MarginChartContent(series=bands))
    lines = {
        "by category, GiB": rf"memory/({'|'.join(CATEGORIES)})_gib",
        "peak in each phase of the step, GiB": r"memory/peak_.*_gib",
        "GPU: allocated, reserved, used of total, GiB": r"memory/gpu_(allocated|peak|reserved|used|total)_gib",
        "host: all processes, their peak, pinned, GiB": r"memory/host_(rss|peak|pinned)_gib",
        "peak of each rank, GiB": r"memory/rank\d+/peak_gib",
    }
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$"]))
        for title, tag in lines.items()
        if any(re.fullmatch(tag, name) for name in names)
    ]
    return layout_pb2.Layout(
        category=[  # two, for in one TensorBoard puts the lines first
            layout_pb2.Category(title="memory: what a step's peak is made of", chart=[stack]),
            layout_pb2.Category(title="memory", chart=charts),
        ]
    )


def layout_summary(names: Collection[str]) -> Any:
    """Return the layout as TensorBoard's plugin reads it from an event.

    NOTE: torch's `add_custom_scalars` knows charts of one band only, the plugin's own function needs TensorFlow.
    """
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout(names).SerializeToString()])
    described = metadata.create_summary_metadata()
    return Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=described)])


class Board(TensorBoardLogger):
    """Write a run's metrics for TensorBoard, with a layout that stacks its memory.

    Args:
        directory: The run's directory.
        first_step: Points from this step on are dropped first: a continued run makes them anew.
    """

    def __init__(self, directory: Path, *, first_step: int = 0) -> None:
        super().__init__(
            directory.parent,
            name=directory.name,
            version="",
            default_hp_metric=False,
            purge_step=first_step,  # NOTE: at 0, too: TensorBoard takes a run's first mark of a start for no restart
        )
        self._layout_is_due = first_step == 0  # a continued run has it, in its earlier file

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        sums = stacked(metrics)
        if sums and self._layout_is_due:
            self.experiment._get_file_writer().add_summary(layout_summary(metrics))
            self._layout_is_due = False
        super().log_metrics({**metrics, **sums}, step)

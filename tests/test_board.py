"""The memory of a run in TensorBoard, as its own reader and its own plugin read it."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.plugins.custom_scalar import layout_pb2  # type: ignore[import-untyped]
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG  # type: ignore[import-untyped]
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from lit_tune.board import Board, stacked

SIZES = {"weights": 4.0, "gradients": 1.0, "optimizer": 2.0, "activations": 3.0, "other": 0.5}
METRICS = {f"memory/{name}_gib": size for name, size in SIZES.items()} | {"memory/host_rss_gib": 9.0}
STACK = {
    "memory_stack/0_gib": 0.0,
    "memory_stack/1_weights_gib": 4.0,
    "memory_stack/2_gradients_gib": 5.0,
    "memory_stack/3_optimizer_gib": 7.0,
    "memory_stack/4_activations_gib": 10.0,
    "memory_stack/5_other_gib": 10.5,
}


@pytest.fixture(autouse=True)
def sorted_event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number the event files of this process so that TensorBoard, which sorts by name, reads them in order."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


def write(run: Path, steps: range, metrics: dict[str, float] = METRICS) -> None:
    """Log as a run does that begins with the first of these steps."""
    board = Board(run, first_step=steps.start)
    board.log_metrics({"parameters/total": 1.0}, steps.start)
    for step in steps:
        board.log_metrics(metrics, step)
    board.finalize("success")


def layouts(run: Path) -> list[Any]:
    events = EventAccumulator(str(run)).Reload()
    found = events.Tensors(CONFIG_SUMMARY_TAG) if CONFIG_SUMMARY_TAG in events.Tags()["tensors"] else []
    return [layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]) for event in found]


def test_the_sums_stack_the_categories() -> None:
    assert stacked(METRICS) == STACK
    assert stacked({"train/loss": 1.0}) == {}


def test_the_bands_of_the_chart_lie_one_upon_the_other_and_are_written(tmp_path: Path) -> None:
    write(tmp_path / "run", range(3))
    (layout,) = layouts(tmp_path / "run")
    bands = layout.category[0].chart[0].margin.series
    assert [band.upper for band in bands] == list(STACK)[1:]
    assert [band.lower for band in bands] == list(STACK)[:-1]
    assert set(STACK) <= set(EventAccumulator(str(tmp_path / "run")).Reload().Tags()["scalars"])


def test_only_charts_that_show_something_are_there(tmp_path: Path) -> None:
    write(tmp_path / "cpu", range(1))
    write(tmp_path / "gpu", range(1), METRICS | {"memory/gpu_used_gib": 1.0, "memory/rank1/peak_gib": 1.0})
    titles = [
        [chart.title.split(",")[0] for chart in layouts(tmp_path / run)[0].category[1].chart] for run in ("cpu", "gpu")
    ]
    assert titles[0] == ["by category", "host: all processes"]
    assert titles[1] == ["by category", "GPU: allocated", "host: all processes", "peak of each rank"]


def test_a_continued_run_doubles_nothing(tmp_path: Path) -> None:
    write(tmp_path / "run", range(5))
    write(tmp_path / "run", range(3, 8))  # it goes on from a checkpoint before the end
    assert len(layouts(tmp_path / "run")) == 1
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for tag in ("memory/weights_gib", "memory_stack/5_other_gib"):
        assert [event.step for event in events.Scalars(tag)] == list(range(8))

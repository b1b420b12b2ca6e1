import csv
import math
from pathlib import Path

import pytest
import torch

from lit_tune.errors import SaveError
from lit_tune.logs import FILE, MetricsCsv, read_metrics


def table(directory: Path) -> list[list[str]]:
    """Return the file's rows, the head first."""
    with (directory / FILE).open(newline="") as stream:
        return list(csv.reader(stream))


def log_steps(logger: MetricsCsv, steps: range) -> None:
    """Log as a trainer does: the training metrics of every step, those of validation at every third."""
    for step in steps:
        logger.log_metrics({"train/loss": 4.0 / (step + 1), "epoch": step // 3}, step)
        logger.save()
        if step % 3 == 2:
            logger.log_metrics({"val/loss": 5.0 / (step + 1), "epoch": step // 3}, step)
            logger.save()


def log_run(directory: Path, steps: range, *, first_step: int = 0) -> None:
    """Log a part of a run from its beginning to its end."""
    logger = MetricsCsv(directory, first_step=first_step)
    log_steps(logger, steps)
    logger.finalize("success")


def test_a_step_is_one_row_whatever_the_number_of_calls(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    logger.log_metrics({"train/loss": 2.5, "epoch": 0}, 0)
    logger.log_metrics({"val/loss": 3.0, "epoch": 0}, 0)
    logger.log_metrics({"train/loss": 0.125}, 1)
    logger.finalize("success")
    assert table(tmp_path) == [
        ["step", "epoch", "train/loss", "val/loss"],
        ["0", "0", "2.5", "3"],
        ["1", "", "0.125", ""],
    ]


def test_a_row_is_on_disk_when_the_next_step_begins(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    log_steps(logger, range(2))
    assert [row["step"] for row in read_metrics(tmp_path / FILE)] == ["0"]
    logger.finalize("failed")
    logger.finalize("failed")  # as Lightning does after a fault
    assert [row["step"] for row in read_metrics(tmp_path / FILE)] == ["0", "1"]


def test_a_metric_that_comes_later_gets_a_column_and_earlier_rows_none_of_it(tmp_path: Path) -> None:
    log_run(tmp_path, range(4))
    assert table(tmp_path) == [
        ["step", "epoch", "train/loss", "val/loss"],
        ["0", "0", "4", ""],
        ["1", "0", "2", ""],
        ["2", "0", "1.33333333", "1.66666667"],
        ["3", "1", "1", ""],
    ]


def test_the_step_comes_first_whatever_the_metrics_are_called(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    logger.log_metrics({"zeta": 1.0, "alpha": 2.0}, 7)
    logger.log_metrics({"beta": 3.0}, 8)
    logger.finalize("success")
    assert table(tmp_path) == [["step", "alpha", "beta", "zeta"], ["7", "2", "", "1"], ["8", "", "3", ""]]


def test_values_survive_to_nine_digits_and_without_a_number_too(tmp_path: Path) -> None:
    values = {"a": 1 / 3, "b": 2.0e-5, "c": 123456789.0, "d": math.nan, "e": math.inf, "f": 1e-30}
    logger = MetricsCsv(tmp_path)
    logger.log_metrics({**values, "tensor": torch.tensor(0.1)}, None)  # type: ignore[dict-item]  # a tensor will do
    logger.finalize("success")
    (row,) = read_metrics(tmp_path / FILE)
    assert row["step"] == "0"
    for name, value in values.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-9, nan_ok=True)
    # Nine digits tell every fp32 number from its neighbours.
    assert torch.tensor(float(row["tensor"])) == torch.tensor(0.1)


@pytest.mark.parametrize("first_step", [0, 1, 3, 5, 6])
def test_a_continued_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path, first_step: int) -> None:
    log_run(tmp_path / "whole", range(9))
    # The first part got as far as step 5; the checkpoint that it goes on from may be older.
    log_run(tmp_path / "parts", range(6))
    log_run(tmp_path / "parts", range(first_step, 9), first_step=first_step)
    assert (tmp_path / "parts" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [FILE]


def test_a_run_goes_on_more_than_once(tmp_path: Path) -> None:
    log_run(tmp_path / "whole", range(9))
    for first, last in [(0, 4), (2, 7), (7, 9)]:
        log_run(tmp_path / "parts", range(first, last), first_step=first)
    assert table(tmp_path / "parts") == table(tmp_path / "whole")


def test_until_something_is_logged_the_old_rows_stay(tmp_path: Path) -> None:
    log_run(tmp_path, range(4))
    before = (tmp_path / FILE).read_bytes()
    log_run(tmp_path, range(0), first_step=2)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_new_runs_file_has_nothing_of_one_that_lay_there(tmp_path: Path) -> None:
    log_run(tmp_path / "whole", range(2))
    log_run(tmp_path / "again", range(9))
    log_run(tmp_path / "again", range(2))
    assert table(tmp_path / "again") == table(tmp_path / "whole")


def test_a_flush_writes_the_row_under_way(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    logger.flush()  # nothing yet
    assert list(tmp_path.iterdir()) == []
    log_steps(logger, range(2))
    logger.flush()
    logger.flush()
    assert [row["step"] for row in read_metrics(tmp_path / FILE)] == ["0", "1"]
    log_steps(logger, range(2, 9))
    logger.finalize("success")
    log_run(tmp_path / "whole", range(9))
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_what_a_continued_run_adds_to_the_step_before_goes_into_its_row(tmp_path: Path) -> None:
    log_run(tmp_path / "whole", range(6))
    logger = MetricsCsv(tmp_path / "parts")
    log_steps(logger, range(2))
    logger.log_metrics({"train/loss": 4.0 / 3, "epoch": 0}, 2)  # its validation was put off
    logger.finalize("failed")
    logger = MetricsCsv(tmp_path / "parts", first_step=3)
    logger.log_metrics({"val/loss": 5.0 / 3, "epoch": 0}, 2)
    log_steps(logger, range(3, 6))
    logger.finalize("success")
    assert (tmp_path / "parts" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_row_that_was_torn_by_a_kill_does_not_hold(tmp_path: Path) -> None:
    log_run(tmp_path / "whole", range(14))
    file = tmp_path / "parts" / FILE
    log_run(tmp_path / "parts", range(12))
    *rows, last = file.read_bytes().splitlines(keepends=True)
    for length in range(len(last)):  # of "11,3,0.33..", which begins as a row of step 1 does
        file.write_bytes(b"".join(rows) + last[:length])
        log_run(tmp_path / "parts", range(11, 14), first_step=11)
        assert file.read_bytes() == (tmp_path / "whole" / FILE).read_bytes(), length


def test_a_disk_that_takes_no_more_is_a_fault_of_saving(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv.partial").mkdir()  # so that it cannot be written, even by root
    logger = MetricsCsv(tmp_path)
    log_steps(logger, range(1))
    with pytest.raises(SaveError) as refused:
        logger.flush()
    assert str(refused.value) == f"{tmp_path / FILE}: the metrics could not be written (Is a directory)."


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_run(tmp_path, range(3))
    assert list(tmp_path.iterdir()) == []


def test_lightning_is_told_where_the_run_lies(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path / "mine")
    assert (logger.name, logger.version, logger.log_dir) == ("mine", "", str(tmp_path / "mine"))
    logger.log_hyperparams({"rank": 16})
    logger.finalize("success")
    assert not (tmp_path / "mine").exists()

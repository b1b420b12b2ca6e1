"""Names and directories of runs, and the run that a checkpoint belongs to."""

from pathlib import Path

import pytest

from lit_tune import checkpoint
from lit_tune.errors import InputError
from lit_tune.runs import LONGEST_NAME, check_name, fresh_name, last_checkpoint, make_directory, run_of, runs_named


@pytest.mark.parametrize("name", ["x" * (LONGEST_NAME + 1), "\u4e16" * LONGEST_NAME])
def test_a_name_that_no_file_system_takes_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"characters; use at most {LONGEST_NAME}"):
        check_name(name)


def test_the_longest_name_and_its_successors_can_be_made(tmp_path: Path) -> None:
    name = check_name("x" * LONGEST_NAME)
    assert [make_directory(tmp_path, name).name for _ in range(3)] == [name, f"{name}-2", f"{name}-3"]


@pytest.mark.parametrize("name", ["*", "[ab]", "a?", "**"])
def test_a_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    for other in ("a", "b-2", "ab-3"):
        (tmp_path / other).mkdir()
    made = [make_directory(tmp_path, name) for _ in range(2)]
    assert runs_named(tmp_path, name) == made


def test_a_link_that_leads_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(tmp_path / "elsewhere")
    assert fresh_name(tmp_path / "runs", "a") == "a"
    with pytest.raises(InputError, match="a file stands where the run's directory should be"):
        make_directory(tmp_path / "runs", "a")
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_whose_checkpoints_lie_elsewhere_stays_where_it_is(working_directory: Path) -> None:
    Path("disk/checkpoints").mkdir(parents=True)
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/checkpoints").symlink_to(Path("disk/checkpoints").resolve())
    checkpoint.write({"global_step": 3}, checkpoint.step_path(Path("runs/a"), 3))
    path, _ = last_checkpoint(Path("runs"), "a")
    assert run_of(path) == Path("runs/a")


def test_a_link_to_a_checkpoint_leads_to_its_run(working_directory: Path) -> None:
    target = checkpoint.step_path(Path("runs/a"), 3)
    target.parent.mkdir(parents=True)
    checkpoint.write({"global_step": 3}, target)
    Path("newest.ckpt").symlink_to(target.resolve())
    assert run_of(Path("newest.ckpt")) == Path("runs/a")


def test_a_checkpoint_outside_of_any_run_is_refused(working_directory: Path) -> None:
    with pytest.raises(InputError, match=r"copied\.ckpt lies in no run; put it into the folder 'checkpoints'"):
        run_of(Path("copied.ckpt"))

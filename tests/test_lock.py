import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_tune import lock
from lit_tune.errors import InputError

HOLD = "import sys; from pathlib import Path; from lit_tune import lock; held = lock.hold(Path(sys.argv[1])); "


def holder(directory: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + "print('held', flush=True); sys.stdin.read()", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(lock.__file__).parents[1])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_while_one_process_holds_it_another_is_refused_and_told_whose_it_is(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(InputError) as refused:
            lock.hold(tmp_path)
        said = str(refused.value)
        assert said.startswith(f"{tmp_path}: another run is at work there (process {process.pid} on ")
        assert said.endswith("start a new run with another --name.")
        assert "\n" not in said
        with pytest.raises(InputError, match=f"process {process.pid} on "):  # the refusal has not changed the note
            lock.hold(tmp_path)
    lock.hold(tmp_path).close()


def test_a_process_that_is_killed_holds_it_no_more(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        lock.hold(tmp_path).close()


def test_where_nothing_can_be_written_the_place_and_reason_are_told(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(InputError) as refused:
        lock.hold(missing)
    assert str(refused.value) == f"{missing}: a run must be able to write there (No such file or directory)."


def test_closed_it_is_free_for_the_same_process(tmp_path: Path) -> None:
    first = lock.hold(tmp_path)
    with pytest.raises(InputError, match=f"process {os.getpid()} on "):
        lock.hold(tmp_path)
    first.close()
    lock.hold(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]


def test_it_names_its_holder_alone(tmp_path: Path) -> None:
    (tmp_path / lock.FILE).write_text("a longer note of a process that is gone\n" * 9)
    held = lock.hold(tmp_path)
    assert (tmp_path / lock.FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert (tmp_path / lock.FILE).read_text().count("\n") == 1
    held.close()


def test_runs_beside_each_other_do_not_meet(tmp_path: Path) -> None:
    held = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        held.append(lock.hold(tmp_path / name))
    for stream in held:
        stream.close()

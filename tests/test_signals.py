import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_tune import signals

ROOT = Path(signals.__file__).parents[1]


def run_python(code: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python that finds the package, in an environment of which only these words are a launch's."""
    plain = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "LIT_TUNE_LAUNCHER")}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import hashlib, os, signal, subprocess, sys, time; from lit_tune import signals; " + code,
        ],
        env=plain | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def lives(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def is_gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not lives(pid)


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, True),
        ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, False),
    ],
)
def test_a_rank_that_rank_0_started_is_a_launched_one(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], launched: bool
) -> None:
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert signals.is_launched() is launched


LAUNCH = (
    "signals.end_with_parent(); "
    "child = subprocess.Popen([sys.executable, '-c', {child!r}], env=os.environ | {{'LOCAL_RANK': '1'}}); "
    "print(child.pid, flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("delay_s", [0.0, 1.0], ids=["killed before the child asks", "killed after the child asked"])
def test_a_launched_rank_ends_with_the_one_that_launched_it(delay_s: float) -> None:
    child = f"import time; time.sleep({0.5 - delay_s / 2}); from lit_tune import signals; signals.end_with_parent(); "
    child += "time.sleep(60)"
    parent = run_python(LAUNCH.format(child=child))
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert lives(pid)
    time.sleep(delay_s)
    parent.kill()
    parent.wait()
    assert is_gone_within(pid, 20)


def test_a_process_that_nobody_launched_outlives_its_parent() -> None:
    child = "from lit_tune import signals; signals.end_with_parent(); import time; time.sleep(1.5)"
    parent = run_python(LAUNCH.format(child=child).replace("'LOCAL_RANK': '1'", "'LOCAL_RANK': '0'"))
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    time.sleep(0.2)
    assert lives(pid)
    assert is_gone_within(pid, 20)


STUCK = (
    "signals.GRACE_S = 0.2; signals.end_if_stuck(lambda number: os._exit(100 + number)); "
    "signal.signal(signal.SIGTERM, lambda *_: {handler}); print('ready', flush=True); {work}"
)


@pytest.mark.parametrize(
    ("handler", "work", "code"),
    [
        ("(signals.heard.set(), time.sleep(0.5), os._exit(7))", "time.sleep(60)", 7),
        ("os._exit(7)", "time.sleep(60)", 7),
        ("os._exit(7)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)", 115),
    ],
    ids=["its handler runs long", "its handler ends it", "the main thread is in C"],
)
def test_a_signal_that_no_handler_hears_ends_the_process_from_a_thread(handler: str, work: str, code: int) -> None:
    process = run_python(STUCK.format(handler=handler, work=work))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # it has begun with its work
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == code


def test_a_launched_rank_hands_its_signal_to_the_parent_and_lets_it_end_first() -> None:
    child = "from lit_tune import signals; signals.tell_parent(15); print('after', flush=True)"
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(9)); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}], env=os.environ | {{'LOCAL_RANK': '1'}}); time.sleep(60)"
    )
    parent = run_python(code)
    assert parent.wait(20) == 9
    assert parent.stdout is not None
    assert parent.stdout.read() == "after\n"  # said when the parent was gone


def test_a_process_of_its_own_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("nobody is to be told"))
    signals.tell_parent(signal.SIGTERM)

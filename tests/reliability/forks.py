"""Runs of `lit-tune fit` at the price of a fork: a server that has the imports done forks a child for each process.

A run of the tiny base takes 7 s as a process of its own and 0.7 s as a fork, so that a thousand interruptions can be
tested. A child differs from a real process in two things only: the imports are done, and one call that the test names
may be watched, so that a signal comes at exactly that moment. Two ranks are started as torchrun does it: an agent sets
their environment and ends the others when one has failed.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
AGENT_GRACE_S = 5.0  # between SIGTERM and SIGKILL for the ranks that outlive a failed one
HOOK = "hook:"


@dataclass(frozen=True)
class Blow:
    """A signal to a run, at a moment named by a call or by the clock.

    Args:
        signal: Which one.
        rank: The rank that gets it; None for all of them.
        at: The call: `hook:` and a callback hook, or `module:function`. Left out, the clock decides.
        count: The signal comes at the n-th such call.
        when_done: It comes when the call has returned, not before it.
        last_batch: Only calls during an epoch's last micro-batch count, or what follows up to the next epoch.
        after_s: Seconds after the start, where no call is named.
        twice: A second signal follows at once.
    """

    signal: int = signal.SIGKILL
    rank: int | None = 0
    at: str = ""
    count: int = 1
    when_done: bool = False
    last_batch: bool = False
    after_s: float = 0.0
    twice: bool = False


@dataclass(frozen=True)
class Job:
    """One start of `lit-tune`.

    Args:
        arguments: Of the command.
        directory: Where it runs; a rank's output goes to `<log>.<rank>` there.
        environment: Variables to set.
        ranks: Number of processes.
        blow: The signal that ends it.
        patience_s: How long the agent lets the other ranks live when one has failed.
        timeout_s: After this, all is killed.
    """

    arguments: list[str]
    directory: str
    environment: dict[str, str] = field(default_factory=dict)
    log: str = "log"
    ranks: int = 1
    blow: Blow | None = None
    patience_s: float = 0.0
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Args:
        codes: Exit code of each rank, minus the signal's number where one ended it.
        seconds: How long it took.
        struck: What the run was doing when the blow fell, empty if it did not fall.
        forced: The agent had to end a rank that outlived its patience, or all of them after the time allowed.
        orphans: Processes that were left.
    """

    codes: list[int]
    seconds: float
    struck: dict[str, Any]
    forced: list[int]
    orphans: int


class ForkServer:
    """The server's other end: one job after another."""

    def __init__(self) -> None:
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | one_thread,
        )

    def run(self, job: Job) -> Ended:
        """Run a job to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server is gone"
        return Ended(**json.loads(answer))

    def close(self) -> None:
        """End the server."""
        self._process.communicate()


# In the server --------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Take jobs as JSON lines from stdin, answer each with a line on stdout."""
    import peft.tuners.lora.bnb  # noqa: F401  # the server's only work: what every run imports
    import torch.utils.tensorboard
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lit_tune.cli
    import lit_tune.run  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        fields = json.loads(line)
        blow = Blow(**fields.pop("blow")) if fields["blow"] else None
        print(json.dumps(asdict(supervise(Job(**fields | {"blow": blow})))), flush=True)


def supervise(job: Job) -> Ended:
    """Fork the ranks of a job and wait for them, as torchrun's agent does."""
    note = Path(job.directory) / f"{job.log}.struck"
    note.unlink(missing_ok=True)
    port, started = free_port(), time.monotonic()
    pids: list[int] = []
    for rank in range(job.ranks):
        if not (pid := os.fork()):
            _child(job, rank, group=pids[0] if pids else 0, port=port, note=note)
        with suppress(OSError):  # the child does the same; whoever is first
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)

    codes: dict[int, int] = {}
    forced: set[int] = set()
    struck: dict[str, Any] = {}
    handles = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids)}
    clock_blow = job.blow if job.blow and not job.blow.at else None
    failed_at = float("inf")  # when the first rank ended other than well
    asked = False
    while handles:
        ready, _, _ = select.select(list(handles), [], [], 0.005)
        now = time.monotonic()
        for handle in ready:
            rank = handles.pop(handle)
            os.close(handle)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
            failed_at = min(failed_at, now) if codes[rank] else failed_at
        left = set(handles.values())
        if clock_blow and now - started > clock_blow.after_s:
            hit = left if clock_blow.rank is None else left & {clock_blow.rank}
            for rank in hit:
                os.kill(pids[rank], clock_blow.signal)
            struck = {"at": f"{clock_blow.after_s:.3f} s"} if hit else {}
            clock_blow = None
        if now - failed_at > job.patience_s and not asked:
            asked = True
            for rank in left:
                os.kill(pids[rank], signal.SIGTERM)
        if now - failed_at > job.patience_s + AGENT_GRACE_S or now - started > job.timeout_s:
            forced |= left
            for rank in left:
                os.kill(pids[rank], signal.SIGKILL)
    if note.exists():
        struck = json.loads(note.read_text())
    seconds = time.monotonic() - started
    return Ended([codes[rank] for rank in range(job.ranks)], seconds, struck, sorted(forced), end_group(pids[0]))


def end_group(group: int) -> int:
    """Kill what is left of a process group; return 1 if there was anything."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a rank."""
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    return names | {name: str(value) for name, value in world.items()}


# In the child ---------------------------------------------------------------------------------------------------------


def _child(job: Job, rank: int, *, group: int, port: int, note: Path) -> NoReturn:
    code = 1
    try:
        with suppress(OSError):
            os.setpgid(0, group)
        os.chdir(job.directory)
        output = os.open(f"{job.log}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        for variable in ("LIT_TUNE_RUN_NAME", "LIT_TUNE_CKPT_PATH", "PL_GLOBAL_SEED"):
            os.environ.pop(variable, None)
        os.environ |= job.environment
        if job.ranks > 1:
            from lightning.pytorch.utilities import rank_zero_only

            os.environ |= torchrun_environment(rank, job.ranks, port)
            rank_zero_only.rank = rank  # type: ignore[attr-defined]  # a real process finds it in its environment when it imports lightning
        if job.blow is not None and job.blow.at:
            watch(job.blow, rank, note)
        from lit_tune import cli

        cli.main(job.arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(blow: Blow, rank: int, note: Path) -> None:
    """Wrap the call that a blow waits for, in the rank that gets it (rank 0 where all do)."""
    from lightning.pytorch.trainer import call

    seen: dict[str, Any] = {"trainer": None, "calls": 0}
    call_hooks: Callable[..., None] = call._call_callback_hooks

    def hooks(trainer: Any, hook_name: str, *args: Any, **kwargs: Any) -> None:
        seen["trainer"] = trainer
        watched = blow.at == HOOK + hook_name and kwargs.get("monitoring_callbacks") is not True
        action = guarded(call_hooks, blow, seen, note) if watched else call_hooks
        action(trainer, hook_name, *args, **kwargs)

    if rank != (blow.rank or 0):
        return
    call._call_callback_hooks = hooks
    if not blow.at.startswith(HOOK):
        module, _, path = blow.at.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, guarded(getattr(owner, name), blow, seen, note))


def guarded(action: Callable[..., Any], blow: Blow, seen: dict[str, Any], note: Path) -> Callable[..., Any]:
    """Return `action` with the blow before or behind its n-th call."""

    def acted(*args: Any, **kwargs: Any) -> Any:
        where = position(seen["trainer"])
        seen["calls"] += where["boundary"] or not blow.last_batch
        now = seen["calls"] == blow.count and not note.exists()
        if now and not blow.when_done:
            strike(blow, where, note)
        result = action(*args, **kwargs)
        if now and blow.when_done:
            strike(blow, where, note)
        return result

    return acted


def position(trainer: Any) -> dict[str, Any]:
    """Tell where in a run a trainer is.

    `boundary` is an epoch's last micro-batch and all that follows until the next epoch's first one has been computed.
    """
    if trainer is None or trainer.state.fn is None:
        return {"step": 0, "boundary": False}
    progress = trainer.fit_loop.epoch_loop.batch_progress
    boundary = trainer.global_step > 0 and (progress.is_last_batch or not progress.current.processed)
    return {"step": trainer.global_step, "epoch": trainer.current_epoch, "boundary": bool(boundary)}


def strike(blow: Blow, where: dict[str, Any], note: Path) -> None:
    """Write down where the run is, and send the signal."""
    note.write_text(json.dumps({"at": blow.at, "count": blow.count} | where))
    for _ in range(1 + blow.twice):
        if blow.rank is None:
            os.killpg(0, blow.signal)
        else:
            os.kill(os.getpid(), blow.signal)


if __name__ == "__main__":
    serve()

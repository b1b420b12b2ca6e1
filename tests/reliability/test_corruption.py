"""Damaged checkpoints: never loaded, always told in one line, and the one before them is taken."""

import hashlib
import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_tune.checkpoint import is_intact, read, step_path, write
from lit_tune.data.instruct import InstructData
from lit_tune.errors import InputError
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.lora import Lora
from lit_tune.runs import RUNS, last_checkpoint
from tests.tiny_llama import tiny_base
from tests.tiny_run import train, write_records

FOOTER = 80  # bytes, of which the last 64 are the hash


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Train a tiny model for two steps and return its checkpoint's bytes."""
    folder = tmp_path_factory.mktemp("trained")
    module = LlamaTuner(base=str(tiny_base(folder / "base")), lora=Lora(rank=4, alpha=8))
    data = InstructData(path=write_records(folder / "records.jsonl"), micro_batch_size=4)
    trainer = train(module, data, max_steps=2)
    trainer.save_checkpoint(folder / "a.ckpt")
    return (folder / "a.ckpt").read_bytes()


# Damage by chance -----------------------------------------------------------------------------------------------------


def truncated(whole: bytes, chance: random.Random) -> bytes:
    return whole[: chance.randrange(len(whole))]


def shortened_a_little(whole: bytes, chance: random.Random) -> bytes:
    return whole[: -chance.randint(1, 2 * FOOTER)]


def beheaded(whole: bytes, chance: random.Random) -> bytes:
    return whole[chance.randint(1, 4096) :]


def flipped(whole: bytes, chance: random.Random) -> bytes:
    """Change one to eight bits, anywhere."""
    return flip(whole, [chance.randrange(8 * len(whole)) for _ in range(chance.randint(1, 8))])


def flipped_footer(whole: bytes, chance: random.Random) -> bytes:
    """Change a bit of the footer, or of the zip's last record before it."""
    return flip(whole, [8 * len(whole) - 1 - chance.randrange(8 * (FOOTER + 22))])


def flip(whole: bytes, bits: list[int]) -> bytes:
    damaged = bytearray(whole)
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def zeroed(whole: bytes, chance: random.Random) -> bytes:
    """Lose a block of the disk."""
    start, size = chance.randrange(len(whole)), chance.choice((1, 512, 4096))
    return whole[:start] + bytes(len(whole[start : start + size])) + whole[start + size :]


def repeated(whole: bytes, chance: random.Random) -> bytes:
    start, size = chance.randrange(len(whole)), chance.choice((1, 512, 4096))
    return whole[: start + size] + whole[start:]


def lost(whole: bytes, chance: random.Random) -> bytes:
    start, size = chance.randrange(len(whole)), chance.choice((1, 512, 4096))
    return whole[:start] + whole[start + size :]


def swapped(whole: bytes, chance: random.Random) -> bytes:
    """Exchange two blocks of 512 bytes."""
    first, second = sorted(chance.sample(range(len(whole) // 512), 2))
    blocks = [whole[i : i + 512] for i in range(0, len(whole), 512)]
    blocks[first], blocks[second] = blocks[second], blocks[first]
    return b"".join(blocks)


def appended(whole: bytes, chance: random.Random) -> bytes:
    return whole + chance.choice((b"\n", b"\0", whole[-FOOTER:], chance.randbytes(chance.randint(1, 4096)), whole))


def overwritten(whole: bytes, chance: random.Random) -> bytes:
    """Put another file's content over a part, as a crossed write does."""
    other = chance.randbytes(chance.randint(1, 4096))
    start = chance.randrange(len(whole))
    return (whole[:start] + other + whole[start + len(other) :])[: len(whole)]


def something_else(whole: bytes, chance: random.Random) -> bytes:
    """Put something else there: a page of a proxy, nothing, zeros, a plain zip, pickle, or checkpoint of torch."""
    plain, pickled = io.BytesIO(), pickle.dumps({"global_step": chance.random()})
    torch.save({"global_step": chance.random()}, plain)
    page = f"<!DOCTYPE html>\n<html><body>{chance.random()}</body></html>\n".encode()
    zeros = bytes(chance.randint(1, len(whole)))
    return chance.choice((b"", page, zeros, chance.randbytes(len(whole)), pickled, plain.getvalue()))


def zipped_anew(whole: bytes, chance: random.Random) -> bytes:
    """Change a record and pack all anew, checksums and all but ours; the footer is left out, or the old one."""
    fresh = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(fresh, "w") as new:
        names = old.namelist()
        changed = chance.choice(names)
        for name in names:
            content = old.read(name)
            new.writestr(name, flip(content, [chance.randrange(8 * len(content))]) if name == changed else content)
        new.comment = chance.choice((b"", old.comment))
    return fresh.getvalue()


DAMAGES = (
    truncated,
    shortened_a_little,
    beheaded,
    flipped,
    flipped_footer,
    zeroed,
    repeated,
    lost,
    swapped,
    appended,
    overwritten,
    something_else,
    zipped_anew,
)


def mutants(whole: bytes, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield damaged files without end, of each kind in turn."""
    chance = random.Random(seed)
    while True:
        for damage in DAMAGES:
            content = damage(whole, chance)
            if content != whole:  # zeros may have been zeroed
                yield damage.__name__, content


def outcome(path: Path) -> str:
    """Say how reading a file ends: loaded, refused (in one line that names the file), or what it should not be."""
    try:
        read(path)
    except InputError as error:
        text = str(error)
        return "refused" if text.isprintable() and str(path) in text else f"told badly: {text!r}"
    except BaseException as error:
        return f"traceback: {error!r}"
    return "loaded"


def count_of(outcomes: dict[str, str], kind: str) -> int:
    return sum(outcome.startswith(kind) for outcome in outcomes.values())


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damaged_checkpoint_is_loaded(
    whole: bytes, tmp_path: Path, count: int, report: Callable[[str], None]
) -> None:
    run = tmp_path / RUNS / "a"
    run.mkdir(parents=True)
    previous, newest = step_path(run, 1), step_path(run, 2)
    write({"global_step": 1}, previous)
    newest.write_bytes(whole)
    # It is the damage that makes the difference.
    assert last_checkpoint(tmp_path / RUNS, "a") == (newest, [])
    assert outcome(newest) == "loaded"
    outcomes, found = {}, {}
    for number, (damage, content) in zip(range(count), mutants(whole), strict=False):
        newest.write_bytes(content)
        mutant = f"{number}: {damage}"
        outcomes[mutant] = outcome(newest) if not is_intact(newest) else "taken for intact"
        found[mutant] = last_checkpoint(tmp_path / RUNS, "a")
    told = sum(last == (previous, [newest]) for last in found.values())
    report(
        f"{count:,} damaged checkpoints: {count_of(outcomes, 'loaded')} silently loaded, "
        f"{count_of(outcomes, 'traceback')} tracebacks, {count_of(outcomes, 'refused'):,} refused in one line; "
        f"named and the one before taken: {told:,}"
    )
    assert {mutant: outcome for mutant, outcome in outcomes.items() if outcome != "refused"} == {}
    assert {mutant: last for mutant, last in found.items() if last != (previous, [newest])} == {}


# Damage by intent: the hash is right, for anyone can compute it -------------------------------------------------------


def seal(content: bytes) -> bytes:
    """Give a zip file the hash that it must have: what an attacker, who reads this, does too."""
    unsealed = content[:-2] + struct.pack("<H", FOOTER)
    return unsealed + b"lit-tune sha256 " + hashlib.sha256(unsealed).hexdigest().encode()


def unsealed(whole: bytes) -> bytes:
    return whole[: -FOOTER - 2] + b"\0\0"


class Calling:
    """An object that, unpickled, calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Holding:
    """An object whose state, unpickled, is set by an object that calls."""

    def __init__(self, calling: Calling) -> None:
        self.calling = calling


def payloads(trace: Path) -> dict[str, object]:
    """Return objects that make the directory `trace` if they are unpickled freely."""
    make = Calling(os.mkdir, str(trace))
    source = f"__import__('os').mkdir({str(trace)!r})"
    return {
        "a function of os": make,
        "a shell": Calling(os.system, f"mkdir {trace}"),
        "exec": Calling(exec, source),
        "eval": Calling(eval, source),
        "a class of ours": Holding(make),
        "in a list": [1, [make]],
        "as a key": {(1, Calling(os.mkdir, str(trace))): 1},
        "beside a tensor": {"weight": torch.ones(2), "step": make},
        "pickle within pickle": Calling(pickle.loads, pickle.dumps(make)),
    }


NAMES = list(payloads(Path("trace")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_code_in_a_sealed_checkpoint_is_never_run(tmp_path: Path, name: str, zipped: bool) -> None:
    trace, path, content = tmp_path / "trace", tmp_path / "a.ckpt", io.BytesIO()
    torch.save({"state_dict": {}, "payload": payloads(trace)[name]}, content, _use_new_zipfile_serialization=zipped)
    path.write_bytes(seal(content.getvalue()) if zipped else seal(content.getvalue() + b"\0\0"))
    assert is_intact(path)
    assert outcome(path) == "refused"
    assert not trace.exists()
    torch.load(path, weights_only=False)  # as proof that it would have run
    assert trace.exists()


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_sealed_checkpoint_of_any_bits_gives_values_or_one_line(
    whole: bytes, tmp_path: Path, count: int, report: Callable[[str], None]
) -> None:
    path, chance = tmp_path / "a.ckpt", random.Random(0)
    plain = unsealed(whole)
    path.write_bytes(seal(plain))
    assert path.read_bytes() == whole  # the seal is the one that `write` sets
    # In the pickle and in the zip's own records, rather than in the weights, of which any bits are weights.
    with zipfile.ZipFile(path) as archive:
        pickled = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        places = [(0, pickled.header_offset + 100 + pickled.file_size), (archive.start_dir, len(plain) - 2)]
    outcomes = {}
    for number in range(count):
        start, end = chance.choice(places)
        bits = [chance.randrange(8 * start, 8 * end) for _ in range(chance.randint(1, 4))]
        path.write_bytes(seal(flip(plain, bits)))
        assert is_intact(path)
        outcomes[f"{number}: bits {bits}"] = outcome(path)
    report(
        f"{count:,} checkpoints changed on purpose, with the right hash: {count_of(outcomes, 'traceback')} tracebacks, "
        f"{count_of(outcomes, 'refused'):,} refused in one line, {count_of(outcomes, 'loaded'):,} other plain values"
    )
    assert {case: outcome for case, outcome in outcomes.items() if outcome not in ("refused", "loaded")} == {}

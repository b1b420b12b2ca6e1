"""Broken records and hostile files in numbers: each is told with its line, or read where it is harmless."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_tune.data import records
from lit_tune.data.prompts import encode_records, load_template
from lit_tune.data.records import read_records
from lit_tune.errors import InputError
from tests.reliability.broken import UNPACKED_FREE_BYTES, Case, file_case, record_case
from tests.tiny import tiny_tokenizer
from tests.tiny_llama import tiny_base
from tests.tiny_run import lit_tune

TOKENIZER = tiny_tokenizer()
TEMPLATE = load_template("chatml")
LONGEST_LINE = 500  # characters of an error besides the path, which can still be read


@pytest.fixture(autouse=True)
def small_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_UNPACKED_FREE_BYTES", UNPACKED_FREE_BYTES)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_broken_record_is_told_with_its_line(tmp_path: Path, count: int, report: Callable[[str], None]) -> None:
    verdicts = judge_all(record_case, count, tmp_path)
    assert verdicts["right line"] > count / 2
    report(f"{count:,} broken records: {figures(verdicts)}")


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_a_hostile_file_is_told(tmp_path: Path, count: int, report: Callable[[str], None]) -> None:
    verdicts = judge_all(file_case, count, tmp_path)
    report(f"{count:,} hostile files: {figures(verdicts)}")


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_the_command_tells_it_in_one_line(
    working_directory: Path, capsys: pytest.CaptureFixture[str], count: int, report: Callable[[str], None]
) -> None:
    tiny_base(working_directory / "base")
    capsys.readouterr()
    told = 0
    for number in range(count):
        case = (record_case, file_case)[number % 2](number)
        if case.answers is not None or case.by_chance:
            continue
        Path(case.name).write_bytes(case.content)
        assert lit_tune("data", "--model.base", "base", "--data.path", case.name) == 2, (number, case)
        said = capsys.readouterr()
        assert said.out == "", (number, case)
        line = rf":({'|'.join(map(str, case.lines))})(:\d+)?" if case.lines else ""
        assert re.fullmatch(rf"lit-tune: {re.escape(case.name)}{line}: [^\n]+\n", said.err), (number, case, said.err)
        told += 1
    assert told
    report(f"{told:,} of them given to `lit-tune data`: exit code 2 and one line in each")


def judge_all(make: Callable[[int], Case], count: int, directory: Path) -> Counter[str]:
    """Read the cases 0 to `count` and count the verdicts; fail with the numbers of those that went wrong."""
    verdicts: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        case = make(number)
        path = directory / case.name
        path.write_bytes(case.content)
        verdict, said = judge(case, str(path))
        verdicts[verdict] += 1
        if verdict not in ("read", "right line", "told"):
            wrong.append(f"case {number}, {case.fault}, lines {case.lines}: {verdict}: {said}")
    assert not wrong, "\n".join([f"{len(wrong)} of {count} went wrong, as {make.__name__}:", *wrong[:10]])
    return verdicts


def judge(case: Case, path: str) -> tuple[str, str]:
    """Read and tokenise a file; return the verdict, and what was said or read."""
    try:
        read = read_records(path)
        encode_records(read, TEMPLATE, TOKENIZER)
    except InputError as fault:
        return verdict_on(str(fault), case, path), str(fault)
    except Exception as fault:
        return "traceback", repr(fault)
    answers = [record.messages[-1].content for record in read]
    right = answers == case.answers if case.answers is not None else case.by_chance
    return "read" if right else "wrongly read", f"{len(answers)} records"


def verdict_on(said: str, case: Case, path: str) -> str:
    """Judge an error."""
    if case.answers is not None and not case.by_chance:
        return "wrongly refused"
    found = re.match(rf"{re.escape(path)}(?::(\d+))?(?::\d+)?: ", said)
    if found is None or "\n" in said or len(said) > len(path) + LONGEST_LINE or case.says not in said:
        return "badly told"
    if case.lines is None:
        return "told"
    return "right line" if found[1] and int(found[1]) in case.lines else "wrong line"


def figures(verdicts: Counter[str]) -> str:
    with_line = verdicts["right line"] + verdicts["wrong line"]
    return (
        f"{verdicts['traceback']} tracebacks; {with_line:,} told with a line, the right one in "
        f"{verdicts['right line'] / with_line:.2%}; {verdicts['told']:,} told of the file as a whole; "
        f"{verdicts['read']:,} harmless and read"
    )

import csv
import gzip
import json
import os
import sys
import threading
import tracemalloc
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetGenerationError
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_tune.data import records
from lit_tune.data.records import Message, Record, content_digest, parse_limit, read_and_count, read_records
from lit_tune.errors import InputError

untimed = settings(deadline=None)  # a busy machine is no failure

ADD = {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}
NAME = {"instruction": "Name a colour.", "input": "", "output": "Blue"}
ADD_MESSAGES = (
    Message("user", "Add the numbers.\n\n2 and 3", instruction="Add the numbers.", input="2 and 3"),
    Message("assistant", "5"),
)
NAME_MESSAGES = (Message("user", "Name a colour.", instruction="Name a colour."), Message("assistant", "Blue"))
BOTH = [Record(0, ADD_MESSAGES), Record(1, NAME_MESSAGES)]


def lines(values: Iterable[object]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def fault(path: str, **settings: object) -> str:
    """Give the text of the one-line error that reading ends with."""
    with pytest.raises(InputError) as caught:
        read_records(path, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
@pytest.mark.parametrize("content", [json.dumps([ADD, NAME]), json.dumps([ADD, NAME], indent=2), lines([ADD, NAME])])
def test_an_array_and_one_record_a_line_are_read_under_either_name(tmp_path: Path, name: str, content: str) -> None:
    assert read_records(write(tmp_path / name, content)) == BOTH
    assert read_records(write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))) == BOTH


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows([ADD, NAME])
    assert read_records(str(path)) == BOTH


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([ADD, {**NAME, "input": None}]), path)
    assert read_records(str(path)) == BOTH


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    parquet = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"messages": turns}]), parquet)
    expected = [Record(0, tuple(Message(turn["role"], turn["content"]) for turn in turns))]
    assert read_records(write(tmp_path / "r.jsonl", lines([{"messages": turns}]))) == expected
    assert read_records(str(parquet)) == expected


@pytest.mark.parametrize("blank", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_no_input_may_be_written_in_four_ways(tmp_path: Path, blank: dict[str, object]) -> None:
    record = {"instruction": "Name a colour.", "output": "Blue", **blank}
    assert read_records(write(tmp_path / "r.jsonl", lines([record])))[0].messages == NAME_MESSAGES


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines([ADD, NAME]).encode(),
        lines([ADD, NAME]).replace("\n", "\r\n").encode(),
        ("\n\n" + lines([ADD]) + "  \n" + lines([NAME]) + "\n").encode(),
        lines([ADD, NAME]).rstrip("\n").encode(),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "no last line break"],
)
def test_harmless_variants_are_read(tmp_path: Path, content: bytes) -> None:
    assert read_records(write(tmp_path / "r.jsonl", content)) == BOTH


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    content = json.dumps({**NAME, "output": text}, ensure_ascii=False)
    assert read_records(write(tmp_path / "r.jsonl", content))[0].messages[1].content == text


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", lines([{"question": "Name a colour.", "answer": "Blue"}]))
    columns = {"instruction": "question", "output": "answer"}
    assert read_records(path, columns=columns)[0].messages == NAME_MESSAGES


def test_records_know_their_place(tmp_path: Path) -> None:
    array = write(tmp_path / "r.json", json.dumps([ADD, NAME], indent=2))
    assert [record.place for record in read_records(array)] == [f"{array}:2", f"{array}:7"]
    parquet = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([ADD, NAME]), parquet)
    assert [record.place for record in read_records(str(parquet))] == [f"{parquet}: record 0", f"{parquet}: record 1"]


def test_a_renamed_column_that_no_record_has_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", lines([ADD]))
    assert "'context'" in fault(path, columns={"input": "context"})
    assert "did you mean 'output'" in fault(path, columns={"ouptut": "answer"})


@untimed
@given(st.lists(st.tuples(*[st.text().filter(str.strip)] * 2, st.text()), min_size=1, max_size=5))
def test_whatever_text_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str, str]]
) -> None:
    raw = [dict(zip(("instruction", "output", "input"), text, strict=True)) for text in texts]
    directory = tmp_path_factory.mktemp("records")
    array = write(directory / "r.json", json.dumps(raw, indent=1, ensure_ascii=False))
    one_a_line = write(directory / "r.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in raw))
    for path in (array, one_a_line):
        read = read_records(path)
        assert [record.messages[0].instruction for record in read] == [text[0] for text in texts]
        assert [record.messages[1].content for record in read] == [text[1] for text in texts]


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, slice(None)),
        (200, slice(0, 200)),
        ("200", slice(0, 200)),
        ("[0:200]", slice(0, 200)),
        (" 5 : 20 ", slice(5, 20)),
        ("[:-5]", slice(None, -5)),
        ("[::10]", slice(None, None, 10)),
        ("[10:2:-2]", slice(10, 2, -2)),
        ([5, 20], slice(5, 20)),
        (["0:200"], slice(0, 200)),
        (["5", "20"], slice(5, 20)),
    ],
)
def test_limits(limit: object, expected: slice) -> None:
    parsed = parse_limit(limit)  # type: ignore[arg-type]
    assert [*range(300)][parsed] == [*range(300)][expected]


@pytest.mark.parametrize(
    "limit",
    [
        *(-1, True, "", "[a:b]", "[0:200", "1,5", "[::0]", "[::-00]", "1.5", [90], [1, 2, 3], [], [None]),
        *("9" * 5_000, f"[:{'9' * 5_000}]", ["0", "9" * 5_000]),  # Python refuses to read numbers so long
    ],
    ids=lambda limit: str(limit)[:9],
)
def test_a_limit_that_is_no_range_is_refused_with_the_forms(limit: object) -> None:
    with pytest.raises(InputError, match=r"\[0:200\]"):
        parse_limit(limit)  # type: ignore[arg-type]


def test_ids_count_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", lines([{**NAME, "output": str(index)} for index in range(10)]))
    assert [(r.id, r.messages[1].content) for r in read_records(path, limit="[4:9:2]")] == [
        (4, "4"),
        (6, "6"),
        (8, "8"),
    ]


def test_a_limit_that_selects_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", lines([ADD, NAME]))
    assert "selects none of the 2 records" in fault(path, limit="[5:9]")


# Faults of a file -----------------------------------------------------------------------------------------------------


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "records.json", "[]")
    assert "did you mean 'records.json'" in fault(str(tmp_path / "record.json"))


def test_a_directory_and_an_unknown_format(tmp_path: Path) -> None:
    assert "is a directory" in fault(str(tmp_path))
    assert "unknown format" in fault(write(tmp_path / "r.txt", "x"))


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.jsonl")  # reading it would wait for ever
    assert "is a pipe or a device" in fault(str(tmp_path / "r.jsonl"))
    assert "no such file" in fault("r\0.jsonl")
    assert "name too long" in fault("r" * 5_000 + ".jsonl")


GOOD = json.dumps(ADD)


@pytest.mark.parametrize(
    ("name", "content", "place", "says"),
    [
        ("r.json", "", "", "empty"),
        ("r.json", " \n ", "", "empty"),
        ("r.json", "[]", "", "no records"),
        ("r.json", "[\n" + GOOD + ",\n{bad}]", ":3:2", "malformed JSON"),
        ("r.json", "[\n" + GOOD + "\n" + GOOD + "]", ":3:1", "Expecting ','"),
        ("r.json", "[\n" + GOOD[:-1] + ",\n" + GOOD + "]", ":3:1", "in the record that begins on line 2;"),
        ("r.json", "[" + GOOD + ",]", f":1:{len(GOOD) + 3}", "malformed JSON"),
        ("r.json", "[" + GOOD + "]\n[]", ":2:1", "Extra data"),
        ("r.json", "[\n" + GOOD, f":2:{len(GOOD) + 1}", "Expecting ','"),
        ("r.json", "[\n\n1]", ":3", "a number"),
        ("r.jsonl", GOOD + "\n" + GOOD[:-4] + "\n", f":2:{len(GOOD) - 3}", "malformed JSON"),
        ("r.jsonl", GOOD + "\n\n" + GOOD + GOOD, f":3:{len(GOOD) + 1}", "one record a line"),
        ("r.jsonl", GOOD + '\n"text"', ":2", "a string"),
        ("r.jsonl", GOOD + "\nnull", ":2", "null"),
        ("r.jsonl", GOOD + '\n{"instruction": NaN}', ":2", "NaN is not JSON"),
        ("r.jsonl", GOOD + '\n{"a": -Infinity}', ":2", "-Infinity is not JSON"),
        ("r.jsonl", GOOD + '\n{"output": "a", "output": "b"}', ":2", "'output' stands twice"),
        ("r.jsonl", GOOD + '\n{"a": ' + "[" * 100_000, ":2", "nested too deep"),
        ("r.jsonl", GOOD + '\n{"instruction": ' + "9" * 5_000 + "}", ":2", "a number"),
        ("r.jsonl", (GOOD + "\n").encode() + b'{"output": "\xff"}', ":2", "0xff is not valid UTF-8"),
        ("r.jsonl", GOOD.encode("utf-16"), "", "UTF-16"),
        ("r.jsonl", GOOD.encode("utf-32"), "", "UTF-32"),
        ("r.jsonl", ("\ufeff" + GOOD).encode("utf-32-be"), "", "UTF-32"),
        ("r.jsonl", GOOD.encode("utf-16-le"), ":1", "NUL"),
        ("r.jsonl", GOOD + '\n{"instruction": "a\x00"}', ":2", "NUL"),
        ("r.json.gz", b"no gzip at all", "", "corrupt"),
        ("r.json.gz", gzip.compress(GOOD.encode())[:-9], "", "corrupt"),
        ("r.csv", "instruction,output\na,b\nc\n", ":3", "1 values for the 2 columns"),
        ("r.csv", "instruction,output\n\"a\nb\",c\nd,'', \n", ":4", "3 values"),
        ("r.csv", 'instruction,output\na,"b\n', ":2", "malformed CSV"),
        ("r.csv", 'instruction,output\n"a\rb",c\nd\n', ":3", "1 values"),
        ("r.csv", "instruction,output\na\rb,c\n", ":2", "malformed CSV"),
        ("r.csv", "\n\ninstruction,output\na,\n", ":4", "'output' is empty"),
        ("r.csv", "output,output\n", ":1", "stands twice"),
        ("r.csv", "instruction,output\n", "", "no records"),
        ("r.parquet", "no parquet", "", "Parquet"),
        ("r.parquet", b"PAR1" + b"x" * 12 + b"\x0c\x00\x00\x00PAR1", "", "Parquet"),
    ],
)
def test_a_faulty_file_is_told_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, place: str, says: str
) -> None:
    path = write(tmp_path / name, content)
    text = fault(path)
    assert text.startswith(f"{path}{place}: ")
    assert says in text


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_UNPACKED_FREE_BYTES", 1_000)
    assert "100 times" in fault(write(tmp_path / "r.json.gz", gzip.compress(b" " * 1_000_000)))


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json.gz", gzip.compress(b" " * 200_000_000))
    tracemalloc.start()
    assert "100 times" in fault(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1.5 * records.MAX_UNPACKED_FREE_BYTES


def test_a_parquet_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_UNPACKED_FREE_BYTES", 1_000)
    pyarrow.parquet.write_table(pa.Table.from_pylist([{**ADD, "output": "x" * 10_000}] * 5_000), tmp_path / "r.parquet")
    assert "100 times" in fault(str(tmp_path / "r.parquet"))


def test_parquet_columns_that_are_no_records_are_told(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pyarrow.parquet.write_table(pa.table(columns, names=["instruction", "output", "output"]), path)
    assert "a column name stands twice" in fault(str(path))
    beyond_dates = pa.array([2**62], pa.int64()).cast(pa.timestamp("us"))
    pyarrow.parquet.write_table(pa.table({"instruction": ["a"], "output": ["b"], "when": beyond_dates}), path)
    assert "date value out of range" in fault(str(path))


@untimed
@given(st.integers(0, 400), st.binary(max_size=3))
def test_a_damaged_file_gives_records_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, damage: bytes
) -> None:
    whole = json.dumps([ADD, NAME, ADD], indent=1).encode()
    path = write(tmp_path_factory.getbasetemp() / "damaged.json", whole[:position] + damage + whole[position + 2 :])
    with suppress(InputError):
        assert read_records(path)


# Faults of a record ---------------------------------------------------------------------------------------------------


def conversation(*turns: object) -> dict[str, object]:
    return {"messages": list(turns)}


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"instruction": "a"}, "'output' is missing"),
        ({"instruction": "a", "Output": "b"}, "did you mean 'Output'?"),
        ({"question": "a", "answer": "b"}, "['question', 'answer']"),
        ({**ADD, "instruction": " \t"}, "'instruction' is empty"),
        ({**ADD, "output": ""}, "'output' is empty"),
        ({**ADD, "output": 5}, "'output' is a number"),
        ({**ADD, "output": True}, "'output' is a boolean"),
        ({**ADD, "output": None}, "'output' is null"),
        ({**ADD, "instruction": ["a"]}, "'instruction' is a list"),
        ({**ADD, "input": {"a": 1}}, "'input' is an object"),
        ({"instruction": "a", "inputs": "b", "output": "c"}, "did you mean 'inputs'?"),
        ({**ADD, "output": "\ud800"}, "lone surrogate U+D800"),
        ({**ADD, "output": "a" * 2_000_001}, "'output' has 2,000,001 characters"),
        ({"mesages": [USER]}, "'messages' is missing (did you mean 'mesages'?)"),
        (conversation(), "an empty list"),
        ({"messages": "Hi"}, "a string"),
        (conversation(USER), "ends with a user turn"),
        (conversation({"role": "assistant", "content": "Hi"}), "no user turn"),
        (conversation("Hi"), "messages[0] is a string"),
        (conversation(USER, {"role": "asistant", "content": "a"}), "messages[1]: role 'asistant' is unknown (did you"),
        (conversation(USER, {"role": "assistant", "text": "a"}), "messages[1]: 'content' is missing"),
        (conversation(USER, {"role": "assistant", "content": ""}), "messages[1]: 'content' is empty"),
        (conversation({"role": 1, "content": "a"}), "messages[0]: 'role' is a number"),
    ],
)
def test_a_faulty_record_is_told_with_line_and_field(tmp_path: Path, record: object, says: str) -> None:
    path = write(tmp_path / "r.jsonl", lines([ADD, record]))
    text = fault(path)
    assert text.startswith(f"{path}:2: ")
    assert says in text


def test_lines_are_right_in_an_array_over_many_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", json.dumps([ADD, NAME, {"instruction": "a"}], indent=2))
    assert fault(path).startswith(f"{path}:12: ")


def test_a_few_empty_outputs_in_a_large_file_are_left_out_and_counted(tmp_path: Path) -> None:
    empty = {**NAME, "output": " "}
    path = write(tmp_path / "r.jsonl", lines([empty, *[NAME] * 99]))
    kept, left_out = read_and_count(path)
    assert ([record.id for record in kept], left_out) == ([*range(1, 100)], 1)
    assert read_and_count(path, limit="[50:60]")[1] == 0
    assert "only records with an empty" in fault(path, limit="[0:1]")

    path = write(tmp_path / "r.jsonl", lines([empty, *[NAME] * 98]))
    assert fault(path).startswith(f"{path}:1: 'output' is empty")


# Digests and the hub --------------------------------------------------------------------------------------------------


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", lines([ADD]))
    digest = content_digest(path)
    assert content_digest(write(tmp_path / "other.jsonl", lines([ADD]))) == digest
    assert content_digest(write(tmp_path / "r.jsonl", lines([NAME]))) != digest
    assert content_digest(BOTH) == content_digest(list(BOTH))
    assert content_digest(BOTH) != content_digest(BOTH[:1])


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)


def test_a_hub_dataset(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        assert (name, split) == ("someone/alpaca", "train")
        return [ADD, NAME, {"instruction": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_records("someone/alpaca", limit=2) == BOTH
    assert fault("someone/alpaca").startswith("someone/alpaca: record 2: 'output' is missing")


def test_a_hub_dataset_that_cannot_be_loaded(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> NoReturn:
        raise DatasetGenerationError("Unknown split\nand more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert "Unknown split; give a local file" in fault("someone/alpaca")


def test_a_loader_is_no_hub_dataset(online: None, working_directory: Path) -> None:
    write(working_directory / "some.json", lines([ADD]))  # which `datasets` would load by the name of its loader
    assert "json: no such file here (did you mean 'some.json'?), and no hub dataset" in fault("json")


def test_the_hub_out_of_reach_is_told_with_what_to_do(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    text = fault("someone/alpaca")
    assert "out of reach (no network)" in text
    assert "local file" in text
    assert "HF_HUB_OFFLINE" in text


def test_a_hub_that_does_not_answer_is_not_waited_for(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: released.wait())
    monkeypatch.setattr(records, "HUB_TIMEOUT_S", 0.01)
    assert "no answer" in fault("someone/alpaca")
    released.set()

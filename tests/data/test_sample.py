"""The bundled sample must be clean: a short demo run trains on it, and users copy its form."""

import json
import unicodedata
from importlib.resources import files

import pytest

Record = dict[str, str]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    text = (files("lit_tune.data") / "sample" / "instructions.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text.removesuffix("\n").split("\n")


@pytest.fixture(scope="module")
def records(lines: list[str]) -> list[Record]:
    return [json.loads(line) for line in lines]


def test_has_enough_records(records: list[Record]) -> None:
    assert len(records) >= 300


def test_keys_and_types_are_exact(records: list[Record]) -> None:
    for number, record in enumerate(records, start=1):
        assert list(record) == ["instruction", "input", "output"], f"line {number}"
        assert all(isinstance(value, str) for value in record.values()), f"line {number}"
        assert record["instruction"], f"line {number}"
        assert record["output"], f"line {number}"


def test_has_records_with_and_without_input(records: list[Record]) -> None:
    with_input = sum(bool(record["input"]) for record in records)
    assert with_input > 100
    assert len(records) - with_input > 100


def test_no_question_is_asked_twice(records: list[Record]) -> None:
    questions = [(record["instruction"].casefold(), record["input"].casefold()) for record in records]
    assert len(set(questions)) == len(questions)


def test_no_long_answer_is_given_twice(records: list[Record]) -> None:
    # Short answers ("Positive", "42") may repeat; a repeated sentence would be memorised instead of its style.
    answers = [record["output"] for record in records if len(record["output"]) > 40]
    assert len(set(answers)) == len(answers)


def test_text_has_no_stray_white_space_or_control_characters(records: list[Record]) -> None:
    for number, record in enumerate(records, start=1):
        for key, value in record.items():
            assert value == value.strip(), f"line {number}, {key!r}"
            controls = {char for char in value if unicodedata.category(char) == "Cc"} - {"\n"}
            assert not controls, f"line {number}, {key!r}: {controls}"

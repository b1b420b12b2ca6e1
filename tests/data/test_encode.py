import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from lit_tune.data import encode
from lit_tune.data.encode import Encoded, encode_dataset
from lit_tune.data.prompts import encode_records, load_template
from lit_tune.data.records import Record, read_records
from lit_tune.errors import InputError, SaveError
from tests.tiny import tiny_tokenizer

ALPACA = load_template("alpaca")
TOKENIZER = tiny_tokenizer()
# With byte tokens, samples of about 180, 230 and 280 tokens.
RECORDS = [{"instruction": f"Say {word}.", "output": word * 10} for word in ("yes", "perhaps", "certainly so")]


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(file)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run(path: str, cache_dir: Path, tokenizer: PreTrainedTokenizerBase = TOKENIZER, **settings: Any) -> Encoded:
    return encode_dataset(
        path, tokenizer=tokenizer, **{"template": ALPACA, "max_length": 1024, "cache_dir": cache_dir, **settings}
    )


def not_called(*_: object, **__: object) -> None:
    pytest.fail("the cache was not used")


def test_samples_are_those_of_encode_records(path: str, cache_dir: Path) -> None:
    encoded = run(path, cache_dir)
    expected = encode_records(read_records(path), ALPACA, TOKENIZER)
    assert len(encoded) == len(expected)
    assert encoded.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert encoded.ids.tolist() == [0, 1, 2]
    assert encoded.counts == {"records": 3, "empty": 0, "kept": 3, "dropped": 0, "truncated": 0}
    for index, (ids, supervised) in enumerate(expected):
        tokens, labels = encoded.sample(index)
        assert tokens.dtype == labels.dtype == np.int64
        assert tokens.tolist() == ids
        assert labels.tolist() == [token if counted else -100 for token, counted in zip(ids, supervised, strict=True)]


def test_the_first_label_is_always_masked() -> None:
    everything = np.ones(4, dtype=np.bool_)
    bounds = np.array([[0, 2], [2, 4]])
    encoded = Encoded(np.array([5, 6, 7, 8], dtype=np.int32), everything, bounds, np.array([0, 1]), {})
    assert [encoded.sample(index)[1].tolist() for index in range(2)] == [[-100, 6], [-100, 8]]


def test_tokens_are_memory_mapped(path: str, cache_dir: Path) -> None:
    encoded = run(path, cache_dir)
    assert isinstance(encoded.tokens, np.memmap)
    assert isinstance(encoded.supervised, np.memmap)
    assert encoded.tokens.dtype == np.int32


def test_a_subset_keeps_the_samples_in_the_order_asked_for(path: str, cache_dir: Path) -> None:
    encoded = run(path, cache_dir)
    subset = encoded.subset([2, 0])
    assert subset.ids.tolist() == [2, 0]
    assert subset.lengths.tolist() == encoded.lengths[[2, 0]].tolist()
    assert subset.sample(0)[0].tolist() == encoded.sample(2)[0].tolist()


def test_tokenising_in_chunks_changes_nothing(path: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(path, cache_dir / "whole").tokens.tolist()
    sizes = []

    def encode_chunk(records: Sequence[Record], *others: Any) -> list[tuple[list[int], list[bool]]]:
        sizes.append(len(records))
        return encode_records(records, *others)

    monkeypatch.setattr(encode, "encode_records", encode_chunk)
    monkeypatch.setattr(encode, "_CHUNK_CHARACTERS", 50)  # more than the first record has, less than two
    assert run(path, cache_dir / "chunks").tokens.tolist() == whole
    assert sizes == [2, 1]


# Long samples ---------------------------------------------------------------------------------------------------------


def test_long_samples_are_dropped_and_counted(path: str, cache_dir: Path) -> None:
    lengths = run(path, cache_dir).lengths
    encoded = run(path, cache_dir, max_length=int(lengths[1]))
    assert encoded.ids.tolist() == [0, 1]
    assert encoded.counts == {"records": 3, "empty": 0, "kept": 2, "dropped": 1, "truncated": 0}


def test_long_samples_are_truncated_and_counted(path: str, cache_dir: Path) -> None:
    whole = run(path, cache_dir)
    encoded = run(path, cache_dir, max_length=int(whole.lengths[1]), over_length="truncate")
    assert encoded.lengths.tolist() == [*whole.lengths[:2], whole.lengths[1]]
    assert encoded.counts == {"records": 3, "empty": 0, "kept": 3, "dropped": 0, "truncated": 1}
    assert encoded.sample(2)[0].tolist() == whole.sample(2)[0][: whole.lengths[1]].tolist()
    assert TOKENIZER.eos_token_id not in encoded.sample(2)[0]


def test_what_would_keep_no_supervised_token_is_not_truncated_but_dropped(path: str, cache_dir: Path) -> None:
    whole = run(path, cache_dir)
    prompts = [int((whole.sample(index)[1] == -100).sum()) for index in range(3)]
    assert prompts[0] < prompts[1] < prompts[2]
    encoded = run(path, cache_dir, max_length=prompts[1], over_length="truncate")
    assert encoded.counts == {"records": 3, "empty": 0, "kept": 1, "dropped": 2, "truncated": 1}
    assert (encoded.sample(0)[1] != -100).sum() == prompts[1] - prompts[0]


def test_a_long_sample_may_be_a_fault(path: str, cache_dir: Path) -> None:
    length = run(path, cache_dir).lengths[1]
    with pytest.raises(
        InputError, match=rf"records\.jsonl:2: the record has {length} tokens, more than max_length {length - 1};"
    ):
        run(path, cache_dir, max_length=int(length) - 1, over_length="fail")


@pytest.mark.parametrize("over_length", ["drop", "truncate"])
def test_nothing_left_is_a_fault(path: str, cache_dir: Path, over_length: str) -> None:
    shortest = run(path, cache_dir).lengths[0]
    with pytest.raises(InputError, match=rf"no supervised token is left: all 3 .*the shortest has {shortest} tokens"):
        run(path, cache_dir, max_length=20, over_length=over_length)


# The cache ------------------------------------------------------------------------------------------------------------


def test_the_second_call_reads_the_cache(path: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(path, cache_dir)
    monkeypatch.setattr(encode, "read_and_count", not_called)
    second = run(path, cache_dir)
    assert second.tokens.tolist() == first.tokens.tolist()
    assert second.counts == first.counts


def test_padding_and_truncating_with_the_tokenizer_does_not_change_the_key(path: str, cache_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    run(path, cache_dir, tokenizer=tokenizer)
    tokenizer("some text", padding="max_length", truncation=True, max_length=8)
    run(path, cache_dir, tokenizer=tokenizer)
    assert len(list(cache_dir.iterdir())) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"template": load_template("chatml")},
        {"tokenizer": tiny_tokenizer(prepends_bos=False)},
        {"max_length": 1000},
        {"over_length": "truncate"},
        {"limit": "[0:3]"},
        {"columns": {"instruction": "output"}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_setting_has_an_entry_of_its_own(path: str, cache_dir: Path, changed: dict[str, Any]) -> None:
    run(path, cache_dir)
    run(path, cache_dir, **changed)
    assert len(list(cache_dir.iterdir())) == 2


def test_changed_records_have_an_entry_of_their_own(path: str, cache_dir: Path) -> None:
    run(path, cache_dir)
    Path(path).write_text(json.dumps(RECORDS[:1]))
    assert len(run(path, cache_dir)) == 1


@pytest.mark.parametrize("name", ["tokens.npy", "supervised.npy", "offsets.npy", "ids.npy", "about.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "a flipped bit", "another's"])
def test_a_damaged_entry_is_made_again(path: str, cache_dir: Path, name: str, damage: str) -> None:
    expected = run(path, cache_dir).tokens.tolist()
    (entry,) = cache_dir.iterdir()
    if damage == "missing":
        (entry / name).unlink()
    elif damage == "empty":
        (entry / name).write_bytes(b"")
    elif damage == "cut short":
        (entry / name).write_bytes((entry / name).read_bytes()[:-1])
    elif damage == "a flipped bit":
        content = bytearray((entry / name).read_bytes())
        content[-2] ^= 1
        (entry / name).write_bytes(content)
    else:
        (entry / "offsets.npy").write_bytes((entry / "ids.npy").read_bytes())
    assert run(path, cache_dir).tokens.tolist() == expected
    assert [*cache_dir.iterdir()] == [entry]


def test_the_same_entry_may_be_made_twice_at_once(path: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, both_written = encode._write, Barrier(2, timeout=60)

    def write_and_wait(*arguments: Any) -> None:
        write(*arguments)
        both_written.wait()

    monkeypatch.setattr(encode, "_write", write_and_wait)
    with ThreadPoolExecutor(2) as pool:
        # A tokenizer for each: one must not be used by two threads at once.
        runs = [pool.submit(run, path, cache_dir, tokenizer=tiny_tokenizer()) for _ in range(2)]
        first, second = (made.result() for made in runs)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert len(list(cache_dir.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_told(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match="set LIT_TUNE_CACHE"):
        run(path, tmp_path / "file" / "cache")


def test_faults_of_the_data_leave_no_entry(tmp_path: Path, cache_dir: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a"}')
    with pytest.raises(InputError, match=r"bad\.jsonl:1: 'output' is missing"):
        run(str(bad), cache_dir)
    assert not cache_dir.exists()


def test_a_template_that_refuses_a_record_is_told_with_the_file(tmp_path: Path, cache_dir: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    file = tmp_path / "turns.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    with pytest.raises(InputError, match=r"turns\.jsonl:1: template 'llama2' fails: turns must alternate"):
        run(str(file), cache_dir, template=load_template("llama2"))

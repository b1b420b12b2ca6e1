"""What must hold of the tokens and labels of any records whatever, from the file to the loss.

Every test is an invariant, tried with examples that Hypothesis makes: the same ones in every run. Their texts are made
to break templates: control tokens written out and cut in two, blanks at the ends, signs of templates and of Jinja.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from lit_tune.data.collate import collate
from lit_tune.data.describe import describe
from lit_tune.data.encode import IGNORED, Encoded, encode_dataset
from lit_tune.data.instruct import last_prompt
from lit_tune.data.prompts import Template, encode_prompt, load_template, stop_token_ids
from lit_tune.data.records import Message, read_records
from lit_tune.errors import InputError
from lit_tune.modules.attention import register
from lit_tune.modules.llama import LlamaTuner
from tests.tiny import BOS, CHAT_TOKENS, EOS, PAD, tiny_sentencepiece_tokenizer, tiny_tokenizer
from tests.tiny_llama import tiny_llama

Fields = dict[str, Any]
Check = Callable[..., None]
Test = Callable[[int, Callable[[str], None]], None]

EXAMPLES: dict[str, int] = {}  # of every invariant, those that held


def invariant(**strategies: st.SearchStrategy[Any]) -> Callable[[Check], Test]:
    """Make a test of what must hold for all examples: of 20, in the long form of a thousand."""

    def decorate(check: Check) -> Test:
        @pytest.mark.parametrize("count", [20, pytest.param(1_000, marks=pytest.mark.slow)])
        def test(count: int, report: Callable[[str], None]) -> None:
            held = 0

            @settings(max_examples=count, deadline=None, derandomize=True, database=None)
            @given(**strategies)
            def example(**drawn: Any) -> None:
                nonlocal held
                check(**drawn)
                held += 1

            example()
            assert held >= count
            EXAMPLES[check.__name__] = held
            report(f"{held:,} examples: {check.__doc__}")

        return test

    return decorate


# Examples -------------------------------------------------------------------------------------------------------------

# The template that comes with TinyLlama's chat models: its marks of turns are no tokens.
TINYLLAMA = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
TEMPLATES = [
    *(load_template(name) for name in ("alpaca", "llama2", "llama3", "chatml")),
    load_template("chat", chat_template=TINYLLAMA),
]
BYTES = tiny_tokenizer()
BYTE_TOKENIZERS = [BYTES, tiny_tokenizer(prepends_bos=False)]
PIECES = [tiny_sentencepiece_tokenizer("first"), tiny_sentencepiece_tokenizer("always")]

CONTROL = [BOS, EOS, PAD, "<unk>", *CHAT_TOKENS]
HALVES = [half for token in CONTROL for half in (token[: len(token) // 2], token[len(token) // 2 :])]
SIGNS = [
    *("\n", " ", "\t", "the", "### Response:", "[/INST]", "<<SYS>>\n", "<|user|>\n", "{{ 7 * 7 }}", "{% raw %}"),
    *("\x1e", "\x1f", "\U000f0000", "\u2028", "😀", "\u202e"),
]

letters = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)
texts = st.lists(letters | st.sampled_from([*CONTROL, *HALVES, *SIGNS]), min_size=1, max_size=6)
filled = texts.map("".join).filter(str.strip)
alpacas = st.fixed_dictionaries({"instruction": filled, "output": filled, "input": filled | st.just("")})


def as_turns(pairs: Sequence[tuple[str, str]], rules: str) -> Fields:
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return {"messages": [{"role": "system", "content": rules}, *turns] if rules else turns}


chats = st.builds(as_turns, st.lists(st.tuples(filled, filled), min_size=1, max_size=3), filled | st.just(""))
some = st.lists(alpacas | chats, min_size=1, max_size=4)
templates = st.sampled_from(TEMPLATES)
byte_tokenizers = st.sampled_from(BYTE_TOKENIZERS)
tokenizers = st.sampled_from([*BYTE_TOKENIZERS, *PIECES])
limits = st.integers(2, 400)


def answers(record: Fields) -> list[str]:
    """Give the texts that a model is to learn."""
    if "messages" not in record:
        return [record["output"]]
    return [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]


def encode(records: Iterable[Fields], template: Template, tokenizer: PreTrainedTokenizerBase, **others: Any) -> Encoded:
    """Take records from a file to samples, as a run does."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "records.jsonl")
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return encode_file(path, template, tokenizer, **others)


def encode_file(path: Path, template: Template, tokenizer: PreTrainedTokenizerBase, **others: Any) -> Encoded:
    given_length = {"max_length": 1_000_000} | others
    return encode_dataset(
        str(path), tokenizer=tokenizer, template=template, cache_dir=path.parent / "cache", **given_length
    )


def truncated(
    records: Sequence[Fields], template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded | None:
    """Cut samples at `max_length`; None where it is refused because nothing would be left to learn."""
    try:
        return encode(records, template, tokenizer, max_length=max_length, over_length="truncate")
    except InputError as fault:
        if f"no supervised token is left: all {len(records)} records" not in str(fault):
            raise
        return None


def messages_of(record: Fields) -> tuple[Message, ...]:
    with TemporaryDirectory() as directory:
        path = Path(directory, "records.jsonl")
        path.write_text(json.dumps(record))
        return read_records(str(path))[0].messages


def samples_of(encoded: Encoded) -> list[tuple[list[int], list[int]]]:
    return [(tokens.tolist(), labels.tolist()) for tokens, labels in map(encoded.sample, range(len(encoded)))]


def runs(labels: Sequence[int]) -> list[list[int]]:
    """Give every unbroken run of supervised tokens."""
    found: list[list[int]] = []
    for before, label in zip([IGNORED, *labels], labels, strict=False):
        if label != IGNORED:
            found += [[]] if before == IGNORED else []
            found[-1].append(label)
    return found


def written(answer: str, template: Template) -> str:
    """Give an answer as a template writes it: two of them trim, one puts blanks around."""
    if template.name in ("llama2", "llama3"):
        answer = answer.strip()
    return f" {answer} " if template.name == "llama2" else answer


# What is learnt -------------------------------------------------------------------------------------------------------


@invariant(records=some, template=templates, tokenizer=byte_tokenizers)
def test_only_answers(records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """exactly the answers, and the one token that ends each, are supervised"""
    ends = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
    for record, (_, labels) in zip(records, samples_of(encode(records, template, tokenizer)), strict=True):
        expected = [written(answer, template) + ends.get(template.name, EOS) for answer in answers(record)]
        assert [tokenizer.decode(run) for run in runs(labels)] == expected


@invariant(records=some, template=templates, tokenizer=tokenizers)
def test_every_answer_ends(records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """every answer ends in a supervised stop token, in a batch that is padded with eos too"""
    encoded = encode(records, template, tokenizer)
    assert tokenizer.eos_token_id is not None
    batch = collate(
        [encoded.sample(i) for i in range(len(encoded))], packing=False, pad_token_id=tokenizer.eos_token_id
    )
    stops = stop_token_ids(template, tokenizer)
    for record, labels, length in zip(records, batch["labels"].tolist(), encoded.lengths, strict=True):
        assert [run[-1] in stops for run in runs(labels)] == [True] * len(answers(record))
        assert labels[length - 1] in stops
        assert set(labels[length:]) <= {IGNORED}


@invariant(records=some, template=templates, tokenizer=tokenizers, max_length=limits)
def test_never_nothing(
    records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """no sample without a supervised token, cut at any length, and no first token supervised; else it is refused"""
    encoded = truncated(records, template, tokenizer, max_length)
    for _, labels in samples_of(encoded) if encoded else []:
        assert labels[0] == IGNORED
        assert runs(labels)


# What is written ------------------------------------------------------------------------------------------------------


@invariant(records=some, template=templates, tokenizer=tokenizers)
def test_no_injection(records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """a sample has the control tokens of its template, whatever its texts say"""
    harmless = [{key: without_text(value) for key, value in record.items()} for record in records]
    for attacked, plain in zip(
        samples_of(encode(records, template, tokenizer)), samples_of(encode(harmless, template, tokenizer)), strict=True
    ):
        assert controls(attacked[0], tokenizer) == controls(plain[0], tokenizer)


def without_text(value: Any) -> Any:
    return [{**turn, "content": "x"} for turn in value] if isinstance(value, list) else value and "x"


def controls(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the control tokens in order; what an unknown letter becomes is none, though <unk> is declared as one."""
    return [token for token in tokens if token in tokenizer.added_tokens_decoder and token != tokenizer.unk_token_id]


@invariant(records=some, template=templates, tokenizer=tokenizers)
def test_texts_come_back(records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """an answer's tokens decode to the answer"""
    for record, (_, labels) in zip(records, samples_of(encode(records, template, tokenizer)), strict=True):
        for answer, run in zip(answers(record), runs(labels), strict=True):
            decoded = str(tokenizer.decode(run[:-1], clean_up_tokenization_spaces=False))
            expected = written(answer, template)
            if tokenizer in PIECES:
                # SentencePiece writes a blank before a text's first word and takes one away, and its sign for it is ▁.
                decoded, expected = (text.replace("▁", " ").removeprefix(" ") for text in (decoded, expected))
            assert decoded == expected


@invariant(records=some, template=templates, tokenizer=tokenizers)
def test_bos(records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """a sample begins with one bos if its template or tokenizer has it, and only Llama 2 repeats it at each request"""
    writes_bos = template.name in ("llama2", "llama3") or tokenizer is not BYTE_TOKENIZERS[1]
    for record, (tokens, _) in zip(records, samples_of(encode(records, template, tokenizer)), strict=True):
        requests = len(answers(record)) if template.name == "llama2" else 1
        assert tokens.count(tokenizer.bos_token_id) == (requests if writes_bos else 0)
        assert (tokens[0] == tokenizer.bos_token_id) == writes_bos


@invariant(record=alpacas | chats, template=templates, tokenizer=tokenizers)
def test_prompts(record: Fields, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """the prompt of every turn in generation is what stands before its answer in training"""
    ((tokens, labels),) = samples_of(encode([record], template, tokenizer))
    messages = messages_of(record)
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    starts = [at for at, label in enumerate(labels) if label != IGNORED and labels[at - 1] == IGNORED]
    assert [encode_prompt(messages[:turn], template, tokenizer) for turn in turns] == [tokens[:at] for at in starts]
    assert last_prompt(np.array(tokens), np.array(labels)) == tokens[: starts[-1]]


@invariant(records=st.lists(alpacas, min_size=1, max_size=4), template=templates, tokenizer=tokenizers)
def test_containers(records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """records give the same samples from any kind of file, and again from the cache"""
    expected = samples_of(encode(records, template, tokenizer))
    with TemporaryDirectory() as name:
        directory = Path(name)
        array = json.dumps(records, indent=1, ensure_ascii=False).encode()
        (directory / "r.json").write_bytes(array)
        (directory / "r.json.gz").write_bytes(gzip.compress(array))
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), directory / "r.parquet")
        with (directory / "r.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*records[0]], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(records)
        for suffix in ("json", "json.gz", "parquet", "csv", "csv"):
            assert samples_of(encode_file(directory / f"r.{suffix}", template, tokenizer)) == expected, suffix


# What is counted and cut ----------------------------------------------------------------------------------------------


@invariant(records=some, template=templates, tokenizer=tokenizers, max_length=limits)
def test_truncation(
    records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """a sample cut at max_length is the whole one's beginning, dropped where that teaches nothing; short ones stay"""
    whole = samples_of(encode(records, template, tokenizer))
    cut = {i: (tokens[:max_length], labels[:max_length]) for i, (tokens, labels) in enumerate(whole)}
    useful = {i: sample for i, sample in cut.items() if set(sample[1]) != {IGNORED}}
    short = {i: sample for i, sample in cut.items() if len(whole[i][0]) <= max_length}
    for over_length, expected in {"truncate": useful, "drop": short}.items():
        if expected:
            encoded = encode(records, template, tokenizer, max_length=max_length, over_length=over_length)
            assert dict(zip(encoded.ids.tolist(), samples_of(encoded), strict=True)) == expected
    if len(short) < len(records):
        with pytest.raises(InputError, match=f"more than max_length {max_length};"):
            encode(records, template, tokenizer, max_length=max_length, over_length="fail")


@invariant(records=some, template=templates, tokenizer=tokenizers, max_length=limits)
def test_accounts(
    records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """records, tokens and supervised tokens add up, from the file to the batch and in what `lit-tune data` says"""
    whole = encode(records, template, tokenizer)
    encoded = truncated(records, template, tokenizer, max_length)
    too_long = int((whole.lengths > max_length).sum())
    if encoded is None:
        assert too_long == len(records)
        return
    samples = samples_of(encoded)
    counts = encoded.counts
    assert counts["records"] == len(records) == counts["kept"] + counts["dropped"] + counts["empty"]
    assert counts["kept"] == len(samples)
    assert too_long == counts["dropped"] + counts["truncated"]
    tokens = sum(len(ids) for ids, _ in samples)
    supervised = sum(label != IGNORED for _, labels in samples for label in labels)
    said = describe(encoded)
    assert tokens == len(encoded.tokens) == int(encoded.lengths.sum()) == said.tokens
    assert supervised == pytest.approx(said.supervised_share * said.tokens)
    for packing in (True, False):
        batch = collate([encoded.sample(i) for i in range(len(encoded))], packing=packing, pad_token_id=0)
        assert (batch["num_tokens"], batch["num_supervised"]) == (tokens, supervised)


# What a batch is ------------------------------------------------------------------------------------------------------


@invariant(records=some, template=templates, tokenizer=tokenizers, pad_token_id=st.integers(0, 272))
def test_batches(
    records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase, pad_token_id: int
) -> None:
    """packed or padded, with any pad token, a batch holds the samples' tokens, labels and positions, and no others"""
    encoded = encode(records, template, tokenizer)
    samples = [encoded.sample(i) for i in range(len(encoded))]
    lengths = encoded.lengths.tolist()
    packed = collate(samples, packing=True, pad_token_id=pad_token_id)
    padded = collate(samples, packing=False, pad_token_id=pad_token_id)
    assert packed["cu_seqlens"].tolist() == [0, *np.cumsum(lengths).tolist()]
    cut = {key: packed[key][0].split(lengths) for key in ("input_ids", "labels", "position_ids")}
    for i, (tokens, labels) in enumerate(samples):
        rows = {"input_ids": tokens.tolist(), "labels": labels.tolist(), "position_ids": [*range(lengths[i])]}
        assert {key: part[i].tolist() for key, part in cut.items()} == rows
        assert {key: padded[key][i, : lengths[i]].tolist() for key in rows} == rows
        assert set(padded["labels"][i, lengths[i] :].tolist()) <= {IGNORED}


def tuner() -> LlamaTuner:
    """Make the module that trains, around the tiny Llama."""
    module = LlamaTuner(base="tiny", method="fft")
    module.model = tiny_llama(vocabulary=len(BYTES))
    module.model.set_attn_implementation(register())
    trainer: Any = SimpleNamespace(precision="32-true")
    module.trainer = trainer
    return module


TUNER = tuner()
PLAIN = tiny_llama(vocabulary=len(BYTES))  # the same weights, and transformers' own attention and loss


@invariant(records=some, template=templates, tokenizer=byte_tokenizers)
def test_loss(records: list[Fields], template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """the loss of a packed batch is that of the padded one, and of plain transformers sample by sample"""
    encoded = encode(records, template, tokenizer)
    samples = [encoded.sample(i) for i in range(len(encoded))]
    with torch.no_grad():
        packed, padded = (
            float(TUNER.nll(collate(samples, packing=packing, pad_token_id=2))) for packing in (True, False)
        )
        plain = sum(
            float(
                cross_entropy(
                    PLAIN(input_ids=torch.from_numpy(tokens)[None]).logits[0, :-1],
                    torch.from_numpy(labels)[1:],
                    reduction="sum",
                )
            )
            for tokens, labels in samples
        )
    # fp32 sums in another order differ by some 1e-7 of their size.
    assert packed == pytest.approx(plain, rel=1e-5)
    assert padded == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_the_long_form_is_long(report: Callable[[str], None]) -> None:
    total = sum(EXAMPLES.values())
    assert total >= 10_000, "run the whole file"
    report(f"{total:,} examples of {len(EXAMPLES)} invariants in all: each holds in each of its examples")

"""Makers of broken data: good records with one fault among them, and files that are hostile as a whole.

Every case is made from its number alone, so a number is all that is needed to repeat one. Where the line of a syntax
fault does not follow from how the case was made, Python's own decoder is asked for it.
"""

import csv
import gzip
import io
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

Fields = dict[str, Any]
Mutation = Callable[[random.Random, Fields], str]  # from a good record to its text in the file


@dataclass(frozen=True)
class Case:
    """A file, and what reading it must come to.

    Attributes:
        fault: What is wrong with it.
        name: Its name.
        content: Its bytes.
        lines: The lines that may be told, nearly always one; None: it is told of the file as a whole.
        says: What must be told besides.
        answers: The records' answers if it can be read; None: it must be refused.
        by_chance: It may be read or refused.
    """

    fault: str
    name: str
    content: bytes
    lines: range | None = None
    says: str = ""
    answers: list[str] | None = None
    by_chance: bool = False


def on(line: int) -> range:
    return range(line, line + 1)


# Good records ---------------------------------------------------------------------------------------------------------

WORDS = [
    *(
        "the sea",
        "two words",
        "7",
        " ",
        "\n",
        "\t",
        '"',
        "'",
        "\\",
        "\\n",
        "{",
        "}]",
        ",",
        ":",
        "[0:2]",
        "# no comment",
    ),
    *(
        "😀",
        "👩\u200d👧",
        "שלום",
        "\u202eright to left",
        "e\u0301",
        "\u2028",
        "\u2029",
        "\x85",
        "\x1e",
        "\x7f",
        "\ufeff",
    ),
    *("</s>", "<|im_end|>", "<|eot_id|>", "{{ 7 * 7 }}", "\U000f0000", "\ufffd", "null", "NaN", "--data.path"),
]
LETTERS = ["é", "ß", "½", "°", "£"]  # which Latin-1 has too


def a_text(rng: random.Random) -> str:
    """Make a text that is odd and right."""
    return "a" + "".join(rng.choices(WORDS, k=rng.randrange(1, 8)))


def alpaca(rng: random.Random) -> Fields:
    return {"instruction": a_text(rng), "input": a_text(rng) if rng.random() < 0.5 else "", "output": a_text(rng)}


def conversation(rng: random.Random) -> Fields:
    turns = [{"role": role, "content": a_text(rng)} for role in ("user", "assistant") * rng.randrange(1, 3)]
    rules = [{"role": "system", "content": a_text(rng)}] if rng.random() < 0.3 else []
    return {"messages": rules + turns}


def some_records(rng: random.Random) -> list[Fields]:
    return [rng.choice([alpaca, conversation])(rng) for _ in range(rng.randrange(1, 12))]


def answer(record: Fields) -> str:
    text: str = record["output"] if "output" in record else record["messages"][-1]["content"]
    return text


def dump(rng: random.Random, value: object) -> str:
    """Write a value in one line, in one of the ways in which that can be done."""
    separators = rng.choice([(", ", ": "), (",", ":"), (" ,", ":\t")])
    return json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=separators)


def with_raw(rng: random.Random, record: Fields, key: str, raw: str) -> str:
    """Write a record with a value that is given as it stands in the file."""
    return dump(rng, record | {key: "RAW"}).replace('"RAW"', raw)


# Faults of a record's values ------------------------------------------------------------------------------------------


def missing(rng: random.Random, record: Fields) -> str:
    record.pop(rng.choice(["instruction", "output"]))
    return dump(rng, record)


def misspelt(rng: random.Random, record: Fields) -> str:
    key = rng.choice([*record])
    at = rng.randrange(len(key) - 1)
    swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    wrong = rng.choice([key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], swapped, key.upper(), f"{key} "])
    return dump(rng, {wrong if name == key else name: value for name, value in record.items()})


def of_another_type(rng: random.Random, record: Fields) -> str:
    key = rng.choice([*record])
    nothing = [] if key == "input" else ["null"]
    numbers = ["5", "-1.5e300", "9" * 5_000, "NaN", "-Infinity"]
    return with_raw(rng, record, key, rng.choice([*nothing, *numbers, "true", "[]", '["a"]', "{}", '{"a": "b"}']))


def blank(rng: random.Random, record: Fields) -> str:
    return dump(rng, record | {rng.choice(["instruction", "output"]): rng.choice(["", " ", "\n\t", "\u3000", "\x1f"])})


def lone_surrogate(rng: random.Random, record: Fields) -> str:
    bad = rng.choice(["\ud800", "\udfff", "\udc00\ud800"])
    return json.dumps(record | {rng.choice([*record]): f"a{bad}{a_text(rng)}"})


def constant(rng: random.Random, record: Fields) -> str:
    return with_raw(rng, record, "extra", rng.choice(['{"a": [NaN]}', "Infinity", "[-Infinity]"]))


def doubled_key(rng: random.Random, record: Fields) -> str:
    key = rng.choice([*record])
    before = rng.choice([dump(rng, {key: record[key]})[:-1], '{"x": {"y": 1, "y": 1}'])
    return f"{before}, {dump(rng, record)[1:]}"


def nested(rng: random.Random, record: Fields) -> str:
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    value = opening * 100_000 + rng.choice(["", "1" + closing * 100_000])
    return with_raw(rng, record, rng.choice(["extra", "output"]), value)


def no_object(rng: random.Random, record: Fields) -> str:
    return rng.choice(["5", "null", "true", '"text"', "[]", dump(rng, [record]), dump(rng, dump(rng, record))])


def broken_conversation(rng: random.Random, record: Fields) -> str:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    turns: list[object] = [
        *([], "a", 5, {}, [user], [assistant], [assistant, user], [user, "b"], [user, None], [user, [assistant]]),
        *([user, {**assistant, "content": wrong}] for wrong in ("", " ", None, 5, ["b"], {"text": "b"})),
        *([user, {**assistant, "role": wrong}] for wrong in ("asistant", "gpt", "", None, 5, "Assistant")),
        *([user, wrong] for wrong in ({}, {"role": "assistant"}, {"content": "b"}, {"from": "gpt", "value": "b"})),
    ]
    return dump(rng, {"messages": rng.choice(turns)})


VALUE_FAULTS: list[Mutation] = [
    *(missing, misspelt, of_another_type, blank, lone_surrogate, constant, doubled_key, no_object, broken_conversation)
]
SAYS: dict[Mutation, str] = {missing: "is missing", misspelt: "did you mean"}


# Faults of a record's text --------------------------------------------------------------------------------------------

STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def signs(written: str, which: str) -> list[int]:
    """Give the places of a JSON text's own signs, the quotes around strings among them."""
    inside = {at for found in STRING.finditer(written) for at in range(*found.span(1))}
    return [at for at, letter in enumerate(written) if at not in inside and letter in which]


def in_a_string(rng: random.Random, written: str, what: str) -> str:
    """Put something at the beginning of a string."""
    at = rng.choice([found.start(1) for found in STRING.finditer(written)])
    return written[:at] + what + written[at:]


def cut_short(rng: random.Random, record: Fields) -> str:
    written = dump(rng, record)
    return written[: rng.randrange(1, len(written))]


def a_sign_too_few(rng: random.Random, record: Fields) -> str:
    written = dump(rng, record)
    at = rng.choice(signs(written, '{}[]":,'))
    return written[:at] + written[at + 1 :]


def a_sign_too_many(rng: random.Random, record: Fields) -> str:
    written = dump(rng, record)
    at = rng.choice(signs(written, "{}:,")[1:])
    return written[:at] + rng.choice("]},:;x'/\\\"\ufeff") + written[at:]


def raw_control(rng: random.Random, record: Fields) -> str:
    return in_a_string(rng, dump(rng, record), rng.choice(["\t", "\n", "\x01", "\x1f", "\r"]))


def bad_escape(rng: random.Random, record: Fields) -> str:
    return in_a_string(rng, dump(rng, record), rng.choice(["\\x41", "\\u12zz", "\\ ", "\\'", "\\U0001f600"]))


def another_language(rng: random.Random, record: Fields) -> str:
    written = dump(rng, record)
    unquoted = re.sub(r'"(\w+)"\s*:', r"\1:", written, count=1)
    near = [repr(record), written[:-1] + ",}", written + " // why", written + ";", "- " + written, "#" + written]
    return rng.choice([*near, unquoted, written.replace('"', "'"), written.replace('"', "“")])


def two_at_once(rng: random.Random, record: Fields) -> str:
    return dump(rng, record) + rng.choice(["", " ", "\t"]) + dump(rng, record)


SYNTAX_FAULTS: list[Mutation] = [
    *(cut_short, a_sign_too_few, a_sign_too_many, raw_control, bad_escape, another_language, two_at_once)
]
BAD_BYTES = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x82", b"\xf8\x88\x80\x80\x80", b"\0"]


def bad_bytes(rng: random.Random, record: Fields) -> str:
    """Put bytes into a string that are no UTF-8, as the surrogates that Python has for them."""
    return in_a_string(rng, dump(rng, record), rng.choice(BAD_BYTES).decode("utf-8", "surrogateescape"))


def harmless(rng: random.Random, record: Fields) -> str:
    """Write a record in another way that changes nothing."""
    extras: list[Fields] = [{}, {"id": 5}, {"messages": None}, {"\ud800": None}, {"é": [[]]}, {"extra": "RAW"}]
    items = [*(rng.choice(extras) | record).items()]
    rng.shuffle(items)
    if record.get("input") == "":
        kept = [item for item in items if item[0] != "input"]
        items = rng.choice([kept, [*kept, ("input", rng.choice(["", None, " ", "\n"]))]])
    value = rng.choice(["9" * 5_000, "1e999", "-0.0", "[" * 50 + "]" * 50, '{"a": {"a": 1}}'])
    return "\t " + json.dumps(dict(items)).replace('"RAW"', value) + " "


# One fault among good records -----------------------------------------------------------------------------------------


def record_case(number: int) -> Case:
    """Put one mutated record somewhere among good ones."""
    rng = random.Random(f"record {number}")
    makers, weights = (
        [value_case, syntax_case, byte_case, harmless_case, flipped_case, csv_case],
        [35, 30, 5, 10, 5, 15],
    )
    return rng.choices(makers, weights)[0](rng)


def value_case(rng: random.Random) -> Case:
    mutate = nested if rng.random() < 0.02 else rng.choice(VALUE_FAULTS)  # nested ones have 100,000 characters
    written, line, _ = rng.choice([in_lines, in_array])(rng, mutate(rng, alpaca(rng)), some_records(rng))
    return packed(rng, Case(mutate.__name__, "r.json", written.encode(), on(line), says=SAYS.get(mutate, "")))


def syntax_case(rng: random.Random) -> Case:
    mutate = rng.choice(SYNTAX_FAULTS)
    mutated = mutate(rng, rng.choice([alpaca, conversation])(rng))
    if rng.random() < 0.5:
        written, line, _ = in_lines(rng, mutated, some_records(rng))
        return packed(rng, Case(mutate.__name__, "r.json", written.encode(), on(line)))
    written, begin, _ = in_array(rng, mutated, some_records(rng))
    line = faulty_line(written)  # a bracket left out shows in one of the next records only
    says = f"the record that begins on line {begin}" if line != begin else ""
    return packed(rng, Case(mutate.__name__, "r.json", written.encode(), on(line), says))


def byte_case(rng: random.Random) -> Case:
    written, line, _ = rng.choice([in_lines, in_array])(rng, bad_bytes(rng, alpaca(rng)), some_records(rng))
    return packed(rng, Case("bad bytes", "r.json", written.encode("utf-8", "surrogateescape"), on(line)))


def harmless_case(rng: random.Random) -> Case:
    record = rng.choice([alpaca, conversation])(rng)
    others = some_records(rng)
    written, _, at = rng.choice([in_lines, in_array])(rng, harmless(rng, record), others)
    answers = [answer(one) for one in (*others[:at], record, *others[at:])]
    return packed(rng, Case("harmless", "r.json", written.encode(), answers=answers))


def flipped_case(rng: random.Random) -> Case:
    """Replace one byte of a line by any other."""
    lines = [dump(rng, record).encode() for record in some_records(rng)]
    at = rng.randrange(len(lines))
    place, byte = rng.randrange(len(lines[at])), rng.randrange(256)
    lines[at] = lines[at][:place] + bytes([byte]) + lines[at][place + 1 :]
    # Where it is a line break instead of the opening bracket, what is wrong stands on the next line.
    told = range(at + 1, at + 2 + (byte == 10))
    content = b"\n".join(lines)
    answers = plain_answers(content)
    return Case("flipped byte", "r.jsonl", content, told, answers=answers, by_chance=answers is not None)


def plain_answers(content: bytes) -> list[str] | None:
    """Read one record a line as Python's decoder does; None if it cannot."""
    try:
        return [answer(json.loads(line)) for line in content.decode().split("\n") if line.strip()]
    except (ValueError, LookupError, TypeError):
        return None


def packed(rng: random.Random, case: Case) -> Case:
    """Give a JSON file another name, line ending, byte order mark or packing: it makes no difference."""
    content = case.content
    if rng.random() < 0.3:
        content = content.replace(b"\n", b"\r\n")
    if rng.random() < 0.1:
        content = b"\xef\xbb\xbf" + content
    name = rng.choice(["r.json", "r.jsonl"])
    if rng.random() < 0.3:
        name, content = f"{name}.gz", gzip.compress(content, 1)
    return Case(case.fault, name, content, case.lines, case.says, case.answers)


def in_lines(rng: random.Random, mutated: str, others: Sequence[Fields]) -> tuple[str, int, int]:
    """Write one record a line, with blank lines between; return the text, the mutated one's line, and its index."""
    # A file that begins with a bracket is an array.
    at = rng.randrange(1 if mutated.startswith("[") else 0, len(others) + 1)
    written = [dump(rng, record) for record in others]
    before = "".join(line + rng.choice(["\n", "\n", "\n\n", "\n \n"]) for line in written[:at])
    after = "".join(f"\n{line}" for line in written[at:]) + rng.choice(["", "\n"])
    return before + mutated + after, before.count("\n") + 1, at


def in_array(rng: random.Random, mutated: str, others: Sequence[Fields]) -> tuple[str, int, int]:
    """Write an array, of records over one line or many; return what `in_lines` does."""
    at = rng.randrange(len(others) + 1)
    indent = rng.choice([None, 0, 2])
    written = [json.dumps(record, indent=indent, ensure_ascii=False) for record in others]
    before = rng.choice(["[\n", "\n[ \n\n", "["]) + "".join(f"{record},\n" for record in written[:at])
    return before + ",\n".join([mutated, *written[at:]]) + "\n]", before.count("\n") + 1, at


def faulty_line(written: str) -> int:
    """Return the line on which Python's decoder finds a text to be no JSON; 0 if it finds none."""
    try:
        json.loads(written)
    except json.JSONDecodeError as fault:
        return fault.lineno
    return 0


# CSV ------------------------------------------------------------------------------------------------------------------

HEADER = ["instruction", "input", "output"]


def csv_case(rng: random.Random) -> Case:
    good = ["a", "", a_text(rng)]
    filled = csv_text(rng, [good])
    mutated = {
        "too few values": csv_text(rng, [good[: rng.randrange(1, 3)]]),
        "too many values": csv_text(rng, [[*good, *rng.choices(["", "x"], k=rng.randrange(1, 3))]]),
        "blank value": csv_text(rng, [rng.choice([["", "b", "c"], ["a", "b", " "], ["\t", "", "c"], ["", "", ""]])]),
        "open quote": 'a,"b,c\n',
        "text behind a quote": '"a"b,c,d\n',
        "bare carriage return": "a\rb,c,d\n",
        "bad bytes": f"a{rng.choice(BAD_BYTES).decode('utf-8', 'surrogateescape')},,b\n",
        "harmless": rng.choice(
            [f"\n{filled}", f"{filled}\r\n\n", f"{filled[:-1]}\r\n", f'"a\rb",,{csv_text(rng, [good[2:]])}']
        ),
    }
    fault = rng.choice([*mutated])
    before, after = csv_rows(rng), csv_rows(rng)
    head = csv_text(rng, [HEADER, *before])
    # Nothing behind an open quote may close it.
    tail = "a,b,c\n" * rng.randrange(4) if fault == "open quote" else csv_text(rng, after)
    answers = [row[2] for row in (*before, good, *after)] if fault == "harmless" else None
    content = (head + mutated[fault] + tail).encode("utf-8", "surrogateescape")
    return Case(f"csv: {fault}", "r.csv", content, on(head.count("\n") + 1), answers=answers)


def csv_rows(rng: random.Random) -> list[list[str]]:
    return [[a_text(rng), a_text(rng), a_text(rng)] for _ in range(rng.randrange(1, 8))]


def csv_text(rng: random.Random, rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, csv.unix_dialect, quoting=csv.QUOTE_ALL if rng.random() < 0.5 else csv.QUOTE_MINIMAL).writerows(
        rows
    )
    return file.getvalue()


# Files that are hostile as a whole ------------------------------------------------------------------------------------

UNPACKED_FREE_BYTES = 1024**2  # what the test allows a packed file, so that its bombs need not be large

NO_DATA = [
    *("<!DOCTYPE html>\n<html><body>404</body></html>", "404: Not Found", "- instruction: a\n  output: b\n", "a\nb\nc"),
    *(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n",
        "# Data\n\n| a | b |\n",
        "[data]\na = 1\n",
    ),
    *(
        'instruction = "a"\n',
        "import json\n",
        "<?xml version='1.0'?>\n<a/>",
        "//\n",
        "\\",
        "'",
        '"',
        "{",
        "[",
        "]",
        "-",
        ".",
    ),
]
PUNCTUATION = '[]{}"":,,\\ 1\n\n\n'


def file_case(number: int) -> Case:
    """Make a file that is hostile as a whole, of the kinds in turn."""
    rng = random.Random(f"file {number}")
    return FILE_KINDS[number % len(FILE_KINDS)](rng)


def an_array(rng: random.Random) -> tuple[str, list[Fields]]:
    records = some_records(rng)
    return json.dumps(records, indent=rng.choice([None, 0, 2]), ensure_ascii=False), records


def lines_of(records: Sequence[Fields]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def undecodable_line(content: bytes) -> int:
    """Return the line of the first byte that Python cannot decode; 0 if there is none."""
    try:
        content.decode()
    except UnicodeDecodeError as fault:
        return content.count(b"\n", 0, fault.start) + 1
    return 0


def nothing(rng: random.Random) -> Case:
    name, text = rng.choice(
        [
            ("r.csv", "instruction,output\n"),
            *((name, blank) for name in ("r.json", "r.jsonl") for blank in ("", " \n", "[]")),
        ]
    )
    return Case("nothing in it", name, rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode())


def cut_array(rng: random.Random) -> Case:
    content = an_array(rng)[0].encode()
    content = content[: rng.randrange(1, len(content))]
    line = undecodable_line(content) or faulty_line(content.decode())
    return Case("cut array", "r.json", content, on(line))


def cut_lines(rng: random.Random) -> Case:
    records = some_records(rng)
    content = lines_of(records).encode()
    content = content[: rng.randrange(1, len(content))]
    whole = content.count(b"\n")
    is_whole = not undecodable_line(content) and not faulty_line(content.decode().split("\n")[-1] or "{}")
    answers = [answer(record) for record in records[: whole + (not content.endswith(b"\n"))]]
    return Case("cut lines", "r.jsonl", content, on(whole + 1), answers=answers if is_whole else None)


def cut_csv(rng: random.Random) -> Case:
    rows = csv_rows(rng)
    head = csv_text(rng, [HEADER, *rows])
    last = csv_text(rng, [["a", "b", "c" + a_text(rng)]]).encode()
    content = head.encode() + last[: rng.randrange(1, len(last))]
    line = undecodable_line(content) or head.count("\n") + 1
    return Case("cut csv", "r.csv", content, on(line), by_chance=True)  # a text cut in its midst is still a text


def damaged_gz(rng: random.Random) -> Case:
    text, records = an_array(rng)
    content = bytearray(gzip.compress(text.encode(), rng.randrange(10)))
    if rng.random() < 0.5:
        return Case("cut gz", "r.json.gz", bytes(content[: rng.randrange(1, len(content))]))
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    # The time and the system in the header may be anything; all else is under a checksum.
    return Case(
        "flipped gz", "r.json.gz", bytes(content), answers=[answer(record) for record in records], by_chance=True
    )


def mistaken_suffix(rng: random.Random) -> Case:
    text = an_array(rng)[0].encode()
    table = parquet([alpaca(rng)])
    zero_line = table.count(b"\n", 0, table.index(0)) + 1
    name, content, line = rng.choice(
        [
            ("r.json.gz", text, None),
            ("r.parquet", text, None),
            ("r.parquet", gzip.compress(text), None),
            ("r.jsonl", gzip.compress(text), 1),
            ("r.csv", gzip.compress(text), 1),
            ("r.json", table, zero_line),
            ("r.csv", table, zero_line),
        ]
    )
    return Case("mistaken suffix", name, content, on(line) if line else None)


def foreign_encoding(rng: random.Random) -> Case:
    records = [{"instruction": "a", "output": "b"} for _ in range(rng.randrange(1, 9))]
    at = rng.randrange(len(records))
    records[at]["output"] = "a" + rng.choice(LETTERS)
    encoding, line = rng.choice(
        [
            *(
                ("utf-16", None),
                ("utf-32", None),
                ("utf-16-le", 1),
                ("utf-16-be", 1),
                ("utf-32-le", 1),
                ("utf-32-be", 1),
            ),
            *(("latin-1", at + 1), ("cp1252", at + 1), ("cp500", 1)),
        ]
    )
    return Case(encoding, "r.jsonl", lines_of(records).encode(encoding), on(line) if line else None)


def noise(rng: random.Random) -> Case:
    name = rng.choice(["r.json", "r.jsonl", "r.csv", "r.json.gz", "r.parquet"])
    content = b"\x80" + rng.randbytes(rng.randrange(1, 3_000)) + b"\0"
    line = content.count(b"\n", 0, content.index(0)) + 1
    return Case("noise", name, content, None if name in ("r.json.gz", "r.parquet") else on(line))


def bomb(rng: random.Random) -> Case:
    filling = rng.choice([b" ", b"[", b"\n", b"\0", b'{"a":'])
    content = gzip.compress(filling * (rng.randrange(4, 12) * UNPACKED_FREE_BYTES // len(filling)))
    return Case("bomb", "r.json.gz", content, says="times its size")


def parquet_bomb(rng: random.Random) -> Case:
    content = parquet([{"instruction": "a", "output": "b" * 4096}] * rng.randrange(1_000, 3_000))
    return Case("parquet bomb", "r.parquet", content, says="times its size")


def deep(rng: random.Random) -> Case:
    blank_lines = rng.randrange(4)
    content = "\n" * blank_lines + rng.choice(["[", '{"a":', '[{"a":']) * 100_000
    return Case("deep", "r.json", content.encode(), on(blank_lines + 1), says="nested too deep")


def long_text(rng: random.Random) -> Case:
    records = [alpaca(rng), alpaca(rng), alpaca(rng)]
    at = rng.randrange(3)
    records[at][rng.choice(HEADER)] = rng.choice(["a", "é", "😀", "a b "]) * rng.randrange(2_000_001, 2_500_000)
    return Case("long text", "r.jsonl", lines_of(records).encode(), on(at + 1), says="characters")


def joined(rng: random.Random) -> Case:
    first, others = an_array(rng)[0], some_records(rng)
    break_ = rng.choice(["", "\n", "\n\n"])
    content = rng.choice([first + break_ + lines_of(others), first + break_ + an_array(rng)[0], "[" + first + break_])
    return Case("joined files", "r.json", content.encode(), on(faulty_line(content)))


def no_data(rng: random.Random) -> Case:
    text = rng.choice(NO_DATA)
    line = next(number for number, line in enumerate(text.split("\n"), start=1) if faulty_line(line))
    return Case("no data", rng.choice(["r.json", "r.jsonl"]), text.encode(), on(line))


def punctuation(rng: random.Random) -> Case:
    text = "".join(rng.choices(PUNCTUATION, k=rng.randrange(1, 200)))
    if not text.strip():
        return Case("only blanks", "r.json", text.encode())
    if text.lstrip().startswith("["):
        line = faulty_line(text)
    else:
        lines = text.split("\n")
        syntax = [number for number, line in enumerate(lines, start=1) if line.strip() and faulty_line(line)]
        line = syntax[0] if syntax else next(number for number, line in enumerate(lines, start=1) if line.strip())
    return Case("punctuation", "r.json", text.encode(), on(line) if line else None)


def wrapped(rng: random.Random) -> Case:
    records = [alpaca(rng)]
    value = rng.choice(
        [{"data": records}, {"0": records[0]}, {"instruction": records[0]}, {"train": {"rows": records}}]
    )
    return Case("wrapped", "r.json", json.dumps(value).encode(), on(1), says="'instruction' is")


def odd_table(rng: random.Random) -> Case:
    text, line, says = rng.choice(
        [
            ("instruction;output\na;b\n", 2, "'instruction' is missing"),
            ("instruction\toutput\na\tb\n", 2, "'instruction' is missing"),
            ("say a,,a\nsay b,,b\n", 2, "'instruction' is missing"),
            ("instruction,output,output\na,b,c\n", 1, "stands twice"),
            ("\n\nInstruction,output\na,b\n", 4, "did you mean 'Instruction'"),
            ("instruction,output\n\n\na,b,c\n", 4, "3 values"),
        ]
    )
    return Case("odd table", "r.csv", text.encode(), on(line), says)


def parquet(records: Sequence[Fields], **settings: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), file, **settings)
    return file.getvalue()


def damaged_parquet(rng: random.Random) -> Case:
    content = bytearray(parquet([alpaca(rng) for _ in range(20)], compression=rng.choice(["snappy", "zstd", "none"])))
    if rng.random() < 0.3:
        return Case("cut parquet", "r.parquet", bytes(content[: rng.randrange(len(content))]))
    for _ in range(rng.randrange(1, 4)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return Case("flipped parquet", "r.parquet", bytes(content), by_chance=True)  # it has no checksum


def odd_parquet(rng: random.Random) -> Case:
    records: list[Fields] = [alpaca(rng) for _ in range(9)]
    at = rng.randrange(9)
    records[at]["output"] = rng.choice([None, "", " "])
    if rng.random() < 0.5:  # a column has one type
        wrong: list[object] = [5, b"b", ["b"], True]
        at, records = 0, [{"instruction": "a", "output": rng.choice(wrong)}]
    return Case("odd parquet", "r.parquet", parquet(records), says=f"record {at}: 'output' is")


FILE_KINDS: list[Callable[[random.Random], Case]] = [
    *(nothing, cut_array, cut_lines, cut_csv, damaged_gz, mistaken_suffix, foreign_encoding, noise, bomb, parquet_bomb),
    *(deep, long_text, joined, no_data, punctuation, wrapped, odd_table, damaged_parquet, odd_parquet),
]

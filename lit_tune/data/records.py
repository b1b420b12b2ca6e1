"""Records: instruction data as it lies in files, checked once and turned into conversations.

Every record becomes a `Record` of messages, whether it was written as Alpaca fields or as a chat, so that all that
follows (templates, tokenising, preview) knows one form only. Whatever is wrong with a file is told here, as one
`InputError` with file and line; nothing later has to look at raw data again. The price of known lines is that a JSON
array is decoded element by element, which costs about a tenth more than `json.load`.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import re
import reprlib
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lit_tune.errors import InputError

FIELDS = ("instruction", "input", "output", "messages")
ROLES = ("system", "user", "assistant")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")

MAX_EMPTY_SHARE = 0.01  # of a file's records; up to this many without an output are left out and counted
HUB_TIMEOUT_S = 4.0  # the user is told within 5 s that the hub is out of reach
# JSON text packs 3 to 10 times; what unpacks to more than this is no data set but an attack or an accident.
MAX_UNPACKED_RATIO = 100
MAX_UNPACKED_FREE_BYTES = 64 * 1024**2
# More than the longest context of any Llama holds. A text so long is a file cut in the wrong places, and tokenising it
# would take gigabytes (measured: 220 bytes of memory a character).
MAX_CHARACTERS = 2_000_000

_BLOCK_BYTES = 1024**2
_BATCH_ROWS = 1024
_FOREIGN_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Eighteen digits: Python refuses to read numbers of thousands.
_LIMIT = re.compile(r"(-?\d{1,18})?:(-?\d{1,18})?(?::(-?\d{1,18})?)?")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `instruction` and `input` are the parts of an Alpaca record's user turn; templates that know them (alpaca) write
    them apart, all others write `content`, which holds both.
    """

    role: str
    content: str
    instruction: str = ""
    input: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One training sample: its index in the whole file, counted from 0 before any limit, and its turns.

    `place` is where it stands, as a fault names it: `file:line`, or `file: record N`.
    """

    id: int
    messages: tuple[Message, ...]
    place: str = field(default="", compare=False)


class Row(NamedTuple):
    """A raw record and its place, see `Record`."""

    place: str
    value: object


def read_records(
    path: str,
    *,
    columns: Mapping[str, str] | None = None,
    limit: str | int | Sequence[int | str] | None = None,
) -> list[Record]:
    """Read instruction records from a file or a hub dataset.

    Args:
        path: A .json, .jsonl (both also .gz), .csv or .parquet file, or the id of a hub dataset (its train split).
        columns: Our field name to the file's column name, where they differ: `{"instruction": "question"}`.
        limit: Which records to take, see `parse_limit`. Records outside it are not checked.

    Raises:
        InputError: A fault of the file or of a record, with file and line.
    """
    records, _ = read_and_count(path, columns=columns, limit=limit)
    return records


def read_and_count(
    path: str,
    *,
    columns: Mapping[str, str] | None = None,
    limit: str | int | Sequence[int | str] | None = None,
) -> tuple[list[Record], int]:
    """Read as `read_records` does; return also how many of the chosen records were left out for an empty output.

    Real sets, Alpaca among them, hold a few records without an answer: nothing can be learnt from those, and nobody
    should have to edit them out. More than `MAX_EMPTY_SHARE` of them is a fault of the file, told with its line.
    """
    names = _column_names(columns or {})
    chosen = parse_limit(limit)
    rows = _read_rows(path)
    if not rows:
        raise InputError(f"{path}: holds no records")
    ids = range(len(rows))[chosen]
    if not ids:
        raise InputError(f"limit {limit!r} selects none of the {len(rows)} records in {path}")
    if columns and "input" in columns and not any(_has(rows[i].value, columns["input"]) for i in ids):
        raise InputError(f"{path}: no record has the column {columns['input']!r} that --data.columns gives for 'input'")
    empty = {i for i, row in enumerate(rows) if _is_unanswered(row.value, names["output"])}
    left_out = empty if len(empty) <= MAX_EMPTY_SHARE * len(rows) else set()
    records = [Record(i, _messages(rows[i], names), rows[i].place) for i in ids if i not in left_out]
    if not records:
        raise InputError(f"limit {limit!r} selects only records with an empty {names['output']!r} in {path}")
    return records, len(ids) - len(records)


def parse_limit(limit: str | int | Sequence[int | str] | None) -> slice:
    """Turn a limit into the slice it means.

    `"[0:200]"`, `"0:200"`, `"::10"` are Python slices, `200` and `"200"` mean the first 200, `[0, 200]` a start and an
    end, `["0:200"]` is what YAML makes of an unquoted `[0:200]`.

    Raises:
        InputError: Anything else.
    """
    parts: list[int | str]
    if limit is None:
        return slice(None)
    if isinstance(limit, str):
        bracketed = re.fullmatch(r"\s*\[(.*)\]\s*", limit)
        parts = [bracketed[1] if bracketed else limit]
    elif isinstance(limit, int):
        parts = [str(limit)]
    else:
        parts = list(limit)

    match [str(part).replace(" ", "") for part in parts]:
        case [text] if isinstance(parts[0], str) and re.fullmatch(r"\d{1,18}", text):
            return slice(0, int(text))
        # NOTE: a lone number in a list is refused: YAML 1.1 reads an unquoted [1:30] as [90], base sixty.
        case [text] if isinstance(parts[0], str) and (found := _LIMIT.fullmatch(text)) and int(found[3] or 1):
            start, stop, step = (None if group is None else int(group) for group in found.groups())
            return slice(start, stop, step)
        case [start_text, stop_text] if all(re.fullmatch(r"-?\d{1,18}", text) for text in (start_text, stop_text)):
            return slice(int(start_text), int(stop_text))
    raise InputError(f'limit {limit!r} is no range of records; write "[0:200]" (quoted), "[::10]", or a number N')


def is_local(path: str) -> bool:
    """Tell whether `path` means a file or directory here; otherwise it is the id of a hub dataset."""
    return os.path.exists(path) or path.endswith(SUFFIXES) or not _HUB_ID.fullmatch(path)


def content_digest(source: str | Sequence[Record]) -> str:
    """Give a sha256 (hex) that changes when the content does: of a local file's bytes, or of records already read.

    Raises:
        InputError: The file cannot be read.
    """
    digest = hashlib.sha256()
    if isinstance(source, str):
        digest.update(_read_bytes(source))
    else:
        for record in source:
            digest.update(repr((record.id, *map(astuple, record.messages))).encode())
    return digest.hexdigest()


def _column_names(columns: Mapping[str, str]) -> dict[str, str]:
    """Give every field's column name in the file."""
    for name in columns:
        if name not in FIELDS:
            raise InputError(
                f"--data.columns: {name!r} is no field of ours{_near(name, FIELDS)}; use {_listed(FIELDS)}"
            )
    return {name: columns.get(name, name) for name in FIELDS}


# Files ----------------------------------------------------------------------------------------------------------------


def _read_rows(path: str) -> list[Row]:
    """Read all raw records; the branch by format."""
    if not is_local(path):
        return _hub_rows(path)
    if path.endswith(".parquet"):
        return _parquet_rows(path)
    if not path.endswith(SUFFIXES):
        _read_bytes(path)  # a path that does not exist is told as such, not as an unknown format
        raise InputError(f"{path}: unknown format; use {_listed(SUFFIXES)}, or the id of a hub dataset")
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    if path.endswith(".csv"):
        return list(_csv_rows(text, path))
    # The first character tells an array from one record a line, whichever name the file carries.
    return list(_array_rows(text, path) if text.lstrip().startswith("[") else _line_rows(text, path))


def _read_bytes(path: str) -> bytes:
    file = Path(path.replace("\0", "\N{REPLACEMENT CHARACTER}"))  # no file name holds a NUL
    try:
        if file.exists() and not file.is_dir() and not file.is_file():  # a pipe blocks, a device may never end
            raise InputError(f"{path}: is a pipe or a device; write the records to a file")
        return file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{_near_file(path)}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory; give a file in it ({_listed(SUFFIXES)})") from None
    except OSError as fault:
        raise InputError(f"{path}: cannot be read: {fault.strerror}") from fault


def _read_text(path: str) -> str:
    """Read a UTF-8 text file, unpacked if it is a .gz, without its byte order mark."""
    data = _read_bytes(path)
    if path.endswith(".gz"):
        data = _gunzip(data, path)
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    for name, marks in _FOREIGN_MARKS.items():
        if data.startswith(marks):
            raise InputError(f"{path}: is {name}; save it as UTF-8")
    if (nul := data.find(0)) >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise InputError(f"{path}:{line}: holds a NUL byte; save it as UTF-8 text (is it UTF-16, or a binary file?)")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        bad = f"0x{data[fault.start]:02x}"
        raise InputError(f"{path}:{line}: byte {bad} is not valid UTF-8; save the file as UTF-8") from None


def _gunzip(data: bytes, path: str) -> bytes:
    packed, blocks, unpacked = io.BytesIO(data), [], 0
    try:
        with gzip.open(packed) as file:
            while block := file.read(_BLOCK_BYTES):
                blocks.append(block)
                unpacked += len(block)
                _refuse_bomb(unpacked, packed.tell(), path)
    except (OSError, EOFError, zlib.error) as fault:
        raise InputError(f"{path}: the .gz file is corrupt: {fault}") from fault
    return b"".join(blocks)


def _refuse_bomb(unpacked: int, packed: int, path: str) -> None:
    """Stop unpacking when so few bytes have given so many, long before memory is used up."""
    if unpacked > MAX_UNPACKED_FREE_BYTES + MAX_UNPACKED_RATIO * packed:
        raise InputError(
            f"{path}: unpacks to more than {MAX_UNPACKED_RATIO} times its size; unpack it yourself if meant so"
        )


# JSON -----------------------------------------------------------------------------------------------------------------


class _RefusedJsonError(ValueError):
    """JSON that Python's decoder would take, and lose data or carry a non-number with it."""


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RefusedJsonError(f"the key {reprlib.repr(twice)} stands twice in one object; keep one")
    return mapping


def _refuse_constant(name: str) -> object:
    raise _RefusedJsonError(f"{name} is not JSON; use null or a number")


# Numbers are never used, so floats will do; int() would raise on one of more than 4,300 digits.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=float)


def _decode(text: str, position: int, *, path: str, line: int, first_line: int = 1) -> tuple[object, int]:
    """Decode the value at `position`; return it and the position after it.

    `line` is where the value begins; `first_line` is the number that `text`'s own first line has in the file.
    """
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as fault:
        raise _malformed(fault, path=path, first_line=first_line, begin=line) from None
    except _RefusedJsonError as fault:
        raise InputError(f"{path}:{line}: {fault}") from None
    except RecursionError:
        raise InputError(f"{path}:{line}: is nested too deep; a record is one flat object") from None


def _malformed(fault: json.JSONDecodeError, *, path: str, first_line: int = 1, begin: int | None = None) -> InputError:
    """Tell where a text stops being JSON, and if that is far from it, where the record that it happens in begins."""
    line = first_line + fault.lineno - 1
    record = f" in the record that begins on line {begin}" if begin not in (None, line) else ""
    return InputError(
        f"{path}:{line}:{fault.colno}: malformed JSON: {fault.msg}{record}; "
        "the file must be one array of records, or one record a line"
    )


def _array_rows(text: str, path: str) -> Iterator[Row]:
    """Yield the elements of the array that is the whole of `text`, each with the line it begins on."""

    def skip_space(position: int) -> int:
        found = _JSON_SPACE.match(text, position)
        assert found is not None  # the pattern matches the empty string
        return found.end()

    position = skip_space(text.index("[") + 1)
    line = 1 + text.count("\n", 0, position)
    closed = text.startswith("]", position)
    while not closed:
        value, end = _decode(text, position, path=path, line=line)
        yield Row(f"{path}:{line}", value)
        separator = skip_space(end)
        closed = text.startswith("]", separator)
        if not closed and not text.startswith(",", separator):
            raise _malformed(json.JSONDecodeError("Expecting ',' or ']'", text, separator), path=path)
        following = separator if closed else skip_space(separator + 1)
        line += text.count("\n", position, following)
        position = following
    rest = skip_space(position + 1)
    if rest < len(text):
        raise _malformed(json.JSONDecodeError("Extra data after the array", text, rest), path=path)


def _line_rows(text: str, path: str) -> Iterator[Row]:
    """Yield one value a line; blank lines are skipped.

    Lines end at \\n only: `str.splitlines` would also cut at U+2028, which is legal inside a JSON string.
    """
    for line, line_text in enumerate(text.split("\n"), start=1):
        content = line_text.strip(" \t\r")
        if not content:
            continue
        value, end = _decode(line_text, line_text.index(content), path=path, line=line, first_line=line)
        if line_text[end:].strip(" \t\r"):
            fault = json.JSONDecodeError("Extra data after the record", line_text, end)
            raise _malformed(fault, path=path, first_line=line)
        yield Row(f"{path}:{line}", value)


# Tables ---------------------------------------------------------------------------------------------------------------


def _csv_rows(text: str, path: str) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header, each with the line it begins on."""
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # the module's own limit is 128 KiB a field
    # Lines end at \n, as everywhere here, though a quoted value may hold a \r; old Mac files have \r alone.
    reader = csv.reader(io.StringIO(text, newline="\n" if "\n" in text else ""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            if values and not header:
                header = values
                _refuse_doubles(header, place=f"{path}:{line}")
            elif values and len(values) != len(header):
                raise InputError(f"{path}:{line}: {len(values)} values for the {len(header)} columns of the header")
            elif values:
                yield Row(f"{path}:{line}", dict(zip(header, values, strict=True)))
            line = reader.line_num + 1
    except csv.Error as fault:
        raise InputError(f"{path}:{line}: malformed CSV: {str(fault).partition(' - ')[0]}") from None


def _refuse_doubles(header: Sequence[str], *, place: str) -> None:
    if len(set(header)) < len(header):
        raise InputError(f"{place}: a column name stands twice in the header {reprlib.repr(list(header))}")


def _parquet_rows(path: str) -> list[Row]:
    from pyarrow import BufferReader  # noqa: PLC0415 - heavy, and needed for this format only
    from pyarrow.parquet import ParquetFile  # noqa: PLC0415

    data = _read_bytes(path)
    values: list[object] = []
    unpacked = 0
    try:
        file = ParquetFile(BufferReader(data))
        _refuse_doubles(file.schema_arrow.names, place=path)
        for batch in file.iter_batches(_BATCH_ROWS):
            unpacked += batch.nbytes
            _refuse_bomb(unpacked, len(data), path)
            values += batch.to_pylist()
    except InputError:
        raise
    except Exception as fault:  # Arrow has its own classes for some faults only, and dates and time zones have theirs
        raise InputError(f"{path}: is no readable Parquet file: {one_line(fault)}") from fault
    return _numbered(path, values)


def _hub_rows(name: str) -> list[Row]:
    """Read the train split of a hub dataset, after asking the hub for it with a short timeout.

    `datasets` alone retries for most of a minute before it says that there is no network.
    """
    from huggingface_hub.constants import is_offline_mode  # noqa: PLC0415 - heavy, and needed for hub ids only

    if not is_offline_mode():
        _ask_hub(name)
    from datasets import load_dataset  # noqa: PLC0415 - a second to import

    # NOTE: by these names `datasets` means its loaders, which would take whatever lies in the working directory.
    if name.isidentifier() and find_spec(f"datasets.packaged_modules.{name}"):
        raise InputError(f"{name}: no such file here{_near_file(name)}, and no hub dataset; give a local file")
    try:
        values = list(load_dataset(name, split="train"))
    except Exception as fault:  # of many libraries, and `datasets` has a base class of its own
        raise InputError(
            f"{name}: no such file here{_near_file(name)}, and the hub dataset cannot be loaded: {one_line(fault)}; "
            "give a local file, or the id of a dataset"
        ) from fault
    return _numbered(name, values)


def _ask_hub(name: str) -> None:
    """Ask the hub whether the dataset exists, for at most `HUB_TIMEOUT_S` seconds.

    In a thread of its own, because a look-up of the host's name has no timeout.

    Raises:
        InputError: No such dataset, no access, or no answer.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415 - heavy, and needed for hub ids only
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError  # noqa: PLC0415

    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
            outcome.append(None)
        except Exception as fault:
            outcome.append(fault)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    match outcome:
        case [None]:
            return
        case [GatedRepoError()]:
            raise InputError(f"{name}: access to this dataset is gated; accept its terms on the hub and set HF_TOKEN")
        case [RepositoryNotFoundError()]:
            raise InputError(
                f"{name}: neither a file here{_near_file(name)} nor a dataset on the hub; "
                "give an existing file or id (a private one needs HF_TOKEN)"
            )
    reason = one_line(outcome[0]) if outcome else f"no answer in {HUB_TIMEOUT_S:.0f} s"
    raise InputError(
        f"{name}: no such file here{_near_file(name)}, and the hub is out of reach ({reason}); "
        "give a local file, or set HF_HUB_OFFLINE=1 to use a dataset downloaded earlier"
    )


def _numbered(path: str, values: Sequence[object]) -> list[Row]:
    return [Row(f"{path}: record {index}", value) for index, value in enumerate(values)]


# One record -----------------------------------------------------------------------------------------------------------


def _messages(row: Row, names: Mapping[str, str]) -> tuple[Message, ...]:
    """Check a raw record and turn it into messages."""
    record = row.value
    if not isinstance(record, dict):
        raise InputError(f"{row.place}: the record is {_kind(record)}; it must be an object with named fields")
    if _has(record, names["messages"]):
        return _conversation(record[names["messages"]], name=names["messages"], place=row.place)
    unknown = record.keys() - names.values()
    if names["instruction"] not in record and (near := _near(names["messages"], unknown)):
        raise InputError(f"{row.place}: {names['messages']!r} is missing{near}; correct the key, or use --data.columns")
    instruction = _required(record, names["instruction"], names=names, place=row.place)
    context = _optional(record, names["input"], names=names, place=row.place)
    output = _required(record, names["output"], names=names, place=row.place)
    content = f"{instruction}\n\n{context}" if context else instruction
    return (Message("user", content, instruction=instruction, input=context), Message("assistant", output))


def _conversation(turns: object, *, name: str, place: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        kind = "an empty list" if turns == [] else _kind(turns)
        raise InputError(f'{place}: {name!r} is {kind}; it must be a list of {{"role": ..., "content": ...}}')
    messages = tuple(_turn(turn, place=f"{place}: {name}[{index}]") for index, turn in enumerate(turns))
    if messages[-1].role != "assistant":
        raise InputError(f"{place}: {name!r} ends with a {messages[-1].role} turn; the last must be the assistant's")
    if all(message.role != "user" for message in messages):
        raise InputError(f"{place}: {name!r} has no user turn; the assistant needs one to answer")
    return messages


def _turn(turn: object, *, place: str) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f'{place} is {_kind(turn)}; it must be {{"role": ..., "content": ...}}')
    for name in ("role", "content"):
        if name not in turn:
            raise InputError(f"{place}: {name!r} is missing{_near(name, turn)}")
    role = _string(turn["role"], "role", place=place)
    if role not in ROLES:
        raise InputError(f"{place}: role {reprlib.repr(role)} is unknown{_near(role, ROLES)}; use {_listed(ROLES)}")
    return Message(role, _filled(turn["content"], "content", place=place))


def _required(record: Mapping[str, object], name: str, *, names: Mapping[str, str], place: str) -> str:
    """Give a field that must be there and hold text."""
    if name not in record:
        near = _near(name, record.keys() - names.values())
        raise InputError(
            f"{place}: {name!r} is missing{near or f' (the record has {reprlib.repr(list(record))})'}; "
            f"every record needs {names['instruction']!r} and {names['output']!r}, or --data.columns"
        )
    return _filled(record[name], name, place=place)


def _optional(record: Mapping[str, object], name: str, *, names: Mapping[str, str], place: str) -> str:
    """Give a field that may be missing, null or blank, which all mean the empty string."""
    if name not in record and (near := _near(name, record.keys() - names.values(), cutoff=0.75)):
        raise InputError(f"{place}: {name!r} is missing{near}; correct the key, or name the column in --data.columns")
    value = record.get(name)
    text = "" if value is None else _string(value, name, place=place)
    return text if text.strip() else ""


def _filled(value: object, name: str, *, place: str) -> str:
    text = _string(value, name, place=place)
    if not text.strip():
        raise InputError(f"{place}: {name!r} is empty; fill it or remove the record")
    return text


def _string(value: object, name: str, *, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: {name!r} is {_kind(value)}; it must be a string")
    if len(value) > MAX_CHARACTERS:
        raise InputError(
            f"{place}: {name!r} has {len(value):,} characters, more than {MAX_CHARACTERS:,}; split or remove the record"
        )
    if found := _LONE_SURROGATE.search(value):
        raise InputError(f"{place}: {name!r} holds the lone surrogate U+{ord(found[0]):04X}, which is no character")
    return value


def _is_unanswered(record: object, output: str) -> bool:
    text = record.get(output) if isinstance(record, dict) else None
    return isinstance(text, str) and not text.strip()


def _has(record: object, name: str) -> bool:
    return isinstance(record, dict) and record.get(name) is not None


# Words for messages ---------------------------------------------------------------------------------------------------


def _kind(value: object) -> str:
    """Name a JSON value's type as a sentence needs it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _near(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """Give ` (did you mean 'x'?)` for the nearest candidate, or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(candidates)}
    close = get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def _near_file(path: str) -> str:
    try:
        return _near(Path(path).name, os.listdir(Path(path).parent))
    except OSError:
        return ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def one_line(fault: Exception | None) -> str:
    """Give the first line of another library's message, without what a terminal would obey."""
    text = str(fault).strip() or type(fault).__name__
    return "".join(letter if letter.isprintable() else " " for letter in text.splitlines()[0][:200])

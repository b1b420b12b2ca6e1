"""Tokenised data: made once, kept in a cache on disk, memory-mapped by every process of a run.

A cache entry is a directory of flat .npy files, named by a hash of everything that its content depends on: the
records' bytes, the tokenizer, the template and the settings. So an entry is never updated and never stale; it appears
whole by a rename, which is what makes two processes that tokenise the same data at once harmless. The price is disk:
five bytes per token and entry, and entries stay until the user removes them.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_tune.data.prompts import Template, check_tokenizer, encode_records
from lit_tune.data.records import Record, content_digest, is_local, read_and_count
from lit_tune.errors import InputError, SaveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverLength = Literal["drop", "truncate", "fail"]
IGNORED = -100  # the label of a token that is not supervised, as PyTorch's and transformers' losses have it

_FORMAT = 2  # raise it whenever the same input would give other files
# Characters tokenised at a time, which bounds the lists held: a tokenizer takes up to 220 bytes for each.
_CHUNK_CHARACTERS = 2_000_000
_BLOCK_BYTES = 1024**2
_ARRAYS = ("tokens", "supervised", "offsets", "ids")


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised samples; the arrays of tokens are memory-mapped and shared by all subsets.

    Attributes:
        tokens: int32, all samples one after another.
        supervised: bool, for every token whether the loss counts it.
        bounds: int64 [N, 2], where each sample begins and ends in `tokens`.
        ids: int64 [N], each sample's record: its index in the file.
        counts: What became of the `records` that the limit chose, also in a subset: `kept`; `empty` (left out, no
            response) and `dropped` (left out, too long), which add up with it; and of those kept, `truncated` (cut, so
            that the token with which the model learns to stop is lost).
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    bounds: NDArray[np.int64]
    ids: NDArray[np.int64]
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every sample, int64 [N]."""
        return self.bounds[:, 1] - self.bounds[:, 0]

    def sample(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give a sample's tokens and labels, each int64 [T].

        Labels are not shifted. The first is always masked, for in a packed row its prediction would come from the
        sample before.
        """
        begin, end = self.bounds[index]
        tokens = self.tokens[begin:end].astype(np.int64)
        labels = np.where(self.supervised[begin:end], tokens, IGNORED)
        labels[0] = IGNORED
        return tokens, labels

    def subset(self, indices: Sequence[int]) -> "Encoded":
        """Give the samples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, bounds=self.bounds[chosen], ids=self.ids[chosen])


def encode_dataset(
    path: str,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    max_length: int,
    over_length: OverLength = "drop",
    columns: Mapping[str, str] | None = None,
    limit: str | int | Sequence[int | str] | None = None,
    cache_dir: Path,
) -> Encoded:
    """Read, check and tokenise a data set, or take it from the cache.

    Args:
        path: A file or a hub dataset, as `read_records` takes it.
        tokenizer: The model's tokenizer; it must have a fast version.
        template: The prompt template.
        max_length: Tokens that a sample may have, prompt and response together.
        over_length: What to do with longer ones: drop and count them, truncate them (those of which nothing supervised
            would remain are dropped), or fail.
        columns: Our field names to the file's, where they differ.
        limit: Which records to take, as `parse_limit` reads it.
        cache_dir: Where entries lie.

    Raises:
        InputError: A fault of the data or of the template, or no sample is left.
        SaveError: The cache cannot be written.
    """
    check_tokenizer(tokenizer)
    # A local file is known by its bytes; to know a hub dataset, its records have to be read.
    read = None if is_local(path) else read_and_count(path, columns=columns, limit=limit)
    settings = {
        "format": _FORMAT,
        "content": content_digest(path if read is None else read[0]),
        "suffixes": Path(path).suffixes,
        "tokenizer": _tokenizer_digest(tokenizer),
        "template": template.source,
        "max_length": max_length,
        "over_length": over_length,
        "columns": columns and dict(columns),
        "limit": repr(limit),
    }
    entry = cache_dir / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    cached = _load(entry)
    if cached is not None:
        return cached
    records, empty = read or read_and_count(path, columns=columns, limit=limit)
    samples = _encode(records, template=template, tokenizer=tokenizer)
    kept, counts = _fit(samples, max_length=max_length, over_length=over_length, path=path)
    return _publish(entry, kept, {"records": len(records) + empty, "empty": empty, **counts})


class _Sample(NamedTuple):
    """A tokenised record: itself, its tokens (int32 [T]), and whether each is supervised (bool [T])."""

    record: Record
    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]


def _encode(
    records: Iterable[Record], *, template: Template, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[_Sample]:
    """Tokenise records chunk by chunk."""
    for chunk in _chunks(records):
        for record, (tokens, supervised) in zip(chunk, encode_records(chunk, template, tokenizer), strict=True):
            yield _Sample(record, np.array(tokens, dtype=np.int32), np.array(supervised, dtype=np.bool_))


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Cut records into chunks, which end with the record that brings them over `_CHUNK_CHARACTERS`."""
    chunk: list[Record] = []
    characters = 0
    for record in records:
        chunk.append(record)
        characters += sum(len(message.content) for message in record.messages)
        if characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _fit(
    samples: Iterable[_Sample], *, max_length: int, over_length: OverLength, path: str
) -> tuple[list[_Sample], dict[str, int]]:
    """See to samples longer than `max_length`; return what is kept, and counts of kept, dropped and truncated.

    Raises:
        InputError: A sample is too long and that is to fail, or nothing is left.
    """
    kept: list[_Sample] = []
    over_long = truncated = 0
    shortest = 0
    for sample in samples:
        length = len(sample.tokens)
        if length <= max_length:
            kept.append(sample)
            continue
        if over_length == "fail":
            raise InputError(
                f"{sample.record.place}: the record has {length} tokens, more than max_length {max_length}; "
                "raise max_length, or set over_length to drop or truncate"
            )
        shortest = min(shortest or length, length)
        over_long += 1
        # The first token is never predicted, so it does not count as supervised.
        if over_length == "truncate" and sample.supervised[1:max_length].any():
            kept.append(_Sample(sample.record, sample.tokens[:max_length], sample.supervised[:max_length]))
            truncated += 1
    if not kept:
        raise InputError(
            f"{path}: no supervised token is left: all {over_long} records are longer than max_length {max_length} "
            f"(the shortest has {shortest} tokens); raise max_length"
        )
    return kept, {"kept": len(kept), "dropped": over_long - truncated, "truncated": truncated}


def _tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash what decides which ids a text gets."""
    serialized = tokenizer.backend_tokenizer.to_str()
    # NOTE: before its added tokens the tokenizer keeps how it was last asked to pad and truncate.
    lasting = serialized[serialized.index('"added_tokens"') :]
    named = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256((lasting + named).encode()).hexdigest()


# The cache ------------------------------------------------------------------------------------------------------------


def _publish(entry: Path, samples: Sequence[_Sample], counts: dict[str, int]) -> Encoded:
    """Write a cache entry so that it appears whole or not at all, and load it."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f"{entry.name}.", ignore_cleanup_errors=True) as name:
            scratch = Path(name)
            _write(scratch / "made", samples, counts)
            try:
                os.rename(scratch / "made", entry)
            except OSError:
                # Either another process was first, then our copy goes; or the entry there is damaged, then it goes.
                if _load(entry) is None:
                    os.rename(entry, scratch / "damaged")
                    os.rename(scratch / "made", entry)
    except OSError as fault:
        raise SaveError(
            f"tokenised data cannot be written to {entry.parent}: {fault.strerror}; "
            "make room there, or set LIT_TUNE_CACHE to another directory"
        ) from fault
    published = _load(entry)
    assert published is not None
    return published


def _write(directory: Path, samples: Sequence[_Sample], counts: dict[str, int]) -> None:
    directory.mkdir()
    lengths = [len(sample.tokens) for sample in samples]
    np.save(directory / "tokens.npy", np.concatenate([sample.tokens for sample in samples]))
    np.save(directory / "supervised.npy", np.concatenate([sample.supervised for sample in samples]))
    np.save(directory / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(directory / "ids.npy", np.array([sample.record.id for sample in samples], dtype=np.int64))
    about = {"counts": counts, "checksum": _checksum(directory, counts)}
    (directory / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _checksum(entry: Path, counts: object) -> int:
    """Give a checksum of an entry: a machine that went down may have left a file with zeros in it."""
    checksum = zlib.crc32(json.dumps(counts).encode())
    for name in _ARRAYS:
        with (entry / f"{name}.npy").open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                checksum = zlib.crc32(block, checksum)
    return checksum


def _load(entry: Path) -> Encoded | None:
    """Map a cache entry into memory; None if it is not there or not as it was written."""
    try:
        about = json.loads((entry / "about.json").read_bytes())
        if about["checksum"] != _checksum(entry, about["counts"]):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    tokens, supervised, offsets, ids = (np.load(entry / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    return Encoded(tokens, supervised, np.stack([offsets[:-1], offsets[1:]], axis=1), ids, about["counts"])

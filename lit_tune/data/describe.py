"""What training will see, in figures and in colour: the part of `lit-tune data` that needs no command line."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_tune.data.encode import IGNORED, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (5, 50, 95, 99)
NUM_BINS = 12
BAR_WIDTH = 40

# Two shades in turn show where one token ends and the next begins.
_SUPERVISED_STYLES = ("bold green", "green")
_MASKED_STYLES = ("dim", "bright_black")
_SPECIAL_STYLE = "magenta"


@dataclass(frozen=True, slots=True)
class Bin:
    """The samples of `first` to `last` tokens, both included."""

    first: int
    last: int
    samples: int


@dataclass(frozen=True, slots=True)
class Description:
    """The figures of a tokenised data set; lengths are in tokens, prompt and response together."""

    samples: int
    counts: dict[str, int]  # of the whole file, see `Encoded.counts`
    tokens: int
    supervised_share: float  # of all tokens
    mean_length: float
    length_percentiles: dict[int, int]
    max_length: int
    histogram: tuple[Bin, ...]
    duplicates: int  # samples whose tokens equal those of an earlier one


def describe(encoded: Encoded) -> Description:
    """Count and measure a tokenised data set."""
    lengths = encoded.lengths
    # A sample's first label is always masked, whatever the template says.
    supervised = sum(int(encoded.supervised[begin + 1 : end].sum()) for begin, end in encoded.bounds)
    percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return Description(
        samples=len(encoded),
        counts=encoded.counts,
        tokens=int(lengths.sum()),
        supervised_share=supervised / int(lengths.sum()),
        mean_length=float(lengths.mean()),
        length_percentiles={rank: int(length) for rank, length in zip(PERCENTILES, percentiles, strict=True)},
        max_length=int(lengths.max()),
        histogram=_histogram(lengths),
        duplicates=len(encoded) - len(set(_fingerprints(encoded))),
    )


def overlap(train: Encoded, held_out: Encoded) -> int:
    """Count the held-out samples that training sees too, token for token: their loss tells nothing of new text."""
    seen = set(_fingerprints(train))
    return sum(fingerprint in seen for fingerprint in _fingerprints(held_out))


def _fingerprints(encoded: Encoded) -> Iterator[bytes]:
    """Yield a hash of every sample's tokens."""
    for begin, end in encoded.bounds:
        yield hashlib.blake2b(encoded.tokens[begin:end].tobytes(), digest_size=16).digest()


def _histogram(lengths: NDArray[np.int64]) -> tuple[Bin, ...]:
    """Count lengths in at most `NUM_BINS` bins of one width, from 1 to the longest."""
    width = -(-int(lengths.max()) // NUM_BINS)
    samples = np.bincount((lengths - 1) // width)
    return tuple(Bin(index * width + 1, (index + 1) * width, int(count)) for index, count in enumerate(samples))


def render(description: Description, console: Console) -> None:
    """Print a table of the figures and a histogram of the lengths."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _rows(description):
        table.add_row(name, value)
    console.print(table)
    console.print("\nTokens a sample")
    most = max(bin_.samples for bin_ in description.histogram)
    bar = "#" if console.options.ascii_only else "█"
    digits = len(str(description.histogram[-1].last))
    for bin_ in description.histogram:
        # Every bin that is not empty shows at least one mark.
        filled = -(-bin_.samples * BAR_WIDTH // most)
        console.print(
            f"{bin_.first:>{digits}} - {bin_.last:>{digits}}  {bar * filled} {bin_.samples:,}", highlight=False
        )


def _rows(description: Description) -> list[tuple[str, str]]:
    counts = description.counts
    percentiles = ", ".join(f"p{rank} {length:,}" for rank, length in description.length_percentiles.items())
    return [
        ("samples", f"{description.samples:,} (of {counts['records']:,} records)"),
        ("dropped, too long", f"{counts['dropped']:,}"),
        ("truncated", f"{counts['truncated']:,}"),
        ("left out, no output", f"{counts['empty']:,}"),
        ("duplicates", f"{description.duplicates:,}"),
        ("tokens", f"{description.tokens:,}"),
        ("supervised", f"{description.supervised_share:.1%} of the tokens"),
        ("length in tokens", f"mean {description.mean_length:.1f}, {percentiles}, max {description.max_length:,}"),
    ]


def colour(tokens: Sequence[int], labels: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> Text:
    """Show a sample token by token: what is supervised in green between ⟦ and ⟧, what is masked dim.

    Special tokens are written out; characters that a terminal would obey are written as escapes.

    Args:
        tokens: Token ids, [T].
        labels: Labels as `Encoded.sample` gives them, [T].
        tokenizer: The tokenizer that made the ids.
    """
    text = Text()
    pairs = zip(tokens, labels, strict=True)
    for supervised, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        styles = _SUPERVISED_STYLES if supervised else _MASKED_STYLES
        text.append("⟦" if supervised else "", style=styles[0])
        for index, (piece, special) in enumerate(_readable([token for token, _ in run], tokenizer)):
            text.append(piece, style=_SPECIAL_STYLE if special else styles[index % 2])
        text.append("⟧" if supervised else "", style=styles[0])
    return text


def _readable(tokens: Iterable[int], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, bool]]:
    """Give the text of each token, and whether it is special; tokens that share one character come together."""
    pieces: list[tuple[str, bool]] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = _decode(pending, tokenizer)
        # A character has at most four bytes, so it may take four tokens until it can be decoded.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 4:
            continue
        pieces.append((_escaped(text), token in tokenizer.added_tokens_decoder))
        pending = []
    return [*pieces, (_escaped(_decode(pending, tokenizer)), False)] if pending else pieces


def _decode(tokens: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    assert isinstance(text, str)  # a list of texts is what it gives for a batch
    # Decoding drops the first space, which SentencePiece writes as part of the token.
    first = str(tokenizer.convert_ids_to_tokens(tokens[0]))
    return " " + text if first.startswith("▁") and not text.startswith(" ") else text


def _escaped(text: str) -> str:
    """Write what is not printable, save line breaks and tabs, as an escape: a record must not steer the terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )

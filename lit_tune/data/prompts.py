"""Prompt templates: a conversation becomes token ids, and the flags that say which of them are supervised.

Every template is a Jinja chat template, as transformers has them. Rendering one to a string and tokenising the string
would lose two things: which text came from the user (`</s>` in a record must not end the sample), and where a response
begins and ends. So a template is rendered with one private-use character in place of every message text, and the
result cut there: special tokens are read in the template's own text only, and every response is a piece by itself.
Since most records have the same shape (roles, and which fields are empty), that is done once per shape; the price is
one plain rendering per record, which proves that the template does the same to the real texts.

Training and generation take their prompt from the same function, so the prompt is exactly the sample's beginning.
"""

import functools
import json
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from difflib import get_close_matches
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_tune.data.records import Message, Record, one_line
from lit_tune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = ("alpaca", "llama2", "llama3", "chatml")
CHAT = "chat"  # the tokenizer's own template

# A message text is rendered as <left><mark><right>. The marks lie in a private-use plane; left and right are control
# characters that count as white space, so a template's `| trim` removes them and thereby shows what it does.
_FIRST_MARK = 0xF0000
_LEFT, _RIGHT = "\x1e", "\x1f"
_MARKED = re.compile(f"({_LEFT}?)([\U000f0000-\U0010fffd])({_RIGHT}?)")
_TEXT_FIELDS = ("content", "instruction", "input")

# SentencePiece tokenizers write a space before a text's first word; after a newline they do not. See `_Encoder.encode`.
_ANCHOR = "\n"

# Stand for texts that do not matter: a template is asked what it writes around them.
_ANY_REQUEST = Message("user", "x")
_ANY_RESPONSE = Message("assistant", "x")


@dataclass(frozen=True)
class Template:
    """A Jinja chat template over `messages`, `bos_token`, `eos_token` and `add_generation_prompt`."""

    name: str
    source: str


def load_template(name: str, *, chat_template: str | None = None) -> Template:
    """Load a prompt template.

    Args:
        name: alpaca (Stanford Alpaca's prompts, word for word; they end in `### Response:` and the response follows
            without a line break), llama2, llama3, chatml, chat (the tokenizer's own), or the path of a .jinja file.
        chat_template: The tokenizer's own template, which `chat` means.

    Raises:
        InputError: No such template, a file that cannot be read, or a syntax error (with its line).
    """
    if name in SHIPPED:
        source = resources.files("lit_tune.data").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")
    elif name == CHAT and chat_template is None:
        raise InputError(f"template 'chat': the tokenizer has no chat template; use one of {', '.join(SHIPPED)}")
    elif name == CHAT:
        assert chat_template is not None
        source = chat_template
    else:
        source = _read_template(name)
    try:
        _compile(source)
    except jinja2.TemplateSyntaxError as fault:
        raise InputError(f"{name}:{fault.lineno}: the template is no valid Jinja: {fault.message}") from fault
    except Exception as fault:  # of Python's compiler, which Jinja hands its output to: nested too deep, for one
        raise InputError(f"{name}: the template cannot be compiled: {one_line(fault)}") from fault
    return Template(name, source)


def encode_records(
    records: Sequence[Record], template: Template, tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], list[bool]]]:
    """Tokenise records, all texts in one call of the tokenizer: many times faster than one by one.

    Returns:
        For every record its token ids and, as long, whether each is supervised: the assistant's texts and the token
        that closes each of them. Nothing follows the last closing token.

    Raises:
        InputError: The template refuses a record, or does not suit the tokenizer.
    """
    encoder = _Encoder(template, tokenizer)
    places = [record.place or f"record {record.id}" for record in records]
    samples = [encoder.stretches(record.messages, place=place) for record, place in zip(records, places, strict=True)]
    ids = encoder.encode(stretch.content for sample in samples for stretch in sample)
    return [encoder.join(sample, ids, place=place) for sample, place in zip(samples, places, strict=True)]


def encode_record(
    record: Record, template: Template, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[bool]]:
    """Tokenise one record; see `encode_records`."""
    return encode_records([record], template, tokenizer)[0]


def encode_prompt(messages: Sequence[Message], template: Template, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenise a conversation that waits for the assistant's next turn.

    The ids are exactly those with which `encode_record` begins, given the same messages and any response.

    Raises:
        InputError: The template refuses the messages, or does not suit the tokenizer.
    """
    encoder = _Encoder(template, tokenizer)
    sample = encoder.stretches((*messages, _ANY_RESPONSE), place="the prompt")
    prompt = sample[:-2]  # without the response and the token that closes it
    tokens, _ = encoder.join(prompt, encoder.encode(stretch.content for stretch in prompt), place="the prompt")
    return tokens


def stop_token_ids(template: Template, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Give the tokens that end a response: the tokenizer's eos, and what the template closes a response with."""
    encoder = _Encoder(template, tokenizer)
    closing = encoder.stretches((_ANY_REQUEST, _ANY_RESPONSE), place="a trial of the template")[-1].content
    assert isinstance(closing, int)
    return list(dict.fromkeys([encoder.control.eos, closing]))


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that training cannot use.

    Raises:
        InputError: It has no eos token, or is not backed by the tokenizers library.
    """
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {name!r} has no fast version (tokenizer.json); convert it with transformers")
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {name!r} has no eos token, so a model could not learn to stop; set its eos_token")


# Templates ------------------------------------------------------------------------------------------------------------


def _read_template(path: str) -> str:
    known = (*SHIPPED, CHAT)
    if not path.endswith(".jinja") and not os.path.isfile(path):
        close = get_close_matches(path, known, n=1)
        near = f" (did you mean {close[0]!r}?)" if close else ""
        raise InputError(f"template {path!r} is unknown{near}; use {', '.join(known)}, or the path of a .jinja file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as fault:
        raise InputError(f"{path}: the template cannot be read: {fault.strerror}") from fault
    except UnicodeDecodeError as fault:
        raise InputError(f"{path}: the template is not UTF-8 text; save it as UTF-8") from fault
    except ValueError as fault:
        raise InputError(f"{path!r} is no file name: {fault}") from fault


class _GenerationTag(Extension):
    """Let `{% generation %}`, with which some templates mark the assistant's text, stand for its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_fixed(form: str) -> str:
    """Give the date that Llama 3.1's template falls back to: training must not depend on the day it runs."""
    return datetime(2024, 7, 26).strftime(form)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Write JSON as transformers does in templates; Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Make the environment in which transformers, too, renders chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_fixed
    return environment


@functools.lru_cache
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


# Where the texts stand ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place in a rendering where a field of a message stands, and on which sides the template strips it."""

    message: int
    field: str
    left: bool
    right: bool

    def text(self, messages: Sequence[Message]) -> str:
        text: str = getattr(messages[self.message], self.field)
        text = text.lstrip() if self.left else text
        return text.rstrip() if self.right else text


_Part = str | _Slot  # a rendering is text, slot, text, slot, ..., text


def _mark(messages: Sequence[Message]) -> list[Message]:
    """Put a mark in place of every text. Blank ones stay, because templates ask for them."""
    return [
        replace(
            message,
            **{
                field: f"{_LEFT}{chr(_FIRST_MARK + len(_TEXT_FIELDS) * index + offset)}{_RIGHT}"
                for offset, field in enumerate(_TEXT_FIELDS)
                if getattr(message, field).strip()
            },
        )
        for index, message in enumerate(messages)
    ]


def _parts(marked: str, num_messages: int) -> list[_Part]:
    """Cut the rendering of marked messages at the marks."""
    parts: list[_Part] = []
    end = 0
    for found in _MARKED.finditer(marked):
        index, offset = divmod(ord(found[2]) - _FIRST_MARK, len(_TEXT_FIELDS))
        if index >= num_messages:  # a character of the template's own
            continue
        slot = _Slot(index, _TEXT_FIELDS[offset], left=not found[1], right=not found[3])
        parts += [marked[end : found.start()], slot]
        end = found.end()
    return [*parts, marked[end:]]


def _fill(parts: Iterable[_Part], messages: Sequence[Message]) -> str:
    return "".join(part if isinstance(part, str) else part.text(messages) for part in parts)


# Pieces ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Control:
    """What the tokenizer reads as control, and how it treats the beginning of a text."""

    ids: dict[str, int]
    pattern: re.Pattern[str]  # finds the control tokens in a template's text, one group each
    eos: int
    bos: int | None  # the token that the tokenizer puts before every sample, if it is of that kind
    spaced: bool  # a text's first word gets a space that the same word inside a text does not get
    spaced_after_control: bool  # so does the first word after a control token

    def split(self, text: str) -> list[str | int]:
        """Cut a template's text into plain text and control tokens."""
        cut: list[str | int] = []
        end = 0
        for found in self.pattern.finditer(text):
            assert found.lastindex is not None
            cut += [text[end : found.start()], self.ids[found[found.lastindex]]]
            end = found.end()
        return [*cut, text[end:]]


def _control(tokenizer: "PreTrainedTokenizerBase") -> _Control:
    """Find out what the tokenizer reads as control, by its declarations and by trying."""
    check_tokenizer(tokenizer)
    special = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
    alternatives = [
        # A token may be declared to swallow the white space beside it.
        (r"\s*" if special[text].lstrip else "") + f"({re.escape(text)})" + (r"\s*" if special[text].rstrip else "")
        for text in sorted(special, key=len, reverse=True)
    ]

    def encode(text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    first_word = encode("a")
    spaced = encode(_ANCHOR + "a")[len(encode(_ANCHOR)) :] != first_word
    return _Control(
        ids={token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special},
        pattern=re.compile("|".join(alternatives)),
        eos=tokenizer.eos_token_id,
        bos=tokenizer.bos_token_id if tokenizer.bos_token_id in encode("", True)[:1] else None,
        spaced=spaced,
        spaced_after_control=spaced and encode(f"{tokenizer.eos_token}a")[1:] == first_word,
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """A control token, or a text that is tokenised by itself.

    `inner` text goes on from other text, so the tokenizer must not put a space before its first word.
    """

    content: int | tuple[_Part, ...]
    supervised: bool
    inner: bool = False


def _pieces(parts: Sequence[_Part], roles: Sequence[str], control: _Control) -> list[_Piece]:
    """Cut a rendering into control tokens and texts, responses apart; the last piece closes the last response."""
    pieces: list[_Piece] = []
    atoms = _atoms(parts, roles, control)
    for (is_token, supervised), run in groupby(atoms, key=lambda atom: (isinstance(atom[0], int), atom[1])):
        contents = [content for content, _ in run]
        if is_token:
            pieces += [_Piece(token, supervised) for token in contents if isinstance(token, int)]
        elif any(contents):
            text = tuple(part for part in contents if not isinstance(part, int))
            after_control = bool(pieces) and isinstance(pieces[-1].content, int)
            inner = bool(pieces) and control.spaced and not (after_control and control.spaced_after_control)
            pieces.append(_Piece(text, supervised, inner))
    while not pieces[-1].supervised:
        pieces.pop()
    if control.bos is not None and pieces[0].content != control.bos:
        pieces.insert(0, _Piece(control.bos, supervised=False))
    return pieces


def _atoms(parts: Sequence[_Part], roles: Sequence[str], control: _Control) -> list[tuple[_Part | int, bool]]:
    """Give a rendering's texts, slots and control tokens in order, and whether each is supervised.

    The closing token is the first control token that the template writes after the last response, else the
    tokenizer's eos. Where a response is not followed by it, it is put there.
    """

    def is_response(index: int) -> bool:
        part = parts[index] if 0 <= index < len(parts) else ""
        return isinstance(part, _Slot) and roles[part.message] == "assistant"

    last = max(index for index in range(len(parts)) if is_response(index))
    following = parts[last + 1]
    assert isinstance(following, str)  # texts and slots alternate
    closing = [*control.split(following), control.eos][1]

    atoms: list[tuple[_Part | int, bool]] = []
    for index, part in enumerate(parts):
        if isinstance(part, _Slot):
            atoms.append((part, is_response(index)))
            continue
        # A blank before a response is tokenised with it, as tokenizers join a blank to the word that follows.
        text = part.rstrip(" ") if is_response(index + 1) else part
        cut = control.split(text)
        if is_response(index - 1):
            closed = cut[1:2] == [closing]
            atoms += [(atom, True) for atom in (cut[:2] if closed else [closing])]
            cut = cut[2:] if closed else cut
        atoms += [(atom, False) for atom in cut]
        if text != part:
            atoms.append((part[len(text) :], True))
    return atoms


# Tokens ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Text:
    """The text of a filled piece."""

    text: str
    inner: bool


class _Stretch(NamedTuple):
    """A filled piece of one sample: a control token, or a text yet to be tokenised."""

    content: int | _Text
    supervised: bool


class _Encoder:
    """A template joined to a tokenizer, with the pieces of every shape of conversation met so far."""

    def __init__(self, template: Template, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.control = _control(tokenizer)
        self._forbidden = set(self.control.ids.values()) - {tokenizer.unk_token_id}  # in what was given as text
        self._template = template
        self._tokenizer = tokenizer
        self._plans: dict[tuple[str | None, ...], tuple[list[_Part], list[_Piece]]] = {}

    def stretches(self, messages: Sequence[Message], *, place: str) -> list[_Stretch]:
        """Cut a conversation into control tokens and texts; the last two are a response and its closing token."""
        shape = tuple(text for message in messages for text in (message.role, *_blank_texts(message)))
        if shape not in self._plans:
            parts = _parts(self._render(_mark(messages), place=place), len(messages))
            self._check_written(parts, messages, place=place)
            self._plans[shape] = parts, _pieces(parts, [message.role for message in messages], self.control)
        parts, pieces = self._plans[shape]
        if _fill(parts, messages) != self._render(messages, place=place):
            raise InputError(
                f"{place}: template {self._template.name!r} changes a message's text or decides by it, so the response "
                "cannot be told from the prompt; use a template that writes the texts as they are, or remove the record"
            )
        return [
            _Stretch(
                piece.content if isinstance(piece.content, int) else _Text(_fill(piece.content, messages), piece.inner),
                piece.supervised,
            )
            for piece in pieces
        ]

    def encode(self, contents: Iterable[int | _Text]) -> dict[int | _Text, list[int]]:
        """Tokenise texts in one batch, whatever they say as plain text; a control token stands for itself.

        NOTE: a text that goes on from other text is tokenised behind a newline, which is then taken away: alone, a
        SentencePiece tokenizer would put a space before its first word (torchtune and transformers do the same).
        """
        distinct = dict.fromkeys(contents)
        texts = [content for content in distinct if isinstance(content, _Text)]
        anchor = self._tokenizer.encode(_ANCHOR, add_special_tokens=False)
        plain = self._encode_plain([_ANCHOR + text.text if text.inner else text.text for text in texts])
        ids: dict[int | _Text, list[int]] = {token: [token] for token in distinct if isinstance(token, int)}
        for text, tokens in zip(texts, plain, strict=True):
            ids[text] = tokens[len(anchor) :] if text.inner else tokens
        return ids

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        return encoded

    def join(
        self, sample: Iterable[_Stretch], ids: Mapping[int | _Text, list[int]], *, place: str
    ) -> tuple[list[int], list[bool]]:
        """Give a sample's token ids, and whether each is supervised.

        Raises:
            InputError: A text became a control token.
        """
        tokens: list[int] = []
        supervised: list[bool] = []
        for content, counts in sample:
            if isinstance(content, _Text) and not self._forbidden.isdisjoint(ids[content]):
                raise InputError(
                    f"{place}: the tokenizer makes a control token from the plain text {reprlib.repr(content.text)}; "
                    "remove such text from the record, or use another tokenizer"
                )
            tokens += ids[content]
            supervised += [counts] * len(ids[content])
        return tokens, supervised

    def _render(self, messages: Sequence[Message], *, place: str) -> str:
        variables = {"bos_token": "", **self._tokenizer.special_tokens_map}
        try:
            return _compile(self._template.source).render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=False,
                tools=None,
                documents=None,
                **variables,
            )
        except Exception as fault:  # the template is a program of the user's and may raise anything
            raise InputError(f"{place}: template {self._template.name!r} fails: {one_line(fault)}") from fault

    def _check_written(self, parts: Sequence[_Part], messages: Sequence[Message], *, place: str) -> None:
        written = {part.message for part in parts if isinstance(part, _Slot)}
        for index, message in enumerate(messages):
            if index not in written and (message.role == "assistant" or message.content.strip()):
                raise InputError(
                    f"{place}: template {self._template.name!r} leaves out the {message.role}'s text in "
                    f"messages[{index}]; use another template, or remove the turn"
                )


def _blank_texts(message: Message) -> list[str | None]:
    """Give what the template sees of a message's texts beside the marks: the blank ones."""
    return [None if text.strip() else text for text in (message.content, message.instruction, message.input)]

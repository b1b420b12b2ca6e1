"""YAML that can only be plain settings: bounded in size and depth, no name twice, no tags.

PyYAML's safe loader builds no objects, but it keeps the last of two equal names without a word, follows aliases that
stand for billions of values, and its C version ends the whole process where brackets nest too deep. So a text is read
as events first, one after the other, and refused before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

# A whole configuration as `--print_config` writes it has about 4,000 characters, 100 values and 6 levels.
MAX_CHARACTERS = 200_000
MAX_VALUES = 20_000
MAX_DEPTH = 30
TEXT_TAG = "tag:yaml.org,2002:str"  # !!str 12, the one tag that is sometimes needed


@dataclass
class _Collection:
    """A list or mapping that is being read."""

    anchor: str | None
    is_mapping: bool
    values: int = 1  # itself and all in it, an alias counted as what it stands for
    names: set[str] = field(default_factory=set)
    expects_name: bool = True


def load(text: str, build: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Return the values of a YAML text that is nothing but plain settings, made by `build`.

    Raises:
        yaml.YAMLError: It is no YAML, or more than plain settings; most say the place (`MarkedYAMLError`).
    """
    check(text)
    try:
        return build(text)
    except ValueError as error:  # what looks like a number or a date and is none: 0b_, 2020-13-45, 5,000 digits
        raise yaml.YAMLError(str(error)) from error


def check(text: str) -> None:
    """Refuse a YAML text that is anything but plain settings.

    Raises:
        yaml.YAMLError: With the place (a `MarkedYAMLError`), unless the text as a whole is too long.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"{len(text):,} characters are no configuration; it may have {MAX_CHARACTERS:,}")
    anchored: dict[str, int] = {}  # anchor to the number of values it stands for
    collections = [_Collection(anchor=None, is_mapping=False)]  # outermost first; this one holds the documents
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchored:
                raise _refusal(f"the alias *{event.anchor} stands for nothing, or for what it is a part of", event)
            _close(event, anchored[event.anchor], None, into=collections[-1], anchored=anchored)
        elif isinstance(event, yaml.CollectionEndEvent):
            done = collections.pop()
            _close(event, done.values, done.anchor, into=collections[-1], anchored=anchored)
        elif isinstance(event, yaml.DocumentStartEvent) and collections[0].values > 1:
            raise _refusal("a second document begins here; keep one", event)
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            if event.tag not in (None, TEXT_TAG):
                raise _refusal(f"the tag {event.tag} is not allowed; write plain values", event)
            if collections[-1].is_mapping and collections[-1].expects_name:
                _take_name(event, collections[-1].names)
            if isinstance(event, yaml.ScalarEvent):
                _close(event, 1, event.anchor, into=collections[-1], anchored=anchored)
            else:
                collections.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))
        if len(collections) > MAX_DEPTH:
            raise _refusal(f"this is nested more than {MAX_DEPTH} deep", event)


def _take_name(event: yaml.Event, names: set[str]) -> None:
    """Note the name of a setting; refuse one that stands there already, and what is no name."""
    if not isinstance(event, yaml.ScalarEvent):
        raise _refusal("the name of a setting must be a word", event)
    if event.value in names:
        raise _refusal(f"{event.value!r} stands twice; keep one", event)
    names.add(event.value)


def _close(event: yaml.Event, values: int, anchor: str | None, *, into: _Collection, anchored: dict[str, int]) -> None:
    """Count what has been read to its end as part of the collection around it."""
    if anchor is not None:
        anchored[anchor] = values
    into.values += values
    into.expects_name = not into.expects_name
    if into.values > MAX_VALUES:
        raise _refusal(f"with its aliases this has more than {MAX_VALUES:,} values", event)


def _refusal(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]  # or libyaml's

"""YAML that is plain settings is read as PyYAML reads it; what could do harm is refused with its line."""

import sys

import pytest
import yaml

from lit_tune.plain_yaml import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES, check, load
from lit_tune.recipes import shipped

# Each name stands for ten of the one before: "billion laughs".
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model: {method: lora, lora: {rank: 8, targets: [q_proj, v_proj]}}\ndata:\n  limit: '[0:8]'\n",
        "a: &shared {x: 1}\nb: *shared\nc: *shared\n",
        "base: &base {x: 1, y: 2}\nother:\n  <<: *base\n  y: 3\n",
        "name: !!str 12\n",
        "long: " + "x" * 50_000,
    ],
)
def test_plain_settings_are_read_as_pyyaml_reads_them(text: str) -> None:
    assert load(text) == yaml.safe_load(text)


@pytest.mark.parametrize("recipe", shipped().values(), ids=shipped())
def test_every_shipped_recipe_is_plain(recipe) -> None:  # type: ignore[no-untyped-def]
    check(recipe.read_text())


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (LAUGHS, 5, f"with its aliases this has more than {MAX_VALUES:,} values"),
        ("a: 1\nb: 2\na: 3\n", 3, "'a' stands twice; keep one"),
        ("m:\n  a: 1\n  'a': 2\n", 3, "'a' stands twice; keep one"),
        ("a: &x\n  b: *x\n", 2, "the alias *x stands for nothing, or for what it is a part of"),
        ("a: *x\n", 1, "the alias *x stands for nothing"),
        ("\na: !!python/object/apply:os.system [ls]\n", 2, "python/object/apply:os.system is not allowed"),
        ("a: !!set {x}\n", 1, "the tag tag:yaml.org,2002:set is not allowed"),
        ("a: !own x\n", 1, "the tag !own is not allowed"),
        ("[a]: 1\n", 1, "the name of a setting must be a word"),
        ("a: 1\n---\nb: 2\n", 2, "a second document begins here"),
        ("x: " + "[" * 10**5, 1, f"nested more than {MAX_DEPTH} deep"),
        ("x: " + "{a: " * 10**4, 1, f"nested more than {MAX_DEPTH} deep"),
        ("- " * 10**4, 1, f"nested more than {MAX_DEPTH} deep"),
    ],
    ids=range(13),
)
def test_what_could_do_harm_is_refused_with_its_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as refused:
        load(text)
    assert problem in str(refused.value.problem)
    assert refused.value.problem_mark is not None
    assert refused.value.problem_mark.line + 1 == line


@pytest.mark.parametrize(
    "text",
    [
        "a: 0b_",
        "a: 2020-13-45",
        "a: " + "9" * (sys.get_int_max_str_digits() + 1),
        "x" * (MAX_CHARACTERS + 1),
    ],
    ids=["number", "date", "digits", "characters"],
)
def test_what_cannot_be_a_value_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load(text)

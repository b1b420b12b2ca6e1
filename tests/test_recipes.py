from pathlib import Path

import pytest

from lit_tune.errors import InputError
from lit_tune.recipes import expand, find, purpose, shipped

DEMO = shipped()["demo.yaml"]


def refusal(name: str) -> str:
    """Return what the user is told: one line."""
    with pytest.raises(InputError) as refused:
        find(name)
    text = str(refused.value)
    assert "\n" not in text
    return text


# Finding --------------------------------------------------------------------------------------------------------------


def test_recipes_come_with_the_package() -> None:
    assert {"demo.yaml", "lora.yaml", "fft.yaml"} <= set(shipped())
    assert list(shipped()) == sorted(shipped())
    assert all(path.is_file() and path.name == name for name, path in shipped().items())


@pytest.mark.parametrize("name", ["demo.yaml", "demo"])
def test_a_shipped_recipe_is_found_from_anywhere(working_directory: Path, name: str) -> None:
    assert find(name) == DEMO


def test_a_file_here_goes_before_a_shipped_recipe(working_directory: Path) -> None:
    Path("demo.yaml").write_text("")
    assert find("demo.yaml") == Path("demo.yaml")
    assert find("demo") == DEMO  # that is no file here


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.where" / "mine"
    file.parent.mkdir()
    file.write_text("")
    assert find(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/some.where/mine") == file


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dmo.yaml", "demo.yaml"),
        ("demo.yml", "demo.yaml"),
        ("Demo.yaml", "demo.yaml"),
        ("configs/lora.yml", "lora.yaml"),
    ],
)
def test_the_nearest_recipe_is_suggested(working_directory: Path, name: str, near: str) -> None:
    assert refusal(name) == (
        f"--config: there is no file {name} here and no recipe of that name. Did you mean {near}? "
        "`lit-tune configs` lists them."
    )


def test_nothing_is_suggested_where_nothing_is_near(working_directory: Path) -> None:
    assert "Did you mean" not in refusal("zzz")


@pytest.mark.parametrize("name", [".", "", "../configs/demo.yaml"])
def test_a_directory_or_an_odd_path_is_no_recipe(working_directory: Path, name: str) -> None:
    assert refusal(name).startswith("--config: there is no file ")


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expanded", "found"),
    [
        ([], [], []),
        (["--config", "demo"], ["--config", str(DEMO)], [DEMO]),
        (["--config=demo.yaml", "--name", "mine"], [f"--config={DEMO}", "--name", "mine"], [DEMO]),
        (["-c", "demo"], ["-c", str(DEMO)], [DEMO]),
        (["--data.path=demo", "demo", "--name", "demo"], ["--data.path=demo", "demo", "--name", "demo"], []),
        (
            ["--config", "mine.yaml", "--config", "demo"],
            ["--config", "mine.yaml", "--config", str(DEMO)],
            [Path("mine.yaml"), DEMO],
        ),
        (
            ["--print_config", "--config"],
            ["--print_config", "--config"],
            [],
        ),  # the parser tells that a value is missing
    ],
)
def test_config_values_become_paths_and_nothing_else_changes(
    working_directory: Path, given: list[str], expanded: list[str], found: list[Path]
) -> None:
    Path("mine.yaml").write_text("name: mine")
    assert expand(given) == (expanded, found)


def test_a_recipe_that_is_not_there_is_refused_in_either_form(working_directory: Path) -> None:
    for arguments in (["--config", "nowhere.yaml"], ["--config=nowhere.yaml"]):
        with pytest.raises(InputError, match=r"there is no file nowhere\.yaml here"):
            expand(arguments)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"model:\n  method: [lora\n", ":3"),
        (b"model:\n\tmethod: lora\n", ":2"),
        (b"model: !!python/object/apply:os.getcwd []\n", ":1"),
        (b"\xff\xfem\x00", ""),
        (b"name: a\nname: b\n", ":2"),
        (b"name: a\n---\nname: b\n", ":2"),
        (b"trainer: {max_epochs: 0b_}\n", ""),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_with_the_line(working_directory: Path, content: bytes, place: str) -> None:
    Path("mine.yaml").write_bytes(content)
    with pytest.raises(InputError) as refused:
        expand(["--config", "mine.yaml"])
    assert str(refused.value).startswith(f"mine.yaml{place}: this is no YAML of settings: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("content", "kind"), [("", "nothing"), ("- a\n", "one list"), ("3\n", "one int")])
def test_a_file_without_settings_is_refused(working_directory: Path, content: str, kind: str) -> None:
    Path("mine.yaml").write_text(content)
    with pytest.raises(InputError, match=f"mine.yaml: it holds {kind}; write settings by name"):
        expand(["--config", "mine.yaml"])


# Purpose --------------------------------------------------------------------------------------------------------------


def test_the_purpose_is_the_text_of_the_what_line(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# Launch: lit-tune fit\n# What:   LoRA: small, quick\n# What: not this\nmodel:\n")
    assert purpose(recipe) == "LoRA: small, quick"
    recipe.write_text("model:\n  # What: indented\n")
    assert purpose(recipe) == ""


@pytest.mark.parametrize("recipe", shipped().values(), ids=shipped())
def test_every_shipped_recipe_tells_its_purpose(recipe: Path) -> None:
    assert purpose(recipe)


def test_an_installed_package_without_recipes_finds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_tune.recipes.resources.files", lambda package: tmp_path)
    assert shipped() == {}
    assert "Did you mean" not in refusal("demo.yaml")

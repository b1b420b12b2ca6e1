"""Recipes by name: `--config lora.yaml` means a file of the working directory, or one that comes with the package."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

import yaml

from lit_tune import plain_yaml
from lit_tune.errors import InputError

FLAGS = ("--config", "-c")


def shipped() -> dict[str, Path]:
    """Return the recipes that come with the package: file name to path, sorted."""
    folder = Path(str(resources.files("lit_tune"))) / "configs"
    return {path.name: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Path:
    """Return the file that `--config name` means; the ending .yaml may be left out for shipped ones.

    Raises:
        InputError: Neither a file here nor a shipped recipe.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    recipes = shipped()
    for candidate in (name, f"{name}.yaml"):
        if candidate in recipes:
            return recipes[candidate]
    near = difflib.get_close_matches(path.name, recipes, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise InputError(
        f"--config: there is no file {name} here and no recipe of that name.{hint} `lit-tune configs` lists them."
    )


def check_syntax(path: Path) -> None:
    """Refuse a configuration that is no YAML of settings, with the place of the fault.

    Raises:
        InputError: The file cannot be read as text, not as YAML, or holds something else than settings by name.
    """
    try:
        settings = plain_yaml.load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{place}: this is no YAML of settings: {error.problem or error.context}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: this is no YAML of settings: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        kind = "nothing" if settings is None else f"one {type(settings).__name__}"
        raise InputError(f"{path}: it holds {kind}; write settings by name, such as `model: {{method: lora}}`.")


def expand(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Return the command line with every --config value replaced by its path, and these paths.

    Raises:
        InputError: One is not found, or is no YAML.
    """
    expanded, found = [], []
    expects_value = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if expects_value:
            found.append(find(argument))
            expanded.append(str(found[-1]))
        elif equals and flag in FLAGS:
            found.append(find(value))
            expanded.append(f"{flag}={found[-1]}")
        else:
            expanded.append(argument)
        expects_value = argument in FLAGS
    for path in found:
        check_syntax(path)
    return expanded, found


def purpose(path: Path) -> str:
    """Return the one-line purpose of a recipe: the text of its `# What:` line, empty if it has none."""
    for line in path.read_text().splitlines():
        if line.startswith("# What:"):
            return line.removeprefix("# What:").strip()
    return ""

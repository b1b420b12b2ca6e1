"""Every lit-tune command in the README parses and builds, and every file it names is there."""

import re
import shlex
from pathlib import Path

import pytest

from lit_tune import recipes, run
from lit_tune.cli import TOOL_COMMANDS, TRAINER_COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

# In code blocks and between backticks; what follows a "#" in a code block is a remark.
COMMANDS = sorted(
    {
        found.split("  #")[0].strip()
        for found in re.findall(r"(?:^|`|&& )(lit-tune [a-z]+(?: --[^`\n]*)?)", README, re.MULTILINE)
    }
)
# The table of settings gives them without the command.
SETTINGS = re.findall(r"^\|[^|]*\| `(--[^`]*[^`.])`(?: with| or|,| \|)", README, re.MULTILINE)


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 8
    assert len(SETTINGS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_build(command: str, working_directory: Path) -> None:
    word, *arguments = shlex.split(command.split(">", maxsplit=1)[0])[1:]
    assert word in {**TRAINER_COMMANDS, **TOOL_COMMANDS}
    runs_something = word == "fit" and not {"--help", "--print_config"} & set(arguments)
    if runs_something and "--ckpt_path" not in arguments:  # a run to go on with is not there
        built = run.build(arguments, description="")
        assert built.model.method in ("lora", "fft")
        assert not (working_directory / "runs").exists()


@pytest.mark.parametrize("settings", [text for text in SETTINGS if text != "--model.base"])
def test_settings_build(settings: str, working_directory: Path) -> None:
    assert run.build(shlex.split(settings), description="").settings


def test_every_recipe_and_file_named_is_there() -> None:
    named = set(re.findall(r"`((?:demo|lora|fft|llama\d)[a-z0-9-]*\.yaml)`", README))
    assert named == set(recipes.shipped())
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target

"""One command of `lit-tune` in this process, on a tiny base and a few records: what is it told, and how does it end?"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_llama import tiny_base
from tests.tiny_run import lit_tune, write_records

TINY = [
    *("--model.base", "base", "--data.path", "records.jsonl", "--data.template", "chatml"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--samples.prompts", "[]"),
]
MOST_LINES = 10

Told = Callable[..., str]


def spread(cases: Mapping[str, Any], *, one_in: int) -> list[Any]:
    """Return cases as parameters (a tuple is several): one in so many always runs, all run in the long form."""
    return [
        pytest.param(
            *(case if type(case) is tuple else [case]),
            id=name,
            marks=() if index % one_in == 0 else pytest.mark.slow,
        )
        for index, (name, case) in enumerate(cases.items())
    ]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the base and the records once."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_base(folder / "base")
    write_records(folder / "records.jsonl")
    return folder


@pytest.fixture
def surroundings(tiny_folder: Path, working_directory: Path) -> Path:
    """Give the test a working directory with a base and records of its own."""
    shutil.copytree(tiny_folder, working_directory, dirs_exist_ok=True)
    return working_directory


@pytest.fixture
def told(surroundings: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    """Run a command and return what stands on stderr; see that it ends with `code` and without a traceback."""

    def run(*arguments: str, code: int = 2, tiny: bool = True, lines: int = 1) -> str:
        command, *settings = arguments
        ended = lit_tune(command, *(TINY if tiny else []), *settings)
        said = capsys.readouterr().err
        assert ended == code, said
        assert "Traceback" not in said
        if code:
            assert said.startswith("lit-tune: "), said
            assert said.endswith("\n")
            assert said.count("\n") <= lines <= MOST_LINES, said
        return said

    return run

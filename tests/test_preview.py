"""What `lit-tune data`, `configs` and `env` print."""

import json
import platform
import re
from pathlib import Path

import pytest
import torch

from lit_tune import environment, recipes
from tests.tiny_llama import tiny_base
from tests.tiny_run import RECORDS, lit_tune, write_records


@pytest.fixture
def tiny(working_directory: Path) -> list[str]:
    """Make a base and records in an empty working directory; return the settings of a look at them."""
    tiny_base(working_directory / "base")
    write_records(working_directory / "records.jsonl")
    return ["--model.base", "base", "--data.path", "records.jsonl", "--data.template", "chatml"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, with every run of white space as one space."""
    return " ".join(capsys.readouterr().out.split())


# lit-tune data --------------------------------------------------------------------------------------------------------


def test_data_shows_figures_and_the_first_sample(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("data", *tiny) == 0
    shown = said(capsys)
    assert shown.startswith("Data records.jsonl, template chatml")
    assert f"samples {RECORDS} (of {RECORDS} records)" in shown
    assert "Held out" not in shown
    assert "Sample 0 (record 0)" in shown
    assert "Sample 1 " not in shown
    assert "<|im_start|>assistant ⟦yes" in shown
    assert "<|im_end|>⟧" in shown


def test_data_shows_the_samples_asked_for_and_those_held_out(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_tune("data", *tiny, "--show", "[2,0]", "--data.limit", "[9:]", "--data.val_fraction", "0.2") == 0
    shown = said(capsys)
    assert "Held out" in shown
    assert "samples 8 (of 10 records)" in shown
    records = [int(found) for found in re.findall(r"Sample (?:2|0) \(record (\d+)\)", shown)]
    assert len(records) == 2
    assert records[0] > records[1] >= 9  # as they are counted in the whole file


def test_data_tells_what_is_held_out_and_trained_on(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("held_out.jsonl").write_text("".join(Path("records.jsonl").read_text().splitlines(keepends=True)[:3]))
    assert lit_tune("data", *tiny, "--data.val_path", "held_out.jsonl", "--show", "[]") == 0
    assert "3 of these are trained on too" in said(capsys)
    assert lit_tune("data", *tiny, "--data.val_fraction", "0.2", "--show", "[]") == 0
    assert "trained on too" not in said(capsys)


def test_a_path_is_printed_as_it_is(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("[red]").mkdir()
    write_records(Path("[red]/[.jsonl"))
    assert lit_tune("data", *tiny, "--data.path", "[red]/[.jsonl", "--show", "[]") == 0
    assert said(capsys).startswith("Data [red]/[.jsonl, ")


def test_data_counts_what_is_left_out_or_cut(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"instruction": "a", "output": "b " * length} for length in (1, 2, 3, 400)]
    Path("records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert lit_tune("data", *tiny, "--data.max_length", "100", "--show", "[]") == 0
    assert "samples 3 (of 4 records) dropped, too long 1 truncated 0" in said(capsys)
    assert lit_tune("data", *tiny, "--data.max_length", "100", "--data.over_length", "truncate", "--show", "[]") == 0
    assert "samples 4 (of 4 records) dropped, too long 0 truncated 1" in said(capsys)


@pytest.mark.parametrize("show", ["[19]", "[-1]", "[0,99]"])
def test_a_sample_that_is_not_there_is_told(tiny: list[str], capsys: pytest.CaptureFixture[str], show: str) -> None:
    assert lit_tune("data", *tiny, f"--show={show}") == 2
    assert "records.jsonl gives 0 to 18." in capsys.readouterr().err


def test_data_takes_recipes_and_refuses_unknown_settings(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("data", "--config", "demo.yaml", *tiny) == 0
    assert "Sample 0" in said(capsys)
    assert lit_tune("data", *tiny, "--data.lmit", "3") == 2
    assert "Did you mean 'data.limit'?" in capsys.readouterr().err


def test_data_needs_no_weights_and_leaves_nothing(tiny: list[str]) -> None:
    Path("base/model.safetensors").write_bytes(b"")
    before = sorted(Path().rglob("*"))
    assert lit_tune("data", *tiny) == 0
    assert sorted(Path().rglob("*")) == before


# lit-tune configs -----------------------------------------------------------------------------------------------------


def test_configs_lists_every_recipe_with_its_purpose(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert lit_tune("configs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes.shipped())
    for line, path in zip(lines, recipes.shipped().values(), strict=True):
        purpose = recipes.purpose(path)
        assert purpose
        assert line.split(maxsplit=1)[1].strip() == purpose


# lit-tune env ---------------------------------------------------------------------------------------------------------


def test_env_tells_versions_and_devices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert lit_tune("env") == 0
    shown = said(capsys)
    assert f"torch {torch.__version__}" in shown
    assert f"python {platform.python_version()}" in shown
    for name in ("lit-tune", "lightning", "transformers", "peft", "bitsandbytes", "memory", "cpu", "disk here"):
        assert f"{name} " in shown


def test_env_tells_no_names_paths_or_secrets(monkeypatch: pytest.MonkeyPatch, working_directory: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    told = " ".join(environment.environment().values())
    for private in ("hf_secret", str(Path.home()), str(working_directory)):
        assert private not in told
    assert platform.node() not in told.split()


def test_env_tells_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name = "A GPU"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 * 1024**3, 8 * 1024**3))
    told = environment.environment()
    assert told["gpu 0"] == told["gpu 1"] == "A GPU, 8.0 GiB, 3.0 GiB free"


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ["no-such-package"])
    assert environment.environment()["no-such-package"] == "not installed"


# All ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["configs", "env"])
def test_tools_without_settings_have_help_and_refuse_settings(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert lit_tune(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: lit-tune {command}\n")
    assert lit_tune(command, "--all") == 2
    assert f"lit-tune {command} takes no settings, but was given '--all'." in capsys.readouterr().err


def test_data_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("data", "--help") == 0
    shown = said(capsys)
    assert "Show what training will see of the records." in shown
    assert "--show" in shown

"""Whole runs of `lit-tune`, in this process: what they leave, how they go on, and what they refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from lit_tune import checkpoint, lock, recipes, run, runs
from lit_tune.callbacks import stop
from lit_tune.errors import InputError
from lit_tune.logs import read_metrics
from lit_tune.modules import smollm2
from lit_tune.modules.llama import LlamaTuner
from tests.tiny_llama import tiny_base
from tests.tiny_run import lit_tune, write_records

EPOCHS = 2
STEPS = 5  # of 4 samples in an epoch of 19


@pytest.fixture(autouse=True)
def sorted_event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number the event files of this process so that TensorBoard, which sorts by name, reads 9 before 10.

    Files of different processes are in order by their second.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


@pytest.fixture
def tiny(working_directory: Path) -> list[str]:
    """Make a base and records in an empty working directory; return the settings of a run with them."""
    tiny_base(working_directory / "base")
    write_records(working_directory / "records.jsonl")
    return [
        *("--model.base", "base", "--data.path", "records.jsonl", "--data.template", "chatml"),
        *("--model.learning_rate", "0.01", "--trainer.max_epochs", str(EPOCHS)),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),  # the same where there is a GPU
        *("--trainer.enable_progress_bar", "false", "--samples.max_new_tokens", "4"),
        *("--memory.predict", "false"),  # which has tests of its own
    ]


def losses(name: str) -> list[str]:
    """Return the losses of a run's steps as its table has them."""
    return [row["train/loss"] for row in read_metrics(Path("runs") / name / "metrics.csv")]


def weights(name: str) -> bytes:
    """Return the adapter that a run left."""
    return (Path("runs") / name / "result" / "adapter_model.safetensors").read_bytes()


# Names and directories ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "my-run_2.b", "-x", "ä"])
def test_a_plain_folder_name_is_a_name(name: str) -> None:
    assert runs.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "../a", "a/", "a\nb", "a\x00b"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"--name: .* is no plain folder name"):
        runs.check_name(name)


def test_the_runs_of_a_name_are_found_the_newest_last(tmp_path: Path) -> None:
    for name in ("a", "a-2", "a-10", "a-9", "a-x", "ab", "b-2", "a-2-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "a-11").write_text("no directory")
    assert [path.name for path in runs.runs_named(tmp_path, "a")] == ["a", "a-2", "a-9", "a-10"]
    assert runs.runs_named(tmp_path, "c") == []
    assert runs.runs_named(tmp_path / "nowhere", "a") == []


def test_a_fresh_name_takes_the_first_free_number(tmp_path: Path) -> None:
    assert runs.fresh_name(tmp_path, "a") == "a"
    for name in ("a", "a-2", "a-4"):
        (tmp_path / name).mkdir()
    assert runs.fresh_name(tmp_path, "a") == "a-3"


def test_every_run_gets_a_directory_of_its_own(tmp_path: Path) -> None:
    made = [runs.make_directory(tmp_path / "runs", "a") for _ in range(3)]
    assert made == [tmp_path / "runs" / name for name in ("a", "a-2", "a-3")]
    assert all(path.is_dir() for path in made)


def test_of_two_runs_that_start_at_once_each_gets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["a", "a-2"])  # free as it was looked up, then taken by the other

    def look_up(root: Path, name: str) -> str:
        free = next(names)
        (root / "a").mkdir(exist_ok=True)
        return free

    monkeypatch.setattr(runs, "fresh_name", look_up)
    assert runs.make_directory(tmp_path, "a") == tmp_path / "a-2"


def test_a_file_in_the_place_of_the_runs_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match=r"runs/a: the run's directory cannot be made \(Not a directory\)"):
        runs.make_directory(tmp_path / "runs", "a")


def test_the_last_checkpoint_is_the_newest_intact_one_of_the_newest_run_that_has_any(tmp_path: Path) -> None:
    def save(name: str, step: int) -> Path:
        path = checkpoint.step_path(tmp_path / name, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write({"global_step": step}, path)
        return path

    old, middle, newest = save("a", 30), save("a-2", 10), save("a-2", 20)
    (tmp_path / "a-3").mkdir()
    assert runs.last_checkpoint(tmp_path, "a") == (newest, [])
    newest.write_bytes(newest.read_bytes()[:-1])
    assert runs.last_checkpoint(tmp_path, "a") == (middle, [newest])
    middle.write_bytes(b"")
    assert runs.last_checkpoint(tmp_path, "a") == (old, [newest, middle])
    old.unlink()
    with pytest.raises(InputError, match=r"no run named a under .* has an intact checkpoint \(2 damaged: .*\)"):
        runs.last_checkpoint(tmp_path, "a")
    with pytest.raises(InputError, match=r"no run named b under .* has an intact checkpoint\."):
        runs.last_checkpoint(tmp_path, "b")


def test_a_checkpoint_tells_its_run(working_directory: Path) -> None:
    assert runs.run_of(Path("runs/a/checkpoints/step-00000001.ckpt")) == Path("runs/a")
    assert runs.run_of(Path("/elsewhere/a/checkpoints/best.ckpt")) == Path("/elsewhere/a")


# Hardware -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "refused"),
    [
        (0, "auto", 4, None),
        (0, "auto", "auto", None),
        (0, "cpu", 64, None),
        (0, "gpu", 1, "no CUDA GPU is visible"),
        (0, "cuda", "auto", "no CUDA GPU is visible"),
        (2, "auto", 2, None),
        (2, "auto", "auto", None),
        (2, "auto", -1, None),
        (2, "gpu", "-1", None),
        (2, "cpu", 4, None),
        (2, "auto", 3, r"2 GPU\(s\) are visible; ask for at most 2"),
        (2, "gpu", "3", r"2 GPU\(s\)"),
        (2, "gpu", [0, 1], None),
        (2, "gpu", [2], r"2 GPU\(s\)"),
        (2, "gpu", "0,2", r"2 GPU\(s\)"),
        (2, "gpu", "1,", None),
    ],
)
def test_more_gpus_than_there_are_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, accelerator: str, devices: Any, refused: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if refused is None:
        run.check_devices(accelerator, devices)
        return
    with pytest.raises(InputError, match=refused):
        run.check_devices(accelerator, devices)


@pytest.mark.parametrize(
    ("gpu", "native_bf16", "precision"),
    [
        (True, True, "bf16-mixed"),
        (True, False, "32-true"),
        (False, True, "bf16-mixed"),
        (False, False, "32-true"),
    ],
)
def test_the_default_precision_is_bf16_where_the_device_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, native_bf16: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": native_bf16}, raising=False)
    assert run.default_precision() == precision


# What a run leaves ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_settings_metrics_checkpoints_and_result(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_tune("fit", *tiny, "--data.val_fraction", "0.2") == 0
    home = Path("runs/lora")
    found = {path.name.split(".")[0] if "tfevents" in path.name else path.name for path in home.iterdir()}
    written = {"config.yaml", "metrics.csv", "memory.json", "events", "hparams.yaml", "checkpoints", "result", ".lock"}
    assert found == written
    assert sorted(path.name for path in (home / "checkpoints").iterdir()) == ["best.ckpt", "step-00000008.ckpt"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "prompt_template.jinja"} <= {
        path.name for path in (home / "result").iterdir()
    }
    rows = read_metrics(home / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(8))
    for column in (
        *("train/loss", "train/grad_norm", "train/learning_rate", "train/epoch_loss", "val/loss", "val/perplexity"),
        *("throughput/tokens_per_s", "throughput/supervised_tokens_per_s", "throughput/samples_seen"),
        *("memory/host_rss_gib", "memory/host_peak_gib", "parameters/total", "parameters/trainable"),
    ):
        assert any(row[column] for row in rows), column
    assert all(float(row["train/loss"]) > 0 for row in rows)
    assert float(rows[-1]["throughput/samples_seen"]) == 30
    settings = yaml.safe_load((home / "config.yaml").read_text())
    assert settings["name"] == "lora"

    said = capsys.readouterr().out
    for line in ("Run runs/lora: lora of base", "Data records.jsonl: 15 samples, 4 held out", "Parameters: 3,584 of "):
        assert line in said
    assert "Epoch 0: average loss " in said
    assert "Epoch 1: average loss " in said
    assert "tensorboard --logdir runs" in said


def scalars(name: str, tag: str) -> list[tuple[int, float]]:
    """Return the points of a curve as TensorBoard shows it."""
    events = EventAccumulator(str(Path("runs") / name)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_the_last_row_has_all_of_the_last_step_and_the_final_figures_are_apart(tiny: list[str]) -> None:
    assert lit_tune("fit", *tiny, "--data.val_fraction", "0.2") == 0
    rows = read_metrics(Path("runs/lora/metrics.csv"))
    for column in ("train/loss", "train/grad_norm", "train/epoch_loss", "val/loss", "val/perplexity"):
        assert rows[-1][column], column
    assert not any(name.startswith("final/") for name in rows[-1])
    for final, column in (("final/train_epoch_loss", "train/epoch_loss"), ("final/val_loss", "val/loss")):
        ((step, value),) = scalars("lora", final)
        assert step == len(rows)  # behind the curves
        assert value == pytest.approx(float(rows[-1][column]), rel=1e-6)
        assert len(scalars("lora", column)) == EPOCHS


def test_the_average_loss_of_an_epoch_is_that_of_its_tokens(tiny: list[str]) -> None:
    assert lit_tune("fit", *tiny, "--model.learning_rate", "0", "--data.val_path", "records.jsonl") == 0
    epochs = [row for row in read_metrics(Path("runs/lora/metrics.csv")) if row["train/epoch_loss"]]
    assert len(epochs) == EPOCHS
    for row in epochs:  # nothing is learnt, adapters begin at zero: the loss of training is that of validation
        assert float(row["train/epoch_loss"]) == pytest.approx(float(row["val/loss"]), rel=1e-6)


def test_the_next_run_gets_a_number_and_overwrites_nothing(tiny: list[str]) -> None:
    assert lit_tune("fit", *tiny, "--name", "mine") == 0
    before = {path: path.read_bytes() for path in Path("runs/mine").rglob("*") if path.is_file()}
    assert lit_tune("fit", *tiny, "--name", "mine") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine", "mine-2"]
    assert {path: path.read_bytes() for path in Path("runs/mine").rglob("*") if path.is_file()} == before
    assert losses("mine-2") == losses("mine")
    assert weights("mine-2") == weights("mine")


def test_the_config_that_a_run_leaves_makes_the_same_run_again(tiny: list[str]) -> None:
    limit = "[0:12]"
    assert lit_tune("fit", *tiny, "--data.limit", limit, "--seed_everything", "3", "--name", "first") == 0
    assert yaml.safe_load(Path("runs/first/config.yaml").read_text())["data"]["limit"] == limit
    assert lit_tune("fit", "--config", "runs/first/config.yaml", "--name", "second") == 0
    assert losses("second") == losses("first")
    assert len(losses("second")) == EPOCHS * 3  # 12 samples in steps of 4
    first, second = (yaml.safe_load(Path(f"runs/{name}/config.yaml").read_text()) for name in ("first", "second"))
    assert second == first | {"name": "second"}


@pytest.mark.parametrize(
    ("limit", "samples"), [("[0:12]", 12), ("0:12", 12), ("12", 12), ("[0, 12]", 12), ("[::2]", 10), ("[12:]", 7)]
)
def test_every_form_of_a_limit_survives_the_config(tiny: list[str], limit: str, samples: int) -> None:
    built = run.build([*tiny, "--data.limit", limit], description="")
    assert len(built.datamodule.prepare(built.model.load_tokenizer).train) == samples
    Path("again.yaml").write_text(built.parser.dump(built.config, skip_none=False))
    again = run.load_run("again.yaml")
    assert len(again.datamodule.prepare(again.model.load_tokenizer).train) == samples


def test_full_training_leaves_a_model(tiny: list[str]) -> None:
    assert lit_tune("fit", *tiny, "--model.method", "fft") == 0
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in Path("runs/fft/result").iterdir()
    }


def test_a_result_can_be_the_base_of_the_next_run(tiny: list[str]) -> None:
    assert lit_tune("fit", *tiny, "--model.method", "fft") == 0
    assert lit_tune("fit", *tiny, "--model.base", "runs/fft/result") == 0
    assert lit_tune("fit", *tiny, "--model.base", "runs/fft/result", "--model.adapter", "runs/lora/result") == 0
    assert float(losses("lora-2")[0]) < float(losses("lora")[0])


def test_fit_alone_trains_the_default_base_on_the_bundled_sample(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "prepared_directory", lambda: Path("base").resolve())
    assert lit_tune("fit", "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false") == 0
    settings = yaml.safe_load(Path("runs/lora/config.yaml").read_text())
    assert settings["trainer"]["precision"] == run.default_precision()
    assert settings["model"]["base"] == "smollm2-135m"
    assert settings["data"]["path"] is None
    assert len(losses("lora")) == 2


# Memory ---------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_its_memory_was_made_of(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("fit", *tiny, "--data.micro_batch_size", "2", "--trainer.accumulate_grad_batches", "2") == 0
    left = json.loads(Path("runs/lora/memory.json").read_text())
    (rank,) = left["measured"]["ranks"]
    adapters = 4 * 3584
    with safe_open("runs/lora/result/adapter_model.safetensors", framework="pt") as weights:
        tensors = len(list(weights.keys()))
        assert rank["largest"]["gradients"] == adapters == sum(weights.get_tensor(n).nbytes for n in weights.keys())  # noqa: SIM118
    assert rank["largest"]["optimizer"] == 2 * adapters + 4 * tensors  # Adam's two moments, and a counter each
    assert rank["largest"]["activations"] > 0
    assert sum(rank["categories"].values()) == rank["peak"] == max(rank["phases"].values())
    assert left["predicted"] is None
    assert left["settings"]["model.method"] == "lora"
    assert left["settings"]["trainer.accumulate_grad_batches"] == 2
    assert left["settings"]["tokens_of_largest_micro_batch"] > 10
    assert left["environment"]["torch"] == torch.__version__

    rows = read_metrics(Path("runs/lora/metrics.csv"))
    assert not any(name.startswith("memory_stack") for name in rows[0])
    peaks = [max(float(row[f"memory/peak_{phase}_gib"]) for phase in ("forward", "backward")) for row in rows]
    parts = ("weights", "gradients", "optimizer", "activations", "other")
    sums = [sum(float(row[f"memory/{part}_gib"]) for part in parts) for row in rows]
    assert all(total >= peak - 1e-6 for total, peak in zip(sums, peaks, strict=True))
    said = capsys.readouterr().out
    assert said.count("Memory in the first step (optimizer step 0)") == 1
    assert said.count("Memory in the step with the highest peak") == 1


def test_a_run_over_its_host_limit_saves_and_can_go_on(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tiny += ["--data.val_fraction", "0.05"]
    assert lit_tune("fit", *tiny, "--name", "whole") == 0
    capsys.readouterr()
    assert lit_tune("fit", *tiny, "--name", "parts", "--memory.host_limit_gib", "0.01") == 3
    told = capsys.readouterr()
    assert re.fullmatch(
        r"lit-tune: the run takes \d+\.\d\d GiB of host memory after optimizer step 0, more than "
        r"memory\.host_limit_gib 0\.01; raise it or try --data\.micro_batch_size 2 "
        r"--trainer\.accumulate_grad_batches 2; runs/parts/checkpoints/step-00000001\.ckpt is intact, go on with "
        r"--ckpt_path last\n",
        told.err,
    )
    assert "Memory in the pause before optimizer step 1\nhost" in told.out
    assert "  --model.gradient_checkpointing full\n" in told.out
    assert not Path("runs/parts/result").exists()
    assert lit_tune("fit", *tiny, "--name", "parts", "--ckpt_path", "last") == 0
    assert_as_uninterrupted("parts", "whole")


@pytest.mark.slow
def test_two_ranks_end_over_the_limit_together(tiny: list[str]) -> None:
    """Each of them takes less than the limit."""
    fit = [sys.executable, "-m", "lit_tune", "fit", *tiny, "--trainer.devices", "2", "--memory.host_limit_gib"]
    path = {"PYTHONPATH": str(Path(run.__file__).parent.parent)}
    ran = subprocess.run([*fit, "99", "--name", "both"], env=os.environ | path, check=True, capture_output=True)
    assert b"peaks by rank: " in ran.stdout
    ranks = json.loads(Path("runs/both/memory.json").read_text())["measured"]["ranks"]
    limit = 0.75 * sum(rank["host"]["rss"] for rank in ranks) / 1024**3
    assert all(rank["host"]["rss"] < limit * 1024**3 for rank in ranks)
    ended = subprocess.run(
        [*fit, str(limit), "--name", "over"], env=os.environ | path, check=False, capture_output=True
    )
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.count(b"lit-tune: ") == 1
    assert len(checkpoint.step_checkpoints(Path("runs/over"))) == 1


def out_of_memory_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the GPU that is not there have no memory left in optimizer step `step`."""
    nll: Callable[..., Any] = LlamaTuner.nll

    def fails(module: LlamaTuner, batch: dict[str, Any]) -> Any:
        found = nll(module, batch)
        if batch["step"] == step and module.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")
        return found

    monkeypatch.setattr(LlamaTuner, "nll", fails)


def test_a_run_that_ran_out_of_memory_tells_of_what_and_can_go_on(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*tiny, "--data.val_fraction", "0.05", "--checkpoint.every_n_steps", "2"]
    assert lit_tune("fit", *settings, "--name", "whole") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        out_of_memory_in(patch, 3)
        assert lit_tune("fit", *settings, "--name", "parts") == 3
    told = capsys.readouterr()
    assert told.err == (
        "lit-tune: out of memory in the forward pass of optimizer step 3: CUDA out of memory. Tried to allocate 2.00 "
        "GiB.; try --data.micro_batch_size 2 --trainer.accumulate_grad_batches 2; "
        "runs/parts/checkpoints/step-00000002.ckpt is intact, go on with --ckpt_path last\n"
    )
    assert "Memory in the forward pass of optimizer step 3\nhost" in told.out
    assert "4 bits a frozen weight, at some cost in speed; a new run\n" in told.out
    assert lit_tune("fit", *settings, "--name", "parts", "--ckpt_path", "last") == 0
    assert_as_uninterrupted("parts", "whole")


def test_out_of_memory_in_the_first_step_leaves_no_directory(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out_of_memory_in(monkeypatch, 0)
    assert lit_tune("fit", *tiny, "--model.method", "fft") == 3
    told = capsys.readouterr()
    assert "out of memory in the forward pass of optimizer step 0" in told.err
    assert "go on with" not in told.err
    activations = next(line for line in told.out.splitlines() if line.startswith("activations"))
    assert activations.split()[1] != "0.0"  # what autograd had saved by then
    assert list(Path("runs").iterdir()) == []


def test_out_of_memory_as_the_model_is_loaded_is_told(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(module: LlamaTuner) -> None:
        raise MemoryError

    monkeypatch.setattr(LlamaTuner, "configure_model", fails)
    assert lit_tune("fit", *tiny) == 3
    assert "out of memory in the start, before the first step: MemoryError(); try " in capsys.readouterr().err
    assert list(Path("runs").iterdir()) == []


# Going on -------------------------------------------------------------------------------------------------------------


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Let a signal reach this process while it computes optimizer step `step`."""
    training_step: Callable[..., Any] = LlamaTuner.training_step

    def interrupted(module: LlamaTuner, batch: dict[str, Any], batch_idx: int) -> Any:
        if batch["step"] == step:
            os.kill(os.getpid(), number)
        return training_step(module, batch, batch_idx)

    monkeypatch.setattr(LlamaTuner, "training_step", interrupted)


TIMED = ("throughput/", "memory/")  # columns that no two runs have alike


def table(name: str) -> list[dict[str, str]]:
    """Return the rows of a run, without what depends on time."""
    rows = read_metrics(Path("runs") / name / "metrics.csv")
    return [{column: value for column, value in row.items() if not column.startswith(TIMED)} for row in rows]


def assert_as_uninterrupted(parts: str, whole: str) -> None:
    assert table(parts) == table(whole)
    assert weights(parts) == weights(whole)
    for tag in ("train/loss", "val/loss", "train/epoch_loss"):
        assert scalars(parts, tag) == scalars(whole, tag), tag


@pytest.mark.parametrize(
    ("number", "step", "validation", "due"),
    [
        pytest.param(signal.SIGINT, 1, [], False, id="SIGINT-midst"),
        pytest.param(signal.SIGTERM, 1, ["--trainer.val_check_interval", "2"], True, id="SIGTERM-validation-in-midst"),
        pytest.param(signal.SIGTERM, STEPS - 1, [], True, id="SIGTERM-end-of-epoch"),
        pytest.param(signal.SIGTERM, STEPS, [], False, id="SIGTERM-begin-of-epoch"),
        pytest.param(signal.SIGTERM, EPOCHS * STEPS - 1, [], True, id="SIGTERM-end-of-run"),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    step: int,
    validation: list[str],
    due: bool,
) -> None:
    settings = [*tiny, "--data.val_fraction", "0.05", *validation]
    assert lit_tune("fit", *settings, "--name", "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, step, number)
        assert lit_tune("fit", *settings, "--name", "parts") == 128 + number
    told = capsys.readouterr().err
    assert told == (
        f"lit-tune: stopped by {number.name}; saved runs/parts/checkpoints/step-{step + 1:08d}.ckpt; go on with "
        "--ckpt_path last\n"
    )
    assert checkpoint.read(checkpoint.step_path(Path("runs/parts"), step + 1))["validation_due"] is due
    assert not Path("runs/parts/result").exists()
    assert lit_tune("fit", *settings, "--name", "parts", "--ckpt_path", "last") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["parts", "whole"]
    assert_as_uninterrupted("parts", "whole")


def test_stopped_again_and_again_at_an_epochs_end_it_goes_on_all_the_same(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*tiny, "--data.val_fraction", "0.05"]
    assert lit_tune("fit", *settings, "--name", "whole") == 0
    settings += ["--name", "parts"]
    with monkeypatch.context() as patch:
        stop_after(patch, STEPS - 1, signal.SIGTERM)
        assert lit_tune("fit", *settings) == 143  # the validation is due
    with monkeypatch.context() as patch:
        stop_in_validation(patch)
        assert lit_tune("fit", *settings, "--ckpt_path", "last") == 143  # and is done as the signal comes
    with monkeypatch.context() as patch:
        stop_after(patch, STEPS, signal.SIGTERM)
        assert lit_tune("fit", *settings, "--ckpt_path", "last") == 143
    assert lit_tune("fit", *settings, "--ckpt_path", "last") == 0
    assert_as_uninterrupted("parts", "whole")


def stop_in_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SIGTERM reach this process as it is done with a validation."""
    log: Callable[..., None] = LlamaTuner.on_validation_epoch_end

    def interrupted(module: LlamaTuner) -> None:
        log(module)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LlamaTuner, "on_validation_epoch_end", interrupted)


@pytest.mark.parametrize("batch", [("2", "2"), ("1", "4")])
def test_a_run_goes_on_in_another_cut_of_its_global_batch(tiny: list[str], batch: tuple[str, str]) -> None:
    settings = [*tiny, "--model.lora.dropout", "0", "--data.val_fraction", "0.05"]
    assert lit_tune("fit", *settings, "--name", "whole") == 0
    assert (
        lit_tune("fit", *settings, "--name", "parts", "--checkpoint.every_n_steps=1", "--checkpoint.keep_last=9") == 0
    )
    samples, accumulate = batch
    settings += ["--data.micro_batch_size", samples, "--trainer.accumulate_grad_batches", accumulate]
    assert lit_tune("fit", *settings, "--ckpt_path", "runs/parts/checkpoints/step-00000003.ckpt") == 0
    assert [int(row["step"]) for row in table("parts")] == list(range(EPOCHS * STEPS))
    for column in ("train/loss", "val/loss", "train/epoch_loss"):
        expected = [float(row[column]) for row in table("whole") if row[column]]
        # fp32 sums in another order; Adam makes of them what it may at a rate as high as this one.
        assert [float(row[column]) for row in table("parts") if row[column]] == pytest.approx(expected, rel=1e-4)
    assert table("parts")[:3] == table("whole")[:3]


def test_a_checkpoint_never_knows_more_than_the_logs_on_the_disk(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[..., None] = checkpoint.write
    logged: list[tuple[int, int, int]] = []  # steps of the checkpoint, of the table, of the curve

    def look(content: dict[str, Any], path: Path) -> None:
        logged.append((content["global_step"], len(losses("lora")), len(scalars("lora", "train/loss"))))
        write(content, path)

    monkeypatch.setattr(checkpoint, "write", look)
    assert lit_tune("fit", *tiny, "--checkpoint.every_n_steps", "2") == 0
    assert logged == [(step, step, step) for step in (2, 4, 5, 6, 8, 10)]


def test_the_background_is_a_setting(tiny: list[str]) -> None:
    for wanted in ("true", "false"):
        built = run.build([*tiny, "--checkpoint.asynchronous", wanted], description="")
        writer = built.trainer.strategy.checkpoint_io
        assert isinstance(writer, checkpoint.AtomicCheckpointIO)
        assert writer.asynchronous is (wanted == "true")


def test_saved_in_the_background_a_run_goes_on_the_same(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*tiny, "--data.val_fraction", "0.05"]
    assert lit_tune("fit", *settings, "--name", "whole") == 0
    settings += ["--name", "parts", "--checkpoint.asynchronous", "true", "--checkpoint.every_n_steps", "1"]
    with monkeypatch.context() as patch:
        stop_after(patch, STEPS, signal.SIGTERM)
        assert lit_tune("fit", *settings) == 143
    assert lit_tune("fit", *settings, "--ckpt_path", "last") == 0
    assert_as_uninterrupted("parts", "whole")


def test_a_signal_during_the_last_step_comes_too_late(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, EPOCHS * STEPS - 1, signal.SIGTERM)
    assert lit_tune("fit", *tiny) == 0
    assert weights("lora")
    assert len(losses("lora")) == EPOCHS * STEPS


def test_ckpt_path_last_goes_on_in_the_run_that_it_came_from(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_tune("fit", *tiny) == 0
    assert lit_tune("fit", *tiny, "--trainer.max_epochs", "3", "--ckpt_path", "last") == 0
    assert "Going on from runs/lora/checkpoints/step-00000010.ckpt (optimizer step 10)" in capsys.readouterr().out
    assert [path.name for path in Path("runs").iterdir()] == ["lora"]
    assert [int(row["step"]) for row in read_metrics(Path("runs/lora/metrics.csv"))] == list(range(3 * STEPS))


def test_a_finished_run_says_so_and_is_left_as_it_is(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("fit", *tiny) == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert lit_tune("fit", *tiny, "--ckpt_path", "last") == 0
    said = capsys.readouterr().out
    assert "runs/lora is finished: 10 optimizer steps done. Raise trainer.max_epochs" in said
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_is_not_there_is_no_fresh_start(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("last", "best", "nowhere.ckpt"):
        assert lit_tune("fit", *tiny, "--ckpt_path", path) == 2
        assert "checkpoint" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("lost", ["result", "result/run.json"])
def test_a_finished_run_whose_result_is_missing_gets_it(
    tiny: list[str], capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    assert lit_tune("fit", *tiny) == 0
    home = Path("runs/lora")
    before, rows = weights("lora"), (home / "metrics.csv").read_bytes()
    (home / lost).rename("lost")
    assert lit_tune("fit", *tiny, "--ckpt_path", "last") == 0
    assert weights("lora") == before
    assert (home / "metrics.csv").read_bytes() == rows
    assert json.loads((home / "result/run.json").read_text()) == {"optimizer_steps": EPOCHS * STEPS}
    assert "is finished" not in capsys.readouterr().out
    assert len(scalars("lora", "final/train_epoch_loss")) == 1
    assert lit_tune("fit", *tiny, "--ckpt_path", "last") == 0
    assert "is finished" in capsys.readouterr().out


def test_a_result_of_fewer_steps_is_not_that_of_a_run_that_went_on(tiny: list[str]) -> None:
    assert lit_tune("fit", *tiny) == 0
    longer = [*tiny, "--trainer.max_epochs", str(EPOCHS + 1), "--ckpt_path", "last"]
    Path("runs/lora/result").rename("first")
    assert lit_tune("fit", *longer) == 0
    after = weights("lora")
    Path("runs/lora/result").rename("second")
    Path("first").rename("runs/lora/result")  # as if the process had been killed before the result was written
    assert lit_tune("fit", *longer) == 0
    assert weights("lora") == after


# What may not change --------------------------------------------------------------------------------------------------


def files_under(directory: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "name", "takeable"),
    [
        (["--data.limit", "[0:12]"], "data.limit", True),
        (["--data.path", "other.jsonl"], "data.path", True),
        (["--data.template", "alpaca"], "data.template", True),
        (["--data.max_length", "300"], "data.max_length", True),
        (["--data.micro_batch_size", "3"], "data.global_batch_size", True),
        (["--seed_everything", "1"], "seed_everything", True),
        (["--model.learning_rate", "0.001"], "model.learning_rate", True),
        (["--trainer.gradient_clip_algorithm", "value"], "trainer.gradient_clip_algorithm", True),
        (["--model.base", "other"], "model.base", True),
        (["--model.lora.rank", "8"], "model.lora.rank", False),
        (["--model.method", "fft"], "model.method", False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_going_on_with_another_setting_is_refused_and_changes_nothing_or_taken_by_the_flag(
    tiny: list[str], capsys: pytest.CaptureFixture[str], change: list[str], name: str, takeable: bool
) -> None:
    tiny_base(Path("other"), seed=1)
    write_records(Path("other.jsonl"), 18)
    assert lit_tune("fit", *tiny, "--trainer.max_steps", "3") == 0
    before = files_under("runs")
    settings = [*tiny, "--name", "lora", "--ckpt_path", "last", *change]
    assert lit_tune("fit", *settings) == 2
    told = capsys.readouterr().err
    assert f"{name}: the checkpoint was made with " in told
    assert told.count("\n") == 1
    left = files_under("runs")
    assert {path: content for path, content in left.items() if path in before and path.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }
    assert lit_tune("fit", *settings, "--allow_changed", name) == (0 if takeable else 2)
    assert Path("runs/lora/checkpoints/step-00000003.ckpt").exists() is not takeable


def test_a_learning_rate_that_is_taken_really_holds(tiny: list[str]) -> None:
    settings = [*tiny, "--model.schedule", "constant", "--model.warmup", "0"]
    assert lit_tune("fit", *settings, "--trainer.max_steps", "3") == 0
    settings += ["--model.learning_rate", "0.001", "--ckpt_path", "last", "--allow_changed", "model.learning_rate"]
    assert lit_tune("fit", *settings) == 0
    rates = [float(row["train/learning_rate"]) for row in table("lora")]
    assert rates == pytest.approx([0.01] * 3 + [0.001] * (EPOCHS * STEPS - 3), rel=1e-6)


def test_every_setting_that_is_compared_is_one_of_the_commands(tiny: list[str]) -> None:
    assert lit_tune("fit", *tiny, "--trainer.max_steps", "1") == 0
    saved = checkpoint.read(checkpoint.step_path(Path("runs/lora"), 1))
    compared = [*saved["lit_tune"]["settings"], *saved["InstructData"]["settings"]]
    known = run.build(tiny, description="").settings.as_flat().__dict__
    assert [name for name in compared if name not in known] == []


# One run at a time ----------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_refused_where_another_is_at_work(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_tune("fit", *tiny) == 0
    longer = [*tiny, "--trainer.max_epochs", str(EPOCHS + 1)]
    before = files_under("runs")
    with lock.hold(Path("runs/lora")):
        assert lit_tune("fit", *longer, "--ckpt_path", "last") == 2
        assert "lit-tune: runs/lora: another run is at work there (process " in capsys.readouterr().err
        assert {path: content for path, content in files_under("runs").items() if path.name != ".lock"} == {
            path: content for path, content in before.items() if path.name != ".lock"
        }
        assert lit_tune("fit", *tiny) == 0  # a new run has a directory of its own
        path = "runs/lora/checkpoints/step-00000010.ckpt"
        assert lit_tune("predict", *tiny, "--ckpt_path", path) == 0  # and reading is free
    assert lit_tune("fit", *longer, "--ckpt_path", path) == 0


@pytest.mark.parametrize("ends", ["well", "by a fault", "by a signal"])
def test_a_run_holds_its_directory_as_long_as_it_is_at_work(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    refused: list[str] = []
    training_step: Callable[..., Any] = LlamaTuner.training_step

    def step(module: LlamaTuner, batch: dict[str, Any], batch_idx: int) -> Any:
        with pytest.raises(InputError) as refusal:
            lock.hold(Path("runs/lora"))
        refused.append(str(refusal.value))
        if ends == "by a fault" and batch["step"] == 2:
            raise InputError("enough")
        if ends == "by a signal" and batch["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(module, batch, batch_idx)

    monkeypatch.setattr(LlamaTuner, "training_step", step)
    assert lit_tune("fit", *tiny) == {"well": 0, "by a fault": 2, "by a signal": 143}[ends]
    assert len(refused) == (EPOCHS * STEPS if ends == "well" else 3)
    lock.hold(Path("runs/lora")).close()


# Before the time is up ------------------------------------------------------------------------------------------------


def test_a_run_stops_before_its_time_is_up_and_goes_on(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late: list[float] = []  # an hour from the third step on
    training_step: Callable[..., Any] = LlamaTuner.training_step

    def step(module: LlamaTuner, batch: dict[str, Any], batch_idx: int) -> Any:
        late[:] = [3600.0] if batch["step"] == 2 else []
        return training_step(module, batch, batch_idx)

    settings = [*tiny, "--data.val_fraction", "0.05"]
    assert lit_tune("fit", *settings, "--name", "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(LlamaTuner, "training_step", step)
        # Not the process' beginning, which is that of all these tests.
        patch.setattr(psutil.Process, "create_time", lambda process: time.time())
        patch.setattr(stop, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(late)))
        assert lit_tune("fit", *settings, "--name", "parts", "--time-limit", "1h") == 143
    assert capsys.readouterr().err == (
        "lit-tune: stopped by --time-limit; saved runs/parts/checkpoints/step-00000003.ckpt; go on with "
        "--ckpt_path last\n"
    )
    assert lit_tune("fit", *settings, "--name", "parts", "--ckpt_path", "last") == 0
    assert_as_uninterrupted("parts", "whole")


def test_a_time_that_is_up_before_the_first_step_ends_the_run_with_nothing_saved(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_tune("fit", *tiny, "--time-limit", "1s") == 143  # this process has begun longer ago
    assert capsys.readouterr().err == "lit-tune: stopped by --time-limit; nothing was saved\n"
    assert list(Path("runs").rglob("*.ckpt")) == []


@pytest.mark.parametrize("spelt", ["--time-limit=90m", "--time_limit=90m"])
def test_the_time_limit_is_spelt_either_way(tiny: list[str], spelt: str) -> None:
    built = run.build([*tiny, spelt], description="")
    assert built.settings["time_limit"] == "90m"
    assert built._time_limit_s == 5400


# Failing --------------------------------------------------------------------------------------------------------------


def test_a_run_that_fails_before_its_first_step_leaves_no_directory(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for fault in (["--data.path", "nowhere.json"], ["--model.lora.targets", "[q_prj]"], ["--model.base", "./none"]):
        assert lit_tune("fit", *tiny, *fault) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(Path("runs").iterdir()) == []


def test_a_loss_that_is_not_finite_ends_with_code_5_and_without_result(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaTuner, "nll", lambda module, batch: torch.tensor(float("nan"), requires_grad=True))
    assert lit_tune("fit", *tiny) == 5
    assert "the loss of optimizer step 0 is nan" in capsys.readouterr().err
    assert not Path("runs/lora/result").exists()


def test_a_loss_that_is_not_finite_later_on_leaves_the_last_good_checkpoint(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_tune("fit", *tiny, "--name", "whole") == 0
    with monkeypatch.context() as patch:
        poison(patch, STEPS + 1)
        assert lit_tune("fit", *tiny, "--name", "parts") == 5
    assert re.match(
        rf"lit-tune: the loss of optimizer step {STEPS + 1} is nan \(records [\d, ]+, counted from 0\); the weights "
        "were not updated with it. Lower model.learning_rate ",
        capsys.readouterr().err,
    )
    assert [path.name for path in Path("runs/parts/checkpoints").iterdir()] == [f"step-{STEPS:08d}.ckpt"]
    assert lit_tune("fit", *tiny, "--name", "parts", "--ckpt_path", "last") == 0
    assert table("parts") == table("whole")


def test_steps_that_are_not_finite_may_be_skipped(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, STEPS + 1)
    assert lit_tune("fit", *tiny, "--model.skip_nonfinite", "1") == 0
    rows = table("lora")
    assert [float(row["train/skipped_steps"]) for row in rows] == [0.0] * (STEPS + 1) + [1.0] * (STEPS - 1)
    assert [row["step"] for row in rows if row["train/loss"] == "nan"] == [str(STEPS + 1)]
    assert all(float(row["train/epoch_loss"]) > 0 for row in rows if row["train/epoch_loss"])
    assert weights("lora")  # the result holds numbers, or it would not have been written


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the loss of an optimizer step NaN."""
    nll: Callable[..., Any] = LlamaTuner.nll

    def poisoned(module: LlamaTuner, batch: dict[str, Any]) -> Any:
        return nll(module, batch) * (float("nan") if batch.get("step") == step else 1.0)

    monkeypatch.setattr(LlamaTuner, "nll", poisoned)


# The other commands ---------------------------------------------------------------------------------------------------


def shown_loss(capsys: pytest.CaptureFixture[str]) -> float:
    """Return the loss that `validate` or `test` has printed."""
    found = re.search(r"(?:val|test)/loss\W+([\d.]+)", capsys.readouterr().out)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("which", ["last", "best", "runs/lora/checkpoints/best.ckpt"])
def test_validate_test_and_predict_take_a_checkpoint(
    tiny: list[str], capsys: pytest.CaptureFixture[str], which: str
) -> None:
    settings = [*tiny, "--data.val_fraction", "0.2"]
    assert lit_tune("fit", *settings) == 0
    rows = [row for row in read_metrics(Path("runs/lora/metrics.csv")) if row["val/loss"]]
    expected = float(rows[-1]["val/loss"])
    assert expected == min(float(row["val/loss"]) for row in rows)  # so best and last are the same
    before = sorted(Path("runs").rglob("*"))
    for command in ("validate", "test"):
        capsys.readouterr()
        assert lit_tune(command, *settings, "--ckpt_path", which) == 0
        assert shown_loss(capsys) == pytest.approx(expected, rel=1e-6)
    assert sorted(Path("runs").rglob("*")) == before
    assert lit_tune("predict", *settings, "--ckpt_path", which) == 0
    answers = [json.loads(line) for line in Path("runs/lora/predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    assert all(answer["prompt"].endswith("<|im_start|>assistant\n") for answer in answers)
    assert [answer["id"] for answer in answers] == sorted(answer["id"] for answer in answers)


def test_validate_without_checkpoint_measures_the_base(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("fit", *tiny, "--model.learning_rate", "0", "--data.val_fraction", "0.2") == 0
    rows = read_metrics(Path("runs/lora/metrics.csv"))
    capsys.readouterr()
    assert lit_tune("validate", *tiny, "--data.val_fraction", "0.2") == 0
    assert shown_loss(capsys) == pytest.approx(float(rows[-1]["val/loss"]), rel=1e-6)
    assert [path.name for path in Path("runs").iterdir()] == ["lora"]


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_recipe_builds(name: str, working_directory: Path) -> None:
    built = run.load_run(name)
    settings = yaml.safe_load(recipes.shipped()[name].read_text())
    assert built.model.method == settings["model"].get("method", "lora")
    assert built.trainer.max_epochs == settings["trainer"].get("max_epochs", run.DEFAULT_EPOCHS)
    assert list(working_directory.iterdir()) == []


def test_a_run_started_by_another_ones_process_has_a_name_of_its_own(tiny: list[str]) -> None:
    for name in ("first", "second"):
        assert lit_tune("fit", *tiny, "--name", name) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["first", "second"]


def test_a_run_is_named_after_its_recipe(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("fit", "--config", "demo.yaml", *tiny, "--data.limit", "null") == 0
    assert [path.name for path in Path("runs").iterdir()] == ["demo"]
    assert capsys.readouterr().out.startswith(f"Recipe {recipes.shipped()['demo.yaml']}\n")


# Memory, predicted ----------------------------------------------------------------------------------------------------


def test_the_predicted_peak_stands_beside_the_measured_one(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("fit", *tiny, "--memory.predict", "true", "--name", "told") == 0
    assert "predicted" in capsys.readouterr().out
    found = json.loads(Path("runs/told/memory.json").read_text())
    measured, predicted = found["measured"]["ranks"][0], found["predicted"]
    assert predicted["categories"]["weights"] == measured["largest"]["weights"]
    assert predicted["categories"]["optimizer"] == measured["largest"]["optimizer"]


def test_auto_is_resolved_before_the_model_is_made(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("fit", *tiny, "--model.gradient_checkpointing", "auto", "--trainer.max_steps", "1") == 0
    assert "Gradient checkpointing: none, for " in capsys.readouterr().out

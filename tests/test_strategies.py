"""Sharded weights: the same run as on one device, whatever the layout, and whole checkpoints between layouts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from benchmarks.kill_and_continue import curve
from lit_tune import checkpoint, strategies
from lit_tune.data.instruct import InstructData
from lit_tune.errors import InputError
from lit_tune.memory import bytes_on, optimizer_tensors
from lit_tune.modules.llama import LlamaTuner, Method
from lit_tune.modules.lora import Lora
from lit_tune.run import process_count
from tests import sharded
from tests.reliability.forks import Blow
from tests.reliability.interrupted import Workshop, newest_run, workshop
from tests.reliability.splits import in_ranks
from tests.reliability.test_resume_points import KEEP_ALL, STEPPING, cut, whole
from tests.tiny_llama import tiny_base
from tests.tiny_run import Watch, lit_tune, saving, train, write_records

RECORDS = 27  # 19 to train on, in steps of 8, 8 and 3
FINE: dict[str, Any] = {"command": "fit", "precision": "32-true", "optimizer": "adamw"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl", RECORDS)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Leave no process group behind, of which this process is the only rank, and not its port to other processes."""
    with patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Which strategy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "method", "devices", "chosen"),
    [
        ("auto", "fft", 4, "fsdp2"),
        ("auto", "fft", 1, "auto"),
        ("auto", "lora", 4, "auto"),
        ("ddp", "fft", 4, "ddp"),
        ("fsdp2_cpu_offload", "fft", 1, "fsdp2_cpu_offload"),
        ("fsdp2", "lora", 2, "fsdp2"),
    ],
)
def test_auto_shards_where_all_parameters_train_on_several_devices(
    strategy: str, method: str, devices: int, chosen: str
) -> None:
    assert strategies.choose(strategy, method=method, devices=devices, **FINE) == chosen


UNFIT = [
    ({"command": "predict"}, "predict"),
    ({"precision": "16-mixed"}, "16-mixed"),
    ({"optimizer": "adafactor"}, "adafactor"),
]


@pytest.mark.parametrize(("setting", "named"), UNFIT)
def test_what_shards_cannot_do_is_refused_by_name_and_avoided_by_auto(setting: dict[str, str], named: str) -> None:
    for strategy in strategies.NAMES:
        with pytest.raises(InputError, match=f"trainer.strategy is {strategy}: .*{named}"):
            strategies.choose(strategy, method="fft", devices=2, **(FINE | setting))
    assert strategies.choose("auto", method="fft", devices=2, **(FINE | setting)) == "auto"


@pytest.mark.parametrize(
    ("accelerator", "devices", "nodes", "processes"),
    [
        ("cpu", "auto", 1, 1),
        ("cpu", "2", 1, 2),
        ("cpu", 2, 3, 6),
        ("gpu", "auto", 1, 4),
        ("auto", -1, 2, 8),
        ("gpu", "0,2", 1, 2),
        ("gpu", "1,", 1, 1),
        ("gpu", [1, 3, 2], 1, 3),
    ],
)
def test_processes_are_counted_as_lightning_counts_them(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, devices: Any, nodes: int, processes: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_count(accelerator, devices, nodes) == processes


def test_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert process_count("cpu", "auto", 1) == 1  # it may be another launcher's
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    assert process_count("cpu", "auto", 1) == 16


def test_the_command_refuses_before_anything_is_launched(
    base: str, records: str, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("fit", "--model.base", base, "--data.path", records, "--trainer.accelerator", "cpu")
    assert lit_tune(*arguments, "--trainer.strategy", "fsdp2", "--model.optimizer", "adafactor") == 2
    assert "trainer.strategy is fsdp2: adafactor" in capsys.readouterr().err
    assert not torch.distributed.is_initialized()


# One rank -------------------------------------------------------------------------------------------------------------


def run(
    base: str, records: str, *, method: Method = "fft", save_to: Path | None = None, **settings: Any
) -> tuple[Watch, Trainer]:
    """Train on one device with packing, accumulation and clipping; `settings` are the trainer's."""
    lora = Lora(rank=4, alpha=8, dropout=0.1, targets=["q_proj"])
    # Of a rate that does not depend on the run's length.
    module = LlamaTuner(base=base, method=method, lora=lora, learning_rate=1e-3, schedule="constant", warmup=0)
    watch, data = Watch(), InstructData(path=records, template="chatml", micro_batch_size=4, val_fraction=0.3)
    settings = {"accumulate_grad_batches": 2, "max_epochs": 2, "gradient_clip_val": 0.5} | settings
    trainer = train(module, data, watch, *(saving(save_to, data) if save_to else []), **settings)
    return watch, trainer


def layers_of(trainer: Trainer) -> list[torch.nn.Module]:
    """Return the decoder layers of what was trained."""
    module: Any = trainer.lightning_module
    return list(module.causal_lm.model.layers)


@pytest.mark.parametrize("strategy", strategies.NAMES)
@pytest.mark.parametrize("method", ["fft", "lora"])
def test_one_rank_trains_as_without_a_strategy(
    base: str, records: str, one_rank: None, strategy: str, method: Method
) -> None:
    plain, expected = run(base, records, method=method)
    watch, trainer = run(base, records, method=method, strategy=strategy)
    assert all(isinstance(layer, FSDPModule) for layer in layers_of(trainer))
    assert len(watch.losses) == 6
    assert watch.losses == pytest.approx(plain.losses, rel=1e-6)
    for one, other in zip(plain.gradients, watch.gradients, strict=True):
        assert torch.dist(one, other) <= 1e-6 * one.norm()
    assert float(trainer.callback_metrics["train/grad_norm"]) == pytest.approx(
        float(expected.callback_metrics["train/grad_norm"]), rel=1e-6
    )
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(
        float(expected.callback_metrics["val/loss"]), rel=1e-6
    )


@pytest.mark.parametrize("method", ["fft", "lora"])
def test_half_precision_computes_in_it_and_keeps_masters(
    base: str, records: str, one_rank: None, method: Method
) -> None:
    for precision, stored in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)):
        plain, _ = run(base, records, method=method, precision=precision)
        watch, trainer = run(base, records, method=method, precision=precision, strategy="fsdp2")
        # bf16 has 8 bits: norms and the sums between layers are rounded to it, which autocast leaves in fp32.
        assert watch.losses == pytest.approx(plain.losses, rel=3e-3)
        trained = {p.dtype for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert trained == {torch.float32 if method == "lora" else stored}


def test_a_run_goes_on_with_another_strategy_with_the_same_bits(
    base: str, records: str, one_rank: None, tmp_path: Path
) -> None:
    expected, _ = run(base, records, save_to=tmp_path / "whole")
    names = ["auto", "fsdp2", "auto", "fsdp2_cpu_offload"]
    losses, newest = [], None
    for steps, strategy in zip((1, 3, 4, 6), names, strict=True):
        watch, _ = run(base, records, save_to=tmp_path / "cut", ckpt_path=newest, strategy=strategy, max_steps=steps)
        losses += watch.losses
        newest = checkpoint.step_checkpoints(tmp_path / "cut")[0]
    assert losses == expected.losses  # one rank sums nothing in another order, so not a bit changes
    one, other = (checkpoint.read(checkpoint.step_path(tmp_path / name, 6)) for name in ("whole", "cut"))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        assert torch.equal(other["state_dict"][name], weight), name


def test_a_whole_tensor_is_shared_out_and_gathered_again(base: str, records: str, one_rank: None) -> None:
    _, trainer = run(base, records, strategy="fsdp2_cpu_offload", max_steps=1)
    optimizer = trainer.optimizers[0]
    assert all(isinstance(p, DTensor) for layer in layers_of(trainer) for p in layer.parameters())
    state: Any = trainer.strategy.optimizer_state(optimizer)
    assert not any(isinstance(value, DTensor) for values in state["state"].values() for value in values.values())
    shards = strategies.shard_optimizer_state(state, optimizer)
    again = strategies.gather(shards, keep=True)
    for number, values in state["state"].items():
        for name, value in values.items():
            assert torch.equal(again["state"][number][name], value)
    assert isinstance(shards["state"][0]["exp_avg"], DTensor)


@pytest.mark.gpu
def test_offload_keeps_parameters_and_optimizer_state_in_host_memory(base: str, records: str, one_rank: None) -> None:
    on: dict[str, Any] = {"accelerator": "gpu", "precision": "32-true", "max_steps": 2}
    plain, _ = run(base, records, **on)
    watch, trainer = run(base, records, strategy="fsdp2_cpu_offload", **on)
    assert watch.losses == pytest.approx(plain.losses, rel=1e-5)
    parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert bytes_on("cuda", [*parameters, *optimizer_tensors(trainer.optimizers[0])]) == 0
    assert all(p.is_pinned() for p in (p.to_local() for p in parameters) if p.numel())


# Two ranks ------------------------------------------------------------------------------------------------------------


def test_each_of_two_ranks_holds_half_and_both_do_what_one_does(records: str, tmp_path: Path) -> None:
    tied = str(tiny_base(tmp_path / "base", tied=True))  # a weight in two places; 273 rows, which two do not divide
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"base": tied, "records": records}))
    in_ranks("tests.sharded", job, world=sharded.WORLD)
    alone, held = sharded.run(tied, records, accumulate_grad_batches=4)
    ranks = [torch.load(job.with_suffix(f".{rank}.pt"), weights_only=True) for rank in range(sharded.WORLD)]
    assert [rank["made_empty"] for rank in ranks] == [False, True]  # one copy of the model on a machine
    for rank in ranks:
        assert len(rank["losses"]) == 6
        assert rank["losses"] == pytest.approx(alone.losses, rel=1e-5)
        for one, other in zip(alone.gradients, rank["gradients"], strict=True):
            assert torch.dist(one, other) <= 1e-5 * one.norm()
        for category, whole_bytes in held.bytes.items():
            assert 0.45 * whole_bytes < rank["bytes"][category] < 0.55 * whole_bytes, category
        assert "optimizer step 1" in rank["said"]  # all ranks stop, and say the same
        assert rank["said"] == ranks[0]["said"]


@pytest.fixture
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Return the session's workshop."""
    return workshop(tmp_path_factory.getbasetemp() / "reliability")


def test_a_sharded_run_that_was_killed_goes_on_with_the_same_bits(shop: Workshop) -> None:
    kind = "two ranks, sharded"
    directory = shop.directory("sharded, killed")
    ended = shop.attempt(kind, directory, blow=Blow(rank=1, at=STEPPING, count=8))
    assert ended.struck
    shop.finish(kind, directory)
    run = newest_run(directory)
    model = AutoModelForCausalLM.from_pretrained(run / "result", dtype=torch.float32)
    trained = checkpoint.read(checkpoint.step_checkpoints(run)[0])["state_dict"]
    assert {f"model.{name}" for name in model.state_dict()} == trained.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained[f"model.{name}"]), name


def test_a_run_goes_on_in_any_other_layout(shop: Workshop) -> None:
    kind = "two ranks, sharded"
    expected = whole(shop, kind)
    directory = cut(expected, shop.folder / "sharded, other layouts", 3)
    layouts = [("ddp", 2), ("fsdp2", 1), ("auto", 1), ("auto", 2)]  # the last: sharded, as in the beginning
    for (strategy, ranks), count in zip(layouts, (3, 3, 3, 99), strict=True):
        layout = ["--trainer.strategy", strategy, "--trainer.devices", str(ranks)]
        layout += ["--trainer.accumulate_grad_batches", str(4 // ranks)]
        ended = shop.attempt(
            kind, directory, *KEEP_ALL, *layout, ranks=ranks, blow=Blow(rank=None, at=STEPPING, count=count)
        )
        assert bool(ended.struck) == (count < 99), (ended, directory)
    one, other = curve(newest_run(expected)), curve(newest_run(directory))
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for row, same in zip(one, other, strict=True):
        for name in row:
            assert float(same[name]) == pytest.approx(float(row[name]), rel=1e-5), (name, row["step"])

"""The table of what goes together: cell by cell what it says, and that what it allows trains on a CPU."""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from lit_tune.data.instruct import InstructData
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.lora import Lora
from lit_tune.techniques import RULES, Choice, refusal
from tests.tiny import tiny_tokenizer
from tests.tiny_llama import tiny_llama
from tests.tiny_run import lit_tune, train, trained_weights, write_records

TECHNIQUES: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "fp4": {"quantize": "fp4"},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "pissa": {"variant": "pissa"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "16-mixed": {"precision": "16-mixed"},
    "16-true": {"precision": "16-true"},
    "checkpointing full": {"gradient_checkpointing": "full"},
    "checkpointing mlp": {"gradient_checkpointing": "mlp"},
    "checkpointing 2": {"gradient_checkpointing": 2},
    "offload": {"offload_activations": True},
    "accumulation": {"accumulate": 2},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "paged_adamw_8bit": {"optimizer": "paged_adamw_8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "sgd": {"optimizer": "sgd"},
    "step in backward": {"optimizer_in_backward": True},
}
DEVICES = ("cpu", "cuda")
METHODS = ("lora", "fft")
STRATEGIES = ("auto", "ddp", "fsdp2", "fsdp2_cpu_offload", "deepspeed_stage_3_offload")

# A cell is a point where the technique can be used and an x where it is refused. Strategies in the order above.
EXPECTED = """
                      cpu           cuda
                      lora   fft    lora   fft
    none              ...xx  ...xx  ...xx  .....
    int8              ..xxx  xxxxx  ..xxx  xxxxx
    nf4               ..xxx  xxxxx  ..xxx  xxxxx
    fp4               ..xxx  xxxxx  ..xxx  xxxxx
    rslora            ...xx  ...xx  ...xx  .....
    dora              ...xx  ...xx  ...xx  .....
    pissa             ...xx  ...xx  ...xx  .....
    bf16-mixed        ...xx  ...xx  ...xx  .....
    bf16-true         ...xx  ...xx  ...xx  .....
    16-mixed          xxxxx  xxxxx  ..xxx  ..xx.
    16-true           ...xx  xxxxx  ...xx  xxxxx
    checkpointing full ...xx ...xx  ...xx  .....
    checkpointing mlp ...xx  ...xx  ...xx  .....
    checkpointing 2   ...xx  ...xx  ...xx  .....
    offload           ...xx  ...xx  ...xx  .....
    accumulation      ...xx  ...xx  ...xx  .....
    adamw_8bit        ..xxx  ..xxx  ..xxx  ..xxx
    paged_adamw_8bit  xxxxx  xxxxx  ..xxx  ..xxx
    adafactor         ..xxx  ..xxx  ..xxx  ..xxx
    sgd               ...xx  ...xx  ...xx  .....
    step in backward  xxxxx  .xxxx  xxxxx  .xxxx
"""

NAMES = {field.name for field in fields(Choice)}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "method": METHODS,
    "quantize": ("none", "int8", "nf4", "fp4"),
    "variant": ("lora", "rslora", "dora", "pissa"),
    "optimizer": ("adamw", "adamw_8bit", "adafactor", "sgd"),
    "optimizer_in_backward": (False, True),
    "gradient_checkpointing": ("none", "full", "mlp", 2),
    "offload_activations": (False, True),
    "precision": ("32-true", "bf16-mixed", "bf16-true", "16-true"),
    "accumulate": (1, 2),
}


def choice_of(settings: dict[str, Any]) -> Choice:
    """Return a choice of those settings that the table asks for; the others go with everything."""
    return Choice(**{name: value for name, value in settings.items() if name in NAMES})


def expected() -> dict[str, list[str]]:
    """Return the rows of the picture: a technique's cells by device, then method, then strategy."""
    rows = {}
    for line in EXPECTED.splitlines()[3:]:
        if line.strip():
            *name, a, b, c, d = line.split()
            rows[" ".join(name)] = [a, b, c, d]
    return rows


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_cell_is_what_the_picture_shows(technique: str) -> None:
    found = [
        "".join(
            "."
            if refusal(choice_of(TECHNIQUES[technique] | {"device": device, "method": method, "strategy": name}))
            is None
            else "x"
            for name in STRATEGIES
        )
        for device in DEVICES
        for method in METHODS
    ]
    assert found == expected()[technique]


def test_the_picture_has_no_other_rows() -> None:
    assert expected().keys() == TECHNIQUES.keys()


FFT = Choice(method="fft")
IN_BACKWARD = Choice(method="fft", optimizer_in_backward=True)
SHARDED = Choice(method="fft", strategy="fsdp2")
# Each row's reason by a part of its text, on a choice that breaks no other, and what the text says to set instead.
REASONS: list[tuple[Choice, str, dict[str, Any]]] = [
    (replace(FFT, quantize="nf4"), "quantised weights cannot train", {"method": "lora"}),
    (Choice(quantize="int8", variant="pissa"), "model.lora.variant pissa", {"variant": "rslora"}),
    (Choice(quantize="int8", variant="dora"), "at the second forward pass", {"quantize": "nf4"}),
    (Choice(quantize="nf4", precision="64-true"), "16 or 32 bits", {"precision": "32-true"}),
    (Choice(quantize="int8", strategy="fsdp2"), "cannot be cut into shards", {"strategy": "ddp"}),
    (Choice(method="fft", strategy="fsdp2_cpu_offload"), "all is in host memory already", {"strategy": "auto"}),
    (
        Choice(strategy="fsdp2_cpu_offload", device="cuda"),
        "would cross the bus",
        {"strategy": "auto", "quantize": "nf4"},
    ),
    (Choice(strategy="deepspeed_stage_2"), "needs a CUDA GPU", {"strategy": "ddp"}),
    (Choice(precision="16-mixed"), "Lightning has no fp16", {"precision": "bf16-mixed"}),
    (replace(SHARDED, precision="16-mixed", device="cuda"), "one shard only", {"precision": "bf16-true"}),
    (replace(FFT, precision="16-true"), "vanish in fp16", {"precision": "bf16-true"}),
    (Choice(optimizer="paged_adamw_8bit"), "moves the pages", {"optimizer": "adamw_8bit"}),
    (replace(SHARDED, optimizer="adamw_8bit"), "cannot step sharded weights", {"optimizer": "adamw"}),
    (replace(SHARDED, optimizer="adafactor"), "those of a shard", {"optimizer": "sgd"}),
    (Choice(optimizer_in_backward=True), "whose gradients are small", {"method": "fft"}),
    (replace(IN_BACKWARD, devices=2), "on 2 device", {"devices": 1}),
    (replace(IN_BACKWARD, strategy="fsdp2"), "strategy fsdp2 on 1 device", {"strategy": "auto"}),
    (replace(IN_BACKWARD, accumulate=4), "4 micro-batches in an optimizer step", {"accumulate": 1}),
    (replace(IN_BACKWARD, clip=1.0), "set trainer.gradient_clip_val null", {"clip": None}),
    (
        replace(IN_BACKWARD, precision="16-mixed", device="cuda"),
        "scaler skips whole steps",
        {"precision": "bf16-mixed"},
    ),
    (replace(IN_BACKWARD, skip_nonfinite=3), "model.skip_nonfinite 3", {"skip_nonfinite": 0}),
    (Choice(gradient_checkpointing=0), "model.gradient_checkpointing is 0;", {"gradient_checkpointing": 1}),
]


@pytest.mark.parametrize(("choice", "reason", "remedy"), REASONS, ids=[reason for _, reason, _ in REASONS])
def test_a_refusal_tells_value_reason_and_remedy_in_a_line(choice: Choice, reason: str, remedy: dict[str, Any]) -> None:
    text = refusal(choice)
    assert text is not None
    assert text.startswith(("model.", "trainer."))
    assert reason in text
    assert text.endswith(".")
    assert "\n" not in text
    assert "{" not in text
    # What it says to set is in its last part, and helps.
    assert refusal(replace(choice, **remedy)) is None
    for value in remedy.values():
        shown = "null" if value is None else str(value)
        assert shown in text.rpartition(";" if ";" in text else "use")[2] or f"{shown} or more" in text, shown


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "ShardedStrategy", "DeepSpeedStrategy"])
def test_a_strategy_built_in_the_configuration_is_known_by_its_class(name: str) -> None:
    assert "cannot be cut into shards" in str(refusal(Choice(quantize="nf4", strategy=name, device="cuda")))
    assert refusal(replace(IN_BACKWARD, strategy="SingleDeviceStrategy")) is None


def test_every_row_of_the_table_has_a_reason_above() -> None:
    assert {rule.says for rule in RULES if any(rule.excludes(choice) for choice, _, _ in REASONS)} == {
        rule.says for rule in RULES
    }


# What is allowed trains -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocabulary=len(tokenizer), width=64).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl", 4)


class Step(Callback):
    """Keep the weights as they are before training, and the loss."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = trained_weights(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.loss = float(trainer.callback_metrics["train/loss"])


def trains_one_step(base: str, records: str, settings: dict[str, Any]) -> None:
    """Train one optimizer step of four samples, and see that every weight that trains has moved."""
    settings = dict(settings)
    lora = Lora(rank=4, dropout=0.1, targets="all-linear", variant=settings.pop("variant", "lora"))
    accumulate = settings.pop("accumulate", 1)
    trainer = {"precision": settings.pop("precision", "32-true"), "strategy": settings.pop("strategy", "auto")}
    data = InstructData(path=records, template="chatml", micro_batch_size=4 // accumulate)
    step, module = Step(), LlamaTuner(base=base, lora=lora, learning_rate=0.1, **settings)
    if module._offload is not None:
        module._offload.smallest_bytes = 0
    train(module, data, step, gradient_clip_val=None, accumulate_grad_batches=accumulate, max_steps=1, **trainer)
    assert step.loss == pytest.approx(7.2, abs=0.7)  # that of the base, for the adapters do nothing yet
    for name, weight in trained_weights(module).items():
        assert torch.isfinite(weight).all(), name
        # A's gradient is B's times something, and B begins at zero; an embedding moves where its tokens occur.
        if "lora_A" not in name or lora.variant == "pissa":
            assert not torch.equal(weight, step.before[name]), name


CELLS = [
    {"method": method, "strategy": strategy} | settings
    for method in METHODS
    for strategy in ("auto", "ddp")  # on one device; fsdp2's cells are tests/test_strategies.py's
    for settings in TECHNIQUES.values()
    if refusal(choice_of({"method": method, "strategy": strategy} | settings)) is None
    and not (method == "fft" and "variant" in settings)  # full training has no adapters
]


@pytest.fixture
def no_process_group() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.parametrize("settings", CELLS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_every_valid_cell_trains(base: str, records: str, settings: dict[str, Any]) -> None:
    trains_one_step(base, records, settings)


def pairs(settings: dict[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(settings.items(), 2))


def combinations_of_all_pairs() -> list[dict[str, Any]]:
    """Return valid choices among which every pair of options occurs that occurs in any of many valid choices."""
    draw = random.Random(0)
    drawn = [{name: draw.choice(options) for name, options in OPTIONS.items()} for _ in range(3000)]
    # Full training has no adapters to vary.
    drawn = [settings | ({"variant": "lora"} if settings["method"] == "fft" else {}) for settings in drawn]
    valid = [settings for settings in drawn if refusal(choice_of(settings)) is None]
    open_pairs = set().union(*map(pairs, valid))
    chosen = []
    while open_pairs:
        best = max(valid, key=lambda settings: len(pairs(settings) & open_pairs))
        chosen.append(best)
        open_pairs -= pairs(best)
    return chosen


@pytest.mark.parametrize(
    "settings", combinations_of_all_pairs(), ids=lambda settings: " ".join(map(str, settings.values()))
)
def test_any_two_valid_techniques_train_together(base: str, records: str, settings: dict[str, Any]) -> None:
    trains_one_step(base, records, settings)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(base: str, records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.chdir(tmp_path)
    quiet = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false")
    own = ("--model.method", "fft", "--model.optimizer_in_backward", "true", "--trainer.max_steps", "2")
    of = ("--model.base", base, "--data.path", records, "--data.template", "chatml", "--samples.prompts", "[]")
    return ("fit", *of, *own, *quiet)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "trainer.gradient_clip_val 1.0"),
        (("--trainer.gradient_clip_val", "null", "--data.global_batch_size", "2"), "2 micro-batches"),
        (("--trainer.precision", "16"), "16-mixed on a CPU"),
        (("--trainer.strategy", "ddp"), "strategy ddp on 1 device"),
        (("--model.gradient_checkpointing", "-1"), "model.gradient_checkpointing is -1"),
    ],
)
def test_fit_refuses_before_it_begins(
    command: tuple[str, ...], more: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = () if told.startswith("trainer.gradient_clip") else ("--trainer.gradient_clip_val", "null")
    assert lit_tune(*command, "--data.micro_batch_size", "1", *clip, *more) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert list(Path("runs").iterdir()) == []


def test_fit_trains_with_steps_in_the_backward_pass(command: tuple[str, ...]) -> None:
    more = ("--trainer.gradient_clip_val", "null", "--model.gradient_checkpointing", "2", "--name", "a")
    assert lit_tune(*command, *more, "--data.micro_batch_size", "2", "--model.offload_activations", "true") == 0
    rows = (Path("runs") / "a" / "metrics.csv").read_text().splitlines()
    assert "train/grad_norm" in rows[0]
    assert json.loads((Path("runs") / "a" / "result" / "config.json").read_text())["num_hidden_layers"] == 2

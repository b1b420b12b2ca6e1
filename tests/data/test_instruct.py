import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from lit_tune.data.instruct import InstructData, Prepared, bundled_sample, content_digest, last_prompt, split
from lit_tune.data.loader import SizedTrainLoader, TrainLoader
from lit_tune.data.packing import Cut
from lit_tune.data.prompts import encode_record
from lit_tune.data.records import Message, Record
from lit_tune.errors import InputError
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
COUNT = 20


def write_records(path: Path, count: int = COUNT, *, output: str = "yes ") -> str:
    """Write Alpaca records of growing length, with byte tokens about 165 to 245 each."""
    records = [{"instruction": f"Say it {i} times.", "output": output * (i + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_records(tmp_path / "records.jsonl")


def prepared(
    *, world: int = 1, rank: int = 0, accumulate: int = 1, steps_done: int = 0, **settings: Any
) -> InstructData:
    """Make a data module as it is when a trainer has set it up and done so many optimizer steps."""
    data = InstructData(**settings)
    data.prepare(lambda: TOKENIZER)
    trainer: Any = SimpleNamespace(
        world_size=world, global_rank=rank, accumulate_grad_batches=accumulate, global_step=steps_done
    )
    data.trainer = trainer
    return data


def refusal(call: Callable[[], object]) -> str:
    """Return what the user is told: one line."""
    with pytest.raises(InputError) as refused:
        call()
    text = str(refused.value)
    assert "\n" not in text
    return text


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["micro_batch_size", "micro_batch_tokens", "global_batch_size"])
@pytest.mark.parametrize("value", [0, -4])
def test_batches_of_nothing_are_refused(name: str, value: int) -> None:
    settings: dict[str, Any] = {name: value}
    assert refusal(lambda: InstructData(**settings)) == f"data.{name} is {value}; it must be 1 or more."


@pytest.mark.parametrize("other", ["micro_batch_size", "global_batch_size"])
def test_a_batch_is_counted_in_tokens_or_in_samples(other: str) -> None:
    settings: dict[str, Any] = {other: 4, "micro_batch_tokens": 512}
    told = refusal(lambda: InstructData(**settings))
    assert "data.micro_batch_tokens" in told
    assert f"data.{other}" in told


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 7.0, math.nan])
def test_a_val_fraction_that_is_none_is_refused(fraction: float) -> None:
    assert refusal(lambda: InstructData(val_fraction=fraction)).startswith(f"data.val_fraction is {fraction};")


def test_val_fraction_and_val_path_exclude_each_other(path: str) -> None:
    told = refusal(lambda: InstructData(val_fraction=0.1, val_path=path))
    assert told == "data.val_fraction and data.val_path are both given; validation takes one of them."


def test_a_sample_needs_a_token_to_predict_another_from() -> None:
    assert refusal(lambda: InstructData(max_length=1)) == "data.max_length is 1; it must be 2 or more."
    assert InstructData(max_length=2).max_length == 2


# Accumulation ---------------------------------------------------------------------------------------------------------


def test_without_a_global_batch_the_given_accumulation_holds() -> None:
    assert [InstructData(micro_batch_size=3).accumulation(world=2, given=given) for given in (1, 5)] == [1, 5]


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "derived"),
    [
        (32, 4, 1, 8),
        (32, 4, 2, 4),
        (32, 4, 8, 1),
        (32, None, 2, 4),  # the default of 4 samples
        (32, 4, 16, 1),  # a rank's share is less than a micro-batch: it becomes the micro-batch
        (6, 8, 3, 1),
    ],
)
def test_accumulation_follows_from_the_global_batch(
    global_batch: int, micro_batch: int | None, world: int, derived: int
) -> None:
    data = InstructData(global_batch_size=global_batch, micro_batch_size=micro_batch)
    assert data.accumulation(world=world, given=1) == derived
    assert data.accumulation(world=world, given=derived) == derived


def test_devices_times_accumulation_times_micro_batch_is_the_global_batch() -> None:
    made = 0
    for global_batch, micro_batch, world in product(range(1, 25), range(1, 9), range(1, 7)):
        data = InstructData(global_batch_size=global_batch, micro_batch_size=micro_batch)
        try:
            accumulate = data.accumulation(world=world, given=1)
        except InputError:
            assert global_batch % world or (global_batch // world) % micro_batch
            continue
        cut = data.cut(world=world, accumulate=accumulate)
        assert cut.samples is not None
        assert cut.samples <= micro_batch
        assert cut.samples * cut.slots == global_batch
        made += 1
    assert made > 100


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world"),
    [
        (10, 4, 1),  # 10 samples are no whole number of micro-batches of 4
        (10, 5, 4),  # nor do they divide over 4 devices
        (2, 4, 3),  # a device would have nothing to do
    ],
)
def test_a_global_batch_that_cannot_be_divided_is_refused(global_batch: int, micro_batch: int, world: int) -> None:
    data = InstructData(global_batch_size=global_batch, micro_batch_size=micro_batch)
    told = refusal(lambda: data.accumulation(world=world, given=1))
    assert told.startswith(f"data.global_batch_size {global_batch} is not devices x micro-batches x samples: {world} ")


def test_an_accumulation_that_disagrees_with_the_global_batch_is_refused() -> None:
    data = InstructData(global_batch_size=32, micro_batch_size=4)
    told = refusal(lambda: data.accumulation(world=2, given=3))
    assert told.startswith("trainer.accumulate_grad_batches is 3, but data.global_batch_size 32 on 2 devices with")
    assert "makes it 4;" in told


def test_how_a_step_is_cut() -> None:
    assert InstructData().cut(world=2, accumulate=3) == Cut(2, 3, samples=4, tokens=None, packing=True)
    assert InstructData(micro_batch_size=7, packing=False).cut(world=1, accumulate=1) == Cut(
        1, 1, samples=7, tokens=None, packing=False
    )
    assert InstructData(micro_batch_tokens=2048).cut(world=4, accumulate=1) == Cut(
        4, 1, samples=None, tokens=2048, packing=True
    )


# Holding samples out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(20, 0.25, 5), (52002, 0.05, 2600), (3, 0.1, 0), (7, 0, 0)]
)
def test_the_split_is_disjoint_and_complete(count: int, fraction: float, held_out: int) -> None:
    train, val = split(count, fraction)
    assert len(val) == held_out
    assert sorted([*train, *val]) == list(range(count))
    assert train == sorted(train)
    assert val == sorted(val)


def test_the_split_is_the_same_for_every_seed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for seed in (0, 1):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        np.random.seed(seed)
        ready = ready_of(prepared(path=path, val_fraction=0.25))
        assert ready.val is not None
        ids.append((ready.train.ids.tolist(), ready.val.ids.tolist()))
    assert ids[0] == ids[1] == split(COUNT, 0.25)


def test_held_out_samples_are_not_merely_the_last_ones() -> None:
    _, val = split(1000, 0.1)
    assert 400 < np.mean(val) < 600


def trained(data: InstructData) -> list[dict[str, Any]]:
    """Train to the end of an epoch, counting the steps as a trainer does; return the batches."""
    trainer: Any = data.trainer
    batches = []
    for batch in data.train_dataloader():
        batches.append(batch)
        trainer.global_step += batch["last_of_step"]
    return batches


def ready_of(data: InstructData) -> Prepared:
    assert data.prepared is not None
    return data.prepared


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_fraction_that_leaves_nothing_is_refused(path: str, fraction: float) -> None:
    told = refusal(lambda: prepared(path=path, val_fraction=fraction))
    assert told.startswith(f"data.val_fraction {fraction} of 20 samples leaves ")


def test_a_file_of_ones_own_is_held_out_whole(path: str, tmp_path: Path) -> None:
    val_path = write_records(tmp_path / "val.jsonl", 3, output="no ")
    ready = ready_of(prepared(path=path, limit="[0:10]", val_path=val_path))
    assert len(ready.train) == 10
    assert ready.val is not None
    assert len(ready.val) == 3  # the limit is of the training records
    assert "no no" in TOKENIZER.decode(ready.val.sample(1)[0])


def test_without_held_out_samples_there_is_nothing_to_validate_with(path: str) -> None:
    data = prepared(path=path)
    assert data.val_dataloader() == data.test_dataloader() == []


@pytest.mark.parametrize("settings", [{}, {"micro_batch_tokens": 512}, {"global_batch_size": 8}])
def test_ranks_validate_with_all_held_out_samples(path: str, settings: dict[str, Any]) -> None:
    counts = []
    for rank in range(2):
        data = prepared(world=2, rank=rank, accumulate=4, path=path, val_fraction=0.35, **settings)
        counts.append([batch["num_samples"] for batch in data.val_dataloader()])
    assert sum(chain(*counts)) == 7
    assert len(counts[0]) == len(counts[1])


# Preparation ----------------------------------------------------------------------------------------------------------


def test_records_become_samples(path: str) -> None:
    ready = ready_of(prepared(path=path))
    assert ready.train.ids.tolist() == list(range(COUNT))
    message = Message("user", "Say it 0 times.", instruction="Say it 0 times.")
    record = Record(0, (message, Message("assistant", "yes ")))
    tokens, supervised = encode_record(record, ready.template, TOKENIZER)
    assert ready.train.sample(0)[0].tolist() == tokens
    assert supervised[-1]


def test_the_first_call_does_the_work(path: str) -> None:
    loads = []

    def load_tokenizer() -> PreTrainedTokenizerBase:
        loads.append(1)
        return TOKENIZER

    data = InstructData(path=path)
    assert data.prepare(load_tokenizer) is data.prepare(load_tokenizer)
    assert len(loads) == 1


def test_left_out_the_path_means_the_sample_of_the_package() -> None:
    assert InstructData().path == bundled_sample()
    assert Path(bundled_sample()).is_file()


def test_settings_reach_the_records(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": f"Q{i}", "output": "A" * 20 * i}) + "\n" for i in range(1, 11)))
    settings: dict[str, Any] = {"path": str(file), "columns": {"instruction": "question"}, "limit": "[0:8]"}
    assert len(ready_of(prepared(**settings)).train) == 8
    short = ready_of(prepared(**settings, max_length=250)).train
    assert short.counts["dropped"] > 0
    assert short.lengths.max() <= 250
    cut_off = ready_of(prepared(**settings, max_length=250, over_length="truncate")).train
    assert len(cut_off) == 8
    assert "over_length" in refusal(lambda: prepared(**settings, max_length=250, over_length="fail"))


def test_the_tokenizers_own_template_can_be_named(path: str) -> None:
    own = tiny_tokenizer(
        chat_template="{% for message in messages %}<|im_start|>{{ message.role }}:{{ message.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    data = InstructData(path=path, template="chat")
    data.prepare(lambda: own)
    assert own.decode(data.encode_prompt("Hi")) == "<s><|im_start|>user:Hi<|im_end|><|im_start|>assistant:"
    assert data.stop_token_ids() == own.convert_tokens_to_ids(["</s>", "<|im_end|>"])


def test_a_prompt_is_the_beginning_of_the_sample_made_of_it(path: str) -> None:
    data = prepared(path=path)
    prompt = data.encode_prompt("Say it 3 times.")
    tokens, labels = ready_of(data).train.sample(3)
    assert tokens[: len(prompt)].tolist() == prompt
    assert labels[len(prompt) - 1] == -100
    assert (labels[len(prompt) :] != -100).all()
    assert data.stop_token_ids() == [TOKENIZER.eos_token_id]


@pytest.mark.parametrize("setting", ["path", "val_path"])
def test_a_token_budget_must_hold_the_longest_sample(path: str, tmp_path: Path, setting: str) -> None:
    short = write_records(tmp_path / "short.jsonl", 2)
    files: dict[str, Any] = {"path": short, "val_path": short} | {setting: path}
    longest = int(ready_of(prepared(path=path)).train.lengths.max())
    told = refusal(lambda: prepared(**files, micro_batch_tokens=longest - 1))
    assert told.startswith(
        f"data.micro_batch_tokens is {longest - 1}, but the longest sample of {path} has {longest} tokens;"
    )
    assert prepared(**files, micro_batch_tokens=longest).prepared is not None


# Training -------------------------------------------------------------------------------------------------------------


def test_only_batches_of_samples_promise_a_length(path: str) -> None:
    assert type(prepared(path=path).train_dataloader()) is SizedTrainLoader
    assert type(prepared(path=path, micro_batch_tokens=512).train_dataloader()) is TrainLoader


@pytest.mark.parametrize("settings", [{"micro_batch_size": 3}, {"micro_batch_tokens": 512}])
def test_optimizer_steps_are_those_that_training_makes(path: str, settings: dict[str, Any]) -> None:
    data = prepared(accumulate=2, path=path, **settings)
    done = [0]
    for _ in range(4):
        done.append(done[-1] + len({batch["step"] for batch in trained(data)}))
    assert [data.optimizer_steps(epochs) for epochs in range(5)] == done
    assert data.optimizer_steps(4, at_most=done[2] - 1) == done[2] - 1


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "steps"),
    [(3, -1, 21), (3, 5, 5), (3, 99, 21), (-1, 40, 40), (None, 40, 40), (3, 0, 1)],
)
def test_the_schedule_is_as_long_as_the_run(path: str, max_epochs: int | None, max_steps: int, steps: int) -> None:
    data = prepared(path=path, micro_batch_size=3)  # 20 samples: 7 steps an epoch
    trainer: Any = data.trainer
    trainer.max_epochs, trainer.max_steps = max_epochs, max_steps
    assert data.total_steps() == steps


def test_the_seed_orders_the_samples(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_row(seed: str) -> list[int]:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        row: list[int] = next(iter(prepared(path=path).train_dataloader()))["input_ids"].flatten().tolist()
        return row

    assert first_row("1") == first_row("1") != first_row("2")


# Prediction -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_fraction", [0.0, 0.35])
def test_ranks_answer_every_prompt_once_held_out_ones_where_there_are_any(path: str, val_fraction: float) -> None:
    batches = [
        batch
        for rank in range(2)
        for batch in prepared(world=2, rank=rank, path=path, val_fraction=val_fraction).predict_dataloader()
    ]
    ids = [record for batch in batches for record in batch["ids"]]
    assert sorted(ids) == (split(COUNT, val_fraction)[1] or list(range(COUNT)))
    data = prepared(path=path)
    prompts = [prompt for batch in batches for prompt in batch["prompts"]]
    assert prompts == [data.encode_prompt(f"Say it {record} times.") for record in ids]
    assert all(batch["stop_token_ids"] == [TOKENIZER.eos_token_id] for batch in batches)


def test_of_a_conversation_the_last_answer_is_asked_for() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 6, 7, 8])
    labels = np.array([-100, -100, 3, 4, -100, 6, 7, 8])
    assert last_prompt(tokens, labels) == [1, 2, 3, 4, 5]


# Going on -------------------------------------------------------------------------------------------------------------


SETTINGS = {
    "seed_everything",
    "data.template",
    "data.max_length",
    "data.over_length",
    "data.limit",
    "data.val_fraction",
    "data.global_batch_size",
    "data.path",
}
BATCHES = pytest.mark.parametrize("batch", [{"micro_batch_size": 3}, {"micro_batch_tokens": 512}], ids=str)


@BATCHES
def test_a_new_module_goes_on_after_the_trainers_steps(path: str, batch: dict[str, Any]) -> None:
    whole = prepared(accumulate=2, path=path, **batch)
    batches = trained(whole) + trained(whole)
    for done in range(batches[-1]["step"]):
        first = prepared(accumulate=2, path=path, steps_done=done, **batch)
        second = prepared(accumulate=2, path=path, steps_done=done, **batch)
        second.load_state_dict(first.state_dict())
        expected = next(part for part in batches if part["step"] == done)
        following = next(iter(second.train_dataloader()))
        assert following["sample_ids"] == expected["sample_ids"]
        assert (following["step"], following["epoch"]) == (done, expected["epoch"])


@BATCHES
def test_a_state_knows_the_epoch_so_that_none_before_it_is_planned(
    path: str, monkeypatch: pytest.MonkeyPatch, batch: dict[str, Any]
) -> None:
    first = prepared(path=path, **batch)
    steps = [first.optimizer_steps(epochs) for epochs in range(4)]
    trainer: Any = first.trainer
    trainer.global_step = steps[3]  # the third epoch is over
    state = first.state_dict()
    assert (state["epoch"], state["steps_before_epoch"]) == (2, steps[2])

    second = prepared(path=path, steps_done=steps[3], **batch)
    source = second.source()
    counted: list[int] = []
    count = source.steps_in

    def steps_in(epoch: int) -> int:
        counted.append(epoch)
        return count(epoch)

    monkeypatch.setattr(source, "steps_in", steps_in)
    second.load_state_dict(state)
    assert next(iter(second.train_dataloader()))["epoch"] == 3
    assert set(counted) <= {2, 3}


def test_before_the_first_step_a_state_is_at_the_beginning(path: str) -> None:
    state = prepared(path=path).state_dict()
    assert (state["epoch"], state["steps_before_epoch"]) == (0, 0)


@BATCHES
def test_a_step_ends_after_all_its_micro_batches(path: str, batch: dict[str, Any]) -> None:
    data = prepared(accumulate=2, path=path, **batch)
    places = []
    for epoch in range(2):
        for k, part in enumerate(batches := trained(data), start=1):
            if part["last_of_step"]:
                places.append((epoch, k, k == len(batches)))
    assert [data.place_after(step) for step in range(len(places))] == places


@BATCHES
def test_on_another_number_of_devices_a_step_ends_elsewhere(path: str, batch: dict[str, Any]) -> None:
    alone = prepared(world=1, accumulate=4, path=path, **batch)
    pair = prepared(world=2, accumulate=2, path=path, **batch)
    pair.load_state_dict(alone.state_dict())  # the same samples in every step
    for step in range(alone.optimizer_steps(2)):
        (epoch, batches, ends), (pair_epoch, pair_batches, pair_ends) = (
            data.place_after(step) for data in (alone, pair)
        )
        assert (epoch, ends) == (pair_epoch, pair_ends)
        assert pair_batches <= batches <= 2 * pair_batches
    assert pair.place_after(0)[1] == 2
    assert alone.place_after(0)[1] == 4


def test_the_source_follows_the_trainers_cut_and_the_seed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(path=path, micro_batch_size=2)
    first = data.source()
    assert data.source() is first
    trainer: Any = data.trainer
    trainer.accumulate_grad_batches = 5
    assert data.source().cut == Cut(1, 5, samples=2, tokens=None, packing=True)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert data.source().seed == 3


# What may not change --------------------------------------------------------------------------------------------------


def test_the_settings_are_what_decides_on_the_samples(path: str) -> None:
    settings = prepared(path=path, limit=[0, 12], global_batch_size=8, micro_batch_size=2, accumulate=4).settings()
    assert set(settings) == SETTINGS
    assert settings["data.limit"] == ["0", "12"]
    assert settings["data.global_batch_size"] == "8 samples"
    assert json.loads(json.dumps(settings)) == settings  # a checkpoint is read with weights_only


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"accumulate": 4, "micro_batch_size": 2}, {"world": 2, "accumulate": 1, "micro_batch_size": 4}),
        ({"global_batch_size": 8, "accumulate": 8}, {"micro_batch_size": 8, "packing": False}),
        ({"accumulate": 4, "micro_batch_tokens": 512}, {"world": 4, "micro_batch_tokens": 512}),
    ],
)
def test_how_a_global_batch_is_cut_is_no_such_setting(path: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert prepared(path=path, **one).settings() == prepared(path=path, **other).settings()


# The setting that changes, how the checkpoint was made, how the run goes on, and what is said of both.
CHANGES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("data.limit", {"limit": "[0:18]"}, {"limit": "[0:19]"}, "made with [0:18], this run has [0:19]"),
    ("data.limit", {}, {"limit": 19}, "made with None, this run has 19"),
    ("data.template", {}, {"template": "chatml"}, "made with alpaca, this run has chatml"),
    ("data.max_length", {}, {"max_length": 300}, "made with 1024, this run has 300"),
    ("data.over_length", {}, {"over_length": "truncate"}, "made with drop, this run has truncate"),
    ("data.val_fraction", {}, {"val_fraction": 0.1}, "made with 0.0, this run has 0.1"),
    (
        "data.global_batch_size",
        {"micro_batch_size": 2},
        {"micro_batch_size": 2, "accumulate": 2},
        "made with 2 samples, this run has 4 samples",
    ),
    (
        "data.global_batch_size",
        {"micro_batch_tokens": 512},
        {"micro_batch_tokens": 600},
        "made with 1 x 512 tokens, packed, this run has 1 x 600 tokens, packed",
    ),
    (
        "data.global_batch_size",
        {"micro_batch_tokens": 512},
        {"micro_batch_tokens": 512, "packing": False},
        "made with 1 x 512 tokens, packed, this run has 1 x 512 tokens, padded",
    ),
]


@pytest.mark.parametrize(("name", "before", "after", "said"), CHANGES)
def test_a_changed_setting_is_refused_by_name_or_taken_if_allowed(
    path: str, name: str, before: dict[str, Any], after: dict[str, Any], said: str
) -> None:
    state = prepared(path=path, **before).state_dict()
    data = prepared(path=path, **after)
    told = refusal(lambda: data.load_state_dict(state))
    assert told.startswith(f"{name}: the checkpoint was ")
    assert said in told
    assert f"--allow_changed {name}" in told
    data.allow_changed = [name]  # the tokens that follow from it need no word of their own
    data.load_state_dict(state)


def test_another_seed_is_refused_or_taken(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = prepared(path=path).state_dict()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    data = prepared(path=path)
    told = refusal(lambda: data.load_state_dict(state))
    assert told.startswith("seed_everything: the checkpoint was made with 0, this run has 7. ")
    data.allow_changed = ["seed_everything"]
    data.load_state_dict(state)


@pytest.mark.parametrize("allowed", [[], ["data.limit"], ["seed_everything", "model.learning_rate"]])
def test_other_records_are_refused_wherever_they_lie(path: str, tmp_path: Path, allowed: list[str]) -> None:
    state = prepared(path=path).state_dict()
    edited = write_records(tmp_path / "edited.jsonl", output="yes!")  # as many samples, as long ones
    data = prepared(path=edited)
    data.allow_changed = allowed  # of other settings, which have not changed
    told = refusal(lambda: data.load_state_dict(state))
    assert told.startswith("data.path: the checkpoint was made with content ")
    data.allow_changed = ["data.path"]
    data.load_state_dict(state)
    moved = prepared(path=write_records(tmp_path / "moved.jsonl"))
    moved.load_state_dict(state)


@pytest.mark.parametrize("function", [TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING])
def test_a_checkpoint_may_be_measured_on_other_records(path: str, tmp_path: Path, function: TrainerFn) -> None:
    state = prepared(path=path).state_dict()
    other = prepared(path=write_records(tmp_path / "edited.jsonl", output="yes!"), max_length=299)
    trainer: Any = other.trainer
    trainer.state = SimpleNamespace(fn=TrainerFn.FITTING)
    assert refusal(lambda: other.load_state_dict(state)).startswith("data.")
    trainer.state.fn = function
    other.load_state_dict(state)


def test_another_global_batch_is_counted_anew_if_taken(path: str) -> None:
    first = prepared(path=path, micro_batch_size=2)  # 10 steps an epoch
    trainer: Any = first.trainer
    trainer.global_step = 12
    second = prepared(path=path, micro_batch_size=4, steps_done=12)  # 5 steps an epoch
    second.allow_changed = ["data.global_batch_size"]
    second.load_state_dict(first.state_dict())
    assert second.place_after(11) == (2, 2, False)
    assert next(iter(second.train_dataloader()))["epoch"] == 2


def test_the_digest_is_of_what_is_trained_on(path: str, tmp_path: Path) -> None:
    moved = write_records(tmp_path / "moved.jsonl")
    same = [ready_of(prepared(path=file)).train for file in (path, moved)]
    assert content_digest(same[0]) == content_digest(same[1])
    assert content_digest(same[0].subset([0, 1])) != content_digest(same[0].subset([1, 0]))
    # Other labels for the same tokens, as a template may give that supervises other turns.
    relabelled = replace(same[0], supervised=~same[0].supervised)
    assert content_digest(same[0]) != content_digest(relabelled)

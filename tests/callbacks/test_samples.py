import html
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.plugin_util import markdown_to_safe_html  # type: ignore[import-untyped]

from lit_tune.callbacks import samples as samples_module
from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.callbacks.samples import Samples, literal_markdown, sample_markdown
from lit_tune.checkpoint import step_path

from .tiny import VOCABULARY, TinyLoader, TinyModule, fit, make_trainer

LENGTHS = [9, 14, 6, 11]


def bound_samples(**settings: Any) -> Samples:
    samples = Samples(prompts=["abc", "a longer prompt"], max_new_tokens=6, **settings)
    samples.bind(
        encode_prompt=lambda text: [ord(character) % VOCABULARY for character in text],
        decode=lambda tokens: "".join(chr(65 + token) for token in tokens),
        stop_token_ids=[2],
        pad_token_id=2,
    )
    return samples


def trained_weights(tmp_path: Path, callbacks: list[Any]) -> dict[str, torch.Tensor]:
    """Train with dropout, whose random numbers any disturbance would shift."""
    torch.manual_seed(7)
    module = TinyModule(attention_dropout=0.3)
    torch.manual_seed(8)
    trainer = make_trainer(tmp_path, callbacks, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, TinyLoader(LENGTHS, accumulate=2), TinyLoader([8]))
    return module.state_dict()


def test_training_is_bitwise_the_same(tmp_path: Path) -> None:
    samples = bound_samples(every_n_steps=1)
    without = trained_weights(tmp_path, [])
    with_samples = trained_weights(tmp_path, [samples])
    assert len(samples.history) == 5
    assert all(torch.equal(with_samples[name], weight) for name, weight in without.items())


def test_samples_before_training_after_every_epoch_and_once_a_step(tmp_path: Path) -> None:
    samples = bound_samples()
    trainer = make_trainer(tmp_path, [samples], max_epochs=2)
    module = TinyModule()
    paused: list[int] = []
    samples._before_sampling = lambda: paused.append(trainer.global_step)
    trainer.fit(module, TinyLoader(LENGTHS))
    assert [step for step, _ in samples.history] == [0, 4, 8]
    assert paused == [0, 4, 8]
    assert all(len(answers) == 2 for _, answers in samples.history)
    assert samples.history[0][1] != samples.history[-1][1]
    assert all(child.training for child in module.modules())


def test_does_nothing_unbound(tmp_path: Path) -> None:
    samples = Samples(every_n_steps=1)
    make_trainer(tmp_path, [samples]).fit(TinyModule(), TinyLoader(LENGTHS))
    assert samples.history == []


def test_a_resumed_run_keeps_the_answers_from_before_training(tmp_path: Path) -> None:
    samples, resumed = bound_samples(), bound_samples()
    fit(tmp_path, Checkpoint(every_n_steps=1, keep_last=9), samples, lengths=LENGTHS)
    fit(tmp_path, Checkpoint(), resumed, lengths=LENGTHS, ckpt_path=step_path(tmp_path, 2))
    assert [step for step, _ in samples.history] == [0, 4]
    assert resumed.history == samples.history


@pytest.mark.parametrize(("sharded", "expected"), [(False, 0), (True, 1)])
def test_other_ranks_generate_only_where_the_weights_are_sharded(
    monkeypatch: pytest.MonkeyPatch, sharded: bool, expected: int
) -> None:
    monkeypatch.setattr(samples_module, "is_sharded", lambda model: sharded)
    samples = bound_samples()
    trainer: Any = SimpleNamespace(
        global_step=0,
        is_global_zero=False,
        loggers=[],
        precision_plugin=SimpleNamespace(forward_context=torch.no_grad),
    )
    samples.on_train_start(trainer, TinyModule())
    assert len(samples.history) == expected


def test_replicated_weights_are_not_sharded() -> None:
    assert not samples_module.is_sharded(TinyModule())


def test_answers_are_text_in_tensorboard(tmp_path: Path) -> None:
    samples = bound_samples()
    trainer = make_trainer(tmp_path, [samples], logger=TensorBoardLogger(tmp_path, name="", version=""))
    trainer.fit(TinyModule(), TinyLoader(LENGTHS))
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = [f"samples/{index}/text_summary" for index in (0, 1)]
    assert set(tags) <= set(events.Tags()["tensors"])
    shown = events.Tensors(tags[1])
    assert [event.step for event in shown] == [0, 3]
    last = shown[-1].tensor_proto.string_val[0].decode()
    assert last == sample_markdown("a longer prompt", samples.history[-1][1][1])


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script> & <b>bold</b>",
        "**not bold** _nor this_ `nor code` ~~nor this~~",
        "# no heading\n- no list\n1. nor this\n\n    no code block\n\n> no quote",
        "![no image](http://example.org/x.png) [no link](http://example.org)",
        "a | b\n--- | ---\n1 | 2",
        "back\\slash \\* and &amp; as written",
    ],
)
def test_nothing_in_an_answer_takes_effect(text: str) -> None:
    """The reference is TensorBoard's own renderer."""
    rendered = markdown_to_safe_html(literal_markdown(text))
    inside = rendered.removeprefix("<p>").removesuffix("</p>")
    lines = inside.split("<br>")
    assert not any("<" in line for line in lines)
    shown = [html.unescape(line).replace("\xa0", " ") for line in lines]
    assert shown == text.splitlines()


def test_an_empty_answer_is_no_error() -> None:
    assert sample_markdown("Say nothing.", "").endswith("**Answer**\n\n")

import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from lit_tune.modules.llama import LlamaTuner
from lit_tune.predict import Case, predict
from lit_tune.remedies import advised, changes, flops_per_token, largest_that_fits, options
from lit_tune.workload import MicroBatch


def case(*, method: Any = "lora", samples: int = 4, **settings: Any) -> Case:
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4
    )
    tuner = LlamaTuner(base="llama2-7b", method=method, **settings)
    return Case(tuner, config, MicroBatch((512,) * samples, 500 * samples), "bf16-mixed")


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_all_that_is_offered_fits_and_says_how(method: str) -> None:
    of = case(method=method)
    room = int(0.8 * predict(of).peak.total)
    offered = options(of, predict(of), room)
    assert offered
    for option in offered:
        assert predict(option.case).peak.total == option.found.peak.total <= room
        words = shlex.split(option.flags)
        assert all(word.startswith("--") for word in words[::2])
        assert len(words) % 2 == 0


def test_a_run_that_ran_out_of_memory_is_advised_with_figures() -> None:
    of = case()
    room = int(0.8 * predict(of).peak.total)
    advice = advised(of, predict(of), room)
    assert [change.flags for change in advice] == [option.flags for option in options(of, predict(of), room)]
    by_flags = {change.flags: change for change in advice}
    full = by_flags["--model.gradient_checkpointing full"]
    assert re.fullmatch(r"\d+\.\d\d GiB predicted, compute x 1\.\d\d; the same losses", full.effect)
    assert not full.fresh
    assert not by_flags["--data.micro_batch_size 2 --trainer.accumulate_grad_batches 2"].fresh
    fft = case(method="fft")
    others = {change.flags: change for change in advised(fft, predict(fft), int(0.95 * predict(fft).peak.total))}
    assert others["--model.method lora"].fresh


def test_changes_that_only_do_together_are_offered_without_those_not_needed() -> None:
    of = case()
    least = min(predict(made).peak.total for change in changes(of) if (made := change.applied(of)) is not None)
    (offered,) = options(of, predict(of), int(0.98 * least))
    assert offered.found.peak.total <= 0.98 * least
    assert offered.flags.count("--model.") + offered.flags.count("--data.") >= 2


def test_a_smaller_micro_batch_keeps_the_global_batch() -> None:
    of = case(samples=4)
    for change in changes(of):
        if "micro_batch_size" in change.flags:
            made = change.applied(of)
            assert made is not None
            assert len(made.micro.lengths) * made.accumulate == 4
            assert f"accumulate_grad_batches {made.accumulate}" in change.flags


def test_a_smaller_budget_of_tokens_keeps_the_samples_of_a_step_too() -> None:
    of = replace(case(samples=4), token_budget=2048)
    made = {change.flags: change.applied(of) for change in changes(of) if "micro_batch" in change.flags}
    assert list(made) == [
        "--data.micro_batch_tokens 1024 --trainer.accumulate_grad_batches 2",
        "--data.micro_batch_tokens 512 --trainer.accumulate_grad_batches 4",
    ]
    assert [found and (found.micro.tokens, found.accumulate) for found in made.values()] == [(1024, 2), (512, 4)]
    too_long = replace(of, token_budget=600)
    assert [c.applied(too_long) for c in changes(too_long) if "micro_batch" in c.flags] == [None, None]


def test_each_method_is_offered_its_own() -> None:
    lora = " ".join(change.flags for change in changes(case()) if change.make(case()) is not None)
    fft = " ".join(
        change.flags for change in changes(case(method="fft")) if change.make(case(method="fft")) is not None
    )
    assert "quantize nf4" in lora
    assert "quantize" not in fft
    assert "optimizer_in_backward" in fft
    assert "optimizer_in_backward" not in lora


def test_the_largest_that_fits_is_found_between_what_fits_and_what_does_not() -> None:
    of = case()

    def micro(count: int) -> MicroBatch:
        return MicroBatch((64,) * count, 60 * count)

    def peak(count: int) -> int:
        return predict(replace(of, micro=micro(count))).peak.total

    room = peak(30) + 1
    most = largest_that_fits(of, room, sizes=micro)
    assert most == 30
    assert peak(most) <= room < peak(most + 1)
    assert largest_that_fits(of, peak(1), sizes=micro) == 1
    assert largest_that_fits(of, peak(1) - 1, sizes=micro) == 0


def test_recomputing_costs_compute() -> None:
    none, mlp, full = (
        flops_per_token(of, predict(of))
        for of in (case(gradient_checkpointing=setting) for setting in ("none", "mlp", "full"))
    )
    assert none < mlp < full

import contextlib
import copy
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import peft
import pytest
import torch
from torch import nn
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

from lit_tune.errors import InputError
from lit_tune.generate import autocast_dtype, decoding, generate, left_pad, until_stop

PAD, BOS, EOS = 0, 1, 2
# Unequal lengths, not in order, two of them equal
PROMPTS = [[BOS, 5, 6, 7], [BOS, 9], [BOS, 11, 12, 13, 14, 15, 16], [BOS, 20, 21, 22], [BOS]]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.5,  # logits far apart: answers that vary, and no argmax at the mercy of rounding
        attention_dropout=0.3,
    )
    return LlamaForCausalLM(config)


def reference(model: Any, prompt: list[int], **settings: Any) -> list[int]:
    """Continue one prompt by transformers' plain `generate`, with everything up to the stop token."""
    plain = copy.deepcopy(model).eval()
    out = plain.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), pad_token_id=PAD, **settings
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def checkpoint_activations(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()


@contextlib.contextmanager
def transformers_log() -> Iterator[list[str]]:
    """Collect what transformers logs, which does not reach pytest's handlers."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_equals_plain_generate_one_by_one(model: LlamaForCausalLM, batch_size: int) -> None:
    expected = [reference(model, prompt, max_new_tokens=20, do_sample=False, eos_token_id=None) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    answers = generate(model, PROMPTS, max_new_tokens=20, stop_token_ids=[], pad_token_id=PAD, batch_size=batch_size)
    assert answers == expected


def test_stops_before_the_stop_token_and_keeps_the_order(model: LlamaForCausalLM) -> None:
    free = generate(model, PROMPTS, max_new_tokens=20, stop_token_ids=[], pad_token_id=PAD)
    stops = [free[0][3], free[2][7]]
    answers = generate(model, PROMPTS, max_new_tokens=20, stop_token_ids=stops, pad_token_id=stops[0])
    assert answers == [until_stop(answer, stops) for answer in free]
    assert len(answers[0]) <= 3


@pytest.mark.parametrize("pad_token_id", [PAD, EOS])
def test_repetition_penalty_is_that_of_an_unpadded_prompt(model: LlamaForCausalLM, pad_token_id: int) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "repetition_penalty": 3.0}
    expected = [reference(model, prompt, do_sample=False, eos_token_id=None, **settings) for prompt in PROMPTS]
    assert generate(model, PROMPTS, stop_token_ids=[], pad_token_id=pad_token_id, **settings) == expected


def test_drawing_is_repeatable_with_a_seed_and_new_without(model: LlamaForCausalLM) -> None:
    def draw(seed: int | None, **settings: Any) -> list[list[int]]:
        return generate(
            model,
            PROMPTS,
            max_new_tokens=20,
            stop_token_ids=[],
            pad_token_id=PAD,
            temperature=5.0,
            seed=seed,
            **settings,
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    greedy = generate(model, PROMPTS, max_new_tokens=20, stop_token_ids=[], pad_token_id=PAD)
    assert draw(1) != greedy
    assert draw(1, top_k=1) == greedy
    assert draw(1, top_p=1e-6) == greedy


def test_model_settings_of_its_own_do_not_count(model: LlamaForCausalLM) -> None:
    """Chat models come with do_sample, a temperature and penalties in their generation_config.json."""
    greedy = generate(model, PROMPTS, max_new_tokens=8, stop_token_ids=[], pad_token_id=PAD)
    own = GenerationConfig(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0, eos_token_id=greedy[0][2])
    model.generation_config = own
    assert generate(model, PROMPTS, max_new_tokens=8, stop_token_ids=[], pad_token_id=PAD) == greedy
    assert model.generation_config is own


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_says_nothing(model: LlamaForCausalLM, temperature: float, capfd: pytest.CaptureFixture[str]) -> None:
    model.generation_config.temperature = 0.6
    checkpoint_activations(model)
    with transformers_log() as lines:
        generate(
            model.train(), PROMPTS, max_new_tokens=4, stop_token_ids=[EOS], pad_token_id=EOS, temperature=temperature
        )
    assert lines == []
    assert capfd.readouterr() == ("", "")


def test_everything_is_as_before(model: LlamaForCausalLM) -> None:
    AttentionInterface.register("test_without_cache", no_cache_attention)
    model.set_attn_implementation("test_without_cache")
    model.train()
    model.model.layers[1].eval()
    training = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=4, stop_token_ids=[], pad_token_id=PAD, temperature=1.0, seed=3)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert model.config._attn_implementation == "test_without_cache"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    # Nothing that was cached on the way is an inference tensor: a training step works.
    model.set_attn_implementation("sdpa")
    model(input_ids=torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_everything_is_as_before_after_a_failure(model: LlamaForCausalLM) -> None:
    model.train()
    with pytest.raises(IndexError):
        generate(model, [[1000]], max_new_tokens=4, stop_token_ids=[], pad_token_id=PAD)
    assert model.training
    assert all(module.training for module in model.modules())


def no_cache_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    raise AssertionError("decoding must use sdpa")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_uses_the_cache(model: LlamaForCausalLM, gradient_checkpointing: bool) -> None:
    if gradient_checkpointing:
        checkpoint_activations(model)
    model.config.use_cache = False
    lengths: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    generate(model.train(), [PROMPTS[0]], max_new_tokens=5, stop_token_ids=[], pad_token_id=PAD)
    hook.remove()
    assert lengths == [4, 1, 1, 1, 1]


def lora(model: nn.Module) -> nn.Module:
    adapted = peft.get_peft_model(cast(Any, model), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return cast(nn.Module, adapted)


def test_adapters_take_part(model: LlamaForCausalLM) -> None:
    base = generate(model, PROMPTS, max_new_tokens=8, stop_token_ids=[], pad_token_id=PAD)
    adapted = lora(model)
    answers = generate(adapted, PROMPTS, max_new_tokens=8, stop_token_ids=[], pad_token_id=PAD)
    merged = cast(Any, copy.deepcopy(adapted)).merge_and_unload()
    assert answers != base
    assert answers == generate(merged, PROMPTS, max_new_tokens=8, stop_token_ids=[], pad_token_id=PAD)


def test_fp32_adapters_on_a_bf16_base_run_under_autocast(model: LlamaForCausalLM) -> None:
    adapted = lora(model.bfloat16())
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert autocast_dtype(adapted) == torch.bfloat16
    with decoding(adapted) as bare:
        assert torch.is_autocast_enabled("cpu")
        assert bare(input_ids=torch.tensor([PROMPTS[0]])).logits.dtype == torch.bfloat16
    answers = generate(adapted, PROMPTS, max_new_tokens=3, stop_token_ids=[], pad_token_id=PAD)
    assert all(len(answer) == 3 for answer in answers)


def test_uniform_weights_leave_the_callers_autocast_alone(model: LlamaForCausalLM) -> None:
    assert autocast_dtype(model) is None
    assert autocast_dtype(copy.deepcopy(model).bfloat16()) is None
    with torch.autocast("cpu", torch.bfloat16), decoding(model) as bare:
        assert bare(input_ids=torch.tensor([PROMPTS[0]])).logits.dtype == torch.bfloat16


def test_a_compiled_model_is_not_compiled_again(model: LlamaForCausalLM) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    expected = generate(model, PROMPTS, max_new_tokens=4, stop_token_ids=[], pad_token_id=PAD)
    model.compile(backend=backend)
    assert generate(model, PROMPTS, max_new_tokens=4, stop_token_ids=[], pad_token_id=PAD) == expected
    assert not compiled
    model(input_ids=torch.tensor([PROMPTS[0]]))
    assert compiled


def test_left_pad() -> None:
    input_ids, attention_mask = left_pad([[5, 6, 7], [8]])
    assert input_ids.tolist() == [[5, 6, 7], [8, 8, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_no_prompts_no_answers(model: LlamaForCausalLM) -> None:
    assert generate(model, [], max_new_tokens=4, stop_token_ids=[], pad_token_id=PAD) == []


def test_bad_input_says_what_to_do(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match=r"prompts\[1\] has no tokens"):
        generate(model, [[1], []], max_new_tokens=4, stop_token_ids=[], pad_token_id=PAD)
    with pytest.raises(InputError, match="temperature -1 is negative"):
        generate(model, [[1]], max_new_tokens=4, stop_token_ids=[], pad_token_id=PAD, temperature=-1)


def test_import_does_not_load_transformers() -> None:
    code = "import sys, lit_tune.generate; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_drawing_on_a_gpu_leaves_its_generator_alone(model: LlamaForCausalLM) -> None:
    cast(Any, model).cuda()
    state = torch.cuda.get_rng_state()
    settings: dict[str, Any] = {"max_new_tokens": 9, "stop_token_ids": [], "pad_token_id": PAD, "temperature": 5.0}
    assert generate(model, PROMPTS, seed=1, **settings) == generate(model, PROMPTS, seed=1, **settings)
    assert torch.equal(torch.cuda.get_rng_state(), state)

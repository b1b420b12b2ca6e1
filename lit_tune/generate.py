"""Batched decoding: many prompts through a causal LM at once, a model in the midst of its training included.

Shorter prompts are padded on the left, so that every row's next token is its last column; sorting by length keeps the
padding small. Whatever decoding needs of the model (evaluation mode, attention that knows a KV cache, clean generation
settings) is put back afterwards, and random numbers come from a state of their own: training goes on to the bit as if
nothing had been generated.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lit_tune.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, LlamaForCausalLM


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> list[list[int]]:
    """Continue every prompt until a stop token or `max_new_tokens`.

    Args:
        model: A transformers causal LM, bare or with PEFT adapters, in training or evaluation mode.
        prompts: Token ids of each prompt, with whatever special tokens belong to them.
        max_new_tokens: The most tokens to generate for a prompt.
        stop_token_ids: Tokens that end an answer; they are no part of it.
        pad_token_id: Any token id of the vocabulary; fills up answers that ended early, inside a batch only.
        batch_size: Prompts decoded together.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn, the higher the more freely.
        top_p: Draw only from the likeliest tokens that together have this probability.
        top_k: Draw only from this many likeliest tokens; 0 for all.
        repetition_penalty: Above 1 makes tokens that occurred already, in prompt or answer, less likely.
        seed: Makes drawn tokens repeatable, for the same prompts and batch size; None draws anew each time.

    Returns:
        The new token ids of each prompt, in the prompts' order.

    Raises:
        InputError: A prompt has no tokens, or the temperature is negative.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompts[{index}] has no tokens; give every prompt at least one.")
    settings = _generation_config(
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        pad_token_id=pad_token_id,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
    )
    device = _compute_device(model)
    longest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    with decoding(model) as bare, _own_random_state(device, seed):
        for start in range(0, len(prompts), batch_size):
            indices = longest_first[start : start + batch_size]
            input_ids_BT, attention_mask_BT = left_pad([prompts[index] for index in indices])
            tokens_BT = bare.generate(  # type: ignore[misc]  # transformers' protocol does not fit its own models
                input_ids_BT.to(device), attention_mask=attention_mask_BT.to(device), generation_config=settings
            )
            new_tokens = cast(Tensor, tokens_BT)[:, input_ids_BT.shape[1] :].tolist()
            for index, answer in zip(indices, new_tokens, strict=True):
                answers[index] = until_stop(answer, stop_token_ids)
    return answers


def _compute_device(model: nn.Module) -> torch.device:
    """Return the device of the forward pass; shards may lie in host memory, but compute on their mesh's devices."""
    parameter = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    return parameter.device if mesh is None else torch.empty(0, device=mesh.device_type).device


@contextmanager
def decoding(model: nn.Module) -> Iterator["LlamaForCausalLM"]:
    """Make a model ready for its `generate`, yield it without PEFT's wrapper, and put everything back.

    Evaluation mode switches dropout off, and gradient checkpointing with it, which would refuse the KV cache. Attention
    becomes `sdpa`, since our training attention knows no cache; the model's own generation settings (a temperature, a
    top_p) give way to neutral ones. A compiled model runs uncompiled, or every new length would compile it again.
    Weights of mixed precision, such as fp32 adapters on a bf16 base, run under autocast.
    """
    bare = cast("LlamaForCausalLM", getattr(model, "get_base_model", lambda: model)())
    was_training = [(module, module.training) for module in model.modules()]
    attention, generation_config = bare.config._attn_implementation, bare.generation_config
    try:
        model.eval()
        bare.set_attn_implementation("sdpa")
        bare.generation_config = type(generation_config)()
        # NOTE: not `inference_mode`: tensors that a module caches under it could not be used in training.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _autocast_if_mixed(bare):
            yield bare
    finally:
        bare.generation_config = generation_config
        bare.set_attn_implementation(attention)
        for module, training in was_training:
            module.training = training


def autocast_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the 16-bit dtype to compute in if the weights mix it with others, else None."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    half = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes]
    return half[0] if half and len(dtypes) > 1 else None


def _autocast_if_mixed(model: "LlamaForCausalLM") -> AbstractContextManager[None]:
    dtype = autocast_dtype(model)
    # NOTE: not `autocast(enabled=False)`, which would switch off the autocast of a caller.
    return torch.autocast(model.device.type, dtype=dtype) if dtype is not None else nullcontext()


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return input ids and attention mask, both int64 [B, T], with the prompts aligned at the right.

    NOTE: a row is padded with its own first token. The mask hides it from attention in any case; but the repetition
    penalty looks at ids alone, and a pad token equal to eos would keep padded rows, and only those, from stopping.
    """
    length = max(len(prompt) for prompt in prompts)
    input_ids_BT = torch.tensor([[prompt[0]] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    attention_mask_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids_BT, attention_mask_BT


def until_stop(tokens: Sequence[int], stop_token_ids: Sequence[int]) -> list[int]:
    """Return the tokens before the first stop token."""
    stops = (position for position, token in enumerate(tokens) if token in stop_token_ids)
    return list(tokens[: next(stops, len(tokens))])


def _generation_config(
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
) -> "GenerationConfig":
    from transformers import GenerationConfig  # noqa: PLC0415 (takes seconds)

    if temperature < 0:
        raise InputError(f"temperature {temperature} is negative; 0 takes the likeliest tokens, above 0 draws them.")
    # transformers warns of sampling settings beside do_sample=False, and without a top_k of ours would cut at 50.
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=pad_token_id,
        repetition_penalty=repetition_penalty,
        do_sample=temperature > 0,
        use_cache=True,
        **drawing,
    )


@contextmanager
def _own_random_state(device: torch.device, seed: int | None) -> Iterator[None]:
    """Draw from generators seeded for this block, and give the process's back untouched."""
    seed = random.SystemRandom().getrandbits(63) if seed is None else seed
    cuda_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices):
        # NOTE: `torch.manual_seed` would seed every device, those that were not forked included.
        torch.default_generator.manual_seed(seed)
        for cuda_device in cuda_devices:
            torch.cuda.default_generators[cuda_device.index].manual_seed(seed)
        yield

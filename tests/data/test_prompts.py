from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_tune.data.prompts import (
    Template,
    encode_prompt,
    encode_record,
    encode_records,
    load_template,
    stop_token_ids,
)
from lit_tune.data.records import Message, Record
from lit_tune.errors import InputError
from tests.tiny import BOS, CHAT_TOKENS, EOS, PAD, tiny_sentencepiece_tokenizer, tiny_tokenizer

# Typed from PROMPT_DICT in Stanford Alpaca's train.py.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

BYTES = tiny_tokenizer()
BYTES_WITHOUT_BOS = tiny_tokenizer(prepends_bos=False)
PIECES = tiny_sentencepiece_tokenizer("first")
PIECES_ALWAYS_SPACED = tiny_sentencepiece_tokenizer("always")
TOKENIZERS = [BYTES, BYTES_WITHOUT_BOS, PIECES, PIECES_ALWAYS_SPACED]
untimed = settings(deadline=None)  # a busy machine is no failure
NAMES = ["bytes", "bytes without bos", "pieces", "pieces always spaced"]
TEMPLATES = [load_template(name) for name in ("alpaca", "llama2", "llama3", "chatml")]

every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=NAMES)
every_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)


def alpaca_record(instruction: str, response: str, context: str = "") -> Record:
    content = f"{instruction}\n\n{context}" if context else instruction
    return Record(0, (Message("user", content, instruction, context), Message("assistant", response)))


def chat(*contents: str, system: str = "") -> Record:
    roles = ["user", "assistant"] * len(contents)
    turns = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    return Record(0, (Message("system", system), *turns) if system else tuple(turns))


def ids_of(encoded: object) -> list[int]:
    """Narrow what `apply_chat_template` declares to what it returns for one conversation."""
    assert isinstance(encoded, list)
    return encoded


def supervised_runs(record: Record, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode every unbroken run of supervised tokens."""
    runs: list[list[int]] = []
    previous = False
    for token, supervised in zip(*encode_record(record, template, tokenizer), strict=True):
        if supervised and not previous:
            runs.append([])
        if supervised:
            runs[-1].append(token)
        previous = supervised
    return [str(tokenizer.decode(run)) for run in runs]


# Against references that we did not write -----------------------------------------------------------------------------


@every_tokenizer
@pytest.mark.parametrize("context", ["", "2 and 3"])
def test_alpaca_is_the_published_prompt_tokenised_as_stanford_does(
    tokenizer: PreTrainedTokenizerBase, context: str
) -> None:
    prompt = (ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT).format(instruction="Add.", input=context)
    prompt_ids = tokenizer(prompt).input_ids
    together = tokenizer(prompt + "Five").input_ids  # train.py tokenises prompt and response in one string
    ids, supervised = encode_record(alpaca_record("Add.", "Five", context), load_template("alpaca"), tokenizer)
    assert ids == [*together, tokenizer.eos_token_id]
    assert supervised == [False] * len(prompt_ids) + [True] * (len(ids) - len(prompt_ids))


CONVERSATIONS = [
    chat("the first question", "the answer"),
    chat("the first question", "the answer", "and the next", "the end", system="the rules"),
    chat("  spaces at both ends \n", "no spaces"),
    alpaca_record("Add the numbers.", "5", "2 and 3"),
]


@every_tokenizer
@every_template
@pytest.mark.parametrize("record", CONVERSATIONS)
def test_ids_equal_those_of_apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: Template, record: Record
) -> None:
    messages = [asdict(message) for message in record.messages]
    source = template.source
    whole = ids_of(tokenizer.apply_chat_template(messages, chat_template=source, return_dict=False))
    prompt = ids_of(
        tokenizer.apply_chat_template(
            messages[:-1], chat_template=source, add_generation_prompt=True, return_dict=False
        )
    )
    own_prompt = encode_prompt(record.messages[:-1], template, tokenizer)
    own_whole, _ = encode_record(record, template, tokenizer)
    # transformers does not put a bos where the template leaves it out; the line break after ChatML's last turn is not
    # part of our samples.
    extra = 1 if own_prompt[0] == tokenizer.bos_token_id != prompt[0] else 0
    assert own_prompt[extra:] == prompt
    assert own_whole[extra:] == whole[: len(own_whole) - extra]
    assert tokenizer.decode(whole[len(own_whole) - extra :]) in ("", "\n")


def test_the_tokenizers_own_template_is_used() -> None:
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    tokenizer = tiny_tokenizer(prepends_bos=False, chat_template=source)
    messages = [{"role": "user", "content": " the question "}, {"role": "assistant", "content": "the answer\n"}]
    ids, _ = encode_record(
        chat(" the question ", "the answer\n"), load_template("chat", chat_template=source), tokenizer
    )
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)


# Properties -----------------------------------------------------------------------------------------------------------

SPECIAL = [BOS, EOS, PAD, *CHAT_TOKENS]
# Text as users write it, with control tokens written out, and white space at every place.
texts = st.lists(st.text(max_size=6) | st.sampled_from([*SPECIAL, "\n", " ", "the"]), min_size=1, max_size=6)
contents = texts.map("".join).filter(str.strip)
conversations = st.lists(contents, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0)
records = st.builds(
    lambda turns, system: chat(*turns, system=system), conversations, contents | st.just("")
) | st.builds(alpaca_record, contents, contents, contents | st.just(""))
tokenizers = st.sampled_from(TOKENIZERS)
byte_tokenizers = st.sampled_from([BYTES, BYTES_WITHOUT_BOS])
templates = st.sampled_from(TEMPLATES)


@untimed
@given(records, templates, tokenizers)
def test_the_prompt_is_the_samples_beginning_and_the_rest_is_supervised(
    record: Record, template: Template, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids, supervised = encode_record(record, template, tokenizer)
    prompt = encode_prompt(record.messages[:-1], template, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert not supervised[len(prompt) - 1]
    assert supervised[len(prompt) :] == [True] * (len(ids) - len(prompt))
    assert ids[-1] in stop_token_ids(template, tokenizer)


@untimed
@given(records, templates, byte_tokenizers)
def test_only_responses_and_their_closing_tokens_are_supervised(
    record: Record, template: Template, tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = [message.content for message in record.messages if message.role == "assistant"]
    written = {
        "alpaca": "{}</s>",
        "llama2": " {}</s>".replace("{}", "{} "),
        "llama3": "{}<|eot_id|>",
        "chatml": "{}<|im_end|>",
    }[template.name]
    trims = template.name in ("llama2", "llama3")
    expected = [written.format(answer.strip() if trims else answer) for answer in answers]
    assert supervised_runs(record, template, tokenizer) == expected


@untimed
@given(records, templates, tokenizers)
def test_text_never_becomes_a_control_token(
    record: Record, template: Template, tokenizer: PreTrainedTokenizerBase
) -> None:
    def controls(of: Record) -> list[int]:
        special = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
        return [token for token in encode_record(of, template, tokenizer)[0] if token in special]

    harmless = Record(0, tuple(_harmless(message) for message in record.messages))
    assert controls(record) == controls(harmless)


def _harmless(message: Message) -> Message:
    """Give a message of the same shape that says nothing."""
    return Message(message.role, "x", message.instruction and "x", message.input and "x")


@untimed
@given(records, templates, byte_tokenizers)
def test_the_ids_spell_what_the_template_renders(
    record: Record, template: Template, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids, _ = encode_record(record, template, tokenizer)
    rendered = tokenizer.apply_chat_template(
        [asdict(message) for message in record.messages], chat_template=template.source, tokenize=False
    )
    assert isinstance(rendered, str)
    bos = BOS if tokenizer is BYTES and template.name in ("alpaca", "chatml") else ""  # the others write it themselves
    assert tokenizer.decode(ids) == bos + rendered.removesuffix("\n" if template.name == "chatml" else "")


@untimed
@given(records, templates, st.sampled_from([BYTES, PIECES, PIECES_ALWAYS_SPACED]))
def test_a_sample_begins_with_exactly_one_bos(
    record: Record, template: Template, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids, _ = encode_record(record, template, tokenizer)
    # Llama 2's template opens every exchange with a bos; the others have one only.
    exchanges = sum(message.role == "user" for message in record.messages) if template.name == "llama2" else 1
    assert ids[0] == tokenizer.bos_token_id != ids[1]
    assert ids.count(tokenizer.bos_token_id) == exchanges


@untimed
@given(st.lists(records, min_size=1, max_size=4), templates, tokenizers)
def test_a_batch_gives_what_its_records_give_alone(
    batch: Sequence[Record], template: Template, tokenizer: PreTrainedTokenizerBase
) -> None:
    alone = [encode_record(record, template, tokenizer) for record in batch]
    assert encode_records(batch, template, tokenizer) == alone


# What templates may do ------------------------------------------------------------------------------------------------


def test_a_response_that_the_template_does_not_close_gets_eos() -> None:
    template = Template("own", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    record = chat("the question", "the answer", "next", "end")
    assert supervised_runs(record, template, BYTES) == [" the answer</s>", " end</s>"]
    assert BYTES.decode(encode_record(record, template, BYTES)[0]) == (
        "<s>user: the question\nassistant: the answer</s>\nuser: next\nassistant: end</s>"
    )
    assert stop_token_ids(template, BYTES) == [BYTES.eos_token_id]


def test_a_token_that_opens_the_next_turn_closes_no_response() -> None:
    source = "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}{{ eos_token }}"
    record = chat("the question", "the answer", "next", "end")
    assert supervised_runs(record, Template("own", source), BYTES) == ["the answer</s>", "end</s>"]


def test_stop_tokens_are_eos_and_the_templates_closing_token() -> None:
    assert BYTES.convert_ids_to_tokens(stop_token_ids(load_template("chatml"), BYTES)) == [EOS, "<|im_end|>"]


@pytest.mark.parametrize("call", ["raise_exception('no system turns')", "messages[0].content + 1", "1 / 0", "().x.y"])
def test_a_template_that_fails_is_told_with_the_record(call: str) -> None:
    with pytest.raises(InputError, match="record 0: template 'own' fails"):
        encode_record(chat("a", "b"), Template("own", "{{ " + call + " }}"), BYTES)


def test_llama2_refuses_turns_out_of_order() -> None:
    record = Record(7, (Message("user", "a"), Message("user", "b"), Message("assistant", "c")))
    with pytest.raises(InputError, match=r"record 7: .*alternate"):
        encode_record(record, load_template("llama2"), BYTES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content if m.content == 'a' else m.content + '!' }}{% endfor %}",
    ],
)
def test_a_template_that_reads_the_texts_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="record 0: template 'own' changes"):
        encode_record(chat("a", "b"), Template("own", source), BYTES)


def test_a_template_that_leaves_out_a_text_is_refused() -> None:
    with pytest.raises(InputError, match=r"leaves out the assistant's text in messages\[1\]"):
        encode_record(chat("a", "b"), Template("own", "{{ messages[0].content }}"), BYTES)
    with pytest.raises(InputError, match=r"leaves out the user's text in messages\[0\]"):
        encode_record(chat("a", "b"), Template("own", "{{ messages[1].content }}"), BYTES)
    late_rules = Record(0, (*chat("a", "b").messages, Message("system", "rules"), *chat("c", "d").messages))
    with pytest.raises(InputError, match=r"'alpaca' leaves out the system's text in messages\[2\]"):
        encode_record(late_rules, load_template("alpaca"), BYTES)


@pytest.mark.parametrize("mark", ["\U000f0042", "\x1e\U000f0042\x1f"])
def test_a_template_may_write_what_stands_for_texts(mark: str) -> None:
    template = Template("own", mark + "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert BYTES.decode(encode_record(chat("a", "b"), template, BYTES)[0]) == f"<s>{mark}ab</s>"


def test_what_a_template_says_in_a_fault_stays_one_line_and_harmless() -> None:
    template = Template("own", "{{ raise_exception('no\x1b[2J\nmore') }}")
    with pytest.raises(InputError, match=r"^record 0: template 'own' fails: no \[2J$"):
        encode_record(chat("a", "b"), template, BYTES)


def test_a_tokenizer_that_joins_plain_text_to_a_control_token_is_told_with_the_record() -> None:
    words = ["<unk>", EOS, *"</s>ab", "</", "s>"]
    backend = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[("<", "/"), ("s", ">"), ("</", "s>")],
            unk_token="<unk>",
        )
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, unk_token="<unk>")
    template = Template("own", "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    assert encode_record(chat("a", "b"), template, tokenizer)[0] == [6, 1, 7, 1]
    record = Record(3, chat(f"a{EOS}", "b").messages, place="r.jsonl:4")
    with pytest.raises(
        InputError, match=r"^r\.jsonl:4: the tokenizer makes a control token from the plain text 'a</s>'"
    ):
        encode_record(record, template, tokenizer)
    with pytest.raises(InputError, match=r"^the prompt: the tokenizer makes a control token"):
        encode_prompt(record.messages[:1], template, tokenizer)


def test_templates_render_as_in_transformers() -> None:
    source = (
        "{{ {'<': 'é'} | tojson(indent=1) }} {{ strftime_now('%d %b %Y') | length }}\n"
        "{% for m in messages %}\n"
        "    {% if m.role == 'user' %}\n"
        "{{ m.content }}\n"
        "        {% continue %}\n"
        "    {% endif %}\n"
        "    {% generation %}{{ m.content + eos_token }}{% endgeneration %}\n"
        "{% endfor %}\n"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = BYTES.apply_chat_template(messages, chat_template=source, tokenize=False)
    ids, _ = encode_record(chat("a", "b"), Template("own", source), BYTES)
    assert BYTES.decode(ids) == f"{BOS}{rendered}"


# Loading --------------------------------------------------------------------------------------------------------------


def test_a_file_of_ones_own_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}")
    assert load_template(str(path)) == Template(str(path), "{{ messages[0].content }}")


def test_faults_of_a_template_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'alpacca' is unknown \(did you mean 'alpaca'\?\); use alpaca, llama2, llama3"
    ):
        load_template("alpacca")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_template(str(tmp_path / "own.jinja"))
    with pytest.raises(InputError, match="no chat template"):
        load_template("chat")
    path = tmp_path / "own.jinja"
    path.write_text("fine\n{% if %}")
    with pytest.raises(InputError, match=r"own\.jinja:2: the template is no valid Jinja"):
        load_template(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        load_template(str(path))
    with pytest.raises(InputError, match="is no file name"):
        load_template("own\0.jinja")
    with pytest.raises(InputError, match="is unknown"):
        load_template("own" * 2_000)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
        "9" * 5_000,
    ],
    ids=["nested blocks", "nested brackets", "a long number"],
)
def test_a_template_that_python_cannot_compile_is_told(tmp_path: Path, source: str) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(source if source.startswith("{") else f"{{{{ {source} }}}}")
    with pytest.raises(InputError, match=r"own\.jinja: the template cannot be compiled: "):
        load_template(str(path))


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(InputError, match="has no eos token"):
        encode_record(chat("a", "b"), load_template("alpaca"), tiny_tokenizer(eos=False))

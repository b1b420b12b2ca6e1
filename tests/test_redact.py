"""Secrets: what is hidden, and what must be left as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from lit_tune.redact import HIDDEN, is_secret_name, printable, redact

NO_VARIABLES: dict[str, str] = {}
# Made up, in the forms that services hand out. Put together here, so that no scanner takes this file for a leak.
TOKENS = [
    "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz",
    "sk-" + "proj-abcdefghijklmnop1234",
    "sk-" + "ant-api03-abcdefghijklmnop",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_" + "11AAAAAAA0abcdefghijkl_mnop",
    "glpat-" + "abcdefghij0123456789",
    "xoxb-" + "1234567890-abcdefghij",
    "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl",
    "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEow\n-----END RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token[:6])
def test_a_secret_is_known_by_its_form_wherever_it_stands(token: str) -> None:
    assert redact(token, environment=NO_VARIABLES) == HIDDEN
    assert redact(f"cannot reach '{token}'.", environment=NO_VARIABLES) == f"cannot reach '{HIDDEN}'."
    assert redact({"a": [{"b": token}]}, environment=NO_VARIABLES) == {"a": [{"b": HIDDEN}]}


@pytest.mark.parametrize(
    "name",
    ["token", "HF_TOKEN", "hub_token", "authToken", "api_key", "apikey", "WANDB_API_KEY", "x-api-key", "password",
     "DB_PASSWD", "client_secret", "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "credentials", "private_key",
     "trainer.logger.init_args.api_key", "Authorization"],
)  # fmt: skip
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret_name(name)
    assert redact({name: "x"}, environment=NO_VARIABLES) == {name: HIDDEN}


@pytest.mark.parametrize(
    "name",
    ["micro_batch_tokens", "max_new_tokens", "tokens", "tokenizer", "TOKENIZERS_PARALLELISM", "pad_token", "eos_token",
     "stop_token_ids", "special_token", "tokens_per_s", "targets", "monkey", "key", "column", "base"],
)  # fmt: skip
def test_what_only_sounds_like_a_secret_is_kept(name: str) -> None:
    assert not is_secret_name(name)
    assert redact({name: "x"}, environment=NO_VARIABLES) == {name: "x"}


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://me:pass@host/a", f"https://me:{HIDDEN}@host/a"),
        ("postgresql+psycopg://u:p%40ss@host:5432/db", f"postgresql+psycopg://u:{HIDDEN}@host:5432/db"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("https://host/a?token=abc&x=1", f"https://host/a?token={HIDDEN}&x=1"),
        ("unrecognized arguments: --wandb.api_key=abc", f"unrecognized arguments: --wandb.api_key={HIDDEN}"),
        ("{'password': 'abc', 'user': 'me'}", f"{{'password': '{HIDDEN}', 'user': 'me'}}"),
        ("Authorization: Bearer abc", f"Authorization: Bearer {HIDDEN}"),
        ("model.lora.rank: 'x' is not valid", "model.lora.rank: 'x' is not valid"),
        ("data.micro_batch_tokens: 'x' is not valid", "data.micro_batch_tokens: 'x' is not valid"),
        ("it has no end token: set eos_token", "it has no end token: set eos_token"),
        ("trainer.logger.password: 'abc' is not valid", f"trainer.logger.password: '{HIDDEN}' is not valid"),
        ("set HF_TOKEN or run `hf auth login`", "set HF_TOKEN or run `hf auth login`"),
        ("task-force-of-many-people, disk-usage-of-the-whole", "task-force-of-many-people, disk-usage-of-the-whole"),
    ],
)
def test_secrets_within_a_text_are_hidden_and_no_more(text: str, hidden: str) -> None:
    assert redact(text, environment=NO_VARIABLES) == hidden


def test_what_a_variable_of_such_a_name_holds_is_hidden_everywhere() -> None:
    variables = {"MY_TOKEN": "opensesame", "HOME": "/home/me/place", "SHORT_SECRET": "true"}
    assert (
        redact("opensesame in /home/me/place is true", environment=variables) == f"{HIDDEN} in /home/me/place is true"
    )


def test_the_process_own_variables_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "opensesame")
    assert redact(["opensesame"]) == [HIDDEN]


@pytest.mark.parametrize("value", [3, 2.5, True, None, "", [1, 2], {"a": ()}])
def test_other_values_are_kept_with_their_types(value: Any) -> None:
    kept = redact({"token": value}, environment=NO_VARIABLES)["token"]
    assert (kept, type(kept)) == (value, type(value))


def test_settings_of_the_parser_are_copied_and_the_original_kept() -> None:
    make: Callable[..., Namespace] = Namespace
    logger = make(class_path="MyLogger", init_args=make(api_key="abc", name="mine", tags={"secret": "x"}))
    settings = make(trainer=make(logger=[logger], max_epochs=3))
    hidden = redact(settings, environment=NO_VARIABLES)
    assert isinstance(hidden, Namespace)
    assert hidden.as_dict() == {
        "trainer": {
            "logger": [
                {
                    "class_path": "MyLogger",
                    "init_args": {"api_key": HIDDEN, "name": "mine", "tags": {"secret": HIDDEN}},
                }
            ],
            "max_epochs": 3,
        }
    }
    assert logger.init_args.api_key == "abc"
    assert logger.init_args.tags == {"secret": "x"}


def test_a_hidden_value_is_yaml_text() -> None:
    assert yaml.safe_load(yaml.safe_dump({"token": HIDDEN})) == {"token": HIDDEN}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a.json: no such file", "a.json: no such file"),
        ("a\nb: no such\n  file\n", "a b: no such file"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("caf\u00e9 \u4e16 \U0001f600", "caf\u00e9 \u4e16 \U0001f600"),
        ("\u202eabc", "\\u202eabc"),  # it would be shown backwards
        ("\udcff", "\\udcff"),  # a byte of a file's name that is no UTF-8
        ("--password=abc", f"--password={HIDDEN}"),
    ],
)
def test_what_is_printed_is_one_line_that_does_nothing_to_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown

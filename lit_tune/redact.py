"""Secrets kept out of what a run leaves and says: `config.yaml`, TensorBoard's hyperparameters, errors.

A value is a secret by the name of its setting (`api_key`, `HF_TOKEN`), by its own form (`hf_...`, a URL's password), or
because an environment variable of such a name holds the same. Names of special tokens (`pad_token`) are none.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[hidden]"

# A token's name says whose it is, and a model's own special tokens are no secrets.
_SECRET_NAME = re.compile(
    r"passw(?:or)?d|passphrase|passcode|secret|credential|authorization|bearer|api_?key|access_?key|private_?key|signing_?key"
    r"|(?<![a-z])(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!cls_)(?<!sep_)(?<!mask_)(?<!stop_)(?<!special_)token(?![a-z])"
)

# What secrets look like that services hand out, wherever they stand.
_SECRET_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS key ids
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"  # GitHub, GitLab
    r"|\bxox[a-z]-[\w-]{10,}|\bAIza[\w-]{30,}"  # Slack, Google
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_URL_PASSWORD = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*:)[^\s/@'\"]+(?=@)", re.IGNORECASE)
# In a text: api_key=..., x.password: '...', {'token': '...'}, Authorization: Bearer ...
_NAMED_VALUE = re.compile(
    r"(?P<name>[\w.-]*(?:pass|secret|token|key|credential|auth)[\w.-]*)"
    r"(?P<between>['\"]?\s*=\s*['\"]?|['\"]?\s*:\s*['\"]|\s*:\s*Bearer\s+)"
    r"(?P<value>[^\s'\",;&{}\[\]]+)",
    re.IGNORECASE,
)

_SHORTEST = 8  # characters of a variable's value that is looked for in texts; `true` is no secret


def redact(value: Any, *, name: str = "", environment: Mapping[str, str] = os.environ) -> Any:
    """Return `value` with every secret in it replaced by `[hidden]`; mappings, namespaces and lists are copied.

    Args:
        value: A text, a setting, or settings at any depth.
        name: The setting's name.
        environment: The environment variables whose secrets are hidden too.
    """
    if isinstance(value, str):
        return HIDDEN if value and is_secret_name(name) else _redact_text(value, environment)
    if isinstance(value, Mapping):
        return {key: redact(item, name=str(key), environment=environment) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([redact(item, name=name, environment=environment) for item in value])
    if isinstance(value, argparse.Namespace):  # jsonargparse's too
        redacted = copy.copy(value)
        vars(redacted).update(redact(vars(value), environment=environment))
        return redacted
    return value


def printable(text: str) -> str:
    """Return a text as a terminal may show it: one line, control characters written out, secrets hidden."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    return str(redact(shown))


def is_secret_name(name: str) -> bool:
    """Tell whether a setting or variable of this name holds a secret: `WANDB_API_KEY`, but not `micro_batch_tokens`."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_")
    return _SECRET_NAME.search(snake) is not None


def _redact_text(text: str, environment: Mapping[str, str]) -> str:
    held = {value for name, value in environment.items() if len(value) >= _SHORTEST and is_secret_name(name)}
    for secret in sorted(held, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _SECRET_FORMS.sub(HIDDEN, text)
    text = _URL_PASSWORD.sub(rf"\g<before>{HIDDEN}", text)
    return _NAMED_VALUE.sub(_hide_if_secret, text)


def _hide_if_secret(found: re.Match[str]) -> str:
    return f"{found['name']}{found['between']}{HIDDEN}" if is_secret_name(found["name"]) else found[0]

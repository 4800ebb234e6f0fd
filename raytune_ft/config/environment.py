"""What the config takes from its environment: `${ENV_NAME}`, and whether this is a Ray job."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from raytune_ft.errors import ConfigError

STORAGE_VARIABLE = "RAYTUNE_FT_STORAGE"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The names by which torch reads the settings of its allocator, the newest first."""
VERSION = "raytune_ft_version"
"""Key of a job's metadata: the version of this package that checked the config and submitted it."""
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# A password in the user part of a URL or in its query; group 1 is the password.
_IN_USER_PART = re.compile(r"://[^/\s:@]*:([^\s]+)@")
_IN_QUERY = re.compile(r"[?&;](?:password|passwd|pwd|secret|token|api_key)=([^&;\s]+)", re.I)

# Keys of services by what they look like, as detect-secrets finds them.
_TOKENS = {
    "a key of AWS": r"(?:A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA)[A-Z0-9]{16}\b",
    "a key of Google": r"AIza[\w-]{35}|ya29\.[\w-]{20,}",
    "an API key": r"sk-(?:(?:proj|svcacct|admin|ant|or)-[\w-]{20,}|[A-Za-z0-9]{32,})",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}",
    "a token of GitLab": r"gl(?:pat|dt|ft|soat|rt)-[\w-]{20,}",
    "a token of Hugging Face": r"(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a token of PyPI": r"pypi-AgE[\w-]{50,}",
    "a token of Slack": r"xox[abeprs]-[A-Za-z0-9-]{10,}|xapp-\d-[A-Za-z0-9-]{10,}",
    "a JSON web token": r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----[^-]*",
}
_TOKEN = re.compile(
    "|".join(rf"(?P<_{n}>(?<![A-Za-z0-9]){each})" for n, each in enumerate(_TOKENS.values()))
)

# Everything before an @, the scheme in group 1; for free text.
_BEFORE_AT = re.compile(r"(\w+://)?[^\s'\"]*@")
_PASSWORD = re.compile(r"://[^/\s:@]*:(.+)@")  # may hold blanks
_SECRET = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")
HIDDEN = "***"
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def grow_segments() -> None:
    """Let torch's allocator on a GPU grow its segments, unless the user has set it up.

    Passes differ in shape, and segments of fixed size break up until gigabytes are reserved that no
    tensor fits into. Called before torch first uses a GPU, which is when it reads the variable.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def in_ray_job() -> bool:
    """Whether this process is the entry point of a Ray job, or was started by one."""
    return _JOB in os.environ


def check_submitter(own: str) -> None:
    """ConfigError where another version of this package has submitted this job."""
    metadata = json.loads(os.environ.get(_JOB) or "{}").get("metadata") or {}
    theirs = metadata.get(VERSION, own)
    if theirs != own:
        raise ConfigError(
            f"raytune_ft {own} of the cluster",
            f"differs from raytune_ft {theirs}, which has checked the config and submitted it",
            "install the same version on both sides",
        )


def joins_cluster() -> bool:
    """Whether a cluster that exists already does the work, and this process none of it. Inside a
    Ray job, Ray sets RAY_ADDRESS.
    """
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def expand_text(text: str, key: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` with every `${NAME}` replaced; ConfigError where NAME is not set."""
    values = os.environ if environ is None else environ

    def value_of(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in values:
            raise ConfigError(
                f"{key} names ${{{name}}}, which", "is not set", f"write `export {name}=...` first"
            )
        return values[name]

    return _REFERENCE.sub(value_of, text)


def expand(value: Any, key: str = "", environ: Mapping[str, str] | None = None) -> Any:
    """A plain value with every `${NAME}` in its texts replaced."""
    if isinstance(value, str):
        return expand_text(value, key, environ)
    if isinstance(value, dict):
        return {name: expand(item, _join(key, name), environ) for name, item in value.items()}
    if isinstance(value, list):
        return [expand(item, key, environ) for item in value]
    return value


def names_in(value: Any) -> set[str]:
    """The names of all `${NAME}` in the texts of a plain value."""
    return set(_REFERENCE.findall(json.dumps(value)))


def refuse_secrets(value: Any, key: str = "") -> None:
    """ConfigError where a text carries a password or a token that is not a `${NAME}`."""
    if isinstance(value, str):
        what = None
        found = _IN_USER_PART.search(value) or _IN_QUERY.search(value)
        if found and not _REFERENCE.fullmatch(found.group(1)):
            what = "a password"
        elif found := _TOKEN.search(value):
            what = list(_TOKENS)[int(str(found.lastgroup)[1:])]
        if what is not None:
            raise ConfigError(
                key,
                f"holds {what}, and the config is saved in the clear",
                "write it as ${ENV_NAME} and export ENV_NAME",
            )
    elif isinstance(value, dict):
        for name, item in value.items():
            refuse_secrets(item, _join(key, name))
    elif isinstance(value, list):
        for item in value:
            refuse_secrets(item, key)


def masked(text: str) -> str:
    """The text of a config without the tokens and the passwords of URLs in it."""
    for pattern in (_IN_QUERY, _IN_USER_PART):
        text = pattern.sub(lambda match: match[0].replace(match[1], HIDDEN), text)
    return _TOKEN.sub(HIDDEN, text)


def without_secrets(text: str, *written: str) -> str:
    """The text of a library's error without user parts of URLs and without secrets.

    Secrets are the values of each `${NAME}` in `written`, the passwords in `written`, in plain and
    in URL-quoted form, and the keys of services in the environment.
    """
    names = [*_SECRET, *(name for each in written for name in _REFERENCE.findall(each))]
    secrets = {os.environ[name] for name in names if os.environ.get(name)}
    for each in [*written, *secrets]:
        for pattern in (_IN_QUERY, _PASSWORD):
            secrets |= set(pattern.findall(each))
    forms = {form(one) for one in secrets for form in (str, quote, quote_plus, unquote, _quoted)}
    for form in sorted(forms - {""}, key=len, reverse=True):  # one may be part of another
        text = text.replace(form, HIDDEN)
    return _TOKEN.sub(HIDDEN, _BEFORE_AT.sub(lambda match: f"{match[1] or ''}{HIDDEN}@", text))


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name

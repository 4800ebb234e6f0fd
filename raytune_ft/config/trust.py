"""Python code that a config names, and which of it a command may run.

Whoever can write into a storage can write the config.yaml of a run there. So a command runs the
code, and expands the secrets, that its own command line and its own config file name; for more it
asks for `--trust-run`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from raytune_ft.config.environment import names_in
from raytune_ft.config.load import to_plain
from raytune_ft.config.metrics import HARNESS, measured_rewards
from raytune_ft.config.rewards import Judge, function_of
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError

Code = Collection[str] | None
"""What `named_code` gives for the config of this command; None allows all."""


_UNUSED = ("search", "tracking", "sampling", "rewards")  # sections that a promotion does not read
_SENT = "rewards.url="
_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.I)


def named_code(config: Config) -> list[str]:
    """What of a resolved config makes this program run Python code, and secrets of the environment
    that it names: a path or a hub id may carry them to another machine. Of rewards those that
    `promote.metrics` names; a judge gets prompts and answers.
    """
    used = {key: value for key, value in to_plain(config).items() if key not in _UNUSED}
    rewards = measured_rewards(config)
    used["rewards"] = [reward.model_dump() for reward in rewards]
    found = [f"${{{name}}}" for name in sorted(names_in(used)) if _SECRET.search(name)]
    found += [f"promote.metrics={name}" for name in config.promote.metrics if _is_code(name)]
    found += [f"rewards={reward.name}" for reward in rewards if function_of(reward.name)]
    found += [f"{_SENT}{reward.url}" for reward in rewards if isinstance(reward, Judge)]
    if config.model.trust_remote_code:
        base, revision = config.promote.base, config.model.revision
        at = f" at {revision}" if revision else ""
        found.append(f"model.trust_remote_code=true with model.path={config.model.path}{at}")
        found += [f"model.trust_remote_code=true with promote.base={base}"] if base else []
    return found


def check_code(saved: Config, directory: Path, code: Code) -> None:
    """Raises ConfigError where the config in a directory names what is not in `code`."""
    if code is None:
        return
    for name in named_code(saved):
        if name not in code:
            what = "a secret" if name.startswith("$") else "Python code"
            what = "an address that gets prompts and answers" if name.startswith(_SENT) else what
            raise ConfigError(
                name,
                f"is {what} that {directory}/config.yaml names, and this command does not",
                "read that file, and write --trust-run if you trust whoever wrote it",
            )


def _is_code(metric: str) -> bool:
    """A function of a file; or a task's file, which may name functions and holds templates."""
    task = metric.removeprefix(HARNESS)
    return bool(function_of(metric)) or (task != metric and Path(task).suffix in (".yaml", ".yml"))

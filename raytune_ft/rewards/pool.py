"""Rewards in processes of their own: one that hangs or dies costs a score, and begins again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from raytune_ft import child
from raytune_ft.config.rewards import RewardConfig, expanded, reward_of
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.rewards.base import Group, Score

START_S = 300.0
"""How long a reward may take to load, such as a file that imports torch."""
GRACE_S = 10.0
"""A judge pauses between attempts, for this long at most."""
DEATHS = 3
"""The run ends after this many deaths without a score between them."""
SHOWN = 60


@dataclass
class Tally:
    """What a reward gave: sums of scores, why others are missing, and numbers of its own."""

    scored: int = 0
    total: float = 0.0
    missing: Counter[str] = field(default_factory=Counter)
    first_missing: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def mean(self) -> float | None:
        """Of the scores; None where there is none."""
        return self.total / self.scored if self.scored else None

    def add(self, score: Score, group: Group) -> None:
        """Count a score; a missing one by the first words of its reason."""
        if score.value is not None:
            self.scored += 1
            self.total += score.value
            return
        self.missing[score.why.partition(":")[0]] += 1
        self.first_missing = self.first_missing or f"{group.origin}: {score.why}"


class RewardProcess:
    """One reward. `start` before anything is spent, then `scores` for each prompt."""

    def __init__(self, config: RewardConfig) -> None:
        self.config, self.tally = config, Tally()
        self.columns: tuple[str, ...] = ()
        self._together = self._many = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._deaths, self._abandoned = 0, False
        self._limit_s = config.timeout_s + (GRACE_S if config.name == "judge" else 0.0)

    def start(self) -> None:
        """Start the process and load the reward.

        Raises:
            ConfigError: it cannot be loaded, lacks a package, or does not answer.
        """
        self._process, self._channel = child.start("raytune_ft.rewards.process", new_session=True)
        try:
            self._send(self.config.model_dump())
            answer = self._receive(START_S)
        except (EOFError, OSError):
            answer = None
        if answer is None:
            self.close()
            raise ConfigError(
                f"rewards.{self.config.called}",
                f"is not ready within {START_S:g} s, or its process died",
                "correct its file",
            )
        if "refused" in answer:
            self.close()
            value, rule, remedy = answer["refused"]
            raise ConfigError(value or f"rewards.{self.config.called}", rule, remedy)
        self.columns = tuple(answer["ready"]["columns"])
        self._together = answer["ready"]["together"]
        self._many = answer["ready"]["many"]

    def scores(self, groups: Sequence[Group]) -> list[list[Score]]:
        """For each group [n], in the order of its completions.

        Raises:
            RunFailed: it died `DEATHS` times in a row, or gave another number of scores.
        """
        if not self._many:
            return [self._scores([group]) for group in groups]
        scores = iter(self._scores(groups))
        return [[next(scores) for _ in group.completions] for group in groups]

    def _scores(self, groups: Sequence[Group]) -> list[Score]:
        """Of all completions of groups that the process gets at once."""
        owners = [group for group in groups for _ in group.completions]
        found: list[Score] = []
        while len(found) < len(owners):
            rest = _after(groups, len(found))
            try:
                self._score(rest, found)
            except (EOFError, OSError) as error:
                self._died(_after(groups, len(found))[0], found, error)
        for score, group in zip(found, owners, strict=True):
            self.tally.add(score, group)
        return found

    def _score(self, groups: Sequence[Group], found: list[Score]) -> None:
        self._send([group.plain for group in groups])
        expected = len(found) + sum(len(group.completions) for group in groups)
        while True:
            message = self._receive(self._limit_s)
            if message is None:
                raise TimeoutError(f"took longer than {self._limit_s:g} s")
            if "score" in message:
                found.append(Score(message["score"], message["why"]))
                self._deaths = 0
            elif "counts" in message:
                self.tally.counts.update(message["counts"])
            elif "broken" in message or "done" in message:
                if "broken" in message or len(found) != expected:
                    given = message.get("broken") or f"gave {len(found)} of {expected} scores"
                    raise RunFailed(f"{self.config.name} {given}, on {groups[0].origin}")
                return

    def _died(self, group: Group, found: list[Score], error: BaseException) -> None:
        """What was being scored, the first of `group`, has no score; the process begins again."""
        if self._abandoned:
            raise RunFailed(f"{self.config.name} was ended with the run") from error
        self._deaths += 1
        code = self.close()
        slow = isinstance(error, TimeoutError)
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        why = f"time limit: {error}" if slow else f"its process died: {ended}"
        lost = len(group.completions) if self._together else 1
        found += [Score(None, why)] * lost
        if self._deaths >= DEATHS:
            shown = group.prompt if len(group.prompt) <= SHOWN else f"{group.prompt[:SHOWN]}..."
            raise RunFailed(
                f"{self.config.name} died {DEATHS} times in a row ({why}), "
                f"last on {group.origin}: {shown!r}"
            )
        self._start_again(f"it had died on {group.origin}")

    def _start_again(self, after: str) -> None:
        try:
            self.start()
        except ConfigError as refused:
            raise RunFailed(f"{refused}, after {after}") from refused

    def _send(self, message: Any) -> None:
        assert self._channel is not None
        self._channel.send_bytes(json.dumps(message, default=str).encode())

    def _receive(self, limit_s: float) -> dict[str, Any] | None:
        """The next message; None where none comes in time."""
        assert self._channel is not None
        if not self._channel.poll(limit_s):
            return None
        message: dict[str, Any] = json.loads(self._channel.recv_bytes())
        return message

    def revive(self) -> None:
        """Begin again after `abandon`, for another run. Raises RunFailed where that fails."""
        if not self._abandoned:
            return
        self.close()
        self._abandoned, self._deaths = False, 0
        self._start_again("another run has failed")

    def abandon(self) -> None:
        """End the process from another thread than the one that waits for scores."""
        self._abandoned = True
        if (process := self._process) is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> int:
        """End the process and what it has started, and return its exit code."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # one that has died by itself says how
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._process = None
        return code


@dataclass(frozen=True)
class Rewards:
    """All rewards of a config, each in its process."""

    processes: Sequence[RewardProcess]

    @property
    def names(self) -> list[str]:
        """What they are called in results."""
        return [one.config.called for one in self.processes]

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float | None]]]:
        """For each group and completion the scores by name. The rewards work at the same time.

        Raises:
            RunFailed: one of them cannot score; all begin again when another run asks them.
        """
        if not self.processes:
            return [[{} for _ in group.completions] for group in groups]
        for one in self.processes:
            one.revive()
        with ThreadPoolExecutor(len(self.processes)) as threads:
            waiting = [threads.submit(RewardProcess.scores, one, groups) for one in self.processes]
            try:
                by_reward = [each.result() for each in waiting]
            except BaseException:  # Ctrl-C, or a reward that ends the run
                for one in self.processes:
                    one.abandon()
                raise
        return [
            [
                {name: each[g][i].value for name, each in zip(self.names, by_reward, strict=True)}
                for i in range(len(group.completions))
            ]
            for g, group in enumerate(groups)
        ]

    @property
    def judges(self) -> Rewards:
        """Those that compare completions."""
        return Rewards([one for one in self.processes if one.config.compares])

    def score_against(
        self, groups: Sequence[Group], others: Sequence[Sequence[str]]
    ) -> list[list[dict[str, float | None]]]:
        """The same, but those that compare give 1 where a completion wins against the text in its
        place of `others`, 0.5 where both tie.
        """
        graders = Rewards([one for one in self.processes if not one.config.compares])
        scores = graders.score(groups)
        pairs = [
            group.against(number, text)
            for group, texts in zip(groups, others, strict=True)
            for number, text in enumerate(texts)
        ]
        won = iter(self.judges.score(pairs))
        return [[one | next(won)[0] for one in group] for group in scores]

    def check_scored(self) -> None:
        """Raises RunFailed where a reward fails on every completion; None is no failure."""
        for one in self.processes:
            tally = one.tally
            if not tally.scored and tally.missing.keys() - {"None"}:
                raise RunFailed(
                    f"{one.config.name} scored none of {tally.missing.total()} completions; "
                    f"the first: {tally.first_missing}"
                )

    def notes(self) -> Iterator[str]:
        """Sentences on scores that are missing, and on judges."""
        for name, one in zip(self.names, self.processes, strict=True):
            tally = one.tally
            if tally.missing:
                causes = ", ".join(f"{why} {count}" for why, count in tally.missing.items())
                yield f"{name}: no score for {causes}; the first is {tally.first_missing}"
            if tally.counts:
                yield f"{name}: " + ", ".join(f"{what} {n}" for what, n in tally.counts.items())

    def total(self, scores: Mapping[str, float | None]) -> float | None:
        """The weighted sum; None where a score is missing that has a weight."""
        weights = {one.config.called: one.config.weight for one in self.processes}
        values = [(weight, scores[name]) for name, weight in weights.items() if weight]
        known = [weight * value for weight, value in values if value is not None]
        return sum(known) if values and len(known) == len(values) else None


class SharedRewards:
    """Rewards that start when they are first needed, and serve until they are closed.

    To another process it goes as its configs, whose `${ENV_NAME}` are read where they start: no
    secret travels or is written. A copy there starts processes of its own.
    """

    def __init__(self, configs: Sequence[RewardConfig]) -> None:
        self.configs = tuple(configs)
        self._open: ExitStack | None = None
        self._rewards: Rewards | None = None

    def __reduce__(self) -> Any:
        return SharedRewards, (self.configs,)

    def start(self) -> Rewards:
        """The rewards, which start if they have not.

        Raises:
            InputError: one of them cannot be used, or a variable of the environment is not set.
        """
        if self._rewards is None:
            with ExitStack() as stack:
                self._rewards = stack.enter_context(started(expanded(self.configs)))
                self._open = stack.pop_all()
        return self._rewards

    @contextmanager
    def serving(self) -> Iterator[Rewards]:
        """The rewards with counts of their own; those that start here end with the context."""
        was_open = self._rewards is not None
        rewards = self.start()
        for one in rewards.processes:
            one.tally = Tally()
        try:
            yield rewards
        finally:
            if not was_open:
                self.close()

    def close(self) -> None:
        """End the processes."""
        if self._open is not None:
            self._open.close()
        self._open = self._rewards = None


def _after(groups: Sequence[Group], done: int) -> list[Group]:
    """The groups without their first completions, of which `done` are done."""
    rest = []
    for group in groups:
        count = len(group.completions)
        if done < count:
            rest.append(group.after(done) if done else group)
        done = max(0, done - count)
    return rest


def check_rewards(rewards: Sequence[RewardConfig]) -> None:
    """Check the files that rewards name, before anything starts.

    Raises:
        InputError: a file of functions, or a reward model, cannot be used.
    """
    for reward in rewards:
        check = reward_of(reward.name).check
        if check is not None:
            check()(reward)


@contextmanager
def started(rewards: Sequence[RewardConfig]) -> Iterator[Rewards]:
    """The rewards, loaded and ready; their processes end with the context. The configs hold
    their secrets, not the names of these.

    Raises:
        InputError: one of them cannot be used.
    """
    check_rewards(rewards)
    processes = [RewardProcess(reward) for reward in rewards]
    try:
        with ThreadPoolExecutor(max(1, len(processes))) as threads:
            list(threads.map(RewardProcess.start, processes))
        yield Rewards(processes)
    finally:
        for one in processes:
            one.close()


def check_columns(rewards: Rewards, columns: Sequence[str], name: str) -> None:
    """Raises ConfigError where a reward needs a column that the rows of `name` lack."""
    for one in rewards.processes:
        missing = next((column for column in one.columns if column not in columns), None)
        if missing is not None:
            raise ConfigError(
                f"rewards.{one.config.called}",
                f"takes {missing!r}, which is no column of {name} ({', '.join(columns)})",
                "write it in the rows, or name another column",
            )

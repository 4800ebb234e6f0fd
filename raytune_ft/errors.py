"""Every exception that this package raises on purpose.

RaytuneFtError
|-- InputError            exit code 2: the user's input is wrong; nothing was started or lost
|   |-- ConfigError       a key, a value or a combination of them
|   |-- DataError         a source, a row or a column
|   |-- ModelError        a model directory, a hub id, a method that the model cannot take
|   |-- StorageError      a path that cannot be written, a run that exists or does not
|   |   `-- Promoted      the run or sweep was promoted before
|   `-- ClusterError      a cluster that lacks resources, refuses us or is another one
|       `-- Unreachable   a cluster that does not answer
|-- RunFailed             exit code 1: the run itself failed
|   |-- Diverged          the loss or the gradient is not finite
|   |-- LockHeld          another process drives the run, for longer than --wait-lock
|   |-- OutOfMemory       a device or the host ran out of memory
|   |   `-- PassTooLarge  it goes on with smaller passes
|   |-- DefectsFound      `doctor` found something that has to be mended
|   |-- CheckpointError   a checkpoint that is missing, damaged or of another model
|   `-- MergeError        a fold whose logits differ from those of base + adapter
|-- JobEnded              the exit code of a job that was followed, where it is not 0
`-- Interrupted           exit code 130: SIGINT or SIGTERM; the run can be resumed
"""

from __future__ import annotations

from pathlib import Path


class RaytuneFtError(Exception):
    """Root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(RaytuneFtError):
    """The user's input is wrong: the value, the rule that it breaks, what to write instead.

    The three parts are separate arguments, so that no message can lack one.
    """

    exit_code = 2

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        super().__init__(value, rule, remedy)
        self.value, self.rule, self.remedy = value, rule, remedy

    def __str__(self) -> str:
        return f"{self.value} {self.rule}; {self.remedy}"


class ConfigError(InputError):
    """A key, a value or a combination of them."""


class DataError(InputError):
    """A source, a row or a column."""


class ModelError(InputError):
    """A model directory, a hub id, a method that the model cannot take."""


class StorageError(InputError):
    """A path that cannot be written, a run that exists or does not."""


class Promoted(StorageError):
    """The run or sweep was promoted before, and promoting again was not asked for."""


class ClusterError(InputError):
    """A cluster that lacks resources, refuses this user or is not the one that was meant."""


class Unreachable(ClusterError):
    """A cluster that does not answer, or not any more."""


class RunFailed(RaytuneFtError):
    """The input was valid and the run failed."""


class Diverged(RunFailed):
    """The loss or the gradient is not finite."""


class LockHeld(RunFailed):
    """Another process drives the run, for longer than --wait-lock; a retry may find it free."""


class OutOfMemory(RunFailed):
    """A device or the host ran out of memory."""


class PassTooLarge(OutOfMemory):
    """Memory ran out in a pass. The run is started again with smaller passes."""


class DefectsFound(RunFailed):
    """`doctor` found something that has to be mended."""


class CheckpointError(RunFailed):
    """A checkpoint that is missing, damaged or of another model."""


class MergeError(RunFailed):
    """A fold whose logits differ from those of base + adapter."""


class JobEnded(RaytuneFtError):
    """A job that was followed ended with an exit code other than 0, which becomes our own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(RaytuneFtError):
    """SIGINT or SIGTERM arrived; what was saved can be resumed."""

    exit_code = 130

    @classmethod
    def of(cls, run_dir: Path) -> Interrupted:
        """A run or a sweep that was."""
        return cls(f"{run_dir} was interrupted; continue it with --resume")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, torch, a library of CUDA or Ray says so."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        sign in text
        for sign in (
            *("outofmemory", "out of memory", "(oom)", "can't allocate memory"),
            *("cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
        )
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

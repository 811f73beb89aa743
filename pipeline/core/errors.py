"""What can go wrong, anywhere in this project, and the exit code that says so.

    PipelineError                     2
    ├── InputError                    2  something that the user gave does not make sense
    │   ├── ConfigError               2  the configuration: unknown key, wrong type, bad combination
    │   ├── DataError                 2  images, labels, calibration sets
    │   ├── PreprocessError           2  a preprocessing specification
    │   └── ModelError                2  the model, or one in a state that an operation cannot take
    │       └── CheckpointError       2  a checkpoint that cannot be read, or does not fit the model
    ├── ArtifactError                 2  a built thing is damaged, foreign, or not what it should be
    ├── LockedError                   2  another run works on the same folder
    ├── GateFailedError               1  a limit of the configuration does not hold
    ├── BuildError                    3  a stage could not make what it should
    │   └── UnsupportedOperatorError  3  a graph holds an operator that is not known
    ├── UnavailableError              4  hardware or software that this machine does not have
    │   └── StoreError                4  a shared store that does not answer, or cannot be written
    │       └── DamagedError          4  something in it is not what belongs there
    └── UnforeseenError              70  a fault of this program

A message is one line: what is wrong, where, and how to mend it. The command line prints it without
a traceback. The codes are documented in the README; 0 is success and 130 an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from pipeline.core.words import in_short, printable


class PipelineError(Exception):
    """Base of every failure that the command line reports without a traceback."""

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        # Messages hold names out of files, and reach terminals, logs and reports.
        return printable(super().__str__())


class InputError(PipelineError):
    """Something that the user gave does not make sense."""


class ConfigError(InputError):
    """Settings: an unknown key, a wrong type, a combination of options that cannot work."""


class DataError(InputError):
    """Images, labels or calibration sets that cannot be used."""


class PreprocessError(InputError):
    """A preprocessing specification makes no sense."""


class ModelError(InputError):
    """The model is unknown, or in a state that the operation cannot take."""


class CheckpointError(ModelError):
    """A checkpoint cannot be read, or does not fit the model."""


class ArtifactError(PipelineError):
    """A built thing is damaged, foreign, or not what it should be."""


class LockedError(PipelineError):
    """Another run works on the same folder."""


class GateFailedError(PipelineError):
    """A limit that the configuration sets does not hold."""

    exit_code = 1


class BuildError(PipelineError):
    """A stage could not make what it should."""

    exit_code = 3


class UnsupportedOperatorError(BuildError):
    """A graph holds an operator that is not known."""


class UnavailableError(PipelineError):
    """This machine lacks hardware or software that the operation needs."""

    exit_code = 4


class StoreError(UnavailableError):
    """A shared store does not answer, or does not take what it is given."""


class DamagedError(StoreError):
    """Something in a shared store is missing, or not what belongs there."""


class UnforeseenError(PipelineError):
    """A fault of this program, or of a library that it uses: nothing that a user gave."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h


_TORCH_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""In what torch raises instead of a MemoryError."""


def failure_of(step: str, error: Exception, advice: str) -> PipelineError:
    """What an error that nobody foresaw comes to.

    Args:
        step: The step that it ended.
        error: What was raised; no `PipelineError`.
        advice: Where the traceback is, and what to do with it.
    """
    if isinstance(error, MemoryError) or _TORCH_OUT_OF_MEMORY in str(error):
        return BuildError(f"{step}: out of memory: {in_short(error)}; free some and run again")
    return UnforeseenError(f"{step}: an unforeseen fault: {in_short(error)}; {advice}")


@contextmanager
def about(where: str) -> Iterator[None]:
    """Put a place before the messages of input errors, such as the key that led there.

    Args:
        where: What the user gave, such as "model.checkpoint".

    Raises:
        InputError: What was raised inside, of the same kind, as "where: message"; as it is where
            it says so already.
    """
    try:
        yield
    except InputError as error:
        if str(error).startswith(f"{where}:"):
            raise
        raise type(error)(f"{where}: {error}") from error

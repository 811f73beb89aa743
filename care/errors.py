"""Mistakes that a user can mend.

    CareError
    ├── CheckpointError   a checkpoint that cannot be read, or does not fit the model
    ├── DataError         a dataset or an image that cannot be used
    ├── ModelError        an unknown model, or one in a state that an operation cannot take
    ├── PreprocessError   a preprocessing specification that makes no sense
    └── SettingsError     an option, or a combination of options, that makes no sense

A message says what is wrong, where, and how to mend it, in one line. Command lines print it
without a traceback and exit with `exit_code`.
"""

from __future__ import annotations

from typing import ClassVar


class CareError(Exception):
    """Base of every mistake that a user of `care` can mend."""

    exit_code: ClassVar[int] = 2


class CheckpointError(CareError):
    """A checkpoint cannot be read, or does not fit the model."""


class DataError(CareError):
    """A dataset or an image cannot be used."""


class ModelError(CareError):
    """The model is unknown, or in a state that the operation cannot take."""


class PreprocessError(CareError):
    """A preprocessing specification makes no sense."""


class SettingsError(CareError):
    """An option, or a combination of options, makes no sense."""

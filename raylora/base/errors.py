"""Every mistake raylora can name, one class a kind.

RayloraError
├── UserError            the person can mend it: exit code 2, one sentence, no traceback
│   ├── JobError         the job file: unknown words, wrong types, choices that cannot work
│   ├── OptionError      one option's value is not allowed
│   ├── DataError        images, captions, data folders
│   ├── WeightsError     base weights or a LoRA file that cannot be read
│   ├── StorageError     a place that cannot be read or written
│   │   └── MissingObject
│   └── MemoryPlanError  it does not fit
├── ExportError          a saved file did not come back as it was trained
└── TrainingError        the run cannot go on (NaN, drifting workers, a torn checkpoint)
"""

from __future__ import annotations


class RayloraError(Exception):
    """Root of all errors that raylora raises on purpose."""


class UserError(RayloraError):
    """The person who wrote the job can mend this; shown as one sentence."""


class JobError(UserError):
    """Something in the job file cannot work. `problems` holds every one that was found."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[JobError], tuple[list[str]]]:
        return type(self), (self.problems,)


class OptionError(UserError):
    """One option has a value that is not allowed."""


class DataError(UserError):
    """Images, captions or a data folder cannot be used."""


class WeightsError(UserError):
    """Base weights or a LoRA file cannot be read or do not belong together."""


class StorageError(UserError):
    """A place in storage cannot be read or written."""


class MissingObject(StorageError):
    """Storage has no object of that name."""


class MemoryPlanError(UserError):
    """The job does not fit the device, with every allowed strategy on."""


class ExportError(RayloraError):
    """A saved LoRA, read back by an independent reader, is not what was trained."""


class TrainingError(RayloraError):
    """The run cannot go on; what was saved before stays good."""

"""Failures that a user can cause and mend. The command line prints each as one line and exits with code 2."""


class FewstepError(Exception):
    """Base of every error that fewstep raises on purpose; its message says what is wrong, where, and what to do."""


class ConfigError(FewstepError):
    """A recipe, an option or a stored configuration that cannot be used as given."""


class NotImportedError(ConfigError):
    """A part of the user's own file, which nobody has named; says how."""


class DataError(FewstepError):
    """A data source that is missing, empty, corrupt, or of another shape than asked for."""


class CheckpointError(FewstepError):
    """A run folder, checkpoint or saved model that cannot be read, or belongs to another architecture or recipe."""


class LaterFormatError(CheckpointError):
    """A file that a newer fewstep wrote."""


class WriteError(CheckpointError):
    """A file that cannot be written where it was to be; the command line adds --out for commands that have it."""


class BaseWeightsError(CheckpointError):
    """The weights beneath adapters are not where they were, or are others: no older checkpoint helps."""


class HubError(CheckpointError):
    """A model that the Hugging Face Hub, or its cache, does not give; says what to do about it."""


class ShapeError(FewstepError, ValueError):
    """A tensor of the wrong shape, or values outside the range where an operation is defined."""


class UnsupportedError(FewstepError, NotImplementedError):
    """A combination without mathematical meaning, such as the diagonal velocity of a map that only reaches t_min."""


class TrainingDivergedError(FewstepError):
    """A non-finite loss or gradient; names the step, the batch's times and the last good checkpoint."""


class ProcessLostError(FewstepError):
    """One of the processes that train together is gone; names it, and the checkpoint that is left."""


class MissingExtraError(FewstepError, ImportError):
    """An optional dependency is absent; names the extra that brings it."""


class FewstepWarning(UserWarning):
    """Something that the run survives but its user should know."""


class Stopped(KeyboardInterrupt):
    """A signal asked a run to end, and it did once its step was saved; `code` is the exit code that says so."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def first_cause(error: BaseException) -> BaseException:
    """What an error was raised from, or that from, to the first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

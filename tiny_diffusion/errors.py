"""Errors that a user can cause, each with its exit code.  Any other error is our defect and keeps its traceback."""


class OptionError(ValueError):
    """An option that is wrong by itself, or against a readable checkpoint or folder."""

    exit_code = 2


class FileError(OSError):
    """A file, a folder, a data set or a checkpoint that is missing, unreadable, corrupt or cannot be written."""

    exit_code = 1


class DivergenceError(ArithmeticError):
    """Training or sampling that produces NaN or infinity."""

    exit_code = 1


class LostProcessError(RuntimeError):
    """Another rank of the same run has ended, or can no longer be reached."""

    exit_code = 1

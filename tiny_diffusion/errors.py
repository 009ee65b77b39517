"""What a user can cause, each with the exit code it ends in.  Everything else is our defect and keeps its traceback."""


class OptionError(ValueError):
    """An option that is wrong by itself, or against a readable checkpoint or folder."""

    exit_code = 2


class FileError(OSError):
    """A file, a folder, a data set or a checkpoint that is missing, unreadable, corrupt or cannot be written."""

    exit_code = 1


class DivergenceError(ArithmeticError):
    """Training that has produced nothing but non-finite steps."""

    exit_code = 1


class LostProcessError(RuntimeError):
    """Another process of the same run has ended, or can no longer be reached."""

    exit_code = 1

"""What can go wrong for a user, one class for each documented exit code.

A message is one line that names the thing, the cause and the remedy. ``cli.main`` prints it and exits with the code;
anything that is not an ``AltoptError`` is a bug and keeps its traceback.
"""


class AltoptError(Exception):
    """An expected failure; its ``exit_code`` is part of the command line's interface."""

    exit_code = 1


class UsageError(AltoptError):
    """A command, a recipe or a ``--set`` that cannot be understood."""

    exit_code = 2


class DataError(AltoptError):
    """An image or an annotation that cannot be used."""

    exit_code = 3


class ArtifactError(AltoptError):
    """A checkpoint, proposals or record that is missing, foreign or corrupt."""

    exit_code = 4


class DivergedError(AltoptError):
    """A loss that is no longer a finite number."""

    exit_code = 5


class ResourceError(AltoptError):
    """Too little disk or memory."""

    exit_code = 6


class LostError(ResourceError):
    """The connection to another process of the same command broke."""


class DownloadError(AltoptError):
    """Something that could not be fetched."""

    exit_code = 7


class BusyError(AltoptError):
    """The run folder is held by another process."""

    exit_code = 75

"""The base classes of errors that a user can fix."""


class UserError(Exception):
    """An error that a user can fix; one line names the file or flag, what was found and what to do.

    The scripts print the message without a traceback. Any other exception is a fault of the program and keeps it.

    Attributes:
        alone: whether one of several processes raises it, so that this one is to tell it. Any other error is raised by
            all processes of a machine, and the first one prints it.
    """

    alone = False


class DatasetError(UserError):
    """A file is missing or unusable; the message names the file, what was found and what to do."""

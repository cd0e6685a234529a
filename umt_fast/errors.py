"""The base class of every error that a user can repair."""


class RunError(Exception):
    """An error whose message names value, place and fix; the command line prints it without a traceback."""

"""The base of every error that the user of a program can repair."""


class RunError(Exception):
    """An error whose message names the value, the place and the fix; the programs print it without a traceback."""

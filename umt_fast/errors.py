"""The base of every error that the user of a program can repair."""


class RunError(Exception):
    """Its message names the value, the place and the repair; the programs print it without a traceback."""

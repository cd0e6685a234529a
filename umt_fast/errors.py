"""The base of every error that the person who started a run can mend."""


class RunError(Exception):
    """Its message names the value, the place and the mend; the trainer prints it without a traceback."""

"""The one exception that a person's mistake ends in: the command line prints its text and nothing else."""


class UserError(Exception):
    """Names the thing, the value found, the value expected, and what to do next. Shown without a traceback, exit status 2."""

"""The one exception that a person's mistake ends in: the command line prints its text and nothing else."""


class UserError(Exception):
    """Names the thing, the value found, the value expected, and what to do next. Shown without a traceback, exit status 2."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return self.text  # and not `args`, to which Ray Data adds advice of its own

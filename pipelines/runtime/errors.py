"""The exception for a user's mistake, the exception for one image, and the causes of an error that Ray wrapped."""

from collections.abc import Callable
from typing import Any

WRAPPERS = ("SystemException", "RaySystemError", "ControllerError", "UserCodeException")  # Ray's, around what happened


class UserError(Exception):
    """A mistake of the user, or a damaged file: shown without a traceback, exit status 2.

    `text` names the thing, the value found and the value expected; `remedy` says what to do next. `str()` shows both.
    """

    def __init__(self, text: str, remedy: str = "") -> None:
        super().__init__(text)
        self.text, self.remedy = text, remedy

    def __str__(self) -> str:  # not `args`, to which Ray Data appends advice of its own
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


class DamagedFileError(UserError, ValueError):
    """A file does not hold what was written into it: it is cut off, empty, overwritten, or of the wrong kind."""


class ImageError(Exception):
    """One image that can't be used; its text is the reason."""


def mistake_of(error: BaseException) -> UserError | None:
    """The person's mistake that `error` is, or that is behind it; None where it is no mistake."""
    if isinstance(error, UserError) and not hasattr(error, "cause"):  # what Ray makes of a worker's is one too, traceback and all
        return error
    return next((one for one in reversed(causes_of(error)) if isinstance(one, UserError)), None)


def origin_of(error: BaseException) -> BaseException:
    """What happened, without what Ray puts around it."""
    causes = causes_of(error)
    return next((one for one in reversed(causes) if type(one).__name__ not in WRAPPERS), error)


def in_one_line(error: BaseException) -> str:
    """The line of the error's text that says most: its first, of Ray's own the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return lines[-1 if _is_rays(error) else 0]


def causes_of(error: BaseException) -> list[BaseException]:
    """The error and those behind it: what Ray's wrappers and Python's chain lead to."""
    return _reached(error, _behind)


def carried_by(error: BaseException) -> list[BaseException]:
    """What was raised before Ray put its own errors around it; not what lies behind that in turn."""
    return [one for one in _reached(error, lambda one: _behind(one) if _is_rays(one) else []) if not _is_rays(one)]


def _is_rays(error: BaseException) -> bool:
    return type(error).__module__.startswith("ray.")


def _behind(error: BaseException) -> list[Any]:
    failures = getattr(error, "worker_failures", None) or {}
    return [getattr(error, "cause", None), getattr(error, "client_exc", None), *failures.values(), error.__cause__]


def _reached(error: BaseException, behind: Callable[[BaseException], list[Any]]) -> list[BaseException]:
    found: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and not any(one is each for each in found):
            found.append(one)
            waiting += behind(one)
    return found

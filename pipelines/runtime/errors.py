"""The exception for a user's mistake, the exception for an unusable image, and the causes of an error that Ray wrapped."""

from collections.abc import Callable
from typing import Any

WRAPPERS = ("SystemException", "RaySystemError", "ControllerError", "UserCodeException")  # Ray's, around the original exception


class UserError(Exception):
    """A mistake of the user, or a damaged file: shown without a traceback, exit status 2.

    `text` names the thing, the value found and the value expected; `remedy` says what to do next. `str()` shows both.
    """

    def __init__(self, text: str, remedy: str = "") -> None:
        super().__init__(text)
        self.text, self.remedy = text, remedy

    def __str__(self) -> str:  # not `args`: Ray Data appends text to it
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


class DamagedFileError(UserError, ValueError):
    """A file does not have its original content: it is truncated, empty, overwritten, or of the wrong type."""


class ImageError(Exception):
    """An image cannot be used; the text is the reason."""


def mistake_of(error: BaseException) -> UserError | None:
    """The UserError that `error` is or that caused it; None if there is none."""
    if isinstance(error, UserError) and not hasattr(error, "cause"):  # Ray's copy of a worker's UserError has the traceback in its text
        return error
    return next((cause for cause in reversed(causes_of(error)) if isinstance(cause, UserError)), None)


def origin_of(error: BaseException) -> BaseException:
    """The original exception, without Ray's wrappers."""
    causes = causes_of(error)
    return next((cause for cause in reversed(causes) if type(cause).__name__ not in WRAPPERS), error)


def in_one_line(error: BaseException) -> str:
    """The most informative line of the error's text: the first line, or the last line of an exception of Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return lines[-1 if _is_rays(error) else 0]


def causes_of(error: BaseException) -> list[BaseException]:
    """The error and all its causes, through Ray's wrappers and Python's exception chain."""
    return _reached(error, _behind)


def carried_by(error: BaseException) -> list[BaseException]:
    """The exceptions that Ray wrapped, without the causes of those exceptions."""
    reached = _reached(error, lambda reason: _behind(reason) if _is_rays(reason) else [])
    return [reason for reason in reached if not _is_rays(reason)]


def _is_rays(error: BaseException) -> bool:
    return type(error).__module__.startswith("ray.")


def _behind(error: BaseException) -> list[Any]:
    failures = getattr(error, "worker_failures", None) or {}
    return [getattr(error, "cause", None), getattr(error, "client_exc", None), *failures.values(), error.__cause__]


def _reached(error: BaseException, behind: Callable[[BaseException], list[Any]]) -> list[BaseException]:
    found: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        reason = waiting.pop(0)
        if isinstance(reason, BaseException) and not any(reason is known for known in found):
            found.append(reason)
            waiting += behind(reason)
    return found

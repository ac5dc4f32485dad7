"""What is given on the command line is used, or refused: an empty path, and an option that is given twice."""

from typing import Any

import typer
from typer.core import TyperCommand

from pipelines.runtime.errors import UserError


class Command(TyperCommand):
    """A command whose options are given once, but for those that are repeatable."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises UserError for an option that is given twice: all values but the last would be ignored."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for one in order:
            if one.opts[0].startswith("-") and not one.multiple and order.count(one) > 1:
                raise UserError(f"{one.opts[0]} is given {order.count(one)} times, expected it once")
        return super().parse_args(ctx, args)


def path_given(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> str | None:
    """Callback of the options and arguments that take a path or an address. Raises UserError for an empty one, as `--out "$FOLDER"` gives
    where FOLDER is not set."""
    source = context.get_parameter_source(parameter.name or "")
    if source is not None and source.name == "COMMANDLINE" and value is not None and not value.strip():
        metavar = str(parameter.metavar).strip("[]")
        name = parameter.opts[0] if parameter.opts[0].startswith("-") else metavar
        raise UserError(f"{name} is empty, expected {metavar}", remedy=f"give one, or leave {name} out")
    return value

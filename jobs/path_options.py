"""Options of the command line that are refused instead of ignored: empty paths, and options that are given twice."""

from typing import Any

import typer
from typer.core import TyperCommand

from pipelines.runtime.errors import UserError


class Command(TyperCommand):
    """A command that refuses an option given twice, unless it is repeatable."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises UserError for an option that is given twice, because click ignores all values but the last."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for one in order:
            if one.opts[0].startswith("-") and not one.multiple and order.count(one) > 1:
                raise UserError(f"{one.opts[0]} is given {order.count(one)} times, expected once")
        return super().parse_args(ctx, args)


def path_given(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> str | None:
    """Callback of options and arguments that take a path or an address. Raises UserError for an empty value, e.g. from `--out "$FOLDER"`
    with FOLDER not set."""
    source = context.get_parameter_source(parameter.name or "")
    if source is not None and source.name == "COMMANDLINE" and value is not None and not value.strip():
        metavar = str(parameter.metavar).strip("[]")
        name = parameter.opts[0] if parameter.opts[0].startswith("-") else metavar
        raise UserError(f"{name} is empty, expected {metavar}", remedy=f"give a value, or leave {name} out")
    return value

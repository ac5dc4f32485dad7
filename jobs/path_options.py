"""Paths on the command line: an empty one, as `--out "$FOLDER"` gives where FOLDER is not set, is no path."""

import typer

from pipelines.errors import UserError


def path_given(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> str | None:
    """Callback of the options and arguments that take a path or an address. Raises UserError for an empty one."""
    source = context.get_parameter_source(parameter.name or "")
    if source is not None and source.name == "COMMANDLINE" and value is not None and not value.strip():
        option = parameter.opts[0] if parameter.opts[0].startswith("-") else str(parameter.metavar).strip("[]")
        raise UserError(f"{option} is empty, expected {str(parameter.metavar).strip('[]')}; give one, or leave {option} out")
    return value

"""Options that commands share, as dataclasses: `expanded` turns a parameter of such a type into one option for each field."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import update_wrapper
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from jobs.leaving import say

if TYPE_CHECKING:
    from jobs.config.load import ConfigurationFile
    from jobs.config.schema import RunConfig


@dataclass
class ConfigOptions:
    """Where a command's configuration comes from."""

    config: Annotated[str | None, typer.Option("--config", metavar="FILE.yaml", help="settings that override the preset's")] = None
    preset: Annotated[str | None, typer.Option("--preset", metavar="NAME", help="demo, mar_base, mar_large, mar_huge, kl16, kl8, vq16")] = (
        None
    )
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override one setting; repeatable")
    ] = None
    print_config: Annotated[bool, typer.Option("--print-config", help="print the whole configuration and exit")] = False

    def given(self) -> list[str]:
        """The options that are given."""
        values = {"--config": self.config, "--preset": self.preset, "--set": self.assignments, "--print-config": self.print_config}
        return [option for option, value in values.items() if value]

    def load(self, more: Sequence[str] = ()) -> "RunConfig":
        """The configuration, with `more` assignments."""
        return load(self.config, self.preset, [*(self.assignments or []), *more], self.print_config)


def load(config: "str | ConfigurationFile | None", preset: str | None, assignments: Sequence[str], print_config: bool) -> "RunConfig":
    """The configuration, whose sources are printed on stderr. With `print_config` print it, and end the command."""
    from jobs.config.load import load as load_config
    from pipelines.runtime.tracking import without_password

    loaded = load_config(preset, config, assignments)
    file = config if isinstance(config, str | None) else config.name
    sources = [f"preset {preset}" if preset else "defaults", *([file] if file else []), *assignments]
    source = ", ".join(without_password(text) for text in sources)
    if print_config:
        print(f"# {source}\n{loaded.yaml()}", end="")
        raise typer.Exit
    say(f"configuration: {source}")
    return loaded


@dataclass
class PlanOptions:
    """What `mar plan` assumes."""

    gpus: Annotated[int, typer.Option(metavar="N", help="number of GPUs")] = 16
    gpu: Annotated[str, typer.Option(metavar="NAME", help="h100, a100-80gb, …; `list` lists them all")] = "h100"
    epochs: Annotated[float, typer.Option(metavar="X", help="passes over the images")] = 400
    images: Annotated[int, typer.Option(metavar="N", help="number of images; 0: the cache's, or ImageNet's without a cache")] = 0
    efficiency: Annotated[float, typer.Option(metavar="X", help="MFU, as a share of the peak")] = 0.23
    rate: Annotated[float | None, typer.Option("--images-per-second-per-gpu", metavar="X", help="measured, for --efficiency")] = None
    peak_tflops: Annotated[float | None, typer.Option(metavar="X", help="dense bf16 peak, for a GPU that is not listed")] = None
    memory_gb: Annotated[float | None, typer.Option(metavar="X", help="memory, for a GPU that is not listed")] = None
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False


def expanded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with an argument for each field of its parameters that are dataclasses. A default instance of such a parameter gives
    the defaults of its fields."""
    hints = get_type_hints(function, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)}
    parameters: list[Parameter] = []
    for name, parameter in signature(function).parameters.items():
        if name in groups:
            defaults = groups[name]() if parameter.default is Parameter.empty else parameter.default
            kinds = get_type_hints(groups[name], include_extras=True)
            parameters += [
                Parameter(one.name, Parameter.KEYWORD_ONLY, default=getattr(defaults, one.name), annotation=kinds[one.name])
                for one in fields(groups[name])
            ]
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    def run(**given: Any) -> Any:
        built = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        return function(**given, **built)

    update_wrapper(run, function)
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run

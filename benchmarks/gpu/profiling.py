"""A profile of the device: time per kernel family, and the share of idle time."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, Line, line

SHOWN = 10
FAMILIES = (  # the first match of a kernel's name counts; on a CPU, names of PyTorch's operators
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|attention"),
    ("compiled, reductions", r"^triton_(red|per)"),
    ("compiled, pointwise", r"^triton_"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|wgmma|aten::(add|b|badd)?mm$|aten::linear"),
    ("convolutions", r"conv|cudnn|fprop|dgrad|wgrad"),
    ("norms", r"layer_?norm|group_?norm|GammaBeta|RowwiseMoments"),
    ("optimizer, averages, clipping", r"multi_tensor_apply|foreach|adam"),
    ("dropout and other random numbers", r"dropout|philox|distribution|random"),
    ("softmax", r"softmax"),
    ("sort, gather, scatter, index", r"sort|radix|gather|scatter|index|embedding"),
    ("copies and casts", r"memcpy|copy|CatArray|aten::cat"),
    ("fills", r"memset|fill|zero"),
    ("reductions", r"reduce|aten::(sum|mean|any|all)$"),
    ("pointwise", r"elementwise"),
)


def family(kernel: str) -> str:
    """The family of a kernel, or its name without template arguments if it matches none."""
    for name, pattern in FAMILIES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return re.split(r"[<(]", kernel.removeprefix("void "))[0][-60:]


def covered(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The time covered by at least one span, and the time from the first start to the last end."""
    inside, begin, end = 0.0, None, 0.0
    for start, stop in sorted(spans):
        begin = start if begin is None else begin
        if stop > end or begin == start:
            inside += stop - max(start, end) if end else stop - start
            end = max(end, stop)
    return inside, end - (begin or 0.0)


def profiled(bench: Bench, name: str, work: Callable[[], object]) -> Line:
    """A result line with the most expensive families and the idle share."""
    activity = ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU
    for _ in range(2 if bench.cuda else 1):  # the first run initialises the profiler
        bench.synchronize()
        with profile(activities=[activity]) as found:
            work()
            bench.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    spans = []
    for event in found.events():
        if _is_work(bench, event):
            duration = event.time_range.end - event.time_range.start if bench.cuda else event.self_cpu_time_total
            seconds[family(event.name)] += duration / 1e6
            calls[family(event.name)] += 1
            if bench.cuda or event.cpu_parent is None:
                spans.append((event.time_range.start, event.time_range.end))
    busy, whole = covered(spans)
    in_all = sum(seconds.values())
    first = sorted(seconds, key=lambda one: -seconds[one])[:SHOWN]
    families = [
        {"family": one, "share": seconds[one] / in_all if in_all else 0.0, "seconds": seconds[one], "calls": calls[one]} for one in first
    ]
    idle = 1 - busy / whole if whole else None
    most = ", ".join(f"{one['family']} {one['share']:.0%}" for one in families[:4])
    shown = "no work was recorded" if idle is None else f"idle {idle:.1%}; {most}"
    return line("profile", name, shown, families=families, idle_share=idle, seconds=whole / 1e6)


def _is_work(bench: Bench, event: Any) -> bool:
    if not bench.cuda:
        return bool(event.name.startswith("aten::"))
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)

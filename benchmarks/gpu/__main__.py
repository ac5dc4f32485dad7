"""Checks correctness on this GPU, then measures speed.

    python -m benchmarks.gpu [--release DIR] [--minutes 8] [--out FILE.jsonl] [--parts NAME …]
    python -m benchmarks.gpu --device cpu --tiny      # the same script anywhere, in seconds

Needs torch, numpy and safetensors, and for --release (a checkout of LTH14/mar) timm, scipy and tqdm. Each result is a JSON line, written
as soon as it is known. docs/gpu.md explains the measurements. The exit status is 1 if a check failed.
"""

import argparse
import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo

from benchmarks.gpu import correctness, speed
from benchmarks.gpu.bench import Bench, Line, line
from benchmarks.gpu.report import Report, verdicts
from mar_model.training.gpus import of_device

ROOT = Path(__file__).parents[2]
SECONDS = {  # minimum seconds of each part on a GPU
    "golden": 10, "precision": 20, "training_steps": 20, "synchronisation": 10, "memory": 10, "tokenizer": 10, "training": 20,
    "generation": 20, "encoding": 10, "other_training": 20, "other_generation": 20,
}  # fmt: skip
PARTS: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "golden": correctness.golden,
    "precision": correctness.precision,
    "training_steps": correctness.training,
    "synchronisation": correctness.synchronisation,
    "memory": correctness.memory,
    "tokenizer": correctness.tokenizer,
    "training": functools.partial(speed.training_speed, speed.TRAINED),
    "generation": functools.partial(speed.generation, speed.GENERATED),
    "encoding": speed.encoding,
    "other_training": functools.partial(speed.training_speed, speed.TRAINED_TOO),
    "other_generation": functools.partial(speed.generation, speed.GENERATED_TOO),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--release", type=Path, metavar="DIR", help="a checkout of LTH14/mar to compare with")
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that no longer fit are skipped")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.jsonl"), metavar="FILE", help="replaced if there (%(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to test the script, not the device")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--records", type=Path, default=ROOT / "tests" / "data", metavar="DIR", help="golden records (default: tests/data)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device; default: data sheet, else measured")
    parser.add_argument("--append", action="store_true", help=argparse.SUPPRESS)  # set when the script restarts itself
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch finds no CUDA device; try --device cpu --tiny")
    if options.release is not None and not (options.release / "models" / "mar.py").is_file():
        parser.error(f"--release is {options.release}, which has no models/mar.py; expected a checkout of LTH14/mar")
    return options


def environment(bench: Bench, peak: str) -> Line:
    """The environment of the measurements."""
    device = bench.device
    values: dict[str, object] = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    name = platform.processor() or platform.machine()
    if bench.cuda:
        name = torch.cuda.get_device_name(device)
        values |= {
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": _driver(),
            "capability": torch.cuda.get_device_capability(device), "memory_gb": torch.cuda.mem_get_info(device)[1] / 1e9,
        }  # fmt: skip
    shown = f"PyTorch {values['torch']}, driver {values.get('driver', '–')}, peak {bench.peak / 1e12:.4g} TFLOP/s ({peak})"
    return line("environment", name, shown, peak_tflops=bench.peak / 1e12, peak_from=peak, tiny=bench.tiny, **values)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def main() -> int:
    options = parse()
    device = torch.device(options.device)
    if options.tiny and device.type == "cpu":
        torch.set_num_threads(1)  # multithreading slows down such small operations
    torch._dynamo.config.recompile_limit = 256  # for all sizes, precisions and modes in one process
    began = time.monotonic()
    report = Report(options.out, append=options.append)
    bench = Bench(device, options.tiny, began + 60 * options.minutes, 1e12, options.records, options.release)
    measured = correctness.peak_products(bench)
    known = of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    peak = options.peak_tflops or (known.tflops if known else measured / 1e12)
    source = "as given" if options.peak_tflops else known.source if known else "measured"
    bench = Bench(device, options.tiny, bench.deadline, 1e12 * peak, options.records, options.release)
    if not options.append:
        report.add(environment(bench, source))
        report.add(line("products", "bf16" if bench.cuda else "float32", f"{measured / 1e12:.4g} TFLOP/s measured", tflops=measured / 1e12))
    for index, name in enumerate(options.parts):
        if not bench.tiny and bench.left() < SECONDS[name]:
            report.add(speed.skipped("part", name, bench, SECONDS[name]))
            continue
        start = time.monotonic()
        try:
            for found in PARTS[name](bench):
                report.add(found)
        except (Exception, SystemExit) as error:
            report.add(speed.failed("error", name, error))
            error.__traceback__ = None
        report.add(line("part", name, f"{time.monotonic() - start:.1f} s", seconds=time.monotonic() - start))
        rest = options.parts[index + 1 :]
        if rest and not _answers(bench):  # after an unrecoverable CUDA error only another process can use the device
            _start_again(options, rest, bench)
    for found in verdicts(report.lines, judged=not bench.tiny):
        report.add(found)
    print(report.table())
    return 1 if any(one["passed"] is False for one in report.lines if one["kind"] != "verdict") else 0


def _answers(bench: Bench) -> bool:
    try:
        bench.clean()
        bench.synchronize()
        return True
    except RuntimeError as error:
        print(f"the device no longer answers: {error}", file=sys.stderr)
        return False


def _start_again(options: argparse.Namespace, parts: list[str], bench: Bench) -> None:
    """Replace this process with one that runs the remaining parts and appends to the same file."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--append", "--parts", *parts, "--minutes", str(bench.left() / 60)]
    command += ["--out", str(options.out), "--device", options.device, "--records", str(options.records)]
    command += ["--tiny"] if options.tiny else []
    command += ["--release", str(options.release)] if options.release else []
    command += ["--peak-tflops", str(options.peak_tflops)] if options.peak_tflops else []
    os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())

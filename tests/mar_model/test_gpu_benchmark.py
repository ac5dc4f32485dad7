"""`python -m benchmarks.gpu`: on a CPU with tiny models, what it needs to be imported, and its verdicts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.bench import line
from benchmarks.gpu.profiling import covered, family
from benchmarks.gpu.report import Report, verdicts

ROOT = Path(__file__).parents[2]
KINDS = {
    "environment", "products", "golden", "precision", "compiling", "training_steps", "synchronisation", "memory", "tokenizer", "training",
    "generation", "encoding", "profile", "part", "verdict",
}  # fmt: skip
BLOCKED = "ray", "pyarrow", "mlflow", "pydantic", "pipelines", "jobs", "typer", "scipy", "timm"
PROGRAM = f"""
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def run(*arguments: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=seconds, check=False
    )


def test_the_whole_script_on_a_cpu_with_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    done = run("--device", "cpu", "--tiny", "--out", str(out))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = [json.loads(one) for one in out.read_text().splitlines()]
    assert {one["kind"] for one in lines} == KINDS
    assert [one["name"] for one in lines if one["passed"] is False] == []
    by_name = {(one["kind"], one["name"]): one for one in lines}
    assert by_name["training_steps", "compiled against eager"]["error"] < 0.01
    assert by_name["training_steps", "eager: falling"]["last"] < by_name["training_steps", "eager: falling"]["first"]
    assert by_name["memory", "activations"]["error"] <= 0.05
    for name in ("large compiled", "large eager", "base compiled", "base eager", "huge eager checkpointed"):
        found = by_name["training", name]
        assert found["images_per_second"] == pytest.approx(found["images"] / found["seconds"])
        assert found["seconds_min"] <= found["seconds"] <= found["seconds_max"]
        assert found["mfu"] == pytest.approx(found["tflops"] / by_name["environment", lines[0]["name"]]["peak_tflops"])
    for name in ("eager", "compiled", "graphs", "compiled graphs", "compiled graphs, all fast modes"):
        assert 0 < by_name["generation", name]["seconds_an_image"] < 60
    profile = by_name["profile", "training large compiled"]
    assert 3 <= len(profile["families"]) <= 10
    assert 0 < sum(one["share"] for one in profile["families"]) <= 1 + 1e-9
    assert 0 <= profile["idle_share"] < 1
    assert by_name["training", "large release"]["summary"] == "not measured: --release was not given"
    assert by_name["verdict", "training large, MFU"]["goal"] == 0.45
    table = done.stdout[done.stdout.rindex("\n\n") :]
    assert all(one["summary"] in table for one in lines if one["kind"] != "part")


def test_what_no_longer_fits_and_what_fails_is_a_line_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import __main__ as script

    def broken(bench: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(script.PARTS, "golden", broken)
    out, arguments = tmp_path / "gpu.jsonl", ["gpu", "--device", "cpu", "--tiny", "--parts", "golden", "tokenizer", "--out"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(out)])
    assert script.main() == 1
    kinds = [(one["kind"], one["name"], one["passed"]) for one in map(json.loads, out.read_text().splitlines())]
    assert ("error", "golden", False) in kinds
    assert ("tokenizer", "KL encoding, float32", True) in kinds
    assert kinds.index(("error", "golden", False)) < kinds.index(("tokenizer", "KL encoding, float32", True))

    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--minutes", "0", "--peak-tflops", "1", "--out", str(out)])
    monkeypatch.setattr(script.correctness, "peak_products", lambda bench: 1e12)
    assert script.main() == 0
    lines = [json.loads(one) for one in out.read_text().splitlines()]
    assert [one["name"] for one in lines if one.get("skipped")] == list(script.PARTS)
    assert all("of --minutes remain" in one["summary"] for one in lines if one.get("skipped"))


def test_after_an_error_that_cuda_keeps_another_process_runs_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import __main__ as script

    started: list[list[str]] = []

    def replaced(program: str, command: list[str]) -> None:
        started.append(command[3:])
        monkeypatch.setattr(script, "_answers", lambda bench: True)
        monkeypatch.setattr(sys, "argv", ["gpu", *command[3:]])
        raise SystemExit(script.main())

    monkeypatch.setattr(script.os, "execv", replaced)
    monkeypatch.setattr(script, "_answers", lambda bench: False)
    out = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--parts", "synchronisation", "tokenizer", "--out", str(out)])
    with pytest.raises(SystemExit, match="0"):
        script.main()
    assert started[0][:3] == ["--append", "--parts", "tokenizer"]
    kinds = [json.loads(one)["kind"] for one in out.read_text().splitlines()]
    assert kinds.count("environment") == 1
    assert kinds.index("synchronisation") < kinds.index("tokenizer") < kinds.index("verdict")


def test_without_a_gpu_the_command_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("--out", "unused.jsonl")
    assert done.returncode == 2
    assert "--device is cuda, but PyTorch finds no CUDA device; try --device cpu --tiny" in done.stderr


def test_verdicts() -> None:
    lines = [
        line("training", "large compiled", "", images_per_second=500.0, mfu=0.46),
        line("training", "large eager", "", images_per_second=300.0, mfu=0.27),
        line("training", "large release", "", images_per_second=250.0, mfu=0.2),
        line("training", "base release", "out of memory"),
        line("generation", "release", "", seconds_an_image=0.4),
        line("generation", "graphs", "", seconds_an_image=0.1),
        line("generation", "compiled", "", seconds_an_image=0.2),
        line("generation", "compiled graphs, all fast modes", "", seconds_an_image=0.05),
    ]
    found = {one["name"]: (one["value"], one["passed"]) for one in verdicts(lines)}
    assert found == {
        "training large, times the release": (2.0, False),
        "training large, MFU": (0.46, True),
        "training base, times the release": (None, None),
        "training base, MFU": (None, None),
        "generation exact, times the release": (pytest.approx(4.0), True),
        "generation with fast modes, times the release": (pytest.approx(8.0), False),
    }


def test_a_line_is_on_disk_at_once_and_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "new" / "gpu.jsonl")
    report.add(line("precision", "bf16", "not finite", False, error=math.inf))
    text = (tmp_path / "new" / "gpu.jsonl").read_text()
    assert capsys.readouterr().out == text
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["error"] == "inf"
    again = Report(tmp_path / "new" / "gpu.jsonl", append=True)
    again.add(line("verdict", "x", "reached", True))
    assert "FAILED  not finite" in again.table()


def test_kernels_by_family_and_idle_time() -> None:
    kernels = {
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNN": "matrix products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(Params)": "matrix products",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>(pytorch_flash::Flash_fwd_params)": "attention",
        "triton_poi_fused__to_copy_gelu_3": "compiled, pointwise",
        "triton_per_fused_native_layer_norm_0": "compiled, reductions",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<float>>": (
            "optimizer, averages, clipping"
        ),
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>": "copies and casts",
        "Memcpy HtoD (Pinned -> Device)": "copies and casts",
        "void at::native::vectorized_elementwise_kernel<4, at::native::SiluFunctor>": "pointwise",
        "void some::new_kernel<float, 4>(float*)": "some::new_kernel",
    }
    assert {kernel: family(kernel) for kernel in kernels} == kernels
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == (4, 6)
    assert covered([(7, 9)]) == (2, 2)
    assert covered([]) == (0, 0)

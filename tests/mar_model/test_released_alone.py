"""`mar_model` with nothing but torch, numpy, safetensors and what those three need themselves."""

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import mar_model

PROGRAM = """
import importlib, pathlib, pkgutil, sys
sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry and "dist-packages" not in entry] + [sys.argv[1]]
import mar_model, numpy, safetensors, torch
for module in pkgutil.walk_packages(mar_model.__path__, "mar_model."):
    importlib.import_module(module.name)
from mar_model import MAR, GenerationOptions, MARConfig, SampleNoise, generate
from mar_model.checkpoints.checkpoint import AVERAGE, WEIGHTS, load_model, write_checkpoint
from mar_model.checkpoints.released import export_checkpoint, import_checkpoint
config = MARConfig(encoder_depth=1, encoder_width=64, encoder_heads=1, decoder_depth=1, decoder_width=64, decoder_heads=1, buffer_size=2,
                   denoiser_depth=1, denoiser_width=32, latent_size=4, classes=3)
model, folder = MAR(config), pathlib.Path(sys.argv[2])
weights = {name: value.clone() for name, value in model.state_dict().items()}
(folder / "checkpoint").mkdir()
write_checkpoint(folder / "checkpoint", model.config, {WEIGHTS: weights, AVERAGE: weights}, {})
export_checkpoint(folder / "checkpoint", folder / "checkpoint-last.pth")
import_checkpoint(folder / "checkpoint-last.pth", folder / "imported", {})
model, _ = load_model(folder / "imported")
latents = generate(model, torch.tensor([0, 2]), SampleNoise(0, [0, 1]), GenerationOptions(ar_steps=2, diffusion_steps=2))
print(tuple(latents.shape), *sorted({name.partition(".")[0] for name in sys.modules} & {"jobs", "pipelines", "ray", "mlflow", "pyarrow"}))
"""


def test_mar_model_works_where_only_torch_numpy_and_safetensors_are_installed(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    needed, waiting = set(), ["torch", "numpy", "safetensors"]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        try:
            found = distribution(name)
        except ModuleNotFoundError:  # of another platform
            continue
        waiting += [re.match(r"[\w.-]+", one)[0] for one in found.requires or [] if "extra ==" not in one]
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(found.locate_file(top))
    (packages / "mar_model").symlink_to(Path(mar_model.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, str(packages), str(tmp_path)], capture_output=True, text=True, env={}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 16, 4, 4)"
    assert not {"ray", "mlflow", "pyarrow", "pydantic", "scipy", "yaml", "PIL"} & {one.name for one in packages.iterdir()}

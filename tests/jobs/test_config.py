"""The run configuration: precedence, every mistake a person can make in it, and the presets' published numbers."""

from pathlib import Path

import pytest
import yaml
from command_line import Mar

from jobs.config.load import PRESETS, file_as_assignments, load, presets
from jobs.config.schema import TYPES
from mar_model.config import PUBLISHED
from mar_model.tokenizers import without_weights
from pipelines.runtime.errors import UserError

MISTAKES = [
    # (--set, what the error must say)
    ("train.batchs=3", ["train.batchs is not a known key", "nearest: train.batch ", "micro_batch", "--set"]),
    ("training.batch=3", ["training.batch", "nearest: train.batch", "sections are images, tokenizer"]),
    ("guidance=3", ["guidance is not a known key", "nearest: generate.guidance"]),
    ("sed=3", ["sed is not a known key", "nearest: seed"]),
    ("train=3", ["'train' is a section", "train.batch"]),
    ("train.batch", ["'train.batch' has no value", "section.key=value"]),
    ("train.batch=many", ["train.batch is 'many'", "expected a whole number", "--set"]),
    ("train.batch=2.5", ["train.batch is 2.5", "expected a whole number"]),
    ("train.batch=true", ["train.batch is True", "expected a whole number"]),
    ("train.batch=[1", ["'train.batch=[1' is not a YAML"]),
    ("train.flip=perhaps", ["train.flip is 'perhaps'", "expected true or false"]),
    ("train.learning_rate=fast", ["train.learning_rate is 'fast'", "expected a number"]),
    ("train.learning_rate=.nan", ["train.learning_rate is nan", "expected a number above 0"]),
    ("generate.labels=3", ["generate.labels is 3", "a list of whole numbers or names"]),
    ("generate.samples=[1, a]", ["generate.samples is [1, 'a']", "a list of whole numbers"]),
    ("generate.samples=[1, 1]", ["generate.samples is [1, 1]", "distinct sample numbers"]),
    ("generate.labels=[-1]", ["generate.labels is [-1]", "class numbers from 0"]),
    ("generate.guidance_interval=[0.8, 0.2]", ["generate.guidance_interval is [0.8, 0.2]", "ascending order"]),
    ("generate.diffusion_steps_end=101", ["generate.diffusion_steps_end is 101", "at most generate.diffusion_steps, which is 100"]),
    ("generate.eta=1.5", ["generate.eta is 1.5", "a share between 0 and 1"]),
    ("seed=-1", ["seed is -1", "0 or more"]),
    ("train.workers=0", ["train.workers is 0", "above 0"]),
    ("model.label_drop=1.5", ["model.label_drop is 1.5", "between 0 and 1"]),
    ("generate.diffusion_steps=1001", ["generate.diffusion_steps is 1001", "1000 or fewer"]),
    ("tokenizer.kind=kI", ["tokenizer.kind is 'kI'", "one of kl, vq, pixels"]),
    ("cache.dtype=float61", ["cache.dtype is 'float61'", "one of float16, float32", "nearest: float16"]),
    ("train.schedule=cosin", ["train.schedule is 'cosin'", "one of constant, cosine", "nearest: cosine"]),
    ("train.precision=bf61", ["train.precision is 'bf61'", "auto, bf16, float32", "nearest: bf16"]),
    ("generate.guidance_schedule=liner", ["generate.guidance_schedule is 'liner'", "linear, constant", "nearest: linear"]),
    ("evaluate.features=incepton", ["evaluate.features is 'incepton'", "nearest: inception"]),
    ("sweep.over=training", ["sweep.over is 'training'", "one of train, generate", "nearest: train"]),
    ("sweep.mode=minimum", ["sweep.mode is 'minimum'", "one of min, max"]),
    ("images.size=250", ["images.size is 250", "multiple of the tokenizer's stride 16"]),
    ("model.patch_size=3", ["model.patch_size is 3", "divisor of the latent side 16"]),
    ("train.batch=1000", ["train.batch is 1000", "multiple of train.micro_batch, which is 128"]),
    ("model.encoder_heads=7", ["model.encoder_heads is 7", "divisor of model.encoder_width, which is 768"]),
    ("model.decoder_heads=5", ["model.decoder_heads is 5", "divisor of model.decoder_width, which is 768"]),
    ("train.schedule=cosine", ["train.schedule_images is 0", "cosine"]),
    ("sweep.parameters={generate.temprature: [1]}", ["'generate.temprature'", "unknown", "nearest: generate.temperature"]),
    ("sweep.parameters={train.learning_rate: [1]}", ["'train.learning_rate'", "sweep.over is generate"]),
    ("sweep.parameters={generate.temperature: []}", ["generate.temperature is an empty list"]),
    ("sweep.parameters={generate.temperature: 1}", ["sweep.parameters is {'generate.temperature': 1}", "lists of values"]),
    ("sweep.parameters={generate.temperature: [1, hot]}", ["generate.temperature is 'hot'", "expected a number"]),
]


@pytest.mark.parametrize(("assignment", "said"), MISTAKES, ids=[one for one, _ in MISTAKES])
def test_a_mistake_ends_with_status_2_and_names_key_value_and_remedy(mar: Mar, assignment: str, said: list[str]) -> None:
    result = mar("train", "--set", assignment)
    assert result.status == 2
    assert result.out == ""
    assert all(line.startswith("mar: error: ") for line in result.err.splitlines())
    for text in said:
        assert text in result.err


def test_a_file_or_preset_that_is_not_there(mar: Mar, tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text("train: {batch: 256}\n")
    absent = mar("cache", "--config", str(tmp_path / "digit.yaml"))
    assert absent.status == 2
    assert f"nearest: {tmp_path / 'digits.yaml'}" in absent.err
    preset = mar("cache", "--preset", "mar_bas")
    assert preset.status == 2
    assert "'mar_bas' does not exist, expected one of demo, kl16, kl8, mar_base, mar_huge, mar_large, vq16; nearest: mar_base" in preset.err
    assert "--preset demo" in mar("cache", "--config", "demo").err
    assert "use --config" in mar("cache", "--preset", "mine.yaml").err


def test_mistakes_in_a_file_are_all_named_with_the_file(mar: Mar, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {batch: x, flip: 3.5}\ncache: {shard_images: '7'}\n")
    first = mar("train", "--config", str(file)).err.splitlines()
    assert [line.split()[2] for line in first] == ["train.batch", "train.flip"]
    assert all(f"(from {file})" in line for line in first)
    for text, said in [
        ("train: [1, 2]", "train in"),
        ("- train", "expected sections"),
        ("train: {batch: 1", "is not YAML"),
        ("trian: {batch: 1}", "nearest: train"),
    ]:
        file.write_text(text)
        assert said in mar("train", "--config", str(file)).err


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {batch: 256, learning_rate: 1e-4}\nseed: 7\n")
    config = load("demo", str(file), ["train.batch=1_024", "train.images=1e6", "images.held_out_folder=2024", "cluster.address=no"])
    assert config.train.batch == 1024  # --set
    assert config.train.images == 1_000_000
    assert config.train.learning_rate == pytest.approx(1e-4)  # file: text to YAML 1.1
    assert config.seed == 7
    assert config.images.size == 32  # preset
    assert config.train.beta2 == 0.95  # default
    assert config.images.held_out_folder == "2024"  # text where text is expected
    assert config.cluster.address == "no"
    swept = load("demo", assignments=["sweep.over=train", "sweep.parameters={train.learning_rate: [1e-4, 1e-3]}", "sweep.metric=loss"])
    assert swept.sweep.parameters == {"train.learning_rate": [1e-4, 1e-3]}


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\ntrain:\n")
    assert load(file=str(tmp_path / "empty.yaml")) == load()


@pytest.mark.parametrize("preset", presets())
def test_the_printed_configuration_is_the_same_configuration(mar: Mar, tmp_path: Path, preset: str) -> None:
    result = mar("train", "--preset", preset, "--set", "seed=3", "--print-config")
    assert result.status == 0
    (tmp_path / "printed.yaml").write_text(result.out)
    assert load(file=str(tmp_path / "printed.yaml")) == load(preset, assignments=["seed=3"])
    printed = {section: values for section, values in yaml.safe_load(result.out).items() if section != "seed"}
    assert {f"{section}.{key}" for section, values in printed.items() if isinstance(values, dict) for key in values} | {"seed"} == set(
        TYPES
    )


@pytest.mark.parametrize("preset", presets())
def test_a_preset_holds_only_what_differs_from_the_defaults(preset: str) -> None:
    defaults = load().plain()
    written = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    same = [f"{section}.{key}" for section, values in written.items() for key, value in values.items() if defaults[section][key] == value]
    # what tells the three sizes apart is written in each of them
    allowed = {"mar_base": ("model.",), "mar_large": ("generate.guidance",), "demo": ("sweep.over",)}
    assert [key for key in same if not key.startswith(allowed.get(preset, ("nothing",)))] == []


def test_a_file_travels_as_assignments(tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text('train: {path: "a: b", images: 1e6}\ncache: {path: "2024"}\ntokenizer: {path: " x"}\nimages: {held_out_folder: "no"}\n')
    assert load(assignments=file_as_assignments(str(file))) == load(file=str(file))
    for preset in presets():
        assert load(assignments=file_as_assignments(str(PRESETS / f"{preset}.yaml"))) == load(preset)


@pytest.mark.parametrize(
    ("preset", "size", "heads", "denoiser", "guidance"),
    [
        ("mar_base", (12, 768), 12, (6, 1024), 2.9),
        ("mar_large", (16, 1024), 16, (8, 1280), 3.0),
        ("mar_huge", (20, 1280), 16, (12, 1536), 3.2),
    ],
)
def test_presets_have_the_published_recipe(
    preset: str, size: tuple[int, int], heads: int, denoiser: tuple[int, int], guidance: float
) -> None:
    config = load(preset)
    model, train, generate = config.model, config.train, config.generate
    assert (model.encoder_depth, model.encoder_width) == (model.decoder_depth, model.decoder_width) == size
    assert model.encoder_heads == model.decoder_heads == heads
    assert (model.denoiser_depth, model.denoiser_width) == denoiser
    assert (model.buffer_size, model.patch_size, model.mlp_ratio, model.diffusion_repeats) == (64, 1, 4.0, 4)
    assert (model.attention_dropout, model.projection_dropout, model.label_drop) == (0.1, 0.1, 0.1)
    assert (model.mask_ratio_mean, model.mask_ratio_std, model.mask_ratio_min) == (1.0, 0.25, 0.7)
    assert (train.batch, train.images, train.warmup_images) == (2048, 800 * 1_281_167, 100 * 1_281_167)
    assert train.learning_rate == pytest.approx(1e-4 * train.batch / 256)
    assert (train.schedule, train.beta1, train.beta2, train.weight_decay) == ("constant", 0.9, 0.95, 0.02)
    assert (train.gradient_clip, train.ema_decay, train.ema_warmup, train.flip) == (3.0, 0.9999, False, True)
    assert train.workers * train.micro_batch == train.batch
    assert (config.images.size, config.tokenizer.stride, config.tokenizer.channels, config.tokenizer.width) == (256, 16, 16, 128)
    assert (generate.ar_steps, generate.diffusion_steps, generate.guidance_schedule, generate.limit_x0) == (256, 100, "linear", False)
    assert generate.guidance == guidance
    assert (config.evaluate.images, config.evaluate.features) == (50_000, "inception")


@pytest.mark.parametrize(("preset", "published"), [("mar_base", 207_924_768), ("mar_large", 478_326_304), ("mar_huge", 942_403_104)])
def test_presets_have_the_published_number_of_parameters(preset: str, published: int) -> None:
    from jobs.estimate import parameters

    assert parameters(load(preset), classes=1000) == published


@pytest.mark.parametrize(
    ("preset", "published", "start", "weight"), [("kl16", 69_610_963, 50_001, 0.5), ("kl8", 83_653_863, 50_001, 0.5),
    ("vq16", 69_593_371, 250_001, 0.75)],
)  # fmt: skip
def test_tokenizers_have_the_published_sizes_and_recipe(preset: str, published: int, start: int, weight: float) -> None:
    settings = load(preset).tokenizer
    assert sum(value.numel() for value in without_weights(settings.network()).parameters()) == published
    assert settings.learning_rate == pytest.approx(4.5e-6 * settings.batch)
    assert settings.adversarial_start == start * settings.batch
    assert (settings.adversarial_weight, settings.perceptual_weight, settings.l1_weight, settings.l2_weight) == (weight, 1.0, 1.0, 0.0)
    assert (settings.beta1, settings.beta2, settings.weight_decay, settings.kl_weight) == (0.5, 0.9, 0.0, 1e-6)


def test_the_demo_fits_two_workers() -> None:
    demo = load("demo")
    assert demo.train.workers == 2
    assert demo.train.batch // demo.train.micro_batch >= demo.train.workers
    assert demo.images.size // demo.tokenizer.stride == 4
    paths = [demo.tokenizer.path, demo.cache.path, demo.train.path, demo.generate.path, demo.evaluate.path, demo.sweep.path]
    assert all(path.startswith("runs/demo/") for path in paths)
    assert len(set(paths)) == len(paths)
    assert demo.tracking.uri == "sqlite:///runs/demo/mlflow.db"


def test_an_unknown_key_never_reaches_a_stage() -> None:
    with pytest.raises(UserError, match=r"evaluate\.image is not a known key; nearest: evaluate\.images"):
        load(assignments=["evaluate.image=3"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    assert load(name).model == PUBLISHED[name]

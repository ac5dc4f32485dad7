"""Class names, paths and values that are markup to somebody: HTML, TeX, rich's console, file names. They stay text."""

import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tiny_run import SIZE, write_checkpoint, write_tokenizer

from jobs.report.page import report
from pipelines.caching.settings import CacheSettings
from pipelines.caching.stage import cache
from pipelines.generation import samples
from pipelines.generation.settings import GenerateSettings
from pipelines.generation.stage import generate
from pipelines.images.listing import Images, list_images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import plots
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.settings import TokenizerSettings

IMAGE = "<img src=x onerror=alert(1)>"
NAMES = sorted([IMAGE, "\"'><svg onload=alert(2)>", "{{ 7*7 }} [bold]$x^{$ &amp; %41"])
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000",
)  # fmt: skip
NOTICE = "<script>window.alert = () => { document.title = 'script has run' }</script>"  # a dialog would show nowhere


@pytest.fixture(scope="module")
def run(ray_local: ClusterSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes, folder and configuration have such names: a cache, and samples of a checkpoint."""
    root = tmp_path_factory.mktemp("runs") / "a run; <b onclick=alert(3)>$"
    for index, name in enumerate(NAMES):
        for number in range(2):
            file = root / "images" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (SIZE, SIZE), (60 * index, 90, 200)).save(file)
    tokenizer = TokenizerSettings(path=write_tokenizer(root / "tokenizer"))
    images = ImageSettings(source=str(root / "images"), size=SIZE)
    cache(Images(images), tokenizer.path, CacheSettings(path=str(root / "cache")), Stage("cache", ray_local))
    checkpoint = Path(write_checkpoint(root / "checkpoint", tokenizer.path))
    state = json.loads((checkpoint / "state.json").read_text())
    names = json.loads((root / "cache" / "manifest.json").read_text())["class_names"]
    (checkpoint / "state.json").write_text(json.dumps({**state, "class_names": names}))
    settings = GenerateSettings(
        path=str(root / "samples"), checkpoint=str(checkpoint), images=2, labels=[IMAGE, 2], ar_steps=2, diffusion_steps=2, batch=2
    )
    generate(tokenizer.path, "", settings, Stage("generate", ray_local))
    uri = "sqlite:///<script>alert(4)</script>"
    configuration = {"generate": {"labels": [IMAGE, 2]}, "<i>": {"<u>": "<s>"}, "tracking": {"uri": uri}}
    (root / "configuration.json").write_text(json.dumps(configuration))
    return root


class Elements(HTMLParser):
    """Which elements and attributes a page has, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), set[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_them_as_text(run: Path) -> None:
    page = Elements(Path(report(str(run))).read_text())
    assert f"one row per class, from the top: {IMAGE} · {NAMES[2]}." in page.text  # of what was drawn, and no other
    assert not page.tags & {"script", "svg", "b", "i", "u", "s"}
    assert not [name for name in page.attributes if name.startswith("on")]
    for text in (run.name, "<u>", "<s>", "sqlite:///<script>alert(4)</script>"):
        assert text in page.text, text
    assert f"mar report '{run}'" in page.text  # a shell would take it as one word


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[Path], str]:
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine (Debian: apt-get install chromium)")

    def dom(page: Path) -> str:
        profile = tmp_path / f"profile-{page.stem}"
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    return dom


def title(dom: str) -> str:
    return re.findall(r"<title>(.*?)</title>", dom)[-1]


def test_a_browser_shows_them_and_runs_nothing(run: Path, browse: Callable[[Path], str], tmp_path: Path) -> None:
    source = Path(report(str(run))).read_text()
    assert source.count("<head>") == 1
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy".*?>\n')
    for name, text in {"page": source, "without-policy": policy.sub("", source)}.items():
        page = tmp_path / f"{name}.html"
        page.write_text(text.replace("<head>", f"<head>{NOTICE}"))
        shown = browse(page)
        assert "script has run" not in title(shown)
        assert html.escape(IMAGE) in shown
    unsafe = tmp_path / "unsafe.html"  # what this test would see: the same page with the name as markup
    unsafe.write_text(policy.sub("", source).replace("<head>", f"<head>{NOTICE}").replace(html.escape(IMAGE), IMAGE))
    assert title(browse(unsafe)) == "script has run"


def test_samples_lie_below_their_folder_and_are_an_image_source_again(run: Path, tmp_path: Path) -> None:
    assert sorted(one.name for one in (run / "samples" / "images").iterdir()) == sorted([IMAGE, NAMES[2].replace("%", "%25")])
    names = ["../up", "/etc", ".hidden", "..", "", "a/b", "a%2Fb", "a\0b", "ü 🎨"]
    folders = [samples.folder_name(name) for name in names]
    assert folders == ["%2E.%2Fup", "%2Fetc", "%2Ehidden", "%2E.", "%", "a%2Fb", "a%252Fb", "a%00b", "ü 🎨"]
    for folder in folders:
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / folder / "0.png")
    assert list_images(ImageSettings(source=str(tmp_path / "images"), size=8)).class_names == sorted(folders)
    assert [one.name for one in tmp_path.iterdir()] == ["images"]


def test_plots_draw_dollars(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    png = plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: figures.append(figure) or png(figure))
    values = ["runs/$x^{$", "runs/$y$", "runs/z"]
    rows = [
        {"trial": f"{value},{rate}", "parameters": {"train.init_from": value, "train.keep_best": rate}, "metric": 1.0}
        for value in values
        for rate in ("$a_{$", "b")
    ]
    picture = plots.sweep_plot(rows, "validation_$m$", rows[0]["trial"])
    assert np.asarray(Image.open(io.BytesIO(picture))).std() > 1
    [axes] = figures[0].axes
    assert [one.get_text() for one in axes.get_xticklabels()] == [value.replace("$", r"\$") for value in values]
    assert [one.get_text() for one in axes.get_legend().get_texts()] == [r"keep_best \$a_{\$", "keep_best b", "best"]
    assert axes.get_ylabel() == r"validation \$m\$"

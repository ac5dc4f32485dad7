"""Making a latent cache: images a second beside a bare loop, precision, memory, kills, S3 that fails, listing. Each bar with its baseline.

    python -m benchmarks.cache [--what throughput,precision,memory,kills,faults,listing] [--images 2000]
    python -m benchmarks.cache --what forms --source FOLDER_OF_CLASS_FOLDERS

Photographs are made: 500 × 375 JPEG of noise at several scales, about the size of ImageNet's. Ray's start is never part of a speed.
"""

import argparse
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import boto3
import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.faulty_s3 import KINDS, FaultyS3
from benchmarks.source_forms import write_ilsvrc, write_parquet, write_webdataset
from jobs.stages import guarded
from mar_model.tokenizers import KLAutoencoder, KLConfig, save_tokenizer
from pipelines import progress, s3, storage
from pipelines.caching import CacheSettings, cache
from pipelines.cluster import ClusterSettings, connected, use_threads
from pipelines.encoding import Decoded, Encoder, EncodingJob, decode_row
from pipelines.errors import UserError
from pipelines.host_memory import ENVIRONMENT
from pipelines.images import ImageSettings, list_images
from pipelines.latents import MANIFEST, SHARDS, LatentCache
from pipelines.shards import make, shards_of
from pipelines.stage import Stage
from pipelines.tokenizing import TokenizerSettings

DISTINCT = 100  # photographs; the others are the same bytes under other names
CLASSES = 10
BATCH = 32
SHARD = 256
SMALL = KLConfig(channels=4, width=8, multipliers=(1, 1, 2), encoder_blocks=1, decoder_blocks=1, attention=False)
MIDDLE = KLConfig(channels=4, width=4, multipliers=(1, 2, 4, 4), encoder_blocks=1, decoder_blocks=1, attention=False)


def write_photographs(folder: Path, images: int, size: tuple[int, int] = (500, 375)) -> str:
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(min(images, DISTINCT)):
        pixels = np.zeros((size[1], size[0], 3), np.float32)
        for cell in (4, 16, 64):
            coarse = generator.integers(0, 256, (size[1] // cell + 1, size[0] // cell + 1, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32) / 3
        sink = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(sink, "JPEG", quality=90)
        encoded.append(sink.getvalue())
    for number in range(images):
        path = folder / f"{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[number % len(encoded)])
    return str(folder)


def write_tokenizer(folder: Path, config: KLConfig) -> str:
    torch.manual_seed(0)
    save_tokenizer(KLAutoencoder(config), folder)
    return str(folder)


def bare_loop(images: ImageSettings, tokenizer: str, threads: int) -> float:
    """Images a second of one process without Ray after the first SHARD: decoding threads, encoding of both views, moments kept."""
    use_threads(ClusterSettings(threads=threads))
    encoder = Encoder(tokenizer, "float32", "float16", torch.device("cpu"))
    rows, kept = list_images(images).train(), []
    ahead: deque[Future[Decoded]] = deque()
    remaining = iter(rows)
    buffer, began = encoder.buffer(BATCH, images.size), 0.0
    with ThreadPoolExecutor(threads) as pool:
        for row in remaining:
            ahead.append(pool.submit(decode_row, images, row))
            if len(ahead) == 2 * BATCH:
                break
        for start in range(0, len(rows), BATCH):
            if start == SHARD:
                began = time.perf_counter()
            count = min(BATCH, len(rows) - start)
            for place in range(count):
                pixels = ahead.popleft().result().pixels
                assert pixels is not None
                buffer[place] = torch.from_numpy(pixels)
                if (following := next(remaining, None)) is not None:
                    ahead.append(pool.submit(decode_row, images, following))
            kept.append(encoder.encode(buffer[:count]).numpy().astype(np.float16))
    return (len(rows) - SHARD) / (time.perf_counter() - began)


def through_ray(images: ImageSettings, tokenizer: str, path: str, threads: int) -> tuple[float, dict[str, float]]:
    """Images a second through the stage's encoders after the first shard, in a Ray that is already there; and where the time went."""
    import ray

    rows = list_images(images).train()
    job = EncodingJob(images, tokenizer, path, BATCH, "float16", "float32", threads, ClusterSettings(threads=threads))
    done, seconds, began = 0, None, 0.0
    for _, record, took in make(job, 1, ray.put(rows), shards_of(len(rows), SHARD)):
        done += record["rows"]
        began = began or time.perf_counter()
        seconds = took if seconds is None else seconds + took
    assert seconds is not None
    return (done - SHARD) / (time.perf_counter() - began), seconds.shares()


def throughput(options: argparse.Namespace) -> None:
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = ImageSettings(source=write_photographs(folder / "images", options.images), size=256)
        tokenizer = write_tokenizer(folder / "tokenizer", MIDDLE)
        began = time.perf_counter()
        with connected(ClusterSettings(cpus=threads), folder / "ray.log"):
            start = time.perf_counter() - began
            speeds: list[tuple[float, float]] = []
            for run in range(options.runs):
                ours, shares = through_ray(images, tokenizer, str(folder / f"cache-{run}"), threads)
                speeds.append((ours, bare_loop(images, tokenizer, threads)))
    ours, bare = (statistics.median(values) for values in zip(*speeds, strict=True))
    figures = {"images_per_second": ours, "bare_loop": bare, "ray_start_seconds": start, "shares": shares, "runs": speeds}
    print(json.dumps({"benchmark": "cache.throughput", **figures}))
    row("images through Ray", f"{ours:.0f} images/s", f"bare loop {bare:.0f}", f"{ours / bare:.0%}", "90 %")
    row("  Ray's start", f"{start:.1f} s", "", "", "apart")


def precision(options: argparse.Namespace) -> None:
    """Each way in a process of its own: the baseline in PyTorch's, the others as workers are set up."""
    seconds, deviations = {}, {}
    for name in ("contiguous", "float32", "bf16"):
        command = [sys.executable, "-m", "benchmarks.cache", "--what", "encoding", "--precision", name, "--runs", str(options.runs)]
        environment = os.environ | ({} if name == "contiguous" else ENVIRONMENT)
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        seconds[name], deviations[name] = found["seconds_an_image"], found["means_rms_deviation"]
    print(json.dumps({"benchmark": "cache.precision", "seconds_an_image": seconds, "means_rms_deviation": deviations}))
    base = seconds["contiguous"]
    for name in ("float32", "bf16"):
        what, bar = f"{seconds[name]:.3f} s an image", f"3 times; deviation {deviations[name]:.1e}"
        row(f"KL-16 encoding, {name}", what, f"contiguous {base:.3f}", f"{base / seconds[name]:.2f} times", bar)


def run_encoding(options: argparse.Namespace) -> None:
    """KL-16 on 8 images at a time in one arithmetic: what `precision` compares. `contiguous`: float32 as PyTorch does it by itself; the
    others run on a thread, as Ray's actors do."""
    plain = options.precision == "contiguous"
    if plain:
        torch.set_num_threads(os.cpu_count() or 1)
    else:
        use_threads(ClusterSettings(threads=os.cpu_count() or 1))
    images = torch.randint(0, 256, (8, 256, 256, 3), dtype=torch.uint8)
    seconds, deviation = [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = write_tokenizer(Path(temporary), KLConfig())
        pool = ThreadPoolExecutor(1)
        encoder = Encoder(tokenizer, "float32" if plain else options.precision, "float32", torch.device("cpu"))
        if plain:
            encoder.tokenizer.to(memory_format=torch.contiguous_format)

        def encode() -> torch.Tensor:
            if not plain:
                return encoder.encode(images)
            with torch.inference_mode():
                return encoder.tokenizer.encode(images.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1.0)

        for _ in range(options.runs + 1):
            began = time.perf_counter()
            moments = encode() if plain else pool.submit(encode).result()
            seconds.append((time.perf_counter() - began) / len(images) / (1 if plain else 2))  # the others encode the mirror image too
        if not plain:
            deviation = encoder.deviation(images, moments)["means_rms"]
    print(json.dumps({"seconds_an_image": statistics.median(seconds[1:]), "means_rms_deviation": deviation}))


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The largest proportional set size of this process and all below it, in MB, as the list's only element."""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            total = 0.0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss / 2**20
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def memory(options: argparse.Namespace) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = write_tokenizer(folder / "tokenizer", SMALL)
        for images in (2_000, 20_000):
            write_photographs(folder / f"{images}", images, size=(160, 120))
            command = [sys.executable, "-m", "benchmarks.cache", "--what", "stage", "--source", str(folder / f"{images}")]
            command += ["--tokenizer", tokenizer, "--path", str(folder / f"cache-{images}")]
            found[images] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    few, many = (one["peak_mb"] for one in found.values())
    print(json.dumps({"benchmark": "cache.memory", "runs": found}))
    row("peak PSS, 20,000 images", f"{many:.0f} MB", f"2,000: {few:.0f} MB", f"{many / few - 1:+.1%}", "+10 %")


def run_stage(options: argparse.Namespace) -> None:
    """The stage alone, small: what `memory` measures and `kills` kills."""
    progress.LINE_SECONDS = 0.0  # a line whenever an image more is done: `kills` reads how many were lost
    cluster = ClusterSettings(cpus=2)
    images = ImageSettings(source=options.source, size=64)
    settings = CacheSettings(path=options.path, shard_images=options.shard, batch=BATCH, encoders=options.encoders)
    with peak_memory() as peak, connected(cluster, Path(options.path + ".log")):
        summary = cache(images, TokenizerSettings(path=options.tokenizer), settings, Stage("cache", cluster))
    print(json.dumps({"peak_mb": peak[0], "images": summary["images"], "seconds": summary["seconds"]}))


def kills(options: argparse.Namespace) -> None:
    """Kill the driver or an encoder at random moments, start again after each death of the driver, and compare."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = write_tokenizer(folder / "tokenizer", SMALL)
        write_photographs(folder / "images", options.images, size=(500, 375))

        def start(name: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "benchmarks.cache", "--what", "stage", "--source", str(folder / "images"), "--shard", "32"]
            command += ["--tokenizer", tokenizer, "--path", str(folder / name), "--encoders", "2"]
            with (folder / f"{name}.said").open("a") as said:
                return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)

        began = time.perf_counter()
        assert start("undisturbed").wait() == 0
        whole = time.perf_counter() - began
        shards, killed, again, driver = folder / "killed" / "shards", 0, 0, start("killed")
        before: dict[str, int] = {}
        kinds = []
        while killed < options.kills:
            target = time.perf_counter() + draw.uniform(0.0, 3.0)
            while driver.poll() is None and (time.perf_counter() < target or len(_times(shards)) == len(before)):
                time.sleep(0.05)  # until something new is finished: each kill hits work
            if driver.poll() is not None:
                break
            again += sum(before[name] != when for name, when in _times(shards).items() if name in before)
            before = _times(shards)
            encoders = [one for one in psutil.Process(driver.pid).children(recursive=True) if "ShardEncoder" in " ".join(_command(one))]
            if draw.random() < 0.5 and encoders:
                draw.choice(encoders).kill()
                kinds.append("encoder")
            else:
                driver.send_signal(signal.SIGKILL)
                driver.wait()
                kinds.append("driver")
                driver = start("killed")
            killed += 1
        assert driver.wait() == 0
        again += sum(before[name] != when for name, when in _times(shards).items() if name in before)
        same = all(
            (folder / "undisturbed" / name).read_bytes() == (folder / "killed" / name).read_bytes()
            for name in [
                "manifest.json",
                "rejected.parquet",
                *(f"shards/{one}" for one in sorted(os.listdir(folder / "undisturbed" / "shards"))),
            ]
        ) and sorted(os.listdir(shards)) == sorted(os.listdir(folder / "undisturbed" / "shards"))
        said = re.findall(r"^cache: ([\d,]+) of [\d,]+ images", (folder / "killed.said").read_text(), re.MULTILINE)
        done = [int(one.replace(",", "")) for one in said]
        lost = [one - other for one, other in itertools.pairwise(done) if other < one]  # done by somebody who was killed
    found = {"kills": kinds, "finished_shards_made_again": again, "same_bytes": same, "images_lost": lost, "seconds": whole}
    print(json.dumps({"benchmark": "cache.kills", **found}))
    row(f"{killed} kills at random moments", "same bytes" if same else "OTHER BYTES", f"{kinds.count('driver')} drivers", "", "same bytes")
    row("  finished shards made again", str(again), f"{kinds.count('encoder')} encoders", "", "0")
    row("  images encoded twice, of a kill at most", str(max(lost, default=0)), "2 encoders", "shards of 32", f"{2 * 32}")


def faults(options: argparse.Namespace) -> None:
    """The stage on S3 that answers 1 % of the requests with a 500, a 503, a reset or a stall; then on one that says 503 for good."""
    with tempfile.TemporaryDirectory() as temporary, FaultyS3() as server:
        folder, cluster = Path(temporary), ClusterSettings(cpus=2)
        tokenizer = TokenizerSettings(path=write_tokenizer(folder / "tokenizer", SMALL))
        source = write_photographs(folder / "images", options.images, size=(160, 120))
        server.stall = s3.WRITE_SECONDS + 5  # longer than a client waits
        os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ["AWS_ENDPOINT_URL"] = server.url
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        for path in Path(source).rglob("*.jpg"):
            client.put_object(Bucket="data", Key=f"images/{path.relative_to(source)}", Body=path.read_bytes())

        def run(source: str, path: str) -> float:
            settings = CacheSettings(path=path, shard_images=32, batch=BATCH)
            began = time.perf_counter()
            cache(ImageSettings(source=source, size=64), tokenizer, settings, Stage("cache", cluster))
            return time.perf_counter() - began

        def same(path: str) -> bool:
            names = [name for name in storage.list_files(undisturbed) if name == MANIFEST or name.startswith(SHARDS)]
            return all(same_object(f"{path}/{name}", f"{undisturbed}/{name}") for name in names)

        with connected(cluster, folder / "ray.log"):
            undisturbed = str(folder / "undisturbed")
            found = {"seconds_on_disk": run(source, undisturbed), "seconds_on_s3": run("s3://data/images", "s3://data/well")}
            before, server.share = server.requests, 0.01
            found["seconds_with_faults"] = run("s3://data/images", "s3://data/faults")
            requests, failed, server.share = server.requests - before, dict(server.faults), 0.0
            same_bytes = same("s3://data/well") and same("s3://data/faults")

            stop = threading.Timer(found["seconds_on_s3"] / 2, lambda: (setattr(server, "kinds", ("503",)), setattr(server, "share", 1.0)))
            began, message = time.perf_counter(), "NONE"
            stop.start()
            try:
                guarded("cache", "s3://data/lost", lambda: run("s3://data/images", "s3://data/lost"))  # what `mar cache` says
            except UserError as error:
                message = str(error)
            stop.cancel()
            found["seconds_until_told"] = time.perf_counter() - began - found["seconds_on_s3"] / 2
            server.share = 0.0
            left = storage.list_files("s3://data/lost")
            whole = [name for name in left if name.endswith(".arrow") and same_object(f"s3://data/lost/{name}", f"{undisturbed}/{name}")]
            kept = {name.removesuffix(".arrow") for name in whole}
            half = [name for name in left if name.startswith(SHARDS) and name.rpartition(".")[0] not in kept]
            half += [name for name in left if name in (MANIFEST, "summary.json")]
            half += [one["Key"] for one in client.list_multipart_uploads(Bucket="data").get("Uploads", [])]
            run("s3://data/images", "s3://data/lost")
            recovered = same("s3://data/lost")
    if len(failed) < len(KINDS):
        sys.exit(f"{requests} requests brought only {failed}; raise --images")
    figures = {"requests": requests, "faults": failed, "same_bytes": same_bytes, "told": message, "shards_kept": len(whole)}
    print(json.dumps({"benchmark": "cache.faults", **figures, "half_visible": half, "same_bytes_afterwards": recovered, **found}))
    kinds = ", ".join(f"{count} {kind}" for kind, count in failed.items())
    row("S3 failing 1 % of its requests", "same bytes" if same_bytes else "OTHER BYTES", f"{requests} requests", "", "same bytes")
    print(f"  {kinds}; {found['seconds_with_faults']:.0f} s, without faults {found['seconds_on_s3']:.0f} s")
    row("S3 that answers only 503: half visible", f"{len(half)} objects", f"{len(whole)} shards kept", "", "none")
    row("  answering again: the same command", "same bytes" if recovered else "OTHER BYTES", "", "", "same bytes")
    print(f"  told after {found['seconds_until_told']:.0f} s: {message}")


def same_object(path: str, other: str) -> bool:
    return storage.read_bytes(path) == storage.read_bytes(other)


def forms(options: argparse.Namespace) -> None:
    """The images of a folder in each form of source, cached: the same moments, labels and order."""
    if not options.source:
        sys.exit("--what forms needs --source: a folder with a folder of images a class")
    root, cluster = Path(options.source), ClusterSettings(cpus=2)
    images = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    with tempfile.TemporaryDirectory() as temporary, connected(cluster, Path(temporary) / "ray.log"):
        folder = Path(temporary)
        tokenizer = TokenizerSettings(path=write_tokenizer(folder / "tokenizer", MIDDLE))
        for form in ("webdataset", "parquet"):
            (folder / form).mkdir()
        sources = {
            "tree": str(root),
            "ilsvrc": write_ilsvrc(folder / "train.tar", images),
            "webdataset": write_webdataset(folder / "webdataset", images),
            "parquet": write_parquet(folder / "parquet", images),
        }
        found: dict[str, tuple[np.ndarray, ...]] = {}
        for form, source in sources.items():
            settings = CacheSettings(path=str(folder / f"cache-{form}"), shard_images=32, batch=BATCH)
            cache(ImageSettings(source=source), tokenizer, settings, Stage("cache", cluster))
            latents = LatentCache(settings.path)
            rows = np.arange(len(latents))
            moments, labels = latents.take(rows, np.zeros(len(rows), bool))
            found[form] = (moments, latents.take(rows, np.ones(len(rows), bool))[0], labels)
    same = {form: all(map(np.array_equal, arrays, found["tree"])) for form, arrays in found.items()}
    print(json.dumps({"benchmark": "cache.forms", "images": {form: len(arrays[2]) for form, arrays in found.items()}, "same": same}))
    for form in [*same][1:]:
        row(
            f"{form}: {len(found[form][2])} images",
            "the same" if same[form] else "OTHERS",
            f"tree: {len(found['tree'][2])}",
            "",
            "same moments",
        )


def _times(shards: Path) -> dict[str, int]:
    return {one.name: one.stat().st_mtime_ns for one in shards.glob("*.json")}


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def listing(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for label in range(100):
            (Path(temporary) / f"n{label:08d}").mkdir()
            for number in range(1000):
                (Path(temporary) / f"n{label:08d}" / f"n{label:08d}_{number}.JPEG").touch()
        began = time.perf_counter()
        found = list_images(ImageSettings(source=temporary))
        seconds = time.perf_counter() - began
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    print(json.dumps({"benchmark": "cache.listing", "images": len(found.rows), "seconds": seconds}))
    row("list 100,000 images of a tree", f"{seconds:.2f} s", "", "", "seconds")


def row(what: str, found: str, baseline: str, ratio: str, bar: str) -> None:
    print(f"{what:<42} {found:>18} {baseline:>20} {ratio:>12} {'bar ' + bar:>16}", flush=True)


def main() -> None:
    measured = (throughput, precision, memory, kills, faults, forms, listing)
    pieces = {**{one.__name__: one for one in measured}, "stage": run_stage, "encoding": run_encoding}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="listing,throughput,precision,memory,kills,faults")
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--source", default="", help="of `forms`: a folder with a folder of images a class")
    for name in ("tokenizer", "path"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, default=1024, help=argparse.SUPPRESS)
    parser.add_argument("--encoders", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="contiguous", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.what.split(","):
        pieces[name](options)


if __name__ == "__main__":
    main()

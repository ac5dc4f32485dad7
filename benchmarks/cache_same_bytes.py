"""The cache has the same bytes after kills, S3 failures and from other forms of the source. Run by `benchmarks.cache`."""

import argparse
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil

from benchmarks.faulty_s3 import KINDS, FaultyS3
from benchmarks.photographs import BATCH, MIDDLE, SMALL, row, write_photographs, write_tokenizer
from benchmarks.source_forms import write_ilsvrc, write_parquet, write_webdataset
from jobs.stages import guarded
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.latent_format import MANIFEST, SHARDS
from pipelines.caching.settings import CacheSettings
from pipelines.caching.stage import cache
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import s3, storage
from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.settings import TokenizerSettings


def kills(options: argparse.Namespace) -> None:
    """Kill the driver or an encoder at random moments, restart after each kill of the driver, and compare the results."""
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
                time.sleep(0.05)  # until something new is finished, so that each kill hits work
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
        lost = [one - other for one, other in itertools.pairwise(done) if other < one]  # done by a killed process
    found = {"kills": kinds, "finished_shards_made_again": again, "same_bytes": same, "images_lost": lost, "seconds": whole}
    print(json.dumps({"benchmark": "cache.kills", **found}))
    row(f"{killed} kills at random moments", "same bytes" if same else "OTHER BYTES", f"{kinds.count('driver')} drivers", "", "same bytes")
    row("  finished shards made again", str(again), f"{kinds.count('encoder')} encoders", "", "0")
    row("  images encoded twice, maximum per kill", str(max(lost, default=0)), "2 encoders", "shards of 32", f"{2 * 32}")


def _uploaded(source: str, url: str) -> Any:
    """A client of the server at `url`, with the images of `source` in a new bucket."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = url
    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    for path in Path(source).rglob("*.jpg"):
        client.put_object(Bucket="data", Key=f"images/{path.relative_to(source)}", Body=path.read_bytes())
    return client


def faults(options: argparse.Namespace) -> None:
    """The stage on S3 that answers 1 % of the requests with a 500, a 503, a reset or a stall; then on S3 that always answers 503."""
    with tempfile.TemporaryDirectory() as temporary, FaultyS3() as server:
        folder, cluster = Path(temporary), ClusterSettings(cpus=2)
        tokenizer = TokenizerSettings(path=write_tokenizer(folder / "tokenizer", SMALL))
        source = write_photographs(folder / "images", options.images, size=(160, 120))
        server.stall = s3.WRITE_SECONDS + 5  # longer than the client's timeout
        client = _uploaded(source, server.url)

        def run(source: str, path: str) -> float:
            settings = CacheSettings(path=path, shard_images=32, batch=BATCH)
            began = time.perf_counter()
            cache(Images(ImageSettings(source=source, size=64)), tokenizer.path, settings, Stage("cache", cluster))
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
                guarded("cache", "s3://data/lost", lambda: run("s3://data/images", "s3://data/lost"))  # the error of `mar cache`
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
        sys.exit(f"{requests} requests gave only {failed} failures; raise --images")
    figures = {"requests": requests, "faults": failed, "same_bytes": same_bytes, "told": message, "shards_kept": len(whole)}
    print(json.dumps({"benchmark": "cache.faults", **figures, "half_visible": half, "same_bytes_afterwards": recovered, **found}))
    kinds = ", ".join(f"{count} {kind}" for kind, count in failed.items())
    row("S3 failing 1 % of its requests", "same bytes" if same_bytes else "OTHER BYTES", f"{requests} requests", "", "same bytes")
    print(f"  {kinds}; {found['seconds_with_faults']:.0f} s, without faults {found['seconds_on_s3']:.0f} s")
    row("S3 that answers only 503: half visible", f"{len(half)} objects", f"{len(whole)} shards kept", "", "none")
    row("  answering again: the same command", "same bytes" if recovered else "OTHER BYTES", "", "", "same bytes")
    print(f"  reported after {found['seconds_until_told']:.0f} s: {message}")


def same_object(path: str, other: str) -> bool:
    return storage.read_bytes(path) == storage.read_bytes(other)


def forms(options: argparse.Namespace) -> None:
    """Cache the images of a folder from each form of source, and compare moments, labels and order."""
    if not options.source:
        sys.exit("--what forms needs --source: a folder with one folder of images per class")
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
            cache(Images(ImageSettings(source=source)), tokenizer.path, settings, Stage("cache", cluster))
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

"""Writes the same images in every form of `images.source`."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Images = dict[str, bytes]  # "class/name" → encoded bytes


def encoded(width: int, height: int, seed: int = 0, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def class_names(images: Images) -> list[str]:
    return sorted({key.split("/")[0] for key in images})


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tree(root: Path, images: Images) -> str:
    for key, data in images.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    return str(root)


def write_ilsvrc(path: Path, images: Images) -> str:
    """A tar with one tar per class, classes in reverse order."""
    with tarfile.open(path, "w") as outer:
        for name in reversed(class_names(images)):
            sink = io.BytesIO()
            with tarfile.open(fileobj=sink, mode="w") as inner:
                for key, data in images.items():
                    if key.startswith(f"{name}/"):
                        add(inner, key.partition("/")[2], data)
            add(outer, f"{name}.tar", sink.getvalue())
    return str(path)


def write_webdataset(folder: Path, images: Images, shards: int = 2) -> str:
    """Samples of image and label, alternately as text and JSON; returns the pattern."""
    names, keys = class_names(images), sorted(images)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for number, key in enumerate(keys[shard * len(keys) // shards : (shard + 1) * len(keys) // shards]):
                label, (stem, _, extension) = names.index(key.split("/")[0]), key.partition(".")
                add(tar, f"{stem}.{extension}", images[key])
                add(tar, f"{stem}.cls", f"{label}\n".encode()) if number % 2 else add(
                    tar, f"{stem}.json", json.dumps({"label": label, "text": "x" * 600}).encode()
                )
    return str(folder / f"train-{{000..{shards - 1:03d}}}.tar")


def write_parquet(folder: Path, images: Images, files: int = 2, row_group: int = 3) -> str:
    """The layout of Hugging Face's image datasets; returns the pattern."""
    names, keys = class_names(images), sorted(images)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for file in range(files):
        part = keys[file * len(keys) // files : (file + 1) * len(keys) // files]
        rows = [{"image": {"bytes": images[key], "path": key}, "label": names.index(key.split("/")[0])} for key in part]
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"train-{file:05d}.parquet", row_group_size=row_group)
    return str(folder / f"train-{{{','.join(f'{file:05d}' for file in range(files))}}}.parquet")

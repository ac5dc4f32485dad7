"""Every form of image source lists the same images, and reads the same bytes."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from benchmarks.source_forms import Images, add, encoded, write_ilsvrc, write_parquet, write_tree, write_webdataset
from pipelines.images import sources
from pipelines.images.listing import keep_listing, kept_listing, list_images
from pipelines.images.reading import decode_row, read_image
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.patterns import expanded
from pipelines.images.sources.tars import members, opened
from pipelines.runtime.errors import ImageError, UserError

FORMS = {"imagefolder": write_tree, "ilsvrc": write_ilsvrc, "webdataset": write_webdataset, "parquet": write_parquet}


@pytest.fixture(scope="module")
def images() -> Images:
    """Eleven images of three classes, with names that sort otherwise than by number, and of one that is not ASCII."""
    names = [
        f"{'abc'[number % 3]}/{name}.png" for number, name in enumerate(["10", "9", "Ü ß", "x" * 120, "日本", "1", "2", "3", "4", "5", "6"])
    ]
    return {name: encoded(5 + number, 6, number) for number, name in enumerate(names)}


def write(form: str, folder: Path, images: Images) -> ImageSettings:
    folder.mkdir(parents=True, exist_ok=True)
    return ImageSettings(source=FORMS[form](folder / "train.tar" if form == "ilsvrc" else folder, images), size=4)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_images(form: str, images: Images, tmp_path: Path) -> None:
    settings = write(form, tmp_path / form, images)
    assert sources.find_source(settings.source).form == form
    listing = list_images(settings)
    expected = sorted(images)  # written in this order, so that their order is that of the keys
    assert [row.label for row in listing.rows] == ["abc".index(key[0]) for key in expected]
    assert [read_image(settings, row) for row in listing.rows] == [images[key] for key in expected]
    assert listing.class_names == (["0", "1", "2"] if form == "webdataset" else ["a", "b", "c"])
    keys = [row.key for row in listing.rows]
    if form in ("imagefolder", "ilsvrc"):
        assert keys == expected
    if form == "webdataset":
        assert keys == [f"train-{number >= 5:03d}/{key.removesuffix('.png')}" for number, key in enumerate(expected)]
    if form == "parquet":
        assert keys == [f"train-{number >= 5:05d}/{number - 5 * (number >= 5):08d}" for number in range(11)]
    assert list_images(replace(settings, format=form)).digest == listing.digest  # type: ignore[arg-type]
    root = Path(settings.source) if form == "imagefolder" else (tmp_path / form)
    times = [(root / (row.file or row.key)).stat().st_mtime_ns for row in listing.rows]
    assert listing.rows.column("version").tolist() == times
    held_out = list_images(replace(settings, held_out_share=0.4))
    assert 0 < len(held_out.held_out()) < 11
    assert len(held_out.train()) + len(held_out.held_out()) == 11


def test_a_folder_is_what_its_files_are(images: Images, tmp_path: Path) -> None:
    for form in ("webdataset", "parquet"):
        write(form, tmp_path / form, images)
        (tmp_path / form / "readme.txt").write_text("not an image")
        whole = list_images(ImageSettings(source=str(tmp_path / form), size=4))
        assert (len(whole.rows), sources.find_source(str(tmp_path / form)).form) == (11, form)
    assert len(list_images(ImageSettings(source=str(tmp_path / "webdataset" / "train-001.tar"), size=4)).rows) == 6


def test_samples_are_those_that_webdataset_reads(images: Images, tmp_path: Path) -> None:
    settings = write("webdataset", tmp_path, images)
    found = {sample["__key__"]: sample["png"] for sample in webdataset.WebDataset(settings.source, shardshuffle=False)}
    rows = list_images(settings).rows
    assert {row.key.partition("/")[2]: read_image(settings, row) for row in rows} == found


def test_tar_headers_of_every_kind_agree_with_tarfile(tmp_path: Path) -> None:
    names = ["short", "d/" * 60 + "long", "ü" * 70, "e" * 300, "empty"]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            for number, name in enumerate(names):
                if kind != tarfile.USTAR_FORMAT or len(name.encode()) < 130:
                    add(tar, name, b"" if name == "empty" else bytes(range(256)) * (3 * number + 1))
            tar.addfile(tarfile.TarInfo("folder"), None)
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "short"
            tar.addfile(link)
        with opened(str(path)) as file, tarfile.open(path) as tar:
            found = [(one.name, one.offset, one.size) for one in members(str(path), file)]
            assert found == [(one.name, one.offset_data, one.size) for one in tar if one.isreg() or one.issym()]


def test_damaged_tars(images: Images, tmp_path: Path) -> None:
    settings = write("webdataset", tmp_path, images)
    path = tmp_path / "train-001.tar"
    whole = path.read_bytes()
    for left in (len(whole) // 2, 0, 1024):  # in the midst of a member, of everything, and between two members
        path.write_bytes(whole[:left])
        with pytest.raises(UserError, match=r"train-001\.tar is truncated: it ends before byte \d[\d,]*, without a tar end mark"):
            list_images(settings)
    path.write_bytes(whole[:700] + b"x" * (len(whole) - 700))
    with pytest.raises(UserError, match=r"train-001\.tar is not a tar, or damaged: no valid header at byte"):
        list_images(settings)


def test_samples_that_make_no_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {
            "0.jpg": b"0", "0.cls": b"1", "1.jpg": b"1", "2.JPG": b"2", "2.cls": b"cat", "3.txt": b"3", "3.cls": b"0", "4.png": b"4",
            "4.json": b'{"label": true}', "5.png": b"5", "5.json": b'{"label": -2}', "6.webp": b"6", "6.json": b'{"cls": "3"}',
            "7.png": b"7", "7.cls": b"70000", "70.png": b"7", "70.cls": b"9" * 20, "71.png": b"7", "71.json": b"1e300",
            "._7.png": b"", "72.png": b"7", "72.cls": b"1_0", "8.jpg": b"8", "8.json": b"[", "9.png": b"9", "9.json": b"2",
        }.items():  # fmt: skip
            add(tar, name, data)
        add(tar, "0.jpg", b"again")
        add(tar, "0.cls", b"2")
        for name in ("b0.jpg", "b0.png", "b0.cls", "b1.jpg", "b1.cls", "b1.JPG", "b2.jpeg", "b2.webp"):
            add(tar, name, b"0")
        for name, kind in (("b3.jpg", tarfile.LNKTYPE), ("b4.cls", tarfile.SYMTYPE)):
            add(tar, "b4.png", b"4") if name == "b4.cls" else None
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, f"9.{name[3:]}"
            tar.addfile(link)
            add(tar, "b3.cls", b"0") if name == "b3.jpg" else None
    settings = ImageSettings(source=str(tmp_path / "a.tar"))
    rows = list_images(settings).rows
    assert [(row.key, row.label) for row in rows if not row.reason] == [("a/0", 1), ("a/6", 3), ("a/9", 2)]
    assert {row.key: row.reason for row in rows if row.reason} == {
        "a/0": "duplicate key: the first image with this key is used",
        "a/1": "no label (neither cls nor json)",
        "a/2": "no label: cls holds 'cat', expected a whole number",
        "a/3": "the sample has no image (jpg, jpeg, png, webp), only txt, cls",
        "a/4": "no label: json holds '{\"label\": true}', expected a whole number",
        "a/5": "label -2 is out of range, expected 0 to 65535",
        "a/7": "label 70000 is out of range, expected 0 to 65535",
        "a/70": "label 1e+20 is out of range",
        "a/71": "label 1e+300 is out of range",
        "a/72": "no label: cls holds '1_0', expected a whole number",
        "a/8": "no label: json holds '[', expected a whole number",
        "a/b0": "the sample has 2 images (jpg, png), expected one",
        "a/b1": "the sample has 2 images (jpg, JPG), expected one",
        "a/b2": "the sample has 2 images (jpeg, webp), expected one",
        "a/b3": "jpg is a link to 9.jpg, which is not followed; store the file itself",
        "a/b4": "no label: cls is a link to 9.cls, which is not followed; store the file itself",
    }
    assert list_images(settings).class_names == ["0", "1", "2", "3"]
    few = list_images(replace(settings, classes=3))
    assert (few.class_names, [row.key for row in few.rows if not row.reason]) == (["0", "1", "2"], ["a/0", "a/9"])
    with pytest.raises(ImageError, match="duplicate key"):
        read_image(settings, rows[1])


def test_parquet_labels_and_layouts(images: Images, tmp_path: Path) -> None:
    image = pa.array([{"bytes": encoded(4, 4), "path": None}, {"bytes": None, "path": "x"}, {"bytes": encoded(4, 4), "path": None}])
    pq.write_table(pa.table({"image": image, "label": pa.array([1, 0, None], pa.int32())}), tmp_path / "a.parquet")
    settings = ImageSettings(source=str(tmp_path / "a.parquet"))
    listing = list_images(settings)
    assert [(row.label, row.reason) for row in listing.rows] == [(1, ""), (0, ""), (-1, "no label")]
    assert listing.class_names == ["0", "1"]
    pq.write_table(pa.table({"image": image, "class": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column label; expected .* found \['image', 'class'\]"):
        list_images(settings)
    for labels, kind in (([1.0, 2.0, 3.0], "double"), (["1", "2", "3"], "string"), ([True, False, True], "bool"), ([None] * 3, "null")):
        pq.write_table(pa.table({"image": image, "label": labels}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=rf"column label of type {kind}; expected integers"):
            list_images(settings)
    pq.write_table(pa.table({"image": image, "label": pa.array([1, 2**64 - 1, 70_000], pa.uint64())}), tmp_path / "a.parquet")
    assert [row.reason for row in list_images(settings).rows] == [
        "", "label 18446744073709551615 is out of range", "label 70000 is out of range, expected 0 to 65535",
    ]  # fmt: skip
    pq.write_table(pa.table({"picture": image, "label": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column image\.bytes"):
        list_images(settings)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file, or damaged"):
        list_images(settings)


def test_parquet_rows_without_bytes_say_what_is_null(tmp_path: Path) -> None:
    rows = [
        ({"bytes": encoded(4, 4), "path": "0.png"}, ""),
        ({"bytes": None, "path": "cat/1.png"}, "image.bytes is null, only image.path is given: 'cat/1.png'"),
        ({"bytes": None, "path": None}, "image.bytes and image.path are null"),
        (None, "image is null"),
        ({"bytes": b"", "path": "4.png"}, "empty file"),
    ]
    path = tmp_path / "a.parquet"
    settings = ImageSettings(source=str(path), size=4)
    for names in (("bytes", "path"), ("bytes",)):
        kind = pa.struct([(name, {"bytes": pa.binary(), "path": pa.string()}[name]) for name in names])
        image = pa.array([one and {name: one[name] for name in names} for one, _ in rows], kind)
        pq.write_table(pa.table({"image": image, "label": [0] * len(rows)}), path)
        found = [decode_row(settings, row).reason for row in list_images(settings).rows]
        assert found == [reason if "path" in names or "path" not in reason else "image.bytes is null" for _, reason in rows]
        path.rename(tmp_path / f"{len(names)}.parquet")
        settings, path = replace(settings, source=str(tmp_path / "b.parquet")), tmp_path / "b.parquet"


def test_parquet_files_that_name_the_classes_otherwise(images: Images, tmp_path: Path) -> None:
    settings = write("parquet", tmp_path, images)
    path = tmp_path / "train-00001.parquet"
    table = pq.read_table(path)
    features = json.loads(table.schema.metadata[b"huggingface"])
    features["info"]["features"]["label"]["names"].reverse()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    with pytest.raises(
        UserError, match=r"train-00001\.parquet has the class names \['c', 'b', 'a'\], but .*train-00000.parquet has \['a', 'b', 'c'\]"
    ):
        list_images(settings)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a/1.png": encoded(4, 4)})
    with open(os.fsencode(tmp_path / "a") + b"/\xff.png", "wb") as stream:
        stream.write(encoded(4, 4))
    os.mkdir(os.fsencode(tmp_path) + b"/\xfe")
    with open(os.fsencode(tmp_path) + b"/\xfe/2.png", "wb") as stream:
        stream.write(encoded(4, 4))
    listing = list_images(ImageSettings(source=str(tmp_path)))
    assert [(row.key, row.reason) for row in listing.rows] == [
        ("\\xfe/2.png", "its name is not UTF-8"), ("a/1.png", ""), ("a/\\xff.png", "its name is not UTF-8"),
    ]  # fmt: skip
    assert (listing.class_names, listing.remarks) == (["\\xfe", "a"], ["1 of 2 classes has no training image: \\xfe"])


def test_other_images_in_the_same_parquet_files_are_another_source(images: Images, tmp_path: Path) -> None:
    digests = []
    for folder, shown in (("one", images), ("two", {key: data + b"\0" * 50 for key, data in images.items()})):
        digests.append(list_images(write("parquet", tmp_path / folder, shown)).digest)
    assert digests[0] != digests[1]
    assert digests[0] == list_images(write("parquet", tmp_path / "again", images)).digest


def test_an_empty_synset_is_refused_or_a_class_of_its_own(images: Images, tmp_path: Path) -> None:
    settings = write("ilsvrc", tmp_path, images)
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    with tarfile.open(settings.source, "a") as tar:
        add(tar, "aa.tar", empty.getvalue())
    with pytest.raises(UserError, match=r"has 1 class folder without images: aa \(its tar is empty\); "):
        list_images(settings)
    kept = str(tmp_path / "listing.arrow")
    listing = list_images(replace(settings, allow_empty_classes=True))
    assert (listing.class_names, listing.remarks) == (["a", "aa", "b", "c"], ["1 of 4 classes has no training image: aa"])
    keep_listing(kept, listing)
    with pytest.raises(UserError, match="without images: aa"):
        list_images(settings, kept)


def test_patterns() -> None:
    assert expanded("s3://b/a-{08..11}.tar") == [f"s3://b/a-{number}.tar" for number in ("08", "09", "10", "11")]
    assert expanded("{0..10}")[-2:] == ["9", "10"]
    assert expanded("{a,b}-{1..2}") == ["a-1", "a-2", "b-1", "b-2"]
    assert expanded("plain/x.tar") == ["plain/x.tar"]


def test_mistakes_are_named(images: Images, tmp_path: Path) -> None:
    settings = write("webdataset", tmp_path, images)
    with pytest.raises(UserError, match=r"does not exist \(.*train-002\.tar is missing\)"):
        list_images(replace(settings, source=str(tmp_path / "train-{000..002}.tar")))
    with pytest.raises(UserError, match=r"images\.held_out_folder 'a' needs a folder tree, .* has the form webdataset"):
        list_images(replace(settings, held_out_folder="a"))
    with pytest.raises(UserError, match=r"should have the form parquet: expected \.parquet files, found 0"):
        list_images(replace(settings, format="parquet"))
    (tmp_path / "both").mkdir()
    shutil.copy(tmp_path / "train-000.tar", tmp_path / "both" / "a.tar")
    write_parquet(tmp_path / "both", images)
    with pytest.raises(UserError, match=r"contains both Parquet files and tars; set images\.format to parquet or webdataset"):
        list_images(replace(settings, source=str(tmp_path / "both")))
    assert len(list_images(replace(settings, source=str(tmp_path / "both"), format="parquet")).rows) == 11
    with pytest.raises(UserError, match=r"contains no inner tars"):
        list_images(replace(settings, format="ilsvrc", source=str(tmp_path / "train-000.tar")))
    folder = tmp_path / "data.parquet"  # as Spark writes it
    folder.mkdir()
    pattern = write_parquet(folder, images)
    with pytest.raises(UserError, match=r"data\.parquet' is a folder with the name of a file; name its files with a pattern, such as"):
        list_images(replace(settings, source=str(folder)))
    found = list_images(replace(settings, source=pattern))
    assert [read_image(replace(settings, source=pattern), row) for row in found.rows] == [images[key] for key in sorted(images)]


def test_a_kept_listing_serves_until_the_files_change(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, kept = write("ilsvrc", tmp_path / "source", images), str(tmp_path / "listing.arrow")
    listing = list_images(settings, kept)
    keep_listing(kept, listing)
    found = kept_listing(kept)
    assert found is not None
    assert (found.digest, found.class_names, list(found.rows)) == (listing.digest, listing.class_names, list(listing.rows))
    with monkeypatch.context() as patch:
        patch.setattr(sources.Source, "images", lambda *_: pytest.fail("the tar was read again"))
        assert list_images(settings, kept).digest == listing.digest
    assert list_images(replace(settings, held_out_share=0.5), kept).digest != listing.digest
    more = write("ilsvrc", tmp_path / "source", {**images, "d/1.png": encoded(4, 4)})
    assert len(list_images(more, kept).rows) == 12


def test_a_damaged_listing_is_none(images: Images, tmp_path: Path) -> None:
    kept = tmp_path / "listing.arrow"
    listing = list_images(write("ilsvrc", tmp_path / "source", images))
    keep_listing(str(kept), listing)
    whole = kept.read_bytes()
    lost = 0
    for start in range(0, len(whole), 37):
        kept.write_bytes(whole[:start] + bytes(32) + whole[start + 32 :])
        lost += kept_listing(str(kept)) is None  # values alone may be damaged: those the listing does not check
    assert lost > 5


def test_the_digest_tells_data_apart(images: Images, tmp_path: Path) -> None:
    def digest(name: str, changed: Images, **settings: float) -> str:
        return list_images(ImageSettings(source=write_tree(tmp_path / name, changed), **settings)).digest  # type: ignore[arg-type]

    first = digest("1", images)
    assert first == digest("2", images)
    assert first.startswith("11 images, sha256 ")
    key = sorted(images)[0]
    renamed = {("c" + one[1:] if one == key else one): data for one, data in images.items()}
    others = [digest("3", {**images, key: images[key] + b"x"}), digest("4", renamed), digest("5", images, held_out_share=0.5)]
    assert len({first, *others}) == 4


def test_a_listing_of_json_labels_is_one_table(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number in range(300):
            add(tar, f"{number:03d}.jpg", b"x" * number)
            add(tar, f"{number:03d}.json", json.dumps({"label": number % 7}).encode())
    (tmp_path / "a.tar").write_bytes(sink.getvalue())
    rows = list_images(ImageSettings(source=str(tmp_path / "a.tar"))).rows
    assert [row.size for row in rows[10:30:5]] == [10, 15, 20, 25]
    assert rows[-1].label == 299 % 7
    assert rows.column("label").tolist() == [number % 7 for number in range(300)]

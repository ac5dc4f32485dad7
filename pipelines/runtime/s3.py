"""S3 for the stages: reads retry failed requests, and writes are atomic."""

import hashlib
import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from pyarrow import fs

from pipelines.runtime.errors import UserError

ATTEMPTS = 10  # per request, with growing pauses: a busy bucket sometimes answers 503
CONNECT_SECONDS, READ_SECONDS, WRITE_SECONDS = 5.0, 5.0, 20.0  # a request that receives no byte for this time is retried
PART = 64 * 2**20
LISTS_AT_ONCE = 8  # folders; a client holds at most 10 connections
SINGLE_REQUEST = 2**30  # bytes; larger objects are uploaded in parts

Options = tuple[tuple[str, str], ...]  # endpoint_override, scheme, region, if the path ends in ?name=value&…


def split(path: str) -> tuple[str, str, Options]:
    """Bucket, key and options of `s3://bucket/key?options`. A key may contain any character, so only a known option ends it."""
    location = path.removeprefix("s3://")
    before, mark, query = location.rpartition("?")
    options = tuple(parse_qsl(query)) if mark else ()
    if any(name in ("endpoint_override", "scheme", "region") for name, _ in options):
        location = before
    else:
        options = ()
    bucket, _, key = location.partition("/")
    return bucket, key.rstrip("/"), options


def filesystem(path: str) -> tuple[fs.S3FileSystem, str]:
    """Arrow's file system of the path's bucket, cached per process, and `bucket/key`. Raises UserError if it cannot be opened."""
    bucket, key, options = split(path)
    try:
        return _filesystem(bucket, options, _environment()), f"{bucket}/{key}" if key else bucket
    except Exception as error:
        raise UserError(f"path {path!r} can't be opened: {error}; expected a local path or s3://bucket/prefix") from error


def write(path: str, data: bytes) -> None:
    """Write one object atomically. The parts of a failed upload are removed.

    Raises OSError when the bucket does not accept it after ATTEMPTS attempts.
    """
    from boto3.exceptions import S3UploadFailedError
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key, options = split(path)
    parts = TransferConfig(multipart_threshold=SINGLE_REQUEST, multipart_chunksize=PART, max_concurrency=4)
    try:
        _client(options, _environment()).upload_fileobj(io.BytesIO(data), bucket, key, Config=parts)
    except (S3UploadFailedError, BotoCoreError, ClientError) as error:
        raise OSError(f"not accepted in {ATTEMPTS} attempts: {error}") from error


def size_and_version(path: str) -> tuple[int, int]:
    """Size of one object in bytes, and a number derived from its ETag. Raises FileNotFoundError, and OSError if the bucket refuses."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key, options = split(path)
    try:
        found = _client(options, _environment(), reading=True).head_object(Bucket=bucket, Key=key)
    except (BotoCoreError, ClientError) as error:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
            raise FileNotFoundError(path) from error
        raise OSError(f"AWS Error: {error}") from error
    return int(found["ContentLength"]), _version(found["ETag"])


def list_objects(path: str) -> list[tuple[str, int, int]]:
    """All objects below `path`, in any order: the key relative to `path`, the size in bytes, and a number derived from the ETag, which
    Arrow does not return. The top-level folders are listed in parallel. Raises OSError if the bucket refuses."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key, options = split(path)
    start = f"{key}/" if key else ""
    pages = _client(options, _environment(), reading=True).get_paginator("list_objects_v2")

    def below(prefix: str) -> list[dict[str, Any]]:
        return list(pages.paginate(Bucket=bucket, Prefix=prefix))

    try:
        top = list(pages.paginate(Bucket=bucket, Prefix=start, Delimiter="/"))
        folders = [folder["Prefix"] for page in top for folder in page.get("CommonPrefixes", [])]
        with ThreadPoolExecutor(LISTS_AT_ONCE) as pool:
            found = [entry for pages in (top, *pool.map(below, folders)) for page in pages for entry in page.get("Contents", [])]
    except (BotoCoreError, ClientError) as error:
        raise OSError(f"AWS Error: {error}") from error
    objects = [entry for entry in found if not entry["Key"].endswith("/")]  # keys that end in "/" represent empty folders
    return [(entry["Key"][len(start) :], int(entry["Size"]), _version(entry["ETag"])) for entry in objects]


def _version(etag: str) -> int:
    return int.from_bytes(hashlib.sha256(etag.strip('"').encode()).digest()[:8], "big") >> 1


def refused(error: BaseException) -> bool:
    """Whether the error is an error response of the bucket or a missing response; pyarrow raises OSError for these and other errors."""
    return isinstance(error, OSError) and "AWS Error" in str(error)


def abort_uploads(path: str) -> int:
    """Abort the multipart uploads that killed writers left below `path`: their parts are invisible but billed. Returns their number.

    If the bucket's policy does not allow listing them, returns 0: nothing depends on it.
    """
    from botocore.exceptions import ClientError

    bucket, key, options = split(path)
    client = _client(options, _environment())
    found = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{key}/" if key else "")
    try:
        uploads = [upload for page in found for upload in page.get("Uploads", [])]
    except ClientError as error:
        if error.response["Error"]["Code"] in ("AccessDenied", "NotImplemented"):
            return 0
        raise
    for upload in uploads:
        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    return len(uploads)


def _environment() -> Options:
    """Environment variables that determine credentials and endpoint."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


@lru_cache(maxsize=16)
def _filesystem(bucket: str, options: Options, environment: Options) -> fs.S3FileSystem:
    chosen = dict(options)
    endpoint = chosen.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    query = "&".join(f"{name}={value}" for name, value in options)
    region = chosen.get("region") or fs.FileSystem.from_uri(f"s3://{bucket}{'?' * bool(query)}{query}")[0].region
    return fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        scheme=chosen.get("scheme"),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        request_timeout=READ_SECONDS,
        connect_timeout=CONNECT_SECONDS,
    )


def endpoint_url(options: Mapping[str, str]) -> str | None:
    """The endpoint in the options of an `s3://` path, for boto3; None for the endpoint from the environment, or AWS."""
    endpoint = options.get("endpoint_override")
    return f"{options.get('scheme', 'https')}://{endpoint}" if endpoint and "://" not in endpoint else endpoint


@lru_cache(maxsize=16)
def _client(options: Options, environment: Options, reading: bool = False) -> Any:
    """`reading`: without credentials, requests are not signed (as in Arrow), so that public buckets can be read."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    chosen = dict(options)
    session = boto3.session.Session()
    config = Config(
        retries={"mode": "standard", "max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=WRITE_SECONDS,
        signature_version=UNSIGNED if reading and session.get_credentials() is None else None,
    )
    return session.client("s3", endpoint_url=endpoint_url(chosen), region_name=chosen.get("region"), config=config)

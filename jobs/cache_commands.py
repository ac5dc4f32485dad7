"""The commands `mar inspect` (contents of a latent cache) and `mar verify` (its integrity)."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.path_options import path_given
from pipelines.runtime.errors import UserError

if TYPE_CHECKING:
    from pipelines.caching.inspection.inspecting import Inspection
    from pipelines.images.settings import ImageSettings

CLASSES_SHOWN = 10
REASONS_SHOWN = 10
KEYS_SHOWN = 10
BARS = " ▁▂▃▄▅▆▇█"

Cache = Annotated[str, typer.Argument(metavar="CACHE", callback=path_given, help="directory of the latent cache")]
Check = Annotated[bool, typer.Option("--check", help="read every image again and compare it with the digests of a finished cache")]
Tokenizer = Annotated[str, typer.Option(metavar="DIR", callback=path_given, help="the cache's tokenizer, if it has moved")]


def inspect_command(
    cache: Cache,
    tokenizer: Tokenizer = "",
    wall: Annotated[
        str, typer.Option(metavar="FILE.png", callback=path_given, help="picture of decoded images; default: CACHE/inspect.png")
    ] = "",
) -> None:
    """Show the contents of a latent cache, and decode some images."""
    from jobs.stages import guarded

    def work() -> None:
        from pipelines.caching.inspection.inspecting import inspect, write_wall
        from pipelines.runtime import storage

        found = inspect(cache)
        _show(found)
        where = tokenizer or _recorded(cache, "tokenizer").get("path", "")
        if not where or not storage.exists(storage.join(where, "config.json")):
            print(f"no picture: {storage.join(cache, 'configuration.json')} names no existing tokenizer; set --tokenizer")
            return
        path = wall or storage.join(cache, "inspect.png")
        print(f"{write_wall(found.cache, where, path)} images decoded: {path}")

    guarded("inspect", cache, work)


def verify_command(
    cache: Cache,
    sample: Annotated[int, typer.Option("--sample", metavar="N", help="images to encode again from the source")] = 0,
    tokenizer: Tokenizer = "",
    source: Annotated[str, typer.Option(metavar="SOURCE", callback=path_given, help="the image source, if it has moved")] = "",
) -> None:
    """Verify the checksums of a latent cache."""
    from jobs.stages import guarded

    def work() -> bool:
        import torch

        from pipelines.caching.inspection.verifying import damaged_records, damages, encode_again
        from pipelines.caching.latent_cache import LatentCache
        from pipelines.caching.shard_checks import absolve, condemn, condemned

        opened = LatentCache(cache, condemned=True)
        found, records = list(damages(opened)), list(damaged_records(cache))
        for text in [*(text for _, text in found), *records]:
            print(f"✗ {text}")
        print(f"{len(opened.manifest.shards) - len(found)} of {len(opened.manifest.shards)} shards match the manifest")
        if found:
            try:
                condemn(cache, [name for name, _ in found])
            except (OSError, UserError) as error:
                print(f"they still count as finished, because the cache is not writable ({error}); run `mar verify` where it is")
                return False
            print("the cache is not readable until they are repaired: `mar cache` with the same settings makes exactly these shards again")
            return False
        if condemned(cache):
            absolve(cache)
            print("shards that were marked as damaged are intact: the mark is removed")
        if sample:
            where = tokenizer or _recorded(cache, "tokenizer").get("path", "")
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            again = encode_again(opened, _image_settings(cache, source), where, sample, device)
            same = again.largest <= again.allowed
            print(
                f"{'✓' if same else '✗'} {again.images} images encoded again: largest difference {again.largest:.2g} standard deviations "
                f"({again.allowed:.2g} allowed)"
            )
            for key, distance in again.differing[:KEYS_SHOWN]:
                print(f"  {distance:>9.3g}  {key}")
            if len(again.differing) > KEYS_SHOWN:
                print(f"             and {len(again.differing) - KEYS_SHOWN} more")
            return same and not records
        return not records

    if not guarded("verify", cache, work):
        raise typer.Exit(1)


def _recorded(cache: str, section: str) -> dict[str, Any]:
    """One section of the configuration that the cache was made with; empty if it was not stored."""
    from pipelines.runtime import storage
    from pipelines.runtime.stage import CONFIGURATION, Configuration

    path = storage.join(cache, CONFIGURATION)
    remedy = "set --tokenizer or --source, or run `mar cache` with the cache's settings, which writes the file again"
    found: dict[str, Any] = storage.read_json(path, Configuration, remedy) if storage.exists(path) else {}
    return found.get(section) or {}


def _image_settings(cache: str, source: str) -> "ImageSettings":
    from dataclasses import fields

    from pipelines.images.settings import ImageSettings

    recorded = _recorded(cache, "images")
    known = {one.name for one in fields(ImageSettings)}
    settings = ImageSettings(**{name: value for name, value in recorded.items() if name in known})
    settings.source = source or settings.source
    if not recorded or not settings.source:
        raise UserError(f"{cache!r} has no configuration.json with the settings of its images", remedy="run `mar verify` without --sample")
    return settings


def _show(found: "Inspection") -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from pipelines.caching.inspection.inspecting import EDGES

    manifest = found.cache.manifest
    table = Table(title=f"cache {found.cache.path}", show_header=False, title_justify="left")
    size = sum(shard["bytes"] for shard in manifest.shards)
    held_out = manifest.images.get("held_out", 0)
    latent = f"{manifest.latent_channels} × {manifest.latent_size} × {manifest.latent_size}"
    most, fewest = (int(found.images.max()), int(found.images.min())) if len(found.images) else (0, 0)
    deviation = manifest.precision.get("deviation")
    for name, value in {
        "images": f"{manifest.rows:,} in {len(manifest.shards):,} shards, {size / 1e9:.3g} GB; {held_out:,} held out",
        "latents": f"{latent} of {manifest.image_size} px images, {manifest.dtype}",
        "tokenizer": f"{manifest.tokenizer.get('config', {}).get('kind', '?')}, digest {manifest.tokenizer.get('digest', '?')[:12]}…",
        "precision": manifest.precision.get("name", "float32")
        + (f", means {deviation['means_rms']:.2g} standard deviations from float32 (root mean square)" if deviation else ""),
        "classes": f"{len(found.images):,}, from {fewest:,} to {most:,} images",
        "mean": _channels(manifest.latent_mean),
        "standard deviation": _channels(manifest.latent_std),
        "range": f"{min(manifest.latent_min):.3g} to {max(manifest.latent_max):.3g}",
        "digest": found.cache.digest,
    }.items():
        table.add_row(name, value)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    for label in np.argsort(-found.images, kind="stable")[:CLASSES_SHOWN].tolist():
        console.print(f"  {found.images[label]:>9,}  {manifest.class_names[label]}", markup=False)
    if len(found.images) > CLASSES_SHOWN:
        console.print(
            f"  {found.images.sum() - np.sort(found.images)[-CLASSES_SHOWN:].sum():>9,}  in {len(found.images) - CLASSES_SHOWN} more"
        )
    heights = (found.histogram / max(found.histogram.max(), 1e-12) * (len(BARS) - 1)).round().astype(int)
    console.print(f"normalised latents of {found.sampled:,} images, {EDGES[0]:g} to {EDGES[-1]:g} standard deviations:")
    console.print("  " + "".join(BARS[height] for height in heights), markup=False)
    console.print(f"{sum(found.rejected.values()):,} images rejected")
    for reason, count in found.rejected.most_common(REASONS_SHOWN):
        console.print(f"  {count:>9,}  {reason}", markup=False)


def _channels(values: list[float]) -> str:
    """The values of up to four channels; the range of more."""
    if len(values) <= 4:
        return "  ".join(f"{value:.4g}" for value in values)
    return f"{min(values):.4g} to {max(values):.4g} over {len(values)} channels"

"""Open the files behind a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftwork.pipeline.store.errors import StoreError
from graftwork.pipeline.store.files import Files
from graftwork.pipeline.store.local import LocalFiles
from graftwork.pipeline.store.remote import PART_BYTES, PARTS_AT_ONCE, RemoteFiles
from graftwork.specs.paths import UnknownInPath, expand
from graftwork.specs.secrets import filled

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60  # seconds
REQUEST_TRIES = 2  # of one request: a part that is lost does not cost the whole file


def open_files(url: str) -> Files:
    """The files at a folder or an fsspec URL; raises StoreError where no installed library knows it."""
    protocol = url.partition("://")[0] if "://" in url else ""
    try:
        place = filled(expand(url), "store")
        if "://" not in place and "::" not in place:
            # A relative path means the same folder in every process of a job.
            return LocalFiles(str(Path(place).absolute()))
        import fsspec  # which takes longer to load than a run on a local store that has all of its steps
        from fsspec.implementations.local import LocalFileSystem

        if protocol in ("s3", "s3a"):
            fs, root = _open_s3(place)
            if not root:
                raise ValueError("no bucket in it")
            return RemoteFiles(fs, root, url)
        fs, root = fsspec.core.url_to_fs(place)
        if isinstance(fs, LocalFileSystem):
            return LocalFiles(str(root))
        fs, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
    except ImportError as missing:
        package = "graftwork[s3]" if protocol in ("s3", "s3a") else protocol
        told = f"accepted: a folder, or the URL of a library that is installed ({package!r} may want installing)"
        raise StoreError(url, f"whose library is not installed ({missing})", told) from None
    except UnknownInPath as unknown:
        raise StoreError(url, "which cannot be understood", f"accepted: {unknown}") from None
    except (ValueError, RuntimeError) as unknown:
        raise StoreError(
            url, f"which cannot be understood ({unknown})", "accepted: a folder, or a URL as s3://bucket/prefix"
        ) from None
    return RemoteFiles(fs, root, url)


def _open_s3(url: str) -> tuple[Any, str]:
    import fsspec

    once = {"mode": "standard", "total_max_attempts": REQUEST_TRIES}
    ours = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, "retries": once}
    fs, root = fsspec.core.url_to_fs(
        url,
        use_listings_cache=False,
        default_block_size=PART_BYTES,
        max_concurrency=PARTS_AT_ONCE,
        config_kwargs=ours | fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
    )
    fs.retries = 1  # what to try again is decided in one place, below
    return fs, root

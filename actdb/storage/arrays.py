"""The Zarr side of a run: group and array metadata, as zarr-python writes it, and where a part's shard lies.

zarr is imported by the functions that write metadata; reading a database never imports it.
"""

from functools import lru_cache

from actdb.schema import SiteSpec

ARRAYS = "arrays.zarr"
GROUP = b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}'


def shard_name(run: str, site: SiteSpec, part: int) -> str:
    """Return a shard's path below the database: parts follow one another along the site's row axis."""
    coordinates = ("0",) * site.axis + (str(part),) + ("0",) * len(site.feature)
    return f"{ARRAYS}/{run}/{site.name}/c/{'/'.join(coordinates)}"


@lru_cache(maxsize=256)
def array_metadata(site: SiteSpec) -> bytes:
    """Return the `zarr.json` of a site, as zarr-python writes it: sharded, each inner chunk with its CRC-32C."""
    import asyncio
    import warnings

    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    store = MemoryStore()
    blosc = BloscCodec(typesize=_itemsize(site), cname="lz4", clevel=1, shuffle="bitshuffle", blocksize=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns that sharded codecs may change; the written form is standard
        zarr.create_array(
            store,
            shape=site.shape,
            shards=site.shard_shape,
            chunks=site.chunk_shape,
            dtype=site.dtype,
            filters=None,
            compressors=(Crc32cCodec(),) if site.codec == "raw" else (blosc, Crc32cCodec()),
            fill_value=0,
            dimension_names=site.dims,
            attributes={"site": site.name, "hook": site.hook, "layers": list(site.layers)},
        )
    buffer = asyncio.run(store.get("zarr.json", default_buffer_prototype()))
    assert buffer is not None
    return buffer.to_bytes()


def _itemsize(site: SiteSpec) -> int:
    import numpy as np

    return np.dtype(site.dtype).itemsize

"""Images, as far as a tree can start from one: taken into containerd, unpacked, and gone again once it has.

What is taken in for one tree has a name of its own: so it is found and dropped if this process is killed meanwhile, and
no image of anybody else is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import IO

from storebackends.plugin import CommandFailed, StoreError

from .ctr import Ctr

_UNPACKED = re.compile(r"^unpacking \S+ \((sha256:[0-9a-f]{64})\)", re.MULTILINE)


def take_in(ctr: Ctr, image: str, name: str, record: IO[bytes] | None) -> str:
    """Unpack *image*, an archive or the name of an image that containerd has; the key of its topmost snapshot.

    Of an archive all that is taken in is called *name*/something. *record* is as for Ctr.prepare().
    """
    if os.path.lexists(image):
        try:
            said = ctr.import_archive(os.path.abspath(image), f"{name}/image", record)
        except CommandFailed as error:
            raise StoreError(f"{image} is no archive of an image, or a damaged one: {error}") from error
        found = sorted(set(_UNPACKED.findall(said)))
        if len(found) != 1:
            raise StoreError(f"{image} holds {len(found)} images for this platform, and a tree is one: name the one")
        digest = found[0]
    else:
        digest = _digest_of(ctr, image)
        ctr.unpack(digest, record)
    return _chain(_diffs(ctr, digest))


def drop(ctr: Ctr, name: str) -> None:
    """Remove what take_in() called by *name*. Idempotent."""
    if names := [found for found, _ in ctr.images() if found.startswith(f"{name}/")]:
        ctr.remove_images(names)


def _digest_of(ctr: Ctr, image: str) -> str:
    for name, digest in ctr.images():
        if name == image:
            return digest
    raise StoreError(f"there is no file and no image {image!r}; 'ctr images pull' gets one, 'ctr images ls' lists them")


def _diffs(ctr: Ctr, digest: str) -> list[str]:
    """The digests of the layers, unpacked, the lowest first."""
    try:
        manifest = json.loads(ctr.content(digest))
        if "manifests" in manifest:
            raise StoreError(f"{digest} is an index of images for several platforms; name the one for this platform")
        config = json.loads(ctr.content(manifest["config"]["digest"]))
        diffs = [str(diff) for diff in config["rootfs"]["diff_ids"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{digest} is no image of layers that could be a tree: {error!r}") from error
    if not diffs:
        raise StoreError(f"the image {digest} has no layers; build without a base instead")
    return diffs


def _chain(diffs: list[str]) -> str:
    """What containerd calls the snapshot of these layers, one on the other: the OCI image specification's ChainID."""
    chain = diffs[0]
    for diff in diffs[1:]:
        chain = f"sha256:{hashlib.sha256(f'{chain} {diff}'.encode()).hexdigest()}"
    return chain

"""store.json: what makes a folder a store, and the few facts that were decided when it was made.

    ROOT/store.json   format, uuid, backend, durability, boot

A folder that holds other things and no marker is another program's and is left alone.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import renames
from .errors import ConfigError, StoreError

FORMAT = 1
NAME = "store.json"
DURABILITIES = ("group", "full", "none")


@dataclass(frozen=True, slots=True)
class Marker:
    """What a store is. *boot* is the last boot of this host that the store was opened in; "" where none is told."""

    uuid: str
    backend: str
    durability: str
    boot: str
    format: int = FORMAT

    def save(self, root: Path) -> None:
        """Replace the marker of *root*, whole or not at all, and see it on the disk. Raises OSError."""
        part = root / f".{NAME}.{secrets.token_hex(4)}"
        _write_synced(part, self)
        renames.replace(part, root / NAME)

    def booted(self, boot: str) -> Marker:
        """This store, opened in another boot."""
        return replace(self, boot=boot)


def prepare(root: Path, backend: str, durability: str | None, boot: str) -> Marker:
    """Return the marker of the store in *root*, making an empty folder, or none, into a new store.

    Raises ConfigError where the folder is no store, or one that was made with another backend or durability, or by a
    newer version; StoreError where it cannot be used at all. Changes nothing then.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker = _load(root) or _make(root, backend, durability or "group", boot)
        os.chmod(root, 0o700)
    except FileExistsError:
        raise ConfigError(str(root), ["is a file, not a folder; name another path for the store"]) from None
    except OSError as error:
        way_out = "a store needs a local folder that this user owns"
        if error.errno == errno.EROFS:
            way_out = "mount it writable: to open a store is also to mend what a crash left in it"
        raise StoreError(f"{root} cannot be used as a store: {error.strerror}; {way_out}") from error
    _check(root, marker, backend, durability)
    return marker


def kept_backend(root: Path) -> str | None:
    """The backend that the store in *root* was made with; None where there is no store yet. Raises ConfigError."""
    try:
        marker = _load(root)
    except OSError:
        return None  # prepare() says what is wrong there
    return marker.backend if marker else None


def load(root: Path) -> Marker:
    """Read the marker of the store in *root*. Raises ConfigError where it is broken or missing."""
    if marker := _load(root):
        return marker
    raise ConfigError(str(root), [f"{NAME} vanished; is something else cleaning this folder?"])


def _load(root: Path) -> Marker | None:
    try:
        content = json.loads((root / NAME).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(str(root / NAME), [f"is no store's marker ({error}); restore it, or move it away"]) from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise ConfigError(str(root / NAME), ["is not a store's marker; it may be another program's: use another path"])
    if content["format"] > FORMAT:
        raise ConfigError(
            str(root),
            [f"has format {content['format']}, this version knows up to {FORMAT}; upgrade storebackends to open it"],
        )
    try:
        return Marker(**{key: content[key] for key in ("uuid", "backend", "durability", "boot", "format")})
    except KeyError as error:
        raise ConfigError(str(root / NAME), [f"lacks {error}; restore the file, or use another path"]) from error


def _make(root: Path, backend: str, durability: str, boot: str) -> Marker:
    # A crash while a store is made leaves nothing but part files of the marker, so only those may be there.
    foreign = [name for name in os.listdir(root) if not name.startswith(f".{NAME}.")]
    if foreign:
        raise ConfigError(
            str(root),
            [f"holds other things ({foreign[0]!r}) and no {NAME}: name an empty or a new folder"],
        )
    part = root / f".{NAME}.{secrets.token_hex(4)}"
    _write_synced(part, Marker(str(uuid.uuid4()), backend, durability, boot))
    try:
        os.link(part, root / NAME)  # unlike a rename it fails where another process was first
    except FileExistsError:
        pass
    finally:
        os.unlink(part)
    return load(root)


def _write_synced(path: Path, marker: Marker) -> None:
    with open(path, "x", encoding="utf-8") as file:
        json.dump(asdict(marker), file)
        file.flush()
        os.fsync(file.fileno())


def _check(root: Path, marker: Marker, backend: str, durability: str | None) -> None:
    problems = []
    if marker.backend != backend:
        problems.append(f"is a store of backend {marker.backend!r}, not {backend!r}; one store keeps one backend")
    if durability not in (None, marker.durability):
        problems.append(
            f"was made with durability {marker.durability!r}, not {durability!r}: that is chosen once; "
            "leave it out, or make a new store"
        )
    if problems:
        raise ConfigError(str(root), problems)

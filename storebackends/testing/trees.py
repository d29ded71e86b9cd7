"""Trees with everything in them that a backend could lose, and what there is to see of a tree.

make_rich(tree)                      # all that this user and this file system can make
assert snapshot(copy) == snapshot(tree)
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from storebackends.backend import Capability

Make = Callable[[Path], None]

EVERYTHING = frozenset(Capability)
_BLOCK = 64 * 1024
_GIB = 1 << 30


def names(tree: Path) -> None:
    """Names that a careless program breaks on."""
    odd = ["a\nb", "-rf", " ", "~", "*", "a\\b", 'it\'s "quoted"', "ä", "n" * 255]
    if sys.platform == "linux":  # macOS refuses bytes that are no text, and takes the last two for one
        odd += [os.fsdecode(b"\xff\xfe"), "\u00e9", "e\u0301"]
    for name in ["plain"] if sys.platform == "win32" else odd:
        (tree / name).mkdir()
        (tree / name / name).write_bytes(os.fsencode(name))


def shapes(tree: Path) -> None:
    """Deep paths, many files in one folder, empty files and folders."""
    deep = tree.joinpath(*[f"level-{level}" for level in range(100)])
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(b"deep")
    (tree / "empty folder").mkdir()
    (tree / "empty file").touch()
    (tree / "large file").write_bytes(bytes(range(256)) * 1024)
    (tree / "full").mkdir()
    for number in range(300):
        (tree / "full" / str(number)).write_bytes(b"%d" % number)


def modes(tree: Path) -> None:
    """Every kind of mode, on files and on folders."""
    for mode in (0o400, 0o444, 0o640, 0o755, 0o4755, 0o2755, 0o6711, 0o7777):
        (tree / f"file {mode:o}").write_bytes(b"")
        (tree / f"file {mode:o}").chmod(mode)
    for mode in (0o555, 0o700, 0o1777, 0o2775):
        (tree / f"folder {mode:o}").mkdir()
        (tree / f"folder {mode:o}" / "inside").write_bytes(b"")
        (tree / f"folder {mode:o}").chmod(mode)


def symlinks(tree: Path) -> None:
    """Links to files, to folders, to nothing, to themselves, out of the tree."""
    (tree / "target").mkdir()
    (tree / "target" / "file").write_bytes(b"aim")
    aims = ["target/file", "target", "missing", "loop", "/etc/passwd", "/", "../../..", "x" * 1000]
    for number, aim in enumerate(aims):
        (tree / f"link {number}").symlink_to(aim)
    (tree / "loop").symlink_to("loop")


def hardlinks(tree: Path) -> None:
    """Files of several names, in several folders."""
    (tree / "folder").mkdir()
    for name in ("one", "two"):
        (tree / name).write_bytes(b"equal contents, different files")
        os.link(tree / name, tree / "folder" / name)
    os.link(tree / "one", tree / "third name of one")


def sparse(tree: Path) -> None:
    """Files with holes at their start, in between and at their end."""
    for name, size, places in [
        ("middle", 3 << 20, (0, 2 << 20)),
        ("end", 4 << 20, (12345,)),
        ("only a hole", 8 << 20, ()),
    ]:
        with (tree / name).open("wb") as file:
            for place in places:
                file.seek(place)
                file.write(b"data")
            file.truncate(size)


def huge(tree: Path) -> None:
    """A file whose size takes more than 32 bits, nearly all of it a hole."""
    with (tree / "huge").open("wb") as file:
        file.seek(4 * _GIB + 1)
        file.write(b"beyond 4 GiB")


def xattrs(tree: Path) -> None:
    """Extended attributes, empty, binary and long, on files and on folders; as root a file's capabilities too."""
    (tree / "folder").mkdir()
    (tree / "file").write_bytes(b"")
    for path in (tree / "folder", tree / "file"):
        for name, value in [("user.text", b"text"), ("user.empty", b""), ("user.binary", bytes(range(256)) * 8)]:
            _set_xattr(path, name, value)
    if is_root():
        (tree / "privileged").write_bytes(b"")
        cap_net_raw = 1 << 13
        # struct vfs_cap_data, version 2, effective: permitted and inheritable, low and high words
        _set_xattr(tree / "privileged", "security.capability", struct.pack("<5I", 0x02000001, cap_net_raw, 0, 0, 0))


def acls(tree: Path) -> None:
    """POSIX access lists: one of a file, and the default one of a folder."""
    (tree / "file").write_bytes(b"")
    (tree / "folder").mkdir()
    _set_xattr(tree / "file", "system.posix_acl_access", _acl(user=1))
    _set_xattr(tree / "folder", "system.posix_acl_access", _acl(user=2))
    _set_xattr(tree / "folder", "system.posix_acl_default", _acl(user=3))
    (tree / "folder" / "inherits").write_bytes(b"")


def fifos(tree: Path) -> None:
    """A named pipe, which blocks whoever opens it."""
    if sys.platform != "win32":
        os.mkfifo(tree / "pipe", 0o620)


def devices(tree: Path) -> None:
    """Device nodes of both kinds; takes root."""
    if sys.platform != "win32":
        os.mknod(tree / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(tree / "disk", 0o640 | stat.S_IFBLK, os.makedev(259, 70000))


def owners(tree: Path) -> None:
    """Owners that this host has no names for, of all kinds of files; takes root."""
    (tree / "folder").mkdir()
    (tree / "folder" / "file").write_bytes(b"")
    (tree / "setuid").write_bytes(b"")
    (tree / "link").symlink_to("folder")
    for number, path in enumerate(sorted(tree.rglob("*"))):
        if sys.platform != "win32":
            os.lchown(path, 100_000 + number, 200_000 + number)
    (tree / "setuid").chmod(0o6755)  # after the owner, which clears it


def times(tree: Path) -> None:
    """Modification times to the nanosecond, also from before the epoch."""
    (tree / "folder").mkdir()
    (tree / "folder" / "file").write_bytes(b"")
    stamp(tree)
    (tree / "before the epoch").write_bytes(b"")
    os.utime(tree / "before the epoch", ns=(-1_500_000_001, -1_500_000_001))
    os.utime(tree, ns=(1_000_000_001, 1_000_000_001))


def stamp(tree: Path) -> None:
    """Give all in *tree* modification times of their own, to the nanosecond."""
    for number, path in enumerate(sorted((path for path, _ in _walk(tree)), reverse=True)):  # a folder after its files
        moment = 1_234_567_890_123_456_789 + number * 1_000_000_007
        os.utime(path, ns=(moment, moment), follow_symlinks=os.utime not in os.supports_follow_symlinks)


FEATURES: Mapping[str, tuple[Make, Capability | None]] = {
    "names": (names, None),
    "shapes": (shapes, None),
    "modes": (modes, Capability.MODES),
    "symlinks": (symlinks, Capability.SYMLINKS),
    "hard links": (hardlinks, Capability.HARDLINKS),
    "sparse files": (sparse, Capability.SPARSE),
    "extended attributes": (xattrs, Capability.XATTRS),
    "ACLs": (acls, Capability.ACLS),
    "FIFOs": (fifos, Capability.FIFOS),
    "devices": (devices, Capability.DEVICES),
    "owners": (owners, Capability.OWNERS),
    "times": (times, Capability.NS_MTIME),
}
"""What a rich tree is made of, and the capability to keep it."""
ROOT_ONLY = frozenset({devices, owners})


def make_rich(tree: Path, capabilities: Collection[Capability] = EVERYTHING) -> None:
    """Fill *tree* with all that *capabilities* promise to keep and this user can make, but `huge`."""
    for name, (make, capability) in FEATURES.items():
        if (capability is None or capability in capabilities) and (is_root() or make not in ROOT_ONLY):
            (tree / name).mkdir()
            make(tree / name)
    stamp(tree)


def snapshot(tree: Path, capabilities: Collection[Capability] = EVERYTHING) -> dict[str, dict[str, object]]:
    """What there is to see of each file in *tree* ("." is itself), as far as *capabilities* promise to keep it.

    Follows no link and opens nothing but regular files. Holes are not read. Two trees are equal if their snapshots are.
    Sockets are left out: without their process they mean nothing, so a backend may drop them.
    """
    first_names: dict[tuple[int, int], str] = {}
    seen: dict[str, dict[str, object]] = {}
    for path, status in sorted(_walk(tree)):
        if not stat.S_ISSOCK(status.st_mode):
            name = path.relative_to(tree).as_posix()
            seen[name] = dict(_facts(path, status, capabilities))
            if Capability.HARDLINKS in capabilities and not stat.S_ISDIR(status.st_mode):
                seen[name]["same file as"] = first_names.setdefault((status.st_dev, status.st_ino), name)
    return seen


def _facts(path: Path, status: os.stat_result, capabilities: Collection[Capability]) -> Iterator[tuple[str, object]]:
    mode = status.st_mode
    yield "type", stat.filemode(mode)[0]
    if Capability.MODES in capabilities and not stat.S_ISLNK(mode):
        yield "mode", oct(stat.S_IMODE(mode))
    if Capability.OWNERS in capabilities:
        yield "owner", (status.st_uid, status.st_gid)
    if Capability.NS_MTIME in capabilities:
        yield "mtime", status.st_mtime_ns
    if stat.S_ISREG(mode):
        yield "size", status.st_size
        yield "contents", _digest(path, status.st_size)
        if sys.platform != "win32" and Capability.SPARSE in capabilities and status.st_size >= 1 << 20:
            yield "sparse", status.st_blocks * 512 < status.st_size
    elif stat.S_ISLNK(mode):
        yield "aim", os.readlink(path)
    elif sys.platform != "win32" and (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
        yield "device", status.st_rdev
    if attributes := _xattrs(path, capabilities):
        yield "attributes", attributes


def _walk(tree: Path) -> Iterator[tuple[Path, os.stat_result]]:
    pending = [tree]
    while pending:
        path = pending.pop()
        status = os.lstat(path)
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            pending += path.iterdir()


def _digest(path: Path, size: int) -> str:
    """A digest of the blocks that are not all zeros, so that where the holes are makes no difference."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        offset = 0
        while (offset := _next_data(file.fileno(), offset, size)) < size:
            file.seek(offset)
            block = file.read(_BLOCK)
            if block.strip(b"\0"):
                digest.update(b"%d:" % offset + block)
            offset += _BLOCK
    return digest.hexdigest()


def _next_data(descriptor: int, offset: int, size: int) -> int:
    """The offset of the first block from *offset* on that is not all in a hole; *size* where there is none."""
    if sys.platform != "win32":
        try:
            return os.lseek(descriptor, offset, os.SEEK_DATA) // _BLOCK * _BLOCK
        except OSError as error:
            return size if error.errno == errno.ENXIO else offset
    else:
        return offset


def _xattrs(path: Path, capabilities: Collection[Capability]) -> dict[str, bytes]:
    kinds = {Capability.XATTRS: ("user.", "trusted.", "security.capability"), Capability.ACLS: ("system.posix_acl_",)}
    wanted = tuple(prefix for kind, prefixes in kinds.items() if kind in capabilities for prefix in prefixes)
    if sys.platform == "linux" and wanted:
        found = (name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(wanted))
        return {name: os.getxattr(path, name, follow_symlinks=False) for name in sorted(found)}
    return {}


def _set_xattr(path: Path, name: str, value: bytes) -> None:
    if sys.platform == "linux":
        os.setxattr(path, name, value)


def _acl(user: int) -> bytes:
    """An access list as Linux keeps it: owner rwx, *user* r, group rx, mask rx, others nothing."""
    unset = 0xFFFFFFFF
    entries = [(1, 7, unset), (2, 4, user), (4, 5, unset), (16, 5, unset), (32, 0, unset)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def is_root() -> bool:
    """May this process do what it likes?"""
    return sys.platform != "win32" and os.geteuid() == 0

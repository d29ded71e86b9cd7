"""A tree filled from a folder or an archive: all of it kept, and nothing of it outside."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storebackends import BuildFailed, Store
from storebackends.importing import fill, unpack
from tests.capabilities import needs
from tests.stores import files, left_in_progress, open_copy

pytest.importorskip("fcntl", reason="no archives can be unpacked here")
assert sys.platform != "win32"

linux: Any = os  # has the attributes that other systems' os has not

NS = 1_700_000_000_123_456_789
CAP_NET_RAW = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # as the kernel keeps it


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_copy(tmp_path / "store") as store:
        yield store


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.uid, info.gid = os.getuid(), os.getgid()
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info


def archive(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for item in members:
            info, data = item if isinstance(item, tuple) else (item, b"")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def load(store: Store, data: bytes, id: str = "base") -> Path:
    """Import an archive as it would come through a pipe, and return the tree."""
    stream = io.BufferedReader(io.BytesIO(data))
    with store.build(id, lambda work: unpack(work, stream, "it")) as result:
        return result.path


class TestFolder:
    def test_is_copied_with_its_metadata(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "source"
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "f").write_text("text")
        (source / "link").symlink_to("/nowhere")
        os.utime(source / "sub", ns=(NS, NS))
        source.chmod(0o750)

        with store.build("base", lambda work: fill(work, source)) as result:
            tree = result.path

        assert files(tree) == {"sub/f": "text"}
        assert os.readlink(tree / "link") == "/nowhere"
        assert (tree / "sub").stat().st_mtime_ns == NS
        assert stat.S_IMODE(tree.stat().st_mode) == 0o750


@needs("symlinks")
class TestArchive:
    def test_made_by_tar_becomes_the_tree_it_was_made_of(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "source"
        (source / "deep" / "er").mkdir(parents=True)
        (source / "deep" / "er" / "f").write_bytes(b"x" * 100_000)
        os.link(source / "deep" / "er" / "f", source / "same")
        (source / "link").symlink_to("../../etc")
        os.mkfifo(source / "pipe")
        (source / os.fsdecode(b"not \xff text\nat all")).write_text("name")
        with (source / "holes").open("wb") as file:
            file.truncate(64 << 20)
            file.seek(32 << 20)
            file.write(b"island")
        (source / "deep" / "er").chmod(0o555)
        for path in ["deep/er/f", "deep/er", "deep", "."]:
            os.utime(source / path, ns=(NS, NS))
        _tar(tmp_path / "a.tar", source)

        with store.build("base", lambda work: fill(work, tmp_path / "a.tar")) as result:
            tree = result.path

        assert _listing(tree) == _listing(source)
        assert (tree / "same").stat().st_nlink == 2
        assert (tree / "holes").read_bytes() == (source / "holes").read_bytes()
        assert (tree / "holes").stat().st_blocks * 512 < 1 << 20

    @pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
    def test_may_be_packed(self, store: Store, pack: Callable[[bytes], bytes]) -> None:
        assert files(load(store, pack(archive((member("f"), b"text"))))) == {"f": "text"}

    def test_has_later_members_replace_earlier_ones(self, store: Store) -> None:
        tree = load(
            store,
            archive(
                (member("f"), b"old"),
                member("same", tarfile.LNKTYPE, "f"),
                (member("f"), b"new"),
                member("was-link", tarfile.SYMTYPE, "/etc"),
                member("was-link", tarfile.DIRTYPE),
                (member("was-link/inside"), b"in"),
            ),
        )

        assert files(tree) == {"f": "new", "same": "old", "was-link/inside": "in"}

    def test_may_leave_out_its_folders(self, store: Store) -> None:
        tree = load(store, archive((member("a/b/c"), b"text")))

        assert files(tree) == {"a/b/c": "text"}
        assert stat.S_IMODE((tree / "a" / "b").stat().st_mode) == 0o755

    @needs("root", "devices")
    def test_keeps_owners_setuid_and_devices_as_root(self, store: Store) -> None:
        program, device = member("su"), member("null", tarfile.CHRTYPE)
        program.uid, program.gid, program.mode = 1234, 2345, 0o4755
        device.devmajor, device.devminor, device.mode = 1, 3, 0o666

        tree = load(store, archive((program, b"#!"), device))

        found = (tree / "su").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o4755)
        found = (tree / "null").stat()
        assert stat.S_ISCHR(found.st_mode)
        assert found.st_rdev == os.makedev(1, 3)
        assert stat.S_IMODE(found.st_mode) == 0o666

    @needs("xattrs")
    def test_keeps_attributes_of_any_bytes_and_times_to_the_nanosecond(self, store: Store, tmp_path: Path) -> None:
        source, value = tmp_path / "source", b"a\n\xff\x00=\xe4"
        (source / "d").mkdir(parents=True)
        (source / "d" / "f").touch()
        for path in (source / "d" / "f", source / "d"):
            linux.setxattr(path, "user.mark", value)
            os.utime(path, ns=(NS, NS))
        _tar(tmp_path / "a.tar", source, "--xattrs")

        with store.build("base", lambda work: fill(work, tmp_path / "a.tar")) as result:
            tree = result.path

        assert [linux.getxattr(tree / name, "user.mark") for name in ("d", "d/f")] == [value, value]
        assert [os.stat(tree / name).st_mtime_ns for name in ("d", "d/f")] == [NS, NS]

    @needs("root", "xattrs")
    def test_keeps_capabilities_of_programs_with_an_owner(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (source / "ping").touch()
        os.chown(source / "ping", 1234, 1234)
        linux.setxattr(source / "ping", "security.capability", CAP_NET_RAW)
        _tar(tmp_path / "a.tar", source, "--xattrs", "--xattrs-include=security.*")

        with store.build("base", lambda work: fill(work, tmp_path / "a.tar")) as result:
            ping = result.path / "ping"

        assert ping.stat().st_uid == 1234
        assert linux.getxattr(ping, "security.capability") == CAP_NET_RAW

    @pytest.mark.parametrize(
        ("members", "reason"),
        [
            ([member("/etc/evil")], "'/etc/evil', which is not inside"),
            ([member("a/../../evil")], "'a/../../evil', which is not inside"),
            ([member("out", tarfile.SYMTYPE, "/tmp"), member("out/evil")], "'out/evil' lies below a link"),
            ([member("f"), member("f/evil")], "'f/evil' lies below a link or a file"),
            ([member("evil", tarfile.LNKTYPE, "/etc/passwd")], "'/etc/passwd', which is not inside"),
            ([member("evil", tarfile.LNKTYPE, "../f")], "'../f', which is not inside"),
            (
                [member("out", tarfile.SYMTYPE, "/etc"), member("evil", tarfile.LNKTYPE, "out/passwd")],
                "'out/passwd' lies below a link",
            ),
            ([member("evil", tarfile.LNKTYPE, "f")], "is a hard link to 'f', which no member before it is"),
            ([member("evil", tarfile.LNKTYPE, ".")], "is a hard link to '.', which no member before it is"),
            ([member(".", tarfile.SYMTYPE, "/tmp")], "would replace the tree itself"),
            ([member("d", tarfile.DIRTYPE), member("d/f"), member("d")], "unpacking 'd' failed"),
            ([member("evil", b"Z")], "is of the unknown type b'Z'"),
            ([member("e" * 300)], "failed: "),
        ],
    )
    def test_that_reaches_out_is_refused_and_leaves_nothing(
        self, store: Store, members: list[tarfile.TarInfo], reason: str
    ) -> None:
        with pytest.raises(BuildFailed, match="build of 'base' failed") as caught:
            load(store, archive(*members))

        assert reason in str(caught.value)
        assert store.result("base") is None
        assert left_in_progress(store.root) == []

    def test_cut_short_anywhere_is_refused(self, store: Store) -> None:
        whole = archive((member("a"), b"1" * 600), (member("b"), b"2"))

        for length in (0, 100, 512, 700, 1024 + 512, 1024 + 512 + 100, 1024 + 512 + 512):
            with pytest.raises(BuildFailed, match="it is damaged or cut short"):
                load(store, whole[:length])

    def test_with_a_broken_header_in_it_is_refused(self, store: Store) -> None:
        broken = bytearray(archive((member("a"), b"1"), (member("b"), b"2")))
        broken[1024] ^= 1

        with pytest.raises(BuildFailed, match="it is damaged or cut short: bad checksum"):
            load(store, bytes(broken))

    @pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
    def test_with_a_header_too_large_to_read_is_refused(self, store: Store, kind: bytes) -> None:
        header = member("huge", kind)
        header.size = 1 << 40

        with pytest.raises(BuildFailed, match=f"a header in it claims {1 << 40} bytes"):
            load(store, header.tobuf(tarfile.GNU_FORMAT))

    def test_whose_packing_is_broken_is_refused(self, store: Store) -> None:
        packed = gzip.compress(archive((member("a"), b"1")))

        for broken in (packed[:-8] + bytes(8), packed[:-12], packed[:30] + bytes(10) + packed[40:]):
            with pytest.raises(BuildFailed, match="it is damaged or cut short"):
                load(store, broken)
        with pytest.raises(BuildFailed, match="packed by zstd; unpack that first"):
            load(store, b"\x28\xb5\x2f\xfd" + packed)

        assert left_in_progress(store.root) == []


def _tar(target: Path, source: Path, *options: str) -> None:
    subprocess.run(["tar", "--sparse", "--format=posix", *options, "-cf", target, "-C", source, "."], check=True)


def _listing(tree: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in [tree, *sorted(tree.rglob("*"))]:
        status = path.lstat()
        target = os.readlink(path) if path.is_symlink() else ""
        found[str(path.relative_to(tree))] = status.st_mode, status.st_uid, status.st_mtime_ns, target
    return found

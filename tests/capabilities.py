"""What this machine can do: one probe per ability, which tries the thing itself, once.

    @needs("xfs", "bwrap")
    def test_…

is skipped where one of them is missing, and the reason says which, why, and how to get it. `require` does the same
inside a fixture; `look` only answers. A probe returns where the ability is there and raises OSError where it is not.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import leftovers

needs = pytest.mark.needs
PROJECT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


class Answer(NamedTuple):
    """Is the ability here? If not, *reason* says why not and what would help."""

    usable: bool
    reason: str = ""


class _Probe(NamedTuple):
    attempt: Callable[[], None]
    fix: str
    root: bool


_PROBES: dict[str, _Probe] = {}


def probe(name: str, fix: str, *, root: bool = False) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a probe; one with *root* is not tried, and answers no, without it."""

    def register(attempt: Callable[[], None]) -> Callable[[], None]:
        _PROBES[name] = _Probe(attempt, fix, root)
        return attempt

    return register


@cache
def look(name: str) -> Answer:
    """Ask the probe *name*."""
    attempt, fix, root = _PROBES[name]
    if root and name != "root" and not look("root").usable:
        return Answer(False, "this is not root; run the tests as root")
    try:
        attempt()
    except OSError as error:
        return Answer(False, f"{error}; {fix}")
    return Answer(True)


def require(*names: str) -> None:
    """Skip the running test unless this machine has all of these abilities."""
    for name in names:
        usable, reason = look(name)
        if not usable:
            pytest.skip(f"needs {name}: {reason}")


def root_only(name: str) -> bool:
    """Does this ability take root?"""
    return _PROBES[name].root


def run(*argv: str | Path) -> str:
    """Run a program to its end and return what it printed; OSError with its complaint where it fails."""
    # mkfs and mount live in sbin, which `su` without a login leaves out of PATH.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    program = shutil.which(argv[0], path=path)
    if program is None:
        raise OSError(f"{argv[0]} is not installed")
    environment = os.environ | {"PATH": path, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [program, *argv[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment
    )
    if done.returncode != 0:
        raise OSError(f"{argv[0]} failed: {' '.join((done.stderr or done.stdout).split()) or done.returncode}")
    return done.stdout


# Mounts of the tests' own. Each is undone at the end of its block, never lazily: that would only hide a leak.

_MKFS = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f"), "btrfs": ("mkfs.btrfs", "-q", "-f")}


@contextmanager
def loop_fs(kind: str, parent: Path, size: int = 512 * MIB, options: str = "") -> Iterator[Path]:
    """An ext4, xfs or btrfs of *size* bytes in a sparse image below *parent*, mounted with *options*, "a,b".

    XFS takes at least 300 MiB.
    """
    room = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=parent))
    image = room / "image"
    with image.open("wb") as file:
        file.truncate(size)
    run(*_MKFS[kind], image)
    with mounted(room / "mnt", "-o", f"loop,{options}".rstrip(","), image):
        yield room / "mnt"


@contextmanager
def small_tmpfs(parent: Path, size: int = 16 * MIB, nr_inodes: int = 0) -> Iterator[Path]:
    """A tmpfs below *parent* with room for *size* bytes and, unless 0, that many inodes."""
    room = Path(tempfile.mkdtemp(prefix="tmpfs-", dir=parent))
    with mounted(room / "mnt", "-t", "tmpfs", "-o", f"size={size},nr_inodes={nr_inodes}", "tmpfs"):
        yield room / "mnt"


@contextmanager
def zpool(parent: Path, size: int = 1024 * MIB) -> Iterator[str]:
    """A ZFS pool in a sparse file below *parent*, mounted there at *parent*/NAME; yields its name."""
    name = f"storebackends-{os.getpid()}-{os.path.basename(parent)}"
    image = parent / "pool"
    with image.open("wb") as file:
        file.truncate(size)
    run("zpool", "create", "-O", f"mountpoint={parent / name}", "-O", "acltype=posixacl", "-O", "xattr=sa", name, image)
    try:
        yield name
    finally:
        run("zpool", "destroy", "-f", name)


@contextmanager
def mounted(folder: Path, *arguments: str | Path) -> Iterator[Path]:
    """`mount ARGUMENTS FOLDER` for the length of the block; *folder* is made where it is missing."""
    folder.mkdir(exist_ok=True)
    run("mount", *arguments, folder)
    try:
        yield folder
    finally:
        _unmount(folder)


def _unmount(folder: Path) -> None:
    # A process killed just now, or udev looking at the loop device, lets go within moments.
    for _ in range(50):
        try:
            run("umount", folder)
        except OSError as error:
            busy = error
            threading.Event().wait(0.1)
        else:
            return
    raise OSError(f"{busy}; held by: {[f'process {pid}: {what}' for pid, what in leftovers.holders(folder)]}")


# The probes.


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        yield Path(folder)


def _linux(what: str) -> None:
    if sys.platform != "linux":
        raise OSError(f"{what} is Linux's")


@probe("root", "run the tests as root", root=True)
def _root() -> None:
    if sys.platform == "win32" or os.geteuid() != 0:
        raise OSError("this is not root")


@probe("unprivileged", "run the tests as another user, as `make wheel-test` does")
def _unprivileged() -> None:
    """Permission bits bind us."""
    if sys.platform == "win32" or os.geteuid() == 0:
        raise OSError("permission bits do not bind this user")


@probe("fork", "use a POSIX system")
def _fork() -> None:
    if not hasattr(os, "fork"):
        raise OSError("there is no fork()")


@probe("windows", "use Windows, or `make test-windows`")
def _windows() -> None:
    if sys.platform != "win32":
        raise OSError("this is not Windows")


@probe("proc", "mount /proc")
def _proc() -> None:
    if sys.platform == "win32":
        raise OSError("Windows has none")
    os.listdir("/proc/self/fd")


@probe("symlinks", "on Windows, switch on developer mode")
def _symlinks() -> None:
    with _scratch() as folder:
        (folder / "link").symlink_to("nowhere")
        if not (folder / "link").is_symlink():  # so on Wine
            raise OSError("links are not made, and nothing says so")


@probe("modes", "use a POSIX system")
def _modes() -> None:
    if sys.platform == "win32":
        raise OSError("Windows has no permission bits")


@probe("syncfs", "use Linux")
def _syncfs() -> None:
    _linux("syncfs()")


@probe("xattrs", "put TMPDIR on a file system with user extended attributes")
def _xattrs() -> None:
    _linux("setxattr()")
    if sys.platform == "linux":
        with _scratch() as folder:
            os.setxattr(folder, "user.probe", b"1")


@probe("acls", "put TMPDIR on a file system with POSIX ACLs")
def _acls() -> None:
    _linux("the ACL attribute")
    nobody, unset = 65534, 0xFFFFFFFF
    # tag, permissions, id: owner, one user, group, mask, others
    entries = [(1, 7, unset), (2, 4, nobody), (4, 5, unset), (16, 5, unset), (32, 5, unset)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    if sys.platform == "linux":
        with _scratch() as folder:
            os.setxattr(folder, "system.posix_acl_access", acl)


@probe("devices", "grant CAP_MKNOD", root=True)
def _devices() -> None:
    if sys.platform != "win32":
        with _scratch() as folder:
            os.mknod(folder / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))


@probe("tmpfs", "grant CAP_SYS_ADMIN", root=True)
def _tmpfs() -> None:
    with _scratch() as folder, small_tmpfs(folder):
        pass


def _loop(kind: str, package: str) -> None:
    @probe(kind, f"apt-get install {package}, and allow loop devices and mounts", root=True)
    def attempt() -> None:
        with _scratch() as folder, loop_fs(kind, folder) as mount:
            (mount / "file").write_bytes(b"written")


_loop("ext4", "e2fsprogs")
_loop("xfs", "xfsprogs")
_loop("btrfs", "btrfs-progs")


@probe("btrfsutil", "pip install 'storebackends[btrfs]', which takes gcc, python3-dev and libbtrfsutil-dev")
def _btrfsutil() -> None:
    try:
        import btrfsutil
    except ImportError as error:
        raise OSError(f"no module btrfsutil: {error}") from error
    assert btrfsutil.SubvolumeIterator


def _own_btrfs(name: str, variable: str) -> None:
    @probe(name, f"name a btrfs of this user's in ${variable}, as `make wheel-test` does")
    def attempt() -> None:
        if not os.access(os.environ.get(variable, ""), os.W_OK):
            raise OSError("there is none")


_own_btrfs("btrfs_of_a_user", "STOREBACKENDS_BTRFS")
_own_btrfs("btrfs_that_allows", "STOREBACKENDS_BTRFS_ALLOWS")


@probe("overlay", "load the overlay module and grant CAP_SYS_ADMIN", root=True)
def _overlay() -> None:
    # On a tmpfs: the temporary folder may itself be an overlay, as in a container, and take no second one.
    with _scratch() as folder, small_tmpfs(folder) as mount:
        for name in ("lower", "upper", "work"):
            (mount / name).mkdir()
        options = f"lowerdir={mount}/lower,upperdir={mount}/upper,workdir={mount}/work"
        with mounted(mount / "merged", "-t", "overlay", "-o", options, "overlay"):
            pass


@probe("containerd", "apt-get install containerd, and allow mounts and loop devices", root=True)
def _containerd() -> None:
    # Started where a test needs it: one that is there and does not start is a failure, and no ability that is missing.
    run("containerd", "--version")
    run("ctr", "--version")
    _mount_loop()


def _mount_loop() -> None:
    with _scratch() as folder, loop_fs("ext4", folder, 32 * MIB):
        pass


@probe("userns", "allow user namespaces: sysctl user.max_user_namespaces")
def _userns() -> None:
    run("unshare", "--user", "--map-root-user", "true")


@probe("bwrap", "apt-get install bubblewrap, and allow user namespaces")
def _bwrap() -> None:
    run("bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all", "true")


@probe("sh", "use a POSIX system")
def _sh() -> None:
    run("sh", "-c", "true")


@probe("bash", "install bash")
def _bash() -> None:
    run("bash", "-c", "true")


@probe("setpriv", "apt-get install util-linux")
def _setpriv() -> None:
    run("setpriv", "--pdeathsig", "KILL", "true")


@probe("rsync", "apt-get install rsync")
def _rsync() -> None:
    version = re.search(r"version v?(\d+)\.(\d+)", run("rsync", "--version"))
    # Before 3.1 modification times were whole seconds.
    if version is None or (int(version[1]), int(version[2])) < (3, 1):
        raise OSError("rsync is older than 3.1")


@probe("docker", "apt-get install docker.io busybox-static, and allow what a Docker daemon does", root=True)
def _docker() -> None:
    from tests.dockerd import IMAGE, dockerd  # it stands on this module

    with dockerd() as daemon:
        daemon("run", "--rm", "--network", "none", IMAGE, "true")


@probe("source", "run the tests in a checkout")
def _source() -> None:
    if not (PROJECT / "storebackends" / "__init__.py").exists():
        raise OSError("the project's source does not lie beside the tests")


@probe("zfs", "make test-zfs runs these tests in a machine that has it", root=True)
def _zfs() -> None:
    run("zfs", "version")
    with _scratch() as folder, zpool(folder):
        pass


@probe("sudo_zfs", "let nobody run zfs and chown by sudo without a password", root=True)
def _sudo_zfs() -> None:
    run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sudo", "-n", "zfs", "version")

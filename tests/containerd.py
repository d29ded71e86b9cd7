"""A containerd of the tests' own: its socket, state and snapshots in one folder; it ends with who started it.

    with running(folder) as daemon:
        daemon.ctr("snapshots", "ls")

Its snapshots lie on an ext4 and, where the machine has that, a btrfs of their own, both in memory: containerd brings
each change of its database to the disk, and a shared disk's pace is not what is tested.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storebackends import mounts
from tests import capabilities
from tests.capabilities import MIB

WAIT = 60.0
_CONFIG = """
version = 2
root = "{root}"
state = "{folder}/state"
disabled_plugins = [{disabled}]
[grpc]
  address = "{folder}/socket"
[ttrpc]
  address = "{folder}/socket.ttrpc"
[plugins."io.containerd.snapshotter.v1.btrfs"]
  root_path = "{btrfs}"
[plugins."io.containerd.gc.v1.scheduler"]
  startup_delay = "100ms"
"""
_DISABLED = [
    *("grpc.v1.cri", "internal.v1.opt", "internal.v1.tracing", "tracing.processor.v1.otlp"),
    *("snapshotter.v1.aufs", "snapshotter.v1.zfs", "snapshotter.v1.devmapper"),
]


class Daemon:
    """One, started and stopped at will; what it keeps stays."""

    def __init__(self, folder: Path, root: Path, btrfs: Path) -> None:
        self.address, self._folder = str(folder / "socket"), folder
        self._process: subprocess.Popen[bytes] | None = None
        disabled = ", ".join(f'"io.containerd.{name}"' for name in _DISABLED)
        config = _CONFIG.format(root=root / "root", folder=folder, btrfs=btrfs, disabled=disabled)
        (folder / "config.toml").write_text(config)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Have it running and answering."""
        argv = ["containerd", "--config", str(self._folder / "config.toml")]
        with (self._folder / "log").open("ab") as log:
            # A run of the tests that is killed takes it along.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        for _ in range(int(WAIT / 0.05)):
            if self._process.poll() is not None:
                break
            try:
                self.ctr("version")
            except OSError:
                threading.Event().wait(0.05)
            else:
                return
        self.stop()
        raise OSError(f"containerd does not start: {(self._folder / 'log').read_text()[-2000:]}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it; twice is fine."""
        process, self._process = self._process, None
        if process:
            with process:
                process.send_signal(how)
                try:
                    process.wait(WAIT)
                except subprocess.TimeoutExpired:
                    process.kill()

    def ctr(self, *words: str, namespace: str = "storebackends") -> str:
        """What a ctr says; OSError with its complaint."""
        return capabilities.run("ctr", "--address", self.address, "--namespace", namespace, *words)

    def snapshots(self, snapshotter: str, namespace: str = "storebackends") -> list[str]:
        """The keys of all snapshots."""
        said = self.ctr("snapshots", "--snapshotter", snapshotter, "ls", namespace=namespace)
        return [line.split()[0] for line in said.splitlines()[1:]]

    def collect(self, namespace: str = "storebackends") -> None:
        """Have its garbage collected, and wait for the end of it."""
        lease = self.ctr("leases", "create", namespace=namespace).strip()
        self.ctr("leases", "delete", "--sync", lease, namespace=namespace)


def left(daemon: Daemon, root: Path, snapshotter: str = "overlayfs") -> list[str]:
    """What the store in *root* has in the daemon or mounted, beside what its results and generations name."""
    uuid = json.loads((root / "store.json").read_bytes())["uuid"]
    entries = [*(root / "result").iterdir(), *(root / "caches").glob("*/*")]
    nonces = [json.loads((entry / "tree.json").read_bytes())["nonce"] for entry in entries]
    named = {f"storebackends-{uuid}-{nonce}-committed" for nonce in nonces}
    there = {key for key in daemon.snapshots(snapshotter) if uuid in key}
    found = [f"snapshot {key}" for key in there - named] + [f"snapshot {key} is missing" for key in named - there]
    found += [f"mount {point.path}" for point in mounts.below(root)]
    rooms = [root / "containerd" / room for room in ("mounts", "tombs", "views")]
    return found + [str(path) for room in rooms for path in room.iterdir()]


def _memory(otherwise: Path) -> Path:
    """A folder in memory, where there is much; a container's may be small."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > 2048 * MIB else otherwise


@contextmanager
def running(folder: Path, size: int = 8192 * MIB) -> Iterator[Daemon]:
    """A daemon with *size* bytes for its snapshots on each file system; what is not used takes no memory.

    A small one has no btrfs.
    """
    with ExitStack() as held:
        room = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="containerd-", dir=_memory(folder))))
        root = held.enter_context(capabilities.loop_fs("ext4", room, size))
        btrfs = root / "btrfs"
        if size >= 512 * MIB and capabilities.look("btrfs").usable:
            btrfs = held.enter_context(capabilities.loop_fs("btrfs", room, size))
        daemon = Daemon(folder, root, btrfs)
        held.callback(daemon.stop)
        daemon.start()
        yield daemon


def archive(path: Path, layers: Sequence[Mapping[str, bytes]]) -> Path:
    """An OCI image of these *layers*, the lowest first, as a tar of its layout."""
    blobs: dict[str, bytes] = {}

    def blob(kind: str, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    tars = [blob("layer.v1.tar", _tar(layer)) for layer in layers]
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in tars]},
    }
    manifest = {"schemaVersion": 2, "config": blob("config.v1+json", json.dumps(config).encode()), "layers": tars}
    index = {"schemaVersion": 2, "manifests": [blob("manifest.v1+json", json.dumps(manifest).encode())]}
    layout = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode()}
    path.write_bytes(_tar(layout | blobs))
    return path


def _tar(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()

"""A Docker daemon of the tests' own, without any network, and an image made of a static BusyBox."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.capabilities import run

IMAGE = "storebackends-tests"
_APPLETS = "sh cat cp df env false find id kill ln ls mkdir mv pwd rm sleep stat tar touch true wc"
_PATIENCE = 60.0
_OFF = ("iptables=false", "ip6tables=false", "ip-forward=false", "ip-masq=false", "bridge=none", "userland-proxy=false")


class Dockerd:
    """One daemon below *folder*, whose path has to be short: a socket is in it. start() and stop() it at will."""

    def __init__(self, driver: str, folder: Path) -> None:
        self.folder, self.host = folder, f"unix://{folder}/docker.sock"
        self._argv = [
            "dockerd",
            "--config-file",
            f"{folder}/daemon.json",
            "--host",
            self.host,
            "--storage-driver",
            driver,
        ]
        self._argv += ["--data-root", str(self.data), "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid"]
        self._argv += [*(f"--{option}" for option in _OFF), "--exec-opt", "native.cgroupdriver=cgroupfs"]
        (folder / "daemon.json").write_text("{}")  # never what the host has
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        """Where it keeps images and volumes."""
        return self.folder / "data"

    def start(self) -> None:
        """Start it and wait until it answers. OSError, with the end of its log, where it does not."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(int(_PATIENCE / 0.1)):
            if self._process.poll() is not None:
                break
            with suppress(OSError):
                self("version")
                return
            threading.Event().wait(0.1)
        said = (self.folder / "log").read_text(errors="replace").splitlines()[-3:]
        self.stop()
        raise OSError(f"dockerd did not come up: {' '.join(said)}")

    def stop(self) -> None:
        """End it, and with it all its containers."""
        process, self._process = self._process, None
        if process:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            finally:
                process.kill()
                process.wait()

    def __call__(self, *words: str) -> str:
        """What `docker WORDS` prints. OSError where it fails."""
        return run("docker", "--host", self.host, *words)

    def volumes(self) -> list[str]:
        return self("volume", "ls", "--quiet").split()

    def containers(self) -> list[str]:
        return self("ps", "--all", "--format", "{{.Names}}").split()

    def load_image(self) -> None:
        """Make IMAGE, which has no network to come from."""
        archive = self.folder / "image.tar"
        archive.write_bytes(busybox())
        self("import", str(archive), IMAGE)


def busybox() -> bytes:
    """A tar of a root folder with the commands that the tests and the backend run in containers."""
    program = shutil.which("busybox")
    if program is None:
        raise OSError("busybox is not installed")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(os.path.realpath(program), "bin/busybox")
        for name in _APPLETS.split():
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    return packed.getvalue()


@contextmanager
def dockerd(driver: str = "overlay2", data: Path | None = None) -> Iterator[Dockerd]:
    """A running daemon with the image; *data* becomes its folder for images and volumes."""
    with ExitStack() as undo:
        folder = Path(tempfile.mkdtemp(prefix="dockerd-", dir="/tmp"))  # not TMPDIR: a socket's path is short
        undo.callback(shutil.rmtree, folder)
        if data:
            (folder / "data").symlink_to(data)
        daemon = Dockerd(driver, folder)
        undo.callback(daemon.stop)
        daemon.start()
        daemon.load_image()
        yield daemon

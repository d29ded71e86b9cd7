"""The backend `docker` against a `docker` that says what a daemon for Windows containers says; and what it is told.

The stand-in keeps volumes as names in a file and runs nothing: this is about the words, on any machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import storebackends
from storebackends import NoSpace, NotSupported, Store, StoreError
from storebackends.plugin import CommandFailed
from storebackends_docker.daemon import Daemon, mount
from storebackends_docker.inside import Linux, Windows
from tests.standins import stand_in

CLIENT = """\
import json, os, sys
room, words = {room!r}, sys.argv[1:]
with open(room + "/calls", "a") as calls:
    print(json.dumps(words), file=calls)
volumes = room + "/volumes"
os.makedirs(volumes, exist_ok=True)
if words[:2] == ["volume", "create"]:
    open(volumes + "/" + words[-1], "w").close()
elif words[:2] == ["volume", "inspect"]:
    name = words[-1]
    if not os.path.exists(volumes + "/" + name):
        sys.exit("Error: No such volume: " + name)
    point = "C:\\\\ProgramData\\\\docker\\\\volumes\\\\" + name + "\\\\_data"
    print(json.dumps({{"Mountpoint": point, "Labels": {{"storebackends.attempt": name.rpartition("-")[2]}}}}))
elif words[:2] == ["volume", "ls"]:
    print("\\n".join(os.listdir(volumes)))
elif words[:2] == ["volume", "rm"]:
    os.path.exists(volumes + "/" + words[-1]) and os.remove(volumes + "/" + words[-1])
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what was said to the stand-in, which is first on PATH."""
    folder = tmp_path / "bin"
    stand_in(folder, "docker", CLIENT.format(room=str(folder)), monkeypatch)
    return folder


def calls(room: Path, verb: str) -> list[list[str]]:
    words = [json.loads(line) for line in (room / "calls").read_text().splitlines()]
    return [call for call in words if call[0] == verb]


def opened(tmp_path: Path) -> Store:
    return storebackends.open_store(
        backend="docker", path=tmp_path / "store", durability="none", image="mcr.example/servercore:ltsc2022"
    )


class TestWindowsContainers:
    def test_a_build_is_cloned_by_robocopy_and_runs_in_c_build(self, tmp_path: Path, room: Path) -> None:
        source = tmp_path / "file"
        source.write_text("x")
        with opened(tmp_path) as store:
            store.build("base", lambda work: None).release()
            with store.build("child", lambda work: work.run(["cmd", "/C", "dir"], cwd=r"a\b"), base="base") as child:
                attempt, base = child.attempt, store.record("base").attempt
            store.build("copied", lambda work: work.copy_in(source, "a&b/c d")).release()

        made, clone, command, _ = calls(room, "run")
        assert "BASE=" not in "".join(made)
        assert {f"NEW={attempt}", f"BASE={base}"} <= set(clone)
        assert "robocopy C:\\base\\rootfs C:\\new\\rootfs" in clone[-1]
        assert clone[-5:-1] == ["mcr.example/servercore:ltsc2022", "/V:ON", "/S", "/C"]
        assert command[command.index("--workdir", command.index("--workdir") + 1) + 1] == r"C:\build\a\b"
        assert f"{attempt}\\_data\\rootfs,target=C:\\build" in " ".join(command)
        assert not any(word.split("=")[0] in ("PATH", "HOME", "TMPDIR") for word in command)
        (copied,) = calls(room, "create")
        assert {"PART1=a&b", "PART2=c d", "COUNT=2", "LAST=c d"} <= set(copied)
        assert "a&b" not in copied[-1]
        assert calls(room, "cp") == [["cp", str(source), f"{copied[2]}:C:\\copied"]]

    @pytest.mark.parametrize("path", ["a:b", 'a"b', "a%PATH%", "..\\x", "\\x", "a!b"])
    def test_a_path_that_cmd_could_read_otherwise_is_refused(self, tmp_path: Path, room: Path, path: str) -> None:
        with opened(tmp_path) as store, pytest.raises(StoreError, match="no path inside a tree"):
            store.build("id", lambda work: work.copy_in(tmp_path, path))

    def test_what_it_cannot_do_is_said(self, tmp_path: Path, room: Path) -> None:
        with opened(tmp_path) as store:
            with pytest.raises(NotSupported):
                store.usage()
            with pytest.raises(StoreError, match="docker exports none of Windows"):
                store.build("id", lambda work: work.import_image("image"))


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ("Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?", StoreError, "start it"),
        ("error during connect: this error may indicate that the docker daemon is not running", StoreError, "start it"),
        ("dial unix /run/docker.sock: connect: permission denied while trying to connect", StoreError, "start it"),
        ("write /var/lib/docker/x: no space left on device", NoSpace, "no space left"),
        ("Error response from daemon: No such image: x:latest", StoreError, "pull or load"),
        ("Error response from daemon: something else", CommandFailed, "something else"),
    ],
)
def test_what_a_daemon_says_is_told_as_what_it_means(said: str, kind: type[StoreError], message: str) -> None:
    error = Daemon("tcp://box", "uuid")._explain(CommandFailed(["docker"], 1, "ended with status 1", said))

    assert isinstance(error, kind)
    assert message in str(error)
    assert isinstance(error, CommandFailed) or "tcp://box" in str(error)


def test_both_systems_have_the_same_parts() -> None:
    def parts(system: object) -> set[str]:
        return {name for name in dir(system) if not name.startswith("_")}

    assert parts(Linux()) == parts(Windows())


def test_no_mount_of_a_volume_fills_it_from_the_image() -> None:
    assert "volume-nocopy" in mount("name", "/x")[1]

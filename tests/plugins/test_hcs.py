"""The backend `hcs`: what is its own. What every backend must do is in test_hcs_conformance.py."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import pytest

import storebackends
import storebackends_hcs
from storebackends import Store, Workspace, mounts, process
from storebackends.backend import Backend, Command
from storebackends.errors import Busy, NotFound, NotSupported, StoreError
from storebackends_hcs import HcsOptions, probe
from storebackends_hcs._windows import WindowsHost, windows_spec
from storebackends_hcs.ctr import Mount, parse_mounts
from storebackends_hcs.driver import HcsBackend
from tests.capabilities import MIB, needs
from tests.containerd import Daemon, archive, left, running
from tests.standins import stand_in
from tests.stores import files, writes

SNAPSHOTTERS = [
    pytest.param("overlayfs", marks=needs("overlay")),
    "native",
    pytest.param("btrfs", marks=needs("btrfs")),
]
every_snapshotter = pytest.mark.parametrize("snapshotter", SNAPSHOTTERS)
on_linux = [needs("containerd", "overlay"), pytest.mark.slow]


def opened(root: Path, snapshotter: str = "overlayfs", **options: Any) -> Store:
    return storebackends.open_store(backend="hcs", path=root, durability="none", snapshotter=snapshotter, **options)


def reads(store: Store, id: str) -> dict[str, str]:
    with store.use(id) as result:
        return files(result.path)


# What is announced, and what is read of ctr. Needs no daemon.


def test_one_driver_answers_to_both_names() -> None:
    specs = storebackends_hcs.storebackends_backends()

    assert [spec.name for spec in specs] == ["hcs", "containerd"]
    assert {spec.factory for spec in specs} == {f"{HcsBackend.__module__}:{HcsBackend.__name__}"}
    assert all(spec.options is HcsOptions for spec in specs)


@pytest.mark.parametrize("options", [{"namespace": ""}, {"namespace": "a b"}, {"snapshotter": "-x"}, {"adress": "/x"}])
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        HcsOptions.model_validate(options)


def test_a_missing_ctr_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    support = probe(tmp_path)

    assert not support.usable
    assert support.fix


OVERLAY = b"""[{"Options": ["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"],
                  "Source": "overlay", "Type": "overlay"}]"""
LAYER = rb"""[{"Type": "windows-layer", "Source": "C:\\ProgramData\\containerd\\snapshots\\3", "Target": "",
               "Options": ["rw", "parentLayerPaths=[\"C:\\\\snapshots\\\\2\",\"C:\\\\snapshots\\\\1\"]"]}]"""


def test_mounts_are_read_in_every_spelling() -> None:
    (overlay,) = parse_mounts(OVERLAY)
    (bind,) = parse_mounts(b'[{"type": "bind", "source": "/x", "options": null}]')

    assert (overlay.kind, overlay.layers, overlay.values("upperdir")) == ("overlay", 2, ["/s/3/fs"])
    assert bind == Mount("bind", "/x", ())
    assert bind.layers == 0


def test_the_layers_of_windows_are_read_with_their_parents() -> None:
    (layer,) = parse_mounts(LAYER)

    assert layer.source == "C:\\ProgramData\\containerd\\snapshots\\3"
    assert layer.parents == ["C:\\snapshots\\2", "C:\\snapshots\\1"]


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'[{"Type": "bind"}]', b"[1]", b"mount -t overlay"])
def test_what_are_no_mounts_is_an_error_that_shows_it(text: bytes) -> None:
    with pytest.raises(StoreError, match="ctr"):
        parse_mounts(text)


def test_a_windows_container_gets_the_layers_lowest_last_but_for_its_own() -> None:
    (layer,) = parse_mounts(LAYER)
    wanted = Command(["cmd", "/c", "dir"], {"A": "1", "HOME": "/host"}, None)

    spec = windows_spec(layer, wanted, "C:\\src")

    assert spec["windows"] == {"layerFolders": [*layer.parents, layer.source], "ignoreFlushesDuringBoot": True}
    assert spec["process"] == {
        "args": ["cmd", "/c", "dir"],
        "cwd": "C:\\src",
        "env": ["A=1"],
        "user": {"username": "ContainerAdministrator"},
    }


CTR = """\
import sys
with open({calls!r}, "a") as calls:
    print(*sys.argv[1:], file=calls)
if "prepare" in sys.argv:
    print({answer!r})
"""


class OnWindows(HcsBackend):
    host = WindowsHost


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HcsBackend:
    """The driver as it is on Windows, with a ctr that answers as one there and notes what it was asked."""
    stand_in(tmp_path / "bin", "ctr", CTR.format(calls=str(tmp_path / "calls"), answer=LAYER.decode()), monkeypatch)
    (tmp_path / "store").mkdir()
    backend = OnWindows(tmp_path / "store", HcsOptions(snapshotter="windows"), "uuid")
    backend.open()
    return backend


def test_on_windows_a_step_is_prepared_run_in_a_container_and_committed(windows: HcsBackend, tmp_path: Path) -> None:
    entry = windows.build("id", None, "a1")
    with pytest.raises(NotSupported):
        windows.tree(entry)
    command = windows.command(entry, ["cmd", "/c", "dir"], {"A": "1"}, "src/deep")
    config = json.loads((entry.folder / "container.json").read_text())
    windows.rename("id")

    assert command.argv[-5:] == ["run", "--rm", "--config", str(entry.folder / "container.json"), "storebackends-a1"]
    assert config["process"]["cwd"] == "C:\\src\\deep"
    assert config["windows"]["layerFolders"][-1] == "C:\\ProgramData\\containerd\\snapshots\\3"
    calls = [line.partition("--snapshotter windows ")[2] for line in (tmp_path / "calls").read_text().splitlines()]
    key = "storebackends-uuid-a1"
    assert calls == [f"prepare --mounts {key}", f"commit {key}-committed {key}"]


@pytest.mark.parametrize("cwd", ["..", "a/../..", "/x", "\\x", "C:\\x", ""])
def test_on_windows_no_program_runs_outside_of_the_tree(windows: HcsBackend, cwd: str) -> None:
    entry = windows.build("id", None, "a1")

    if cwd:
        with pytest.raises(StoreError, match="no path inside"):
            windows.command(entry, ["cmd"], {}, cwd)


# On a real daemon.


class TestHcs:
    pytestmark = on_linux

    @pytest.fixture
    def root(self, tmp_path: Path, containerd: Daemon) -> Iterator[Path]:
        yield tmp_path / "store"
        mounts.unmount(tmp_path)

    @every_snapshotter
    def test_a_step_is_two_calls_of_ctr_and_a_hit_none(self, root: Path, snapshotter: str) -> None:
        with opened(root, snapshotter) as store:
            store.build("base", writes(a="1")).release()
            before = process.started

            store.build("child", writes(b="2"), base="base").release()
            step = process.started - before
            store.build("child", writes(b="2"), base="base").release()

            assert step == 2
            assert process.started - before == 2
            assert reads(store, "child") == {"a": "1", "b": "2"}

    def test_programs_run_in_the_tree(self, root: Path) -> None:
        def fn(work: Workspace) -> None:
            work.run(["sh", "-c", "pwd >where; mkdir deep"])
            work.run(["sh", "-c", "echo here >file"], cwd="deep")
            assert work.path.joinpath("where").read_text() == f"{work.path}\n"

        with opened(root) as store:
            store.build("id", fn).release()

            assert reads(store, "id")["deep/file"] == "here\n"

    @every_snapshotter
    def test_a_forced_collection_takes_nothing(self, root: Path, containerd: Daemon, snapshotter: str) -> None:
        with opened(root, snapshotter) as store:
            store.build("base", writes(a="1")).release()

            def fn(work: Workspace) -> None:
                containerd.collect()
                (work.path / "b").write_text("2")

            with store.build("child", fn, base="base") as child, store.cache("cache") as cache:
                tree = child.path
                containerd.collect()
                assert files(tree) == {"a": "1", "b": "2"}
                (cache / "c").write_text("3")
            containerd.collect()

            assert [reads(store, id) for id in ("base", "child")] == [{"a": "1"}, {"a": "1", "b": "2"}]
            with store.cache("cache") as cache:
                assert files(cache) == {"c": "3"}
        assert left(containerd, root, snapshotter) == []

    @every_snapshotter
    def test_a_child_that_the_collector_took_keeps_no_parent_for_ever(
        self, root: Path, containerd: Daemon, snapshotter: str
    ) -> None:
        """containerd's collector leaves the child's name with its parent, which then cannot be removed."""
        with opened(root, snapshotter) as store:
            store.build("base", writes(a="1")).release()
            store.build("child", writes(b="2"), base="base").release()
            (key,) = [key for key in containerd.snapshots(snapshotter) if key.endswith(_committed(store, "child"))]
            (parent,) = [key for key in containerd.snapshots(snapshotter) if key.endswith(_committed(store, "base"))]
            containerd.ctr("snapshots", "--snapshotter", snapshotter, "label", key, "containerd.io/gc.root=")
            containerd.collect()
            with pytest.raises(OSError, match="with child"):
                containerd.ctr("snapshots", "--snapshotter", snapshotter, "rm", parent)

            store.delete("child")
            store.delete("base")

        assert parent not in containerd.snapshots(snapshotter)
        assert left(containerd, root, snapshotter) == []

    def test_what_is_deleted_before_what_is_made_of_it_goes_with_that(self, root: Path, containerd: Daemon) -> None:
        """So an open that drops results in any order gets rid of all."""
        with opened(root) as store:
            backend = _backend(store)
            for id, base in (("a", None), ("b", "a"), ("c", "b")):
                store.build(id, writes(**{id: id}), base=base).release()

            backend.delete("a")
            backend.delete("b")
            assert reads(store, "c") == {"a": "a", "b": "b", "c": "c"}
            assert len(os.listdir(root / "containerd" / "tombs")) == 2
            backend.sweep()
            assert reads(store, "c") == {"a": "a", "b": "b", "c": "c"}
            backend.delete("c")

            assert left(containerd, root) == []

    def test_a_tree_in_use_is_not_committed_and_its_holder_is_named(self, root: Path, containerd: Daemon) -> None:
        with opened(root) as store:
            holders: list[subprocess.Popen[bytes]] = []

            def fn(work: Workspace) -> None:
                holders.append(subprocess.Popen(["sleep", "600"], cwd=work.path))

            try:
                with pytest.raises(Busy) as caught:
                    store.build("id", fn)
            finally:
                holders[0].kill()
                holders[0].wait()

            assert f"pid {holders[0].pid} (sleep)" in caught.value.holders[0]
            assert store.result("id") is None
            assert len([key for key in left(containerd, root) if key.startswith("snapshot")]) == 1
        opened(root).close()
        assert left(containerd, root) == []

    def test_a_tree_that_is_mounted_elsewhere_too_is_not_committed(self, root: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        with opened(root) as store:
            with pytest.raises(Busy, match=str(other)):
                store.build("id", lambda work: mounts.mount("bind", str(work.path), other, ["bind"]))

            assert store.result("id") is None
            mounts.unmount(other)

    def test_a_tree_that_was_unmounted_under_its_build_is_not_published(self, root: Path, containerd: Daemon) -> None:
        def fn(work: Workspace) -> None:
            mounts.unmount(work.path)
            (work.path / "beside").touch()

        with opened(root) as store:
            with pytest.raises(storebackends.BuildFailed, match="somebody unmounted"):
                store.build("id", fn)

            assert left(containerd, root) == []

    def test_a_build_deeper_than_an_overlay_goes_gets_a_copy(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("storebackends_hcs.driver.LAYERS", 3)
        with opened(root) as store:
            base = None
            for number in range(8):
                store.build(f"step-{number}", writes(**{f"f{number}": str(number)}), base=base).release()
                base = f"step-{number}"

            assert reads(store, "step-7") == {f"f{number}": str(number) for number in range(8)}
            parents = [_tree(store, f"step-{number}")["parent"] for number in range(8)]
            assert [number for number, parent in enumerate(parents) if parent is None] == [0, 4]

    def test_an_edit_of_the_roots_own_folder_is_kept(self, root: Path) -> None:
        def fn(work: Workspace) -> None:
            work.path.chmod(0o2750)
            os.chown(work.path, 12, 34)
            os.setxattr(work.path, "user.mark", b"here")
            os.utime(work.path, ns=(1, 1_234_567_891))

        with opened(root) as store:
            store.build("base", fn).release()
            store.build("child", lambda work: None, base="base").release()

            for id in ("base", "child"):
                with store.use(id) as result:
                    status = result.path.stat()
                    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (12, 34, 0o2750)
                    assert status.st_mtime_ns == 1_234_567_891
                    assert os.getxattr(result.path, "user.mark") == b"here"

    def test_all_who_read_a_result_share_a_mount_that_ends_with_the_last(self, root: Path) -> None:
        with opened(root) as store:
            store.build("id", writes(a="1")).release()

            with store.use("id") as one:
                with store.use("id") as other:
                    assert one.path == other.path
                assert files(one.path) == {"a": "1"}
                assert len(mounts.below(root)) == 1

            assert mounts.below(root) == []

    def test_what_a_live_process_reads_survives_another_open_and_goes_when_it_is_killed(
        self, root: Path, containerd: Daemon
    ) -> None:
        with opened(root) as store:
            store.build("id", writes(a="1")).release()

        reader = _Child(lambda: _hold(root))
        reader.said()
        opened(root).close()
        assert len(mounts.below(root)) == 1
        reader.kill()
        opened(root).close()

        assert left(containerd, root) == []

    def test_a_forked_child_ends_no_view_of_its_parent(self, root: Path) -> None:
        with opened(root) as store:
            store.build("id", writes(a="1")).release()
            with store.use("id") as result:
                path = result.path

                child = _Child(result.release)
                child.said()
                child.ended()

                assert files(path) == {"a": "1"}

    # Other people's.

    def test_stores_and_users_of_one_daemon_leave_each_other_alone(self, root: Path, containerd: Daemon) -> None:
        containerd.ctr("snapshots", "--snapshotter", "overlayfs", "prepare", "storebackends-of-a-user")
        with opened(root) as store, opened(root.with_name("other")) as other:
            for one in (store, other):
                one.build("id", writes(a=one.root.name)).release()
            orphan = _backend(other)._keys.active("0123")
            containerd.ctr("snapshots", "--snapshotter", "overlayfs", "prepare", orphan)

            opened(root).close()
            assert store.fsck(repair=True).findings == ()
            assert orphan in containerd.snapshots("overlayfs")
            (finding,) = other.fsck(repair=True).findings
            assert (finding.kind, finding.what, finding.repaired) == ("outside", orphan, True)
            store.delete("id")

            assert reads(other, "id") == {"a": "other"}
            assert orphan not in containerd.snapshots("overlayfs")
        assert "storebackends-of-a-user" in containerd.snapshots("overlayfs")
        containerd.ctr("snapshots", "--snapshotter", "overlayfs", "rm", "storebackends-of-a-user")

    def test_a_store_keeps_its_namespace_and_snapshotter(self, root: Path) -> None:
        opened(root, namespace="mine").close()

        for options in ({"namespace": "other"}, {"namespace": "mine", "snapshotter": "native"}):
            with pytest.raises(NotSupported, match="its trees are in"):
                opened(root, **options)
        opened(root, namespace="mine").close()

    # What goes wrong.

    def test_a_snapshot_that_was_removed_behind_our_back_is_told_and_the_rest_works(
        self, root: Path, containerd: Daemon
    ) -> None:
        with opened(root) as store:
            store.build("base", writes(a="1")).release()
            key = next(key for key in containerd.snapshots("overlayfs") if key.endswith(_committed(store, "base")))
            containerd.ctr("snapshots", "--snapshotter", "overlayfs", "rm", key)

            with pytest.raises(NotFound, match="removed from containerd"):
                reads(store, "base")
            with pytest.raises(StoreError, match="removed from containerd"):
                store.build("child", writes(b="2"), base="base")
            with pytest.raises(NotFound, match="removed from containerd"):
                store.size("base")
            (finding,) = [finding for finding in store.fsck(repair=True).findings if finding.kind == "tree"]
            assert (finding.what, finding.repaired) == ("base", True)

            with store.build("base", writes(a="2")) as built:
                assert built.outcome == "built"
            assert reads(store, "base") == {"a": "2"}

    def test_an_unknown_snapshotter_is_explained(self, root: Path) -> None:
        with pytest.raises(NotSupported, match="plugins ls"):
            opened(root, "nosuch")

    def test_a_daemon_that_is_not_there_is_explained(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storebackends_hcs, "CONNECT", "1s")
        with pytest.raises(StoreError, match="does not answer at /nowhere/socket: start it"):
            opened(root, address="/nowhere/socket")

    def test_a_store_outlives_its_daemon(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storebackends_hcs, "CONNECT", "2s")
        with running(tmp_path, 256 * MIB) as daemon, opened(tmp_path / "store", address=daemon.address) as store:
            store.build("base", writes(a="1")).release()
            for how in (signal.SIGTERM, signal.SIGKILL):

                def fn(work: Workspace, how: signal.Signals = how) -> None:
                    (work.path / "b").write_text("2")
                    daemon.stop(how)

                with pytest.raises(StoreError, match="does not answer"):
                    store.build("child", fn, base="base")
                with pytest.raises(StoreError, match="does not answer"):
                    opened(tmp_path / "store", address=daemon.address)
                assert store.result("child") is None
                daemon.start()

                assert reads(store, "base") == {"a": "1"}
                opened(tmp_path / "store", address=daemon.address).close()
                assert left(daemon, tmp_path / "store") == []
            store.build("child", writes(b="2"), base="base").release()
            assert reads(store, "child") == {"a": "1", "b": "2"}

    def test_a_daemon_whose_disk_is_full_fails_builds_and_the_store_works_again(self, tmp_path: Path) -> None:
        with running(tmp_path, 64 * MIB) as daemon, opened(tmp_path / "store", address=daemon.address) as store:
            store.build("base", writes(a="1")).release()

            def fill(work: Workspace) -> None:
                with (work.path / "large").open("wb") as file:
                    while True:
                        file.write(bytes(MIB))

            with pytest.raises(storebackends.BuildFailed, match="No space"):
                store.build("large", fill, base="base")
            assert left(daemon, tmp_path / "store") == []
            assert store.usage().free < 64 * MIB

            store.build("small", writes(b="2"), base="base").release()
            assert reads(store, "small") == {"a": "1", "b": "2"}

    # Images.

    @every_snapshotter
    def test_a_tree_starts_from_an_archive_of_which_nothing_else_stays(
        self, root: Path, tmp_path: Path, containerd: Daemon, snapshotter: str
    ) -> None:
        image = archive(tmp_path / "image.tar", [{"a": b"1", "both": b"old"}, {"b": b"2", "both": b"new"}])
        with opened(root, snapshotter) as store:
            store.build("image", lambda work: work.import_image(str(image))).release()
            store.build("child", writes(c="3"), base="image").release()
            assert reads(store, "image") == {"a": "1", "b": "2", "both": "new"}
            assert containerd.ctr("images", "ls", "-q") == ""

            containerd.collect()
            assert reads(store, "child") == {"a": "1", "b": "2", "both": "new", "c": "3"}
            store.delete("image", recursive=True)

        containerd.collect()
        assert [key for key in containerd.snapshots(snapshotter) if key.startswith("sha256:")] == []
        assert left(containerd, root, snapshotter) == []

    def test_what_is_no_image_is_told_and_leaves_nothing(self, root: Path, tmp_path: Path, containerd: Daemon) -> None:
        (tmp_path / "text").write_text("no image")
        with opened(root) as store:
            for image in (tmp_path / "text", Path("no/such:image")):
                with pytest.raises(storebackends.BuildFailed, match="image|tar"):
                    store.build("id", partial(_imports, image))

            assert left(containerd, root) == []
            assert containerd.ctr("images", "ls", "-q") == ""

    # Kills.

    @every_snapshotter
    def test_what_killed_processes_leave_is_gone_after_the_next_open(
        self, root: Path, containerd: Daemon, rng: random.Random, snapshotter: str
    ) -> None:
        _kill(root, containerd, rng, snapshotter, 4 if snapshotter == "overlayfs" else 3)

    @pytest.mark.soak
    @every_snapshotter
    def test_50_kills(self, root: Path, containerd: Daemon, rng: random.Random, snapshotter: str) -> None:
        _kill(root, containerd, rng, snapshotter, 50)


def _kill(root: Path, containerd: Daemon, rng: random.Random, snapshotter: str, kills: int) -> None:
    """Kill a process that does all that makes snapshots, again and again: the next open leaves what is whole only."""
    with opened(root.with_name("other"), snapshotter) as other, opened(root, snapshotter) as first:
        other.build("id", writes(a="1")).release()
        first.build("base", writes(base="base")).release()
        mine = set(containerd.snapshots(snapshotter))
        for number in range(kills):
            child = _Child(partial(_work, root, snapshotter, rng.getrandbits(32)))
            child.said()
            threading.Event().wait(rng.uniform(0, 0.7))
            child.kill()

            with opened(root, snapshotter) as store:
                assert left(containerd, root, snapshotter) == [], f"after kill {number}"
                assert os.listdir(root / "trash") == []
                for id in store.ids():
                    assert reads(store, id) == {"base": "base", **({id: id} if id != "base" else {})}
        assert reads(other, "id") == {"a": "1"}
        assert mine <= set(containerd.snapshots(snapshotter))


def _work(root: Path, snapshotter: str, seed: int) -> None:
    rng = random.Random(seed)
    with opened(root, snapshotter) as store:
        _tell()
        while True:
            id = rng.choice("abc")
            with store.build(id, writes(**{id: id}), base="base") as built:
                files(built.path)
            with store.cache("cache") as cache:
                (cache / id).touch()
            store.delete(id)


def _hold(root: Path) -> None:
    with opened(root) as store, store.use("id") as result:
        files(result.path)
        _tell()
        signal.pause()


_telling: list[int] = []


def _tell() -> None:
    os.write(_telling[0], b"!")


class _Child:
    """A forked process that does something. It says when it has come so far, or ends."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            _telling[:] = [writing]
            status = 1
            try:
                action()
                _tell()
                status = 0
            except BaseException:  # noqa: BLE001 (nothing may reach the tests' own frames)
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writing)

    def said(self) -> None:
        assert os.read(self._reading, 1) == b"!", "it failed; its traceback is above"

    def ended(self) -> None:
        os.close(self._reading)
        assert os.waitpid(self._pid, 0)[1] == 0

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._reading)
        os.waitpid(self._pid, 0)


def _imports(image: Path, work: Workspace) -> None:
    work.import_image(str(image))


def _backend(store: Store) -> HcsBackend:
    backend: Backend = store._backend
    assert isinstance(backend, HcsBackend)
    return backend


def _tree(store: Store, id: str) -> dict[str, str | None]:
    tree: dict[str, str | None] = json.loads((store.root / "result" / id / "tree.json").read_bytes())
    return tree


def _committed(store: Store, id: str) -> str:
    return f"-{_tree(store, id)['nonce']}-committed"

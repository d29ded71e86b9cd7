"""The backend `overlay`: its layers and mounts. What every backend must do is in test_overlay_conformance.py."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pydantic
import pytest

import storebackends
from storebackends import BuildFailed, NotFound, NotSupported, Store, StoreError, Workspace, mounts, process
from storebackends.backend import Capability
from storebackends.ids import new_attempt
from storebackends.testing.fidelity import _Edits
from storebackends.testing.harness import contents, publish, write
from storebackends.testing.kills import die, killed_inside
from storebackends.testing.trees import make_rich, snapshot
from storebackends_overlay import OverlayOptions, probe
from tests import capabilities
from tests.capabilities import needs, run
from tests.stores import files, kept, left_in_progress, writes

if sys.platform != "linux":
    pytest.skip("needs overlays, which are Linux's", allow_module_level=True)
from storebackends_overlay import mounting
from storebackends_overlay.driver import OverlayBackend

Mounted = Callable[..., AbstractContextManager[Path]]
WAYS = ["descriptors", "paths", "mount(2)"]


@pytest.fixture
def disk(small_tmpfs: Mounted) -> Iterator[Path]:
    """Memory of its own: that of the temporary folder may be an overlay itself."""
    capabilities.require("overlay")
    with small_tmpfs(size=64 << 20) as folder:
        yield folder


@pytest.fixture
def store(disk: Path) -> Iterator[Store]:
    with opened(disk / "store") as store:
        yield store


@pytest.fixture
def backend(disk: Path) -> Iterator[OverlayBackend]:
    (disk / "store").mkdir()
    with ExitStack() as held:
        yield bare(disk / "store", held)


def opened(root: Path, **options: Any) -> Store:
    return storebackends.open_store(backend="overlay", path=root, durability="none", **options)


def bare(root: Path, held: ExitStack, **options: Any) -> OverlayBackend:
    backend = OverlayBackend(root, OverlayOptions.model_validate(options), "uuid")
    backend.open()
    held.callback(backend.close)
    return backend


def tree_of(backend: OverlayBackend, id: str, base: str | None = None) -> Path:
    return backend.tree(backend.build(id, base, new_attempt()))


def points(folder: Path) -> list[str]:
    """What is mounted below a folder."""
    return [found.path for found in mounts.below(folder) if found.path != str(folder)]


def _mark(path: Path, name: str, value: bytes) -> None:
    """Set an attribute that looks like a mark of overlayfs, where the kernel lets one: Linux 6.7 and newer."""
    try:
        os.setxattr(path, f"trusted.overlay.{name}", value)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise


# What it needs.


def test_it_works_where_overlays_can_be_mounted_and_is_never_chosen_unasked(disk: Path) -> None:
    support = probe(disk / "not" / "yet")

    assert (support.usable, support.rank) == (True, 0)
    assert os.listdir(disk) == []


def test_on_an_overlay_there_is_none_and_it_is_said_where(disk: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (disk / name).mkdir()
    lower, upper, work, merged = (str(disk / name) for name in ("lower", "upper", "work", "merged"))
    mounting.mount(merged, [lower], upper, work)
    try:
        support = probe(Path(merged))
        with pytest.raises(NotSupported, match="tmpfs"):
            opened(Path(merged, "store"))
    finally:
        mounts.unmount(merged)

    assert not support.usable
    assert "ext4, XFS, btrfs or tmpfs" in support.fix


@needs("unprivileged")
def test_a_user_who_may_not_mount_is_told_what_would_help(tmp_path: Path) -> None:
    support = probe(tmp_path)

    assert not support.usable
    assert "unshare --user --map-root-user --mount" in support.fix
    with pytest.raises(NotSupported, match="unshare"):
        opened(tmp_path / "store")


@pytest.mark.parametrize("options", [{"depth": 0}, {"depth": 151}, {"depth": "9"}, {"deep": 1}])
def test_a_wrong_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        OverlayOptions.model_validate(options)


@pytest.mark.parametrize("way", WAYS)
def test_kernels_that_take_layers_in_another_way_serve_as_well(
    disk: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(mounting, "way", lambda: way)
    with opened(disk / "store", depth=150) as store:
        store.build("0", writes(a="1", b="1")).release()
        for number in range(1, 155):
            store.build(str(number), writes(**{f"f{number}": "x"}), base=str(number - 1)).release()
        store.build("end", lambda work: (work.path / "a").unlink(), base="154").release()

        with kept(store, "end") as result:
            assert files(result.path) == {"b": "1"} | {f"f{number}": "x" for number in range(1, 155)}
            with pytest.raises(OSError, match="Read-only"):
                (result.path / "b").write_text("2")
    assert points(disk) == []


def test_more_layers_than_a_page_takes_are_refused_with_the_way_out(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounting, "way", lambda: "mount(2)")
    (disk / "point").mkdir()

    with pytest.raises(OSError, match="lower depth"):
        mounting.mount(str(disk / "point"), [str(disk)] * 400)

    assert points(disk) == []


# Layers.


def test_what_is_removed_replaced_or_renamed_stays_so_in_all_that_is_built_on_it(store: Store) -> None:
    def base(work: Workspace) -> None:
        write(work.path, {"gone": b"1", "opaque/old": b"1", "moved/deep/file": b"1", "kept": b"1"})
        os.setxattr(work.path / "kept", "user.note", b"base")

    def change(work: Workspace) -> None:
        (work.path / "gone").unlink()
        shutil.rmtree(work.path / "opaque")
        write(work.path, {"opaque/new": b"2"})
        os.rename(work.path / "moved", work.path / "to")
        os.setxattr(work.path / "kept", "user.note", b"changed")

    store.build("base", base).release()
    store.build("changed", change, base="base").release()
    store.build("child", lambda work: write(work.path, {"to/more": b"3"}), base="changed").release()
    with kept(store, "child") as result, kept(store, "base") as first:
        assert contents(result.path) == {"opaque/new": b"2", "to/deep/file": b"1", "kept": b"1", "to/more": b"3"}
        assert os.getxattr(result.path / "kept", "user.note") == b"changed"
        assert contents(first.path) == {"gone": b"1", "opaque/old": b"1", "moved/deep/file": b"1", "kept": b"1"}
        assert os.getxattr(first.path / "kept", "user.note") == b"base"


@pytest.mark.slow
def test_a_chain_of_600_builds_equals_their_edits_replayed_on_one_folder(disk: Path, rng: random.Random) -> None:
    flat = disk / "flat"
    flat.mkdir(0o755)
    with ExitStack() as held:
        (disk / "store").mkdir()
        backend = bare(disk / "store", held)
        compared = backend.capabilities - {Capability.NS_MTIME}  # those of two different moments
        edits, base = _Edits(rng, compared), None
        for number in range(600):
            edits.apply(flat, tree_of(backend, str(number), base))
            backend.rename(str(number))
            base = str(number)
            if number % 100 == 50 or number == 599:
                with backend.view(base) as tree:
                    assert snapshot(tree, compared) == snapshot(flat, compared), number

        depths = [
            len(json.loads((disk / "store/result" / str(n) / "tree.json").read_text())["layers"]) for n in range(600)
        ]
        assert max(depths) == 101
        assert depths.count(1) == 6  # the first, and one in 101 thereafter, which began with a copy


def test_a_tree_that_is_copied_into_one_layer_keeps_all_that_was_in_the_others(disk: Path) -> None:
    with ExitStack() as held:
        (disk / "store").mkdir()
        backend = bare(disk / "store", held, depth=1)
        make_rich(tree_of(backend, "base"), backend.capabilities)
        backend.rename("base")
        tree = tree_of(backend, "child", "base")
        shutil.rmtree(tree / "shapes")
        _mark(tree / "names", "opaque", b"y")
        made = snapshot(tree, backend.capabilities)
        backend.rename("child")

        tree = tree_of(backend, "flat", "child")
        assert snapshot(tree, backend.capabilities) == made
        backend.rename("flat")
        backend.delete("child")
        backend.delete("base")

        with backend.view("flat") as tree:
            assert snapshot(tree, backend.capabilities) == made


def test_an_edit_of_one_of_a_files_names_leaves_the_others_as_they_were(store: Store) -> None:
    def base(work: Workspace) -> None:
        write(work.path, {"one": b"old"})
        os.link(work.path / "one", work.path / "two")

    assert Capability.LINKED not in store.capabilities
    store.build("base", base).release()
    with store.build("child", lambda work: (work.path / "one").write_bytes(b"new"), base="base") as result:
        assert contents(result.path) == {"one": b"new", "two": b"old"}


def test_a_layer_of_another_attempt_is_never_taken_for_the_one_that_was_built_on(backend: OverlayBackend) -> None:
    first = backend.build("base", None, "a1").attempt
    backend.rename("base")
    publish(backend, "child", {"file": b""}, base="base")
    backend.delete("base")
    publish(backend, "base", {"other": b""})

    with pytest.raises(NotFound, match=f"attempt {first} at 'base'"), backend.view("child"):
        pytest.fail("it was shown")
    with pytest.raises(NotFound, match=f"attempt {first} at 'base'"):
        backend.build("grandchild", "child", new_attempt())


@pytest.mark.parametrize(("damaged", "found"), [("result/base", "child"), ("result/base/tree.json", "base")])
def test_fsck_takes_a_result_out_of_the_way_whose_layers_are_gone(store: Store, damaged: str, found: str) -> None:
    store.build("base", writes(f="1")).release()
    store.build("child", writes(g="1"), base="base").release()
    if (path := store.root / damaged).is_dir():
        shutil.rmtree(path)
    else:
        path.write_text('{"layers": [["ba')

    findings = store.fsck(repair=True).findings

    assert ("tree", found, True) in [(one.kind, one.what, one.repaired) for one in findings]
    assert list(store.ids()) == []
    store.build("base", writes(f="2")).release()


@needs("overlay", "xfs", "ext4")
def test_sizes_are_those_of_the_layer_and_exact_where_no_block_is_shared(loop_fs: Mounted) -> None:
    for kind, exact in (("ext4", True), ("xfs", False)):
        with loop_fs(kind) as folder, opened(folder / "store") as store:
            store.build("base", writes(f="x" * 1_000_000)).release()
            store.build("child", writes(g="x"), base="base").release()

            assert store.size("base").bytes >= 1_000_000
            assert store.size("child").bytes < 100_000
            assert store.size("child").exact is exact


# Hostile builds.


@pytest.mark.parametrize("base", [None, "base"])
def test_no_build_can_give_its_layer_marks_that_hide_or_move_files_in_others(store: Store, base: str | None) -> None:
    def hostile(work: Workspace) -> None:
        write(work.path, {"folder/own": b"1"})
        for name, value in [("opaque", b"y"), ("redirect", b"/other"), ("metacopy", b""), ("whiteout", b"")]:
            for folder in ("folder", "."):
                _mark(work.path / folder, name, value)
        with pytest.raises(PermissionError):
            os.mknod(work.path / "folder" / "whiteout", stat.S_IFCHR | 0o600, 0)

    store.build("base", lambda work: write(work.path, {"folder/file": b"1", "other/file": b"2"})).release()
    store.build("hostile", hostile, base=base).release()
    below = {"folder/file": b"1", "other/file": b"2"} if base else {}
    with store.build("child", writes(), base="hostile") as child:
        assert contents(child.path) == {"folder/own": b"1"} | below


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_build_mounts_in_its_tree_is_undone_and_nothing_outside_is_touched(
    disk: Path, store: Store, fails: bool
) -> None:
    write(disk, {"precious/file": b"1"})

    def function(work: Workspace) -> None:
        for name in ("a b", "a b/new\nline", "bind"):
            (work.path / name).mkdir()
            run(
                "mount",
                *(["--bind", disk / "precious"] if name == "bind" else ["-t", "tmpfs", "tmpfs"]),
                work.path / name,
            )
        run("mount", "-t", "tmpfs", "tmpfs", work.path)  # over all of it
        (work.path / "hidden").touch()
        if fails:
            raise ValueError("meant to fail")

    if fails:
        with pytest.raises(BuildFailed, match="meant to fail"):
            store.build("id", function)
    else:
        with store.build("id", function) as result:
            assert files(result.path) == {}
            assert sorted(os.listdir(result.path)) == ["a b", "bind"]

    assert points(disk) == []
    assert files(disk / "precious") == {"file": "1"}
    assert left_in_progress(store.root) == []


def test_a_tree_that_somebody_unmounts_while_it_is_built_is_not_published(disk: Path, store: Store) -> None:
    def function(work: Workspace) -> None:
        (work.path / "early").touch()
        run("umount", work.path)
        (work.path / "late").touch()

    with pytest.raises(BuildFailed, match="somebody unmounted its tree"):
        store.build("id", function)

    assert os.listdir(store.root / "overlay" / "mounts") == []
    with store.build("id", writes(f="1")) as result:
        assert files(result.path) == {"f": "1"}


def test_a_tree_in_which_a_mount_is_in_use_is_not_published_and_it_is_said_where(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "_PATIENCE", 2)
    with ExitStack() as held:

        def function(work: Workspace) -> None:
            (work.path / "mnt").mkdir()
            run("mount", "-t", "tmpfs", "tmpfs", work.path / "mnt")
            held.enter_context((work.path / "mnt" / "file").open("wb"))

        with pytest.raises(BuildFailed, match="/mnt keeps it in use"):
            store.build("id", function)

        assert points(store.root) == []
        assert left_in_progress(store.root) == []


def test_a_link_in_the_place_of_a_folder_does_not_lead_to_another_mount(disk: Path) -> None:
    for name in ("outside/mnt", "tree"):
        (disk / name).mkdir(parents=True)
    (disk / "tree" / "link").symlink_to("../outside")
    run("mount", "-t", "tmpfs", "tmpfs", disk / "outside" / "mnt")
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ENOTDIR)):
            mounts._unmount_at(str(disk / "tree"), ["link", "mnt"])
        assert points(disk) == [f"{disk}/outside/mnt"]
    finally:
        run("umount", disk / "outside" / "mnt")


def test_nothing_that_is_mounted_in_a_tree_spreads(disk: Path) -> None:
    run("mount", "--make-shared", disk)
    told: list[str] = []

    def function(work: Workspace) -> None:
        told.extend(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(work.path) in line)

    with opened(disk / "store") as store:
        store.build("id", function).release()

    assert len(told) == 1
    assert "shared:" not in told[0]


# Whoever is in the way.


def test_a_tree_that_is_still_open_elsewhere_is_not_published_and_it_is_said_by_whom(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "_PATIENCE", 2)
    with ExitStack() as held:

        def function(work: Workspace) -> None:
            # It leaves the group of the build's commands, as a daemon does.
            argv = [sys.executable, "-c", "print(flush=True); input()"]
            daemon = subprocess.Popen(
                argv, cwd=work.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            held.enter_context(daemon)
            assert daemon.stdout is not None
            daemon.stdout.readline()
            held.callback(daemon.kill)
            told.append(daemon.pid)

        told: list[int] = []
        with pytest.raises(BuildFailed, match="unmounted") as caught:
            store.build("id", function)

        assert f"pid {told[0]} (" in caught.value.reason
        assert store.result("id") is None
        assert left_in_progress(store.root) == []
        with store.build("id", writes(f="1")) as result:
            assert files(result.path) == {"f": "1"}


def test_a_file_that_the_function_itself_left_open_is_named_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_PATIENCE", 2)
    left = []

    def function(work: Workspace) -> None:
        left.append((work.path / "file").open("wb"))

    with pytest.raises(BuildFailed, match="this process"):
        store.build("id", function)
    left[0].close()

    assert points(store.root) == []


def test_nothing_is_left_of_what_overlayfs_needs_while_a_tree_is_written(store: Store) -> None:
    store.build("id", writes(f="1")).release()

    (upper,) = (store.root / "result" / "id").glob("upper~*")
    assert sorted(os.listdir(upper.parent)) == sorted(["build.json", "log", "tree.json", upper.name])


# Views.


def test_builds_and_views_start_no_program(store: Store) -> None:
    before = process.started
    store.build("base", writes(f="1")).release()

    with store.build("id", writes(g="1"), base="base") as result:
        assert files(result.path) == {"f": "1", "g": "1"}
    store.delete("base", recursive=True)

    assert process.started == before


def test_a_tree_is_mounted_once_for_all_who_look_at_it_and_until_the_last_goes(store: Store) -> None:
    store.build("id", writes(f="1")).release()
    assert points(store.root) == []

    first, second = kept(store, "id"), kept(store, "id")
    assert first.path == second.path
    assert points(store.root) == [str(first.path)]
    first.release()
    assert files(second.path) == {"f": "1"}
    del second
    gc.collect()

    assert points(store.root) == []


def test_views_end_with_the_store_though_somebody_works_in_them(store: Store) -> None:
    result = store.build("id", writes(f="1"))
    held = os.open(result.path, os.O_RDONLY)
    try:
        store.close()
        assert points(store.root) == []
        with pytest.raises(StoreError, match="released"):
            print(result.path)
    finally:
        os.close(held)


def test_a_view_that_the_collector_ends_in_the_midst_of_another_is_ended_after_it(store: Store) -> None:
    for id in ("a", "b"):
        store.build(id, writes(f=id)).release()
    views = store._backend._views  # type: ignore[attr-defined]
    result = kept(store, "a")
    assert result.path

    with views._entered():
        result.release()
        assert len(points(store.root)) == 1

    assert points(store.root) == []


def test_a_forked_child_leaves_its_parents_mounts_alone(store: Store) -> None:
    with store.build("id", writes(f="1")) as result:
        assert result.path
        backend = store._backend

        def child() -> None:
            result.release()
            store.close()
            backend.close()
            die()

        killed_inside(child)

        assert files(result.path) == {"f": "1"}


# The dead, and the living.


def _elsewhere(disk: Path, action: Callable[[Store], object]) -> None:
    """Open the store in another process, which is killed after *action*."""

    def process() -> None:
        action(opened(disk / "store"))
        die()

    killed_inside(process)


def test_what_a_killed_process_left_mounted_is_undone_and_what_others_use_stays(disk: Path, store: Store) -> None:
    store.build("id", writes(f="1")).release()

    def look_and_build(other: Store) -> None:
        with kept(other, "id") as result:
            assert files(result.path) == {"f": "1"}
            other.build("dead", lambda _: die())

    with kept(store, "id") as mine:
        seen = []

        def function(work: Workspace) -> None:
            path = mine.path
            _elsewhere(disk, look_and_build)
            assert len(points(disk)) == 4  # two views and two builds
            opened(disk / "store").close()
            assert sorted(points(disk)) == sorted([str(path), str(work.path)])
            (work.path / "file").write_text("still here")
            seen.append(files(path))

        with store.build("mine", function) as result:
            assert files(result.path) == {"file": "still here"}
        assert seen == [{"f": "1"}]
    assert points(disk) == []


def test_fsck_tells_of_mounts_of_the_dead_and_undoes_them(disk: Path, store: Store) -> None:
    store.build("id", writes(f="1")).release()

    def look(other: Store) -> None:
        with kept(other, "id") as result:
            assert files(result.path) == {"f": "1"}
            die()

    _elsewhere(disk, look)

    found = [finding for finding in store.fsck().findings if finding.kind == "outside"]
    assert len(found) == 1
    assert len(points(disk)) == 1
    assert [one.repaired for one in store.fsck(repair=True).findings] == [True]

    assert points(disk) == []
    assert store.fsck().findings == ()


def test_a_kill_at_any_system_call_of_a_mount_leaves_nothing_that_an_open_does_not_undo(
    disk: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.build("base", writes(f="1")).release()
    calls = 0

    class Dying:
        """The C library, until so many calls were made."""

        def __init__(self, library: Any, left: int) -> None:
            self._library, self._left = library, left

        def __getattr__(self, name: str) -> Any:
            if self._left == 0:
                die()
            self._left -= 1
            return getattr(self._library, name)

    def act(other: Store, after: int) -> None:
        library = Dying(mounting._libc, after)
        monkeypatch.setattr(mounting, "_libc", library)
        monkeypatch.setattr(mounts, "_libc", lambda: library)
        with other.build("id", writes(g="2"), base="base") as result:
            assert files(result.path) == {"f": "1", "g": "2"}
        (disk / "whole").touch()

    while not (disk / "whole").exists():
        _elsewhere(disk, lambda other, calls=calls: act(other, calls))  # type: ignore[misc]
        calls += 1
        with opened(disk / "store") as again:
            assert points(disk) == []
            assert left_in_progress(again.root) == []
            # A row of the index may outlive its builder: it is asked of the disk before it is believed.
            assert {finding.kind for finding in again.fsck().findings} <= {"index"}
            if result := again.result("id"):
                with result:
                    assert files(result.path) == {"f": "1", "g": "2"}
                again.delete("id")

    assert calls > 20


# Two classes of layers.


@needs("userns")
def test_a_store_keeps_to_the_attributes_that_its_layers_were_made_with(disk: Path) -> None:
    code = """
import sys
from storebackends import open_store
def change(work):
    (work.path / "gone").unlink()
with open_store(backend="overlay", path=sys.argv[1], durability="none") as store:
    store.build("base", lambda work: [(work.path / name).touch() for name in ("gone", "kept")]).release()
    with store.build("child", change, base="base") as result:
        print(*(path.name for path in result.path.iterdir()))
"""
    inside = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", code]

    assert run(*inside, disk / "store") == "kept\n"
    with opened(disk / "store") as store, kept(store, "child") as result:  # by root
        assert files(result.path) == {"kept": ""}
        store.build("more", lambda work: (work.path / "kept").unlink(), base="child").release()
        with kept(store, "more") as more:
            assert files(more.path) == {}
    assert run(*inside, disk / "store") == "kept\n"
    opened(disk / "roots").close()
    with pytest.raises(OSError, match="made by root"):
        run(*inside, disk / "roots")


def test_attributes_of_which_nothing_is_known_are_refused(disk: Path) -> None:
    opened(disk / "store").close()
    (disk / "store" / "overlay" / "attributes").write_text("")

    with pytest.raises(StoreError, match="neither privileged nor unprivileged"):
        opened(disk / "store")
    assert points(disk) == []

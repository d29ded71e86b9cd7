"""What is in a tree arrives in its clones, cases 16 to 19."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from storebackends.backend import Backend, Capability, Entry
from storebackends.store import Store
from storebackends.trees import remove

from . import trees
from .harness import Harness, contents, fill, filled, needs, publish, require, seen, shown
from .trees import FEATURES, ROOT_ONLY, Make, is_root, snapshot

CHAIN = 128


class Fidelity(Harness):
    """Cases 16 to 19."""

    @pytest.mark.parametrize("feature", FEATURES)
    def test_a_clone_keeps(self, backend: Backend, root: Path, feature: str) -> None:
        """Case 16, a kind of file at a time."""
        make, capability = FEATURES[feature]
        if capability is not None:
            require(capability in backend.capabilities, f"the capability {capability.value!r}")
        require(make not in ROOT_ONLY or is_root(), "root")

        self._carry(backend, root, make)

    def test_a_clone_keeps_all_of_it_together(self, backend: Backend, root: Path) -> None:
        """Case 16."""
        self._carry(backend, root, lambda tree: trees.make_rich(tree, backend.capabilities))

    @needs(Capability.SPARSE)
    def test_a_clone_keeps_a_file_larger_than_4_gib(self, backend: Backend, root: Path) -> None:
        """Case 16."""
        self._carry(backend, root, trees.huge)

    @needs(Capability.HOST_TREE, Capability.HARDLINKS)
    def test_hard_links_that_a_build_breaks_or_makes_are_published_as_they_are(self, backend: Backend) -> None:
        """Case 16: also where nothing but the links differs from the base."""
        base = backend.tree(filled(backend, "base", {"linked": b"1", "single": b"2"}))
        os.link(base / "linked", base / "to break")
        shutil.copy2(base / "single", base / "to link")
        backend.rename("base")
        tree = backend.tree(filled(backend, "child", {}, base="base"))

        (tree / "to break").unlink()
        shutil.copy2(tree / "linked", tree / "to break")
        (tree / "to link").unlink()
        os.link(tree / "single", tree / "to link")

        made = snapshot(tree, backend.capabilities)
        backend.rename("child")
        with backend.view("child") as tree:
            assert snapshot(tree, backend.capabilities) == made

    def test_a_socket_in_a_tree_is_no_obstacle(self, backend: Backend, root: Path) -> None:
        """Case 16: whether the clone has it is the backend's to say."""
        require(sys.platform == "linux", "mknod() of a socket")

        def make(tree: Path) -> None:
            (tree / "file").write_bytes(b"kept")
            if sys.platform == "linux":
                os.mknod(tree / "socket", stat.S_IFSOCK | 0o600)

        self._carry(backend, root, make)

    def _carry(self, backend: Backend, root: Path, make: Make) -> None:
        """Make a tree in a base, build on it, and see that it is there in every place and gone in the end."""
        base = filled(backend, "base", {})
        try:
            self._fill(backend, base, make)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise
            pytest.skip(f"needs a user and a file system that can make it: {error}")
        with seen(backend, base) as tree:
            made = snapshot(tree, backend.capabilities)

        backend.rename("base")
        child = filled(backend, "child", {}, base="base")

        with seen(backend, child) as tree:
            assert snapshot(tree, backend.capabilities) == made
        backend.rename("child")
        for id in ("child", "base"):
            with shown(backend, id) as tree:
                assert snapshot(tree, backend.capabilities) == made
        backend.delete("child")
        backend.delete("base")
        assert self.leftovers(root) == []

    def _fill(self, backend: Backend, entry: Entry, make: Make) -> None:
        """In the tree; or in a folder, to see that a copy of that is equal to it."""
        if Capability.HOST_TREE in backend.capabilities:
            make(backend.tree(entry))
            return
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            backend.copy_in(entry, Path(folder), ".")
            with seen(backend, entry) as tree:
                assert snapshot(tree, backend.capabilities) == snapshot(Path(folder), backend.capabilities)

    @needs(Capability.HOST_TREE)
    def test_a_chain_of_builds_equals_their_edits_replayed_on_one_folder(self, backend: Backend, area: Path) -> None:
        """Case 17."""
        seed = os.environ.get("STOREBACKENDS_SEED") or str(random.SystemRandom().getrandbits(32))
        print(f"STOREBACKENDS_SEED={seed} repeats this")  # noqa: T201 (shown where the case fails)
        # Times are those of two different moments, and so are not compared.
        compared = backend.capabilities - {Capability.NS_MTIME}
        edits = _Edits(random.Random(seed), compared)  # noqa: S311 (no secret)
        flat = area / "flat"
        flat.mkdir(0o755)

        base = None
        for number in range(CHAIN):
            entry = filled(backend, f"step-{number}", {}, base=base)
            assert number == 0 or snapshot(backend.tree(entry), compared) == snapshot(flat, compared)
            edits.apply(flat, backend.tree(entry))
            backend.rename(f"step-{number}")
            base = f"step-{number}"
            if number == CHAIN // 2:
                middle = snapshot(flat, compared)

        with backend.view(f"step-{CHAIN - 1}") as tree:
            assert snapshot(tree, compared) == snapshot(flat, compared)
        with backend.view(f"step-{CHAIN // 2}") as tree:
            assert snapshot(tree, compared) == middle

    @needs(Capability.HOST_TREE)
    def test_a_nested_volume_is_cloned_and_removed_with_its_tree(self, backend: Backend, root: Path) -> None:
        """Case 18."""
        base = filled(backend, "base", {"file": b"outside"})
        require(self.make_nested(backend.tree(base)), "nested volumes")
        (backend.tree(base) / "nested" / "file").write_bytes(b"inside")
        backend.rename("base")

        child = filled(backend, "child", {"nested/file": b"changed"}, base="base")

        with backend.view("base") as tree:
            assert contents(tree) == {"file": b"outside", "nested/file": b"inside"}
        assert contents(backend.tree(child)) == {"file": b"outside", "nested/file": b"changed"}
        backend.discard("child", child.attempt)
        backend.delete("base")
        assert self.leftovers(root) == []

    @needs(Capability.READONLY)
    def test_a_published_tree_refuses_every_change(self, backend: Backend) -> None:
        """Case 19."""
        publish(backend, "id", {"file": b"old", "folder/file": b"old"})

        with backend.view("id") as tree:
            before = snapshot(tree, backend.capabilities)
            for change in (
                lambda: (tree / "file").write_bytes(b"new"),
                lambda: (tree / "new").write_bytes(b"new"),
                lambda: (tree / "folder" / "file").unlink(),
                lambda: os.rename(tree / "file", tree / "moved"),
                lambda: (tree / "file").chmod(0o777),
                lambda: tree.chmod(0o700),
                lambda: os.utime(tree / "file", (1, 1)),
            ):
                with pytest.raises(OSError):
                    change()

            assert snapshot(tree, backend.capabilities) == before

    @needs(Capability.HOST_TREE)
    def test_no_later_build_or_deletion_writes_to_a_result(self, store: Store) -> None:
        """Case 19."""
        with store.build("base", lambda work: trees.make_rich(work.path, store.capabilities)) as base:
            before = snapshot(base.path, store.capabilities)

            store.build("child", fill(store, {"new": b"new"}), base="base").release()
            store.build("unchanged", fill(store, {}), base="base").release()
            store.build("grandchild", lambda work: _empty(work.path), base="child").release()
            store.delete("child", recursive=True)

            assert snapshot(base.path, store.capabilities) == before


class _Edits:
    """Random edits, the same for each tree. None is in place: what a clone of links may do in place is another case."""

    def __init__(self, rng: random.Random, capabilities: frozenset[Capability]) -> None:
        self._rng = rng
        self._kinds = [self._write, self._write, self._rename, self._remove, self._chmod_folder]
        self._kinds += [self._link] if {Capability.HARDLINKS, Capability.LINKED} <= capabilities else []
        self._kinds += [self._symlink] if Capability.SYMLINKS in capabilities else []

    def apply(self, *trees: Path) -> None:
        """Make the same few edits in each of *trees*."""
        for _ in range(4):
            kind, names = self._rng.choice(self._kinds), [f"folder-{n // 4}/{n % 4}" for n in range(20)]
            one, other = self._rng.sample(names, 2)
            number = self._rng.getrandbits(16)
            for tree in trees:
                kind(tree / one, tree / other, number)

    def _write(self, path: Path, _: Path, number: int) -> None:
        _make_way(path)
        path.write_bytes(b"%d" % number)
        path.chmod(0o600 | number & 0o7077)

    def _rename(self, path: Path, other: Path, _: int) -> None:
        if os.path.lexists(path):
            _make_way(other)
            os.rename(path, other)

    def _remove(self, path: Path, _: Path, number: int) -> None:
        if number % 4:
            path.unlink(missing_ok=True)
        elif path.parent.exists():
            shutil.rmtree(path.parent)

    def _chmod_folder(self, path: Path, _: Path, number: int) -> None:
        if path.parent.exists():
            path.parent.chmod(0o700 | number & 0o077)

    def _link(self, path: Path, other: Path, _: int) -> None:
        if os.path.lexists(path) and not path.is_symlink():
            _make_way(other)
            os.link(path, other)

    def _symlink(self, path: Path, other: Path, number: int) -> None:
        _make_way(path)
        path.symlink_to(f"../{other.name}-{number}")


def _make_way(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)


def _empty(tree: Path) -> None:
    for path in list(tree.iterdir()):
        remove(path)  # closed folders too

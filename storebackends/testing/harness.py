"""What the cases stand on: backends and stores of the kind under test, opened and closed again, and plain helpers."""

from __future__ import annotations

import functools
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from storebackends import open_store
from storebackends.backend import Backend, Capability, Entry
from storebackends.config import validate_options
from storebackends.durability import boot_id
from storebackends.ids import new_attempt
from storebackends.marker import prepare
from storebackends.process import Cancel, environment, run
from storebackends.registry import Registry
from storebackends.store import Store
from storebackends.workspace import Workspace

PATIENCE = 60.0
"""Seconds until a thread that should have come is given up."""

Files = Mapping[str, bytes]
Case = TypeVar("Case", bound=Callable[..., object])


def require(there: bool, what: str) -> None:
    """Skip the running case unless *what* it needs is there."""
    if not there:
        pytest.skip(f"needs {what}")


def needs(*capabilities: Capability) -> Callable[[Case], Case]:
    """Skip a case of a Harness, naming what is missing, where the backend lacks one of *capabilities*."""

    def gate(case: Case) -> Case:
        @functools.wraps(case)
        def gated(self: Harness, *args: Any, **kwargs: Any) -> None:
            for capability in capabilities:
                require(capability in self.capabilities, f"the capability {capability.value!r}")
            case(self, *args, **kwargs)

        return gated  # type: ignore[return-value]

    return gate


class Harness:
    """The backend under test. Set `name` and `options`; override the rest where the backend asks for it."""

    name: str
    """The backend's entry point."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Its options, as in the configuration."""
    examples: ClassVar[int] = 15
    """How many random histories case 15 plays; a backend whose builds take long may ask for fewer."""

    @pytest.fixture
    def area(self, tmp_path: Path) -> Path:
        """An empty folder for stores. Override it to test on another file system, or to clean up what pytest cannot."""
        return tmp_path

    def make_nested(self, tree: Path) -> bool:
        """Make a volume of its own (a subvolume, a dataset) at *tree*/nested; False where there is no such thing."""
        return False

    def leftovers(self, root: Path) -> list[str]:
        """What a store should not keep once nothing runs. Extend it by the outside resources of the store in *root*."""
        rooms = [root / room for room in ("in-progress", "loans", "trash", "scratch")]
        return [str(path) for room in rooms if room.is_dir() for path in room.iterdir()]

    # For the cases.

    @pytest.fixture(autouse=True)
    def _opened(self, area: Path) -> Iterator[None]:
        self._area = area
        with ExitStack() as self._open:
            yield

    @pytest.fixture
    def root(self, area: Path) -> Path:
        """The folder of the case's store."""
        return area / "store"

    @pytest.fixture
    def backend(self, root: Path) -> Backend:
        """The backend by itself, on a new root."""
        return self.open_backend(root)

    @pytest.fixture
    def store(self, root: Path) -> Store:
        """A new store."""
        return self.open_store(root)

    def open_backend(self, root: Path) -> Backend:
        """Open the backend on the store in *root*, which is made if need be: without the store, and what that mends."""
        registry = Registry()
        spec = registry.spec(self.name)
        uuid = prepare(root, self.name, "none", boot_id()).uuid
        backend = registry.driver(spec)(root, validate_options(spec, self.options, type(self).__name__), uuid)
        backend.open()
        self._open.callback(backend.close)
        return backend

    def open_store(self, root: Path) -> Store:
        """Open the store in *root*, which is made if need be."""
        # Durability costs much and is not the backend's: nothing here outlives the boot.
        return self._open.enter_context(open_store(backend=self.name, path=root, durability="none", **self.options))

    @functools.cached_property
    def capabilities(self) -> frozenset[Capability]:
        """What the opened backend says that it can do."""
        return self.open_backend(self._area / "capabilities").capabilities


def write(tree: Path, files: Files) -> None:
    """Write *files* into *tree*, making the folders that they are in; as new files, none is written in place."""
    for name, data in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)


def contents(tree: Path) -> dict[str, bytes]:
    """The regular files below *tree*, as write() takes them."""
    paths = [Path(folder, name) for folder, _, names in os.walk(tree) for name in names]
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in paths if not path.is_symlink()}


def filled(backend: Backend, id: str, files: Files, base: str | None = None) -> Entry:
    """Begin a build of *id* and write *files* into its tree, or copy them in where that is no folder of this host."""
    entry = backend.build(id, base, new_attempt())
    if Capability.HOST_TREE in backend.capabilities:
        write(backend.tree(entry), files)
    elif files:
        with _folder(files) as folder:
            backend.copy_in(entry, folder, ".")
    return entry


def publish(backend: Backend, id: str, files: Files, base: str | None = None) -> Entry:
    """Build *id* without a store."""
    filled(backend, id, files, base)
    return backend.rename(id)


@contextmanager
def seen(backend: Backend, entry: Entry) -> Iterator[Path]:
    """The tree of a build; where that is no folder of this host, a copy, as a `tar` that runs there has it."""
    if Capability.HOST_TREE in backend.capabilities:
        yield backend.tree(entry)
        return
    command = backend.command(entry, ["tar", "-cf", "-", "."], environment("/", "/"), None)
    ended = run(command, output=lambda _: None, cancelled=Cancel(), capture=True)
    assert ended.returncode == 0
    # The trees are the cases' own. Older versions of Python know of no filter.
    options: Any = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(ended.stdout)) as archive:
        archive.extractall(folder, numeric_owner=True, **options)  # noqa: S202
        yield Path(folder)


@contextmanager
def shown(backend: Backend, id: str) -> Iterator[Path]:
    """The tree of a result; where view() has none, that of a build on it."""
    if Capability.HOST_TREE in backend.capabilities:
        with backend.view(id) as tree:
            yield tree
        return
    entry = backend.build(f"look-{new_attempt()}", id, new_attempt())
    try:
        with seen(backend, entry) as tree:
            yield tree
    finally:
        backend.discard(entry.id, entry.attempt)


def result(backend: Backend, id: str) -> dict[str, bytes] | None:
    """The files of the result *id*; None where there is none."""
    if backend.result(id) is None:
        return None
    with shown(backend, id) as tree:
        return contents(tree)


def fill(store: Store, files: Files) -> Callable[[Workspace], None]:
    """Return a function for a build in *store* that writes *files*, and their names to the log."""

    def function(work: Workspace) -> None:
        put(store, work, files)
        work.log.write("".join(f"{name}\n" for name in files).encode())

    return function


def put(store: Store, work: Workspace, files: Files) -> None:
    """Write *files* into the tree, or copy them in."""
    if Capability.HOST_TREE in store.capabilities:
        write(work.path, files)
    elif files:
        with _folder(files) as folder:
            work.copy_in(folder, ".")


@contextmanager
def _folder(files: Files) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # noqa: S103 (the tree's own mode, which it becomes)
        write(Path(folder), files)
        yield Path(folder)

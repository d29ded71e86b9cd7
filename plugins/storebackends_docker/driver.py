"""Trees as volumes of a Docker daemon, copied on this host where it can read them, else in a container.

    ENTRY/tree.json     {"volume": NAME, "attempt": ATTEMPT}, written before the volume is made
    VOLUME/rootfs/      the tree
    VOLUME/nonce        the attempt: the volume is the one that was filled, and no empty one that came after it

An attempt's name is never used again, so a volume, or a container on it, that no entry names is nobody's, and stays so.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath

from storebackends.plugin import (
    CacheEntry,
    Capability,
    Command,
    Entry,
    EntryBackend,
    Finished,
    NotFound,
    NotSupported,
    Problem,
    Size,
    StoreError,
    Usage,
    trees,
)

from . import DockerOptions
from .daemon import COPYING, Daemon, mount, volume_of
from .inside import GONE, REFUSED, Linux, Script, System, Windows

log = logging.getLogger(__name__)

_TRIES = 20
_SIZES_KEPT = 10.0  # seconds that the sizes of all volumes are believed for
# What `cp -a` of any image keeps. BusyBox cuts times and fills holes, and neither it nor `docker cp` keeps attributes.
_COPIED = frozenset(
    {
        Capability.DETACHED,
        Capability.OWNERS,
        Capability.MODES,
        Capability.SYMLINKS,
        Capability.HARDLINKS,
        Capability.LINKED,
        Capability.FIFOS,
        Capability.DEVICES,
    }
)
# What the docker client itself reads from its environment.
_CLIENT = ("DOCKER_", "SSH_", "HOME", "PATH", "TMPDIR", "XDG_", "HTTP", "NO_PROXY", "ALL_PROXY", "http", "no_proxy")


@dataclass(frozen=True)
class _Tree:
    """What tree.json says."""

    volume: str
    attempt: str


class DockerBackend(EntryBackend):
    """See the module and `DockerOptions`."""

    options: DockerOptions

    def open(self) -> None:
        """Raises NotSupported where neither this host nor a container could reach the trees."""
        super().open()
        self._daemon = Daemon(self.options.host, self.uuid)
        self._used: set[str] = set()  # attempts of which a command ran in a container
        self._sizes, self._sizes_until = dict[str, int](), 0.0
        self._before = self._after = ""  # a mount point, around the volume's name
        self._look()

    # The verbs.

    def clone(self, source: Entry | None, entry: Entry) -> None:
        """Copy the tree on this host, or in a container that first makes sure of the base."""
        base = (source.id, self._recorded(source)) if source else None
        tree = _Tree(self._daemon.volume(entry.attempt), entry.attempt)
        _save(tree, entry.tree_record)
        self._daemon.create_volume(entry.attempt)
        if self._here:
            self._clone_here(base, tree)
        else:
            self._clone_inside(base, tree)

    def seal(self, entry: Entry) -> None:
        """See that nothing runs in the tree, and that it was not removed behind our back."""
        tree = self._recorded(entry)
        if tree.attempt in self._used:
            self._daemon.end_containers(tree.volume)
            self._used.discard(tree.attempt)
        self._check(tree, entry.id)

    def clone_cache(self, source: Entry | None, entry: Entry) -> None:
        """As any tree, where a borrower can reach it."""
        if not self._here:
            raise NotSupported("a cache", "a build could not reach its copy, a volume of a Docker daemon")
        self.clone(source, entry)

    def remove(self, folder: Path) -> None:
        """Containers, then the volume, then the folder."""
        with suppress(FileNotFoundError, ValueError):  # none was made, or a power cut tore it: swept then
            tree = _load(folder / "tree.json")
            self._used.discard(tree.attempt)
            if tree.volume == self._daemon.volume(tree.attempt):
                self._remove_volume(tree.volume)
        trees.remove(folder)

    def view(self, id: str) -> AbstractContextManager[Path]:
        """See Backend.view."""
        entry = self._source(id)
        tree = self.tree(entry)
        self._check(self._recorded(entry), id)
        return nullcontext(tree)

    # The protocol, where trees are not in the entries.

    def tree(self, entry: Entry) -> Path:
        """The tree in the volume's mount point."""
        if not self._here:
            raise NotSupported(
                "reading a tree as a folder",
                "it is a volume of a Docker daemon that this host, or this user, cannot read",
                "use run() and copy_in(), or open the store on the daemon's host as root",
            )
        return self._mount_point(self._recorded(entry).volume) / "rootfs"

    def command(
        self, entry: Entry, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, user: str | int | None = None
    ) -> Command:
        """In a container of the image, if there is one; killing the client would leave that running, so stop does."""
        if self.options.image is None:
            return super().command(entry, argv, env, cwd, user)
        tree, parts = self._recorded(entry), self._parts(cwd or ".")
        self._used.add(tree.attempt)
        name, options = self._daemon.container(tree.volume, network=self.options.network)
        shown, own = self._environment(env)
        script = self._system.run(argv, parts)
        words = self._daemon.argv(
            *("run", "--rm", "--interactive", "--user", self._system.root if user is None else str(user)),
            *(*options, *self._tree_mounts(tree, self._system.tree), *self._system.own_folders(), *shown),
            *("--workdir", self._system.tree, *script.options, self.options.image, *script.words),
        )
        return Command(words, own, None, stop=partial(self._daemon.remove_containers, [name]))

    def copy_in(self, entry: Entry, source: Path, dest: str) -> None:
        """See Backend.copy_in; where this host cannot reach the tree, extended attributes and holes are lost."""
        if self._here:
            super().copy_in(entry, source, dest)
            return
        tree, script = self._recorded(entry), self._system.fill(self._parts(dest))
        name, words = self._words(self._tree_mounts(tree, self._system.tree), tree.volume, script)
        try:
            self._daemon.call("create", *words, timeout=COPYING)
            # Not --archive: it gives all to the user of the container, whatever its help says.
            copied = f"{name}:{self._system.copied}"
            self._daemon.call("cp", os.path.abspath(source), copied, timeout=COPYING)
            done = self._daemon.call("start", "--attach", name, timeout=COPYING, ok=(0, REFUSED))
        finally:
            self._daemon.remove_containers([name])
        if done.returncode == REFUSED:
            said = done.stderr.decode(errors="replace").strip()
            raise StoreError(f"cannot copy {source} to {dest!r} in the tree of {entry.id!r}: {said}")

    def import_image(self, entry: Entry, image: str) -> None:
        """Make the tree that of *image*, by `docker create`, `export` and `cp`: nothing of the image runs."""
        if isinstance(self._system, Windows):
            raise NotSupported(
                "taking an image", "docker exports none of Windows", "docker cp it, and import the folder"
            )
        if image.startswith("-"):
            raise StoreError(f"{image!r} is no image's name")
        tree, archive = self._recorded(entry), entry.folder / "image.tar"
        name, options = self._daemon.container(tree.volume)
        mounts = self._tree_mounts(tree, "/.storebackends-tree")
        try:
            self._daemon.call("create", *options, *mounts, "--", image, "storebackends", timeout=COPYING)
            self._daemon.call("export", "--output", str(archive), name, timeout=COPYING)
            with archive.open("rb") as stream:
                self._daemon.call("cp", "-", f"{name}:/.storebackends-tree", input=stream, timeout=COPYING)
        finally:
            self._daemon.remove_containers([name])
            trees.remove(archive)

    def usage(self) -> Usage:
        """That of the file system of the volumes; in a container, without inodes, as df tells it."""
        if self._here:
            return trees.usage(Path(self._before).parent)
        total, _, free = self._measure_disk().decode(errors="replace").splitlines()[-1].split()[1:4]
        return Usage(int(total) * 1024, int(free) * 1024)

    def size(self, id: str) -> Size:
        """See Backend.size; an estimate, since files may share blocks."""
        return self._size(self._source(id))

    def cache_size(self, entry: CacheEntry) -> Size:
        """See Backend.cache_size."""
        return self._size(entry)

    def sync_paths(self) -> Sequence[Path]:
        """See Backend.sync_paths."""
        if not self._here:
            raise NotSupported(
                "keeping results through a power cut",
                "the daemon's disk cannot be synced from here",
                'make the store anew with durability = "none"',
            )
        return (self.root, Path(self._before).parent)

    def sweep(self) -> None:
        """Remove what no entry names; what resists is logged, and tried again at the next open."""
        try:
            containers, volumes = self._orphans()
        except StoreError as error:
            log.warning("%s", error)
            containers, volumes = set(), set()
        self._remove_each(lambda name: self._daemon.remove_containers([name]), containers)
        super().sweep()
        self._remove_each(self._remove_volume, volumes)

    def check(self) -> Iterator[Problem]:
        """Volumes and containers that belong to no entry; and results without theirs, where view() cannot tell."""
        containers, volumes = self._orphans()
        # What somebody who opens or measures the store has for a moment; if that was killed, the next open removes it.
        passing = (self._daemon.volume("probe"), self._daemon.volume("usage"))
        for name in sorted(name for name in containers if not name.startswith(passing)):
            repair = partial(self._daemon.remove_containers, [name])
            yield Problem(name, "this container belongs to no build", repair)
        for name in sorted(name for name in volumes if not name.startswith(passing)):
            yield Problem(name, "this volume belongs to no entry", partial(self._remove_volume, name))
        if not self._here:
            yield from self._without_volume()

    # Inside: reaching trees.

    def _look(self) -> None:
        """Find out where volumes are and who can reach them, by one that is removed again."""
        for _ in range(_TRIES):  # another process that opens the store sweeps it away
            probe = self._daemon.create_volume(f"probe{secrets.token_hex(6)}")
            try:
                if (point := self._daemon.mount_point(probe)) and self._learn(point, probe):
                    return
            except StoreError:
                if self._daemon.mount_point(probe):
                    raise
            finally:
                self._daemon.remove_volume(probe)
        raise StoreError("volumes vanish as soon as they are made; is something else removing them?")

    def _learn(self, point: str, volume: str) -> bool:
        """Take what there is to know from one volume; False where that is no more."""
        self._before, _, self._after = point.partition(volume)
        self._system: System = Windows() if PureWindowsPath(point).drive else Linux()
        self.contained = self.options.image is not None
        self.home = self._system.home if self.contained else None
        self._here = self._can_read(Path(point))
        self.capabilities = trees.capabilities(Path(point)) if self._here else _COPIED
        return self._here or self._daemon.mount_point(volume) is not None

    def _can_read(self, point: Path) -> bool:
        # A name made just now: a folder of it here can only be the daemon's.
        if self.options.access == "container":
            return False
        if os.access(point, os.R_OK | os.W_OK | os.X_OK):
            return True
        if self.options.access == "auto" and self.options.image:
            return False
        raise NotSupported(
            "a docker store",
            f"this process cannot read {point.parent.parent}, where the daemon's host keeps its volumes",
            'run as root on that host, or name an image of the daemon: image = "..."',
        )

    def _mount_point(self, volume: str) -> Path:
        return Path(f"{self._before}{volume}{self._after}")

    def _recorded(self, entry: Entry) -> _Tree:
        try:
            tree = _load(entry.tree_record)
        except FileNotFoundError:
            raise NotFound(entry.id, f"{entry.tree_record} is not there: {entry.id!r} was deleted") from None
        except ValueError as error:
            raise StoreError(
                f"{entry.tree_record} is damaged: {error}; delete {entry.id!r} and build it again"
            ) from error
        if tree.volume != self._daemon.volume(tree.attempt):
            raise StoreError(f"{entry.tree_record} names {tree.volume!r}, which is no volume of this store")
        return tree

    def _check(self, tree: _Tree, id: str) -> None:
        """Raise NotFound unless the volume is the one that was filled."""
        if not (self._is_filled(tree) if self._here else self._daemon.mount_point(tree.volume)):
            raise self._gone(tree, id)

    def _is_filled(self, tree: _Tree) -> bool:
        with suppress(FileNotFoundError):
            return (self._mount_point(tree.volume) / "nonce").read_text().strip() == tree.attempt
        return False

    def _gone(self, tree: _Tree, id: str) -> NotFound:
        what = f"the volume {tree.volume} of {id!r} was removed or replaced by somebody else"
        return NotFound(id, f"{what} ('docker volume prune' does that); delete {id!r} and build it again")

    def _parts(self, path: str) -> list[str]:
        """The parts of a path that goes nowhere but down."""
        windows = isinstance(self._system, Windows)
        parts = (path.replace("\\", "/") if windows else path).split("/")
        if not path or not parts[0] or ".." in parts or "\0" in path or (windows and set(path) & set(':"*?<>|!%')):
            raise StoreError(f"{path!r} is no path inside a tree; give a relative one without '..'")
        return [part for part in parts if part not in ("", ".")]

    # Inside: copying.

    def _clone_here(self, base: tuple[str, _Tree] | None, tree: _Tree) -> None:
        point = self._mount_point(tree.volume)
        if base is None:
            trees.create(point / "rootfs")
        else:
            id, source = base
            self._check(source, id)
            trees.copy(self._mount_point(source.volume) / "rootfs", point / "rootfs")
        (point / "nonce").write_text(tree.attempt)

    def _clone_inside(self, base: tuple[str, _Tree] | None, tree: _Tree) -> None:
        mounts = list(mount(tree.volume, self._system.new))
        script = self._system.clone(tree.attempt, None)
        if base:
            id, source = base
            mounts += mount(source.volume, self._system.base, "readonly")
            script = self._system.clone(tree.attempt, source.attempt)
        if self._help(mounts, tree.volume, script, ok=(0, GONE)).returncode == GONE and base:
            raise self._gone(source, id)

    # Inside: containers.

    def _help(self, mounts: Sequence[str], volume: str, script: Script, ok: Container[int] = (0,)) -> Finished:
        """Run a script in a container of its own."""
        words = self._words(mounts, volume, script)[1]
        return self._daemon.call("run", "--rm", *words, timeout=COPYING, ok=ok)

    def _words(self, mounts: Sequence[str], volume: str, script: Script) -> tuple[str, Sequence[str]]:
        """The new name of a container that works on *volume*, and how to make it."""
        name, options = self._daemon.container(volume)
        words = (*options, *mounts, "--user", self._system.root, *script.options, self._image, *script.words)
        return name, words

    @property
    def _image(self) -> str:
        assert self.options.image is not None  # noqa: S101 (else this host reads the volumes)
        return self.options.image

    def _tree_mounts(self, tree: _Tree, target: str) -> Sequence[str]:
        """Have the tree, and nothing beside it, at *target*; and the volume elsewhere, so that nobody prunes it."""
        rootfs = self._system.separator.join([str(self._mount_point(tree.volume)), "rootfs"])
        # Not the volume itself: removed, it would be made again, where a missing folder is an error.
        return [
            *mount(tree.volume, self._system.pin, "readonly"),
            "--mount",
            f"type=bind,{_field('source', rootfs)},target={target}",
        ]

    def _environment(self, env: Mapping[str, str]) -> tuple[Sequence[str], Mapping[str, str]]:
        """Options and an environment of the client, which takes values from it: a command line is there to be read."""
        words, own = list[str](), dict(os.environ)
        for name, value in env.items():
            if self._system.takes(name):
                is_read = name.startswith(_CLIENT)
                words += ["--env", f"{name}={value}" if is_read else name]
                own |= {} if is_read else {name: value}
        return words, own

    def _measure_disk(self) -> bytes:
        for _ in range(3):  # another process that opens the store sweeps the container away
            done = self._help([], self._daemon.volume("usage"), self._system.disk(), ok=range(256))
            if done.returncode == 0:
                return done.stdout
        raise StoreError(f"the space cannot be measured: {done.stderr.decode(errors='replace').strip()}")

    # Inside: what is whose.

    def _named(self, *rooms: str) -> set[str]:
        """The volumes that the entries in *rooms* name. Raises StoreError where one cannot be read."""
        found = set()
        for folder in (folder for room in rooms for folder in self._entries(room)):
            try:
                found.add(_load(folder / "tree.json").volume)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it has none yet, or is gone
            except (OSError, ValueError) as error:
                raise StoreError(
                    f"{folder}/tree.json cannot be read, so no volume can be told to be nobody's: {error}"
                ) from error
        return found

    def _entries(self, room: str) -> Iterator[Path]:
        folders = [self.root / room]
        if room == "caches":
            folders = list(folders[0].iterdir())
        for folder in folders:
            with suppress(FileNotFoundError, NotADirectoryError):
                yield from folder.iterdir()

    def _orphans(self) -> tuple[set[str], set[str]]:
        """The containers and the volumes that belong to no entry.

        Resources are listed first, entries second, in the order in which they move: what no entry names by then was
        left by somebody who was killed, and none ever names it again. So it takes no lock to remove it.
        """
        containers, volumes = self._daemon.containers(), self._daemon.volumes()
        building = self._named("in-progress", "loans")
        kept = self._named("result", "caches", "quarantine", "trash")
        return {name for name in containers if volume_of(name) not in building}, volumes - building - kept

    def _remove_each(self, remove: Callable[[str], None], names: set[str]) -> None:
        for name in sorted(names):
            try:
                remove(name)
            except StoreError as error:
                log.warning("%s stays: %s", name, error)

    def _without_volume(self) -> Iterator[Problem]:
        named: dict[str, _Tree] = {}
        for id in self.ids():
            with suppress(NotFound):  # deleted meanwhile
                named[id] = self._recorded(self._source(id))
        volumes = self._daemon.volumes()
        for id, tree in named.items():
            if tree.volume not in volumes and self.has(id):
                yield Problem(id, str(self._gone(tree, id)))

    def _remove_volume(self, volume: str) -> None:
        # The tree by ourselves, where we can: the daemon would remove what is mounted in it, too.
        if self._here:
            if self.options.image:
                self._daemon.end_containers(volume)
            trees.remove(self._mount_point(volume) / "rootfs")
        self._daemon.remove_volume(volume)

    def _size(self, entry: Entry) -> Size:
        tree = self._recorded(entry)
        if self._here:
            return Size(trees.size(self.tree(entry)), exact=False)
        if time.monotonic() > self._sizes_until:  # the daemon measures all it has, whatever is asked
            self._sizes, self._sizes_until = self._daemon.sizes(), time.monotonic() + _SIZES_KEPT
        return Size(self._sizes.get(tree.volume, 0), exact=False)


def _save(tree: _Tree, path: Path) -> None:
    """Whole or not at all."""
    part = path.with_name("tree.json.part")
    part.write_text(json.dumps({"format": 1, "volume": tree.volume, "attempt": tree.attempt}), encoding="utf-8")
    os.replace(part, path)


def _load(path: Path) -> _Tree:
    """Raises FileNotFoundError, or ValueError where it is broken."""
    try:
        content = json.loads(path.read_bytes())
        return _Tree(str(content["volume"]), str(content["attempt"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"it lacks {error}") from error


def _field(name: str, value: str) -> str:
    """A field of a --mount, which is a line of CSV."""
    quoted = value.replace('"', '""')
    return f'"{name}={quoted}"' if set(value) & set(',"') else f"{name}={value}"

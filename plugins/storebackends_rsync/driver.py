"""Trees as plain folders, cloned by one rsync.

A file of a published tree may be linked from others, so nothing here ever writes to, chmods, chowns or touches one:
rsync makes new files only, links are made, and removal changes the mode of folders at most.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from storebackends.plugin import Capability, CommandFailed, Entry, EntryBackend, NoSpace, NotSupported, tool, trees

from . import RsyncOptions, probe

# A window of -1 compares times to the nanosecond. With the default, rsync leaves alone the time of a folder, link or
# device it has just made if that is right to the second, and a file that differs by less would be linked to its base.
_RSYNC = ("rsync", "-aH", "--numeric-ids", "--modify-window=-1")
_HOLES, _ATTRIBUTES = "-S", "-AX"
_TIMEOUT = 24 * 3600.0  # a bound, not an expectation: what rsync needs depends on the tree alone


class RsyncBackend(EntryBackend):
    """See the module and `RsyncOptions.mode`."""

    options: RsyncOptions
    may_wait = True

    def open(self) -> None:
        """Raises NotSupported where there is no fitting rsync."""
        support = probe(self.root)
        if not support.usable:
            raise NotSupported("an rsync store", support.reason, support.fix)
        super().open()
        self.capabilities = trees.capabilities(self.trash)
        if self.options.mode == "hardlink_unsafe":
            self.capabilities -= {Capability.DETACHED}

    def clone(self, source: Entry | None, entry: Entry) -> None:
        """Copy the tree by rsync, or make it of links."""
        if source is not None and self.options.mode == "hardlink_unsafe":
            _rsync(self.tree(source), self.tree(entry), _HOLES, _ATTRIBUTES, link_to=self.tree(source))
        else:
            self.clone_cache(source, entry)

    def clone_cache(self, source: Entry | None, entry: Entry) -> None:
        """Copy the tree by rsync in every mode: a cache is written to in place."""
        if source is None:
            trees.create(self.tree(entry))
        else:
            # All names at once: nothing waits for what is found out while files are copied.
            _rsync(self.tree(source), self.tree(entry), "--no-inc-recursive", *_kept(self.tree(source), entry.folder))

    def seal(self, entry: Entry) -> None:
        """In hardlink mode, link what equals the base: beside the tree, which is then replaced by one rename."""
        base = entry.read().base if self.options.mode == "hardlink" else None
        source = self.result(base) if base is not None else None
        if source is None:
            return
        tree, linked, spent = (entry.folder / name for name in (self.tree(entry).name, "linked", "spent"))
        for leftover in (linked, spent):  # of an earlier try
            trees.remove(leftover)
        # By content too: a build may have written other bytes of the same length and set the old time.
        _rsync(tree, linked, _HOLES, _ATTRIBUTES, "--checksum", link_to=self.tree(source))
        if joined := list(_joined(tree, linked)):
            names = b"\0".join([b".", *joined])
            _rsync(tree, linked, _HOLES, _ATTRIBUTES, "--ignore-times", "--from0", "--files-from=-", input=names)
        os.rename(tree, spent)
        try:
            os.rename(linked, tree)
        except OSError:
            os.rename(spent, tree)
            raise
        trees.remove(spent)


if sys.platform == "linux":

    def _kept(source: Path, parent: Path) -> set[str]:
        """The options for what the tree *source* has, and *parent*, the folder of its copy, would hand down.

        They cost a third of a copy's time, and a look at every file a twentieth.
        """
        found, every = set[str](), {_HOLES, _ATTRIBUTES}
        try:
            if os.listxattr(source) or "system.posix_acl_default" in os.listxattr(parent):
                found.add(_ATTRIBUTES)
            todo = [os.fspath(source)]
            while todo and found != every:
                with os.scandir(todo.pop()) as entries:
                    for entry in entries:
                        _look(entry, found)
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(entry.path)
        except OSError:  # of a user who may not look; rsync will say more
            return every
        return found

    def _look(entry: os.DirEntry[str], found: set[str]) -> None:
        if _HOLES not in found and entry.is_file(follow_symlinks=False):
            status = entry.stat(follow_symlinks=False)
            if status.st_blocks * 512 < status.st_size:
                found.add(_HOLES)
        if _ATTRIBUTES not in found and os.listxattr(entry.path, follow_symlinks=False):
            found.add(_ATTRIBUTES)

else:

    def _kept(source: Path, parent: Path) -> set[str]:
        return {_HOLES, _ATTRIBUTES}


def _joined(tree: Path, linked: Path) -> Iterator[bytes]:
    """The files that are one in *linked* but several in *tree*, since they equal one that the base has by two names."""
    names: dict[int, list[bytes]] = defaultdict(list)
    top = os.fsencode(linked)
    for folder, _, files in os.walk(top):
        for name in files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if status.st_nlink > 1:
                names[status.st_ino].append(os.path.relpath(path, top))
    for same in names.values():
        if len(same) > 1 and len({os.lstat(os.path.join(os.fsencode(tree), name)).st_ino for name in same}) > 1:
            yield from same


def _rsync(source: Path, dest: Path, *options: str, link_to: Path | None = None, input: bytes | None = None) -> None:
    links = [f"--link-dest={os.path.abspath(link_to)}"] if link_to else []
    try:
        # Absolute, since rsync takes what comes before a colon for a host; with a slash, since it means the contents.
        tool(
            [*_RSYNC, *options, *links, "--", f"{os.path.abspath(source)}/", f"{os.path.abspath(dest)}/"],
            timeout=_TIMEOUT,
            input=input,
        )
    except CommandFailed as error:
        if "(28)" in error.stderr or "(122)" in error.stderr:  # ENOSPC and EDQUOT, as rsync prints them
            raise NoSpace(str(dest), "rsync found it full") from error
        raise

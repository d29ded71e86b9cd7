"""Trees as plain folders, cloned by copying. No external program, on any platform."""

from __future__ import annotations

from storebackends.plugin import Entry, EntryBackend, trees

from . import CopyOptions


class CopyBackend(EntryBackend):
    """See the module; keeps whatever `trees.copy` keeps on the store's file system."""

    options: CopyOptions
    may_wait = True

    def open(self) -> None:
        """Raises NotSupported where blocks are to be shared and cannot be."""
        super().open()
        # In the trash, which is emptied at the next open should this one be killed.
        self.capabilities = trees.capabilities(self.trash)
        if self.options.reflink == "always":
            trees.check_reflink(self.trash)

    def clone(self, source: Entry | None, entry: Entry) -> None:
        """Copy the tree; costs a few system calls per file, and its data too unless blocks are shared."""
        if source is None:
            trees.create(self.tree(entry))
        else:
            trees.copy(self.tree(source), self.tree(entry), reflink=self.options.reflink)

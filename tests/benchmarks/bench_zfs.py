"""The backend `zfs` beside the commands it starts; where there is no ZFS, nothing. See `make bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from storebackends import Store, open_store
from storebackends.process import tool
from storebackends.records import Record
from tests.capabilities import look, zpool
from tests.stores import open_copy, writes

from .harness import Case, microseconds_each, milliseconds, scratch

RESULTS, LOOKS = 1000, 1000


def cases() -> Iterator[Case]:
    """A step, a look and an open: each beside the least that could do it."""
    usable, reason = look("zfs")
    if not usable:
        print(f"nothing of ZFS is measured: {reason}", file=sys.stderr)
        return
    with scratch() as folder, zpool(folder) as pool, _open(pool, folder) as store, open_copy(folder / "copy") as copy:
        numbers = count()
        store.build("base", writes(a="1")).release()
        copy.build("base", writes(a="1")).release()
        home = _home(pool, folder / "store")
        yield Case(
            "zfs: a build on a base",
            milliseconds(lambda: store.build(f"id-{next(numbers)}", writes(), base="base").release()),
            milliseconds(lambda: _step(home, _dataset(folder / "store"), next(numbers))),
            "its three commands alone",
            at_most=1.3,
        )
        yield Case(
            "zfs: result()",
            microseconds_each(LOOKS, lambda: _look(store)),
            microseconds_each(LOOKS, lambda: _look(copy)),
            "that of copy",
            unit="µs",
            at_most=2,
        )
        _fill(home, folder / "store")
        yield Case(
            f"zfs: open a store of {RESULTS} datasets",
            milliseconds(lambda: _open(pool, folder).close()),
            milliseconds(lambda: tool(["zfs", "list", "-H", "-r", "-o", "name", home])),
            "one zfs list",
            at_most=1.5,
            rounds=7,
        )


def _open(pool: str, folder: Path) -> Store:
    return open_store(backend="zfs", dataset=pool, path=folder / "store", durability="none")


def _home(pool: str, root: Path) -> str:
    return f"{pool}/storebackends-{json.loads((root / 'store.json').read_bytes())['uuid']}"


def _dataset(root: Path) -> str:
    return str(json.loads((root / "result" / "base" / "tree.json").read_bytes())["dataset"])


def _step(home: str, base: str, number: int) -> None:
    tool(["zfs", "clone", "-o", "readonly=off", f"{home}/{base}@sealed", f"{home}/bare-{number}"])
    tool(["zfs", "inherit", "-r", "readonly", f"{home}/bare-{number}"])
    tool(["zfs", "snapshot", "-r", f"{home}/bare-{number}@sealed"])


def _look(store: Store) -> None:
    for _ in range(LOOKS):
        found = store.result("base")
        assert found is not None
        found.release()


def _fill(home: str, root: Path) -> None:
    """Put results into the store as builds would have, but for their snapshots."""
    for number in range(RESULTS):
        entry = root / "result" / f"app-{number}"
        entry.mkdir()
        (entry / "tree.json").write_text(json.dumps({"format": 1, "dataset": f"app-{number}", "nested": {}}))
        Record(entry.name, "attempt", outcome="built", log_length=0).save(entry / "build.json")
        tool(["zfs", "create", "-u", f"{home}/app-{number}"])

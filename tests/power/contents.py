"""What is in the results and the cache that power is cut on. All of it follows from ids and attempts.

A result of id a.x on base a has a folder for each, `a/` as the base left it and `a.x/` of its own, and the file
`chain`, to which each of them added a line in place.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import NamedTuple

BASES: dict[str, str | None] = {
    root + rest: root + rest[:-2] if rest else None for root in "abc" for rest in ("", ".x", ".y", ".x.p")
}
"""The ids, and what each is built on: a.x on a, a.x.p on a.x."""
CACHE = "cache"
CHAIN = "chain"
SIZES = (0, 1, 5000, 70_000, 300_000)


class Broken(Exception):
    """A tree or a log is not what was written."""


class File(NamedTuple):
    """All that is looked at of a file. The mode and the time can be lost by themselves."""

    data: bytes
    mode: int
    time: int

    @classmethod
    def of(cls, path: Path) -> File:
        status = path.stat()
        return cls(path.read_bytes(), status.st_mode & 0o7777, status.st_mtime_ns)

    def write(self, path: Path) -> None:
        path.write_bytes(self.data)
        path.chmod(self.mode)
        os.utime(path, ns=(0, self.time))


def fill(tree: Path, id: str, attempt: str) -> None:
    """Write what *attempt* at *id* adds to its base."""
    (tree / id).mkdir()
    for name, file in _own(id, attempt).items():
        file.write(tree / name)
    (tree / id / "link").symlink_to(attempt)
    (tree / id / "again").hardlink_to(tree / id / "0")
    with (tree / CHAIN).open("ab") as chain:
        chain.write(_line(id, attempt))


def log(id: str, attempt: str) -> list[bytes]:
    """What it logs, in pieces."""
    return [f"{id} {attempt} {n}\n".encode() for n in range(50)]


def check(tree: Path, id: str, attempt: str) -> dict[str, str]:
    """Is *tree* that of *attempt* at *id*, whole? The attempts of it and of all it stands on; Broken, or OSError."""
    attempts = {below: os.readlink(tree / below / "link") for below in _chain(id)}
    if attempts[id] != attempt:
        raise Broken(f"{tree} is of attempt {attempts[id]}, not {attempt}")
    expected = {name: file for below in attempts for name, file in _own(below, attempts[below]).items()}
    expected |= {f"{below}/again": expected[f"{below}/0"] for below in attempts}
    links = {f"{below}/link" for below in attempts}
    found = {os.path.relpath(os.path.join(folder, name), tree) for folder, _, names in os.walk(tree) for name in names}
    if found != expected.keys() | links | {CHAIN}:
        raise Broken(f"{tree} differs in {sorted(found ^ (expected.keys() | links | {CHAIN}))}")
    for name, file in expected.items():
        if File.of(tree / name) != file:
            raise Broken(f"{tree / name} has other contents, mode or time")
    if (tree / CHAIN).read_bytes() != b"".join(_line(*pair) for pair in attempts.items()):
        raise Broken(f"{tree / CHAIN} has {(tree / CHAIN).read_bytes()[:500]!r}")
    return attempts


def count_up(cache: Path) -> int:
    """Change a borrowed cache, in place too; what it counts to now."""
    count = check_cache(cache) + 1
    _slot(count).write(cache / str(count % 3))
    with (cache / CHAIN).open("ab") as chain:
        chain.write(_line(CACHE, str(count)))
    return count


def check_cache(cache: Path) -> int:
    """Is it whole? What it counts to, 0 where it is new; Broken, or OSError."""
    if not os.listdir(cache):
        return 0
    chain = (cache / CHAIN).read_bytes()
    count = chain.count(b"\n")
    if count == 0 or chain != b"".join(_line(CACHE, str(n + 1)) for n in range(count)):
        raise Broken(f"{cache / CHAIN} has {chain[:500]!r}")
    slots = {str(n % 3): _slot(n) for n in range(max(1, count - 2), count + 1)}
    if {name: File.of(cache / name) for name in os.listdir(cache) if name != CHAIN} != slots:
        raise Broken(f"{cache} is not what {count} turns left")
    return count


def _chain(id: str) -> list[str]:
    """The ids that a tree is of, the lowest first."""
    base = BASES[id]
    return [*(_chain(base) if base else ()), id]


def _own(id: str, attempt: str) -> dict[str, File]:
    rng = random.Random(f"{id} {attempt}")
    sizes = [rng.choice(SIZES) for _ in range(rng.randint(2, 8))]
    return {f"{id}/{n}": _file(rng, size) for n, size in enumerate(sizes)}


def _slot(count: int) -> File:
    return _file(random.Random(count), 20_000)


def _file(rng: random.Random, size: int) -> File:
    return File(rng.randbytes(size), rng.choice([0o600, 0o644, 0o4755]), rng.randrange(10**18))


def _line(id: str, attempt: str) -> bytes:
    return f"{id} {attempt}\n".encode()

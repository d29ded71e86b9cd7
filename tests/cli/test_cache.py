"""Commands on a store's caches."""

from __future__ import annotations

import json
import os

from tests import capabilities
from tests.cli.host import Host
from tests.stores import open_copy


def test_ls_tells_size_last_use_and_borrowers(host: Host) -> None:
    with open_copy(host.root) as store:
        with store.cache("pip") as path:
            (path / "wheel").write_bytes(bytes(5000))
        with store.cache("ccache"):
            lines = host("cache", "ls").out.splitlines()
            lent, free = (json.loads(line) for line in host("cache", "ls", "--json").out.splitlines())

    assert [(line.split()[0], line.partition("lent to ")[2]) for line in lines] == [
        ("ccache", f"pid {os.getpid()}"),
        ("pip", ""),
    ]
    assert (lent["name"], lent["generation"], lent["borrowers"]) == ("ccache", 0, [os.getpid()])
    assert (free["name"], free["generation"], free["borrowers"]) == ("pip", 1, [])
    assert free["size"]["bytes"] >= 5000


def test_rm_removes_caches(host: Host) -> None:
    with open_copy(host.root) as store:
        for name in ("pip", "ccache", "npm"):
            with store.cache(name):
                pass

    host("cache", "rm", "pip", "ccache")

    assert [json.loads(line)["name"] for line in host("cache", "ls", "--json").out.splitlines()] == ["npm"]
    assert "there is no cache 'pip'" in host("cache", "rm", "pip", code=3).err


def test_rm_refuses_what_is_lent(host: Host) -> None:
    with open_copy(host.root) as store, store.cache("pip"):
        said = host("cache", "rm", "pip", code=3)

    holder = "this process" if capabilities.look("proc").usable else "somebody"
    assert f"the cache is lent to {holder}" in said.err
    assert host("cache", "ls").out.startswith("pip ")

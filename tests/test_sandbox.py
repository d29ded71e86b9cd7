"""What a command sees from inside bubblewrap, and what the sandbox settings come to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storebackends import NotSupported, sandbox
from tests.capabilities import look, needs, run


class Inside:
    """Runs shell commands in a sandbox of its own."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.tmp = folder / "tree", folder / "tmp"
        self.tree.mkdir()
        self.tmp.mkdir()

    def sh(self, script: str, *, cwd: str = ".", network: bool = False, **folders: Path) -> str:
        """What *script* prints; OSError with its complaint where it fails."""
        secrets = folders.pop("secrets", None)
        lists: dict[str, Any] = {name: [folder] for name, folder in folders.items()}
        shell = ["/bin/sh", "-ec", script]
        argv = sandbox.bwrap(shell, tree=self.tree, tmp=self.tmp, cwd=cwd, network=network, secrets=secrets, **lists)
        return run(*argv)


@pytest.fixture
def inside(tmp_path: Path) -> Inside:
    return Inside(tmp_path)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with no programs but those in this folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.why_not.cache_clear()
    yield tmp_path
    sandbox.why_not.cache_clear()


@needs("bwrap")
def test_the_tree_is_at_a_fixed_path_and_can_be_written(inside: Inside) -> None:
    (inside.tree / "sub").mkdir()

    printed = inside.sh("pwd; echo hello >file", cwd="sub")

    assert printed == "/build/sub\n"
    assert (inside.tree / "sub" / "file").read_text() == "hello\n"


@needs("bwrap")
@pytest.mark.parametrize("path", ["/etc/storebackends-test", "/storebackends-test", "/usr/storebackends-test"])
def test_the_host_cannot_be_written(inside: Inside, path: str) -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        inside.sh(f"echo x >{path}")

    assert not os.path.exists(path)


@needs("bwrap")
def test_the_host_cannot_be_mounted_writable_again(inside: Inside) -> None:
    with pytest.raises(OSError, match="mount"):
        inside.sh("mount -o remount,rw /usr")

    assert inside.sh("grep ' /usr ' /proc/self/mountinfo | cut -d' ' -f6 | cut -d, -f1") == "ro\n"


@needs("bwrap")
def test_tmp_is_the_builds_own(inside: Inside, tmp_path: Path) -> None:
    printed = inside.sh("ls -A /tmp; echo mine >/tmp/file")

    assert printed == ""
    assert (inside.tmp / "file").read_text() == "mine\n"


@needs("bwrap")
def test_no_process_outside_can_be_seen(inside: Inside) -> None:
    printed = inside.sh("readlink /proc/self/ns/pid; ls -d /proc/[0-9]*")

    namespace, *processes = printed.split()
    assert namespace != os.readlink("/proc/self/ns/pid")
    assert len(processes) < 10


@needs("bwrap")
def test_there_is_no_network_unless_it_is_asked_for(inside: Inside) -> None:
    outside = os.readlink("/proc/self/ns/net")

    without = inside.sh("readlink /proc/self/ns/net; tail -n +3 /proc/net/dev")
    with_it = inside.sh("readlink /proc/self/ns/net", network=True)

    namespace, *devices = without.splitlines()
    assert namespace != outside == with_it.strip()
    assert [device.split(":")[0].strip() for device in devices] == ["lo"]


@needs("bwrap")
def test_what_is_hidden_cannot_be_seen_or_written(inside: Inside) -> None:
    hidden = Path("/usr/share")

    printed = inside.sh(f"ls -A {hidden}; touch {hidden}/file || echo refused", hide=hidden)

    assert printed == "refused\n"


@needs("bwrap")
def test_what_is_shown_can_be_read_even_below_tmp(inside: Inside, tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "file").write_text("seen")

    printed = inside.sh(f"cat {shown}/file; touch {shown}/file || echo refused", show=shown)

    assert printed == "seenrefused\n"


@needs("bwrap")
def test_what_is_both_shown_and_hidden_is_hidden(inside: Inside, tmp_path: Path) -> None:
    store = tmp_path / "shown" / "store"
    store.mkdir(parents=True)
    (store / "file").touch()

    printed = inside.sh(f"ls -A {store}", show=store.parent, hide=store)

    assert printed == ""


@needs("bwrap")
def test_secrets_can_be_read_and_not_written(inside: Inside, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "token").write_text("s3cret")

    printed = inside.sh("cat /run/secrets/token; touch /run/secrets/token || echo refused", secrets=secrets)

    assert printed == "s3cretrefused\n"


@needs("bwrap", "root")
def test_root_can_still_give_files_away(inside: Inside) -> None:
    inside.sh("touch file; chown 5:6 file; chmod 4755 file")

    status = (inside.tree / "file").stat()

    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (5, 6, 0o4755)


@needs("bwrap")
def test_auto_means_bubblewrap_where_it_works() -> None:
    assert look("bwrap").usable

    chosen = sandbox.choose("auto"), sandbox.choose("bwrap"), sandbox.choose("host")

    assert chosen == ("bwrap", "bwrap", "host")


def test_auto_means_the_host_where_bubblewrap_is_not_there(programs: Path) -> None:
    chosen = sandbox.choose("auto")

    assert chosen == "host"


@needs("fork")
def test_auto_means_the_host_where_bubblewrap_is_there_and_does_not_work(programs: Path) -> None:
    (programs / "bwrap").write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    (programs / "bwrap").chmod(0o755)

    chosen = sandbox.choose("auto")

    assert chosen == "host"
    assert sandbox.why_not().endswith("ended with status 1: No permissions to create new namespace")


def test_bubblewrap_that_is_asked_for_and_not_there_is_refused_with_the_fix(programs: Path) -> None:
    with pytest.raises(NotSupported) as caught:
        sandbox.choose("bwrap")

    assert "bubblewrap" in caught.value.reason
    assert 'sandbox = "host"' in caught.value.fix

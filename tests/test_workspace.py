from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storebackends import BuildFailed, Cancelled, CommandFailed, Store, StoreError, Workspace
from tests.capabilities import needs
from tests.stores import files, left_in_progress, open_copy, until


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_copy(tmp_path / "store") as store:
        yield store


def inside(store: Store, fn: Callable[[Workspace], object]) -> str:
    """Run *fn* in a build that must succeed; return its log."""
    with store.build("a", fn) as result, result.log.tail() as reader:
        return b"".join(reader).decode()


class TestRun:
    @needs("sh")
    def test_is_in_the_tree_with_a_clean_environment(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECRET", "from outside")

        def fn(work: Workspace) -> None:
            done = work.run(["sh", "-c", "pwd; env; umask; ls -A $HOME $TMPDIR; cat"], env={"MINE": "1"}, capture=True)
            lines = done.stdout.decode().splitlines()
            environment = dict(line.split("=", 1) for line in lines if "=" in line)
            assert lines[0] == str(work.path)
            assert set(environment) <= {"PATH", "LANG", "HOME", "TMPDIR", "MINE", "PWD", "SHLVL", "_", "OLDPWD"}
            assert environment["MINE"] == "1"
            for name in ("HOME", "TMPDIR"):
                assert not Path(environment[name]).is_relative_to(work.path)
            assert "0022" in lines

        inside(store, fn)

    @needs("sh")
    def test_writes_both_outputs_into_the_log_in_order(self, store: Store) -> None:
        assert inside(store, lambda work: work.run(["sh", "-c", "echo 1; echo 2 >&2; echo 3"])) == "1\n2\n3\n"

    @needs("sh")
    def test_captures_standard_output_alone(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            assert work.run(["sh", "-c", "echo out; echo err >&2"], capture=True).stdout == b"out\n"

        assert inside(store, fn) == "err\n"

    @needs("sh")
    def test_feeds_input_and_else_nothing(self, store: Store) -> None:
        big = b"x" * 1_000_000

        def fn(work: Workspace) -> None:
            assert work.run(["cat"], input=big, capture=True).stdout == big
            assert work.run(["cat"], capture=True).stdout == b""

        inside(store, fn)

    @needs("sh")
    def test_in_a_folder_of_the_tree(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            (work.path / "sub").mkdir()
            work.run(["touch", "f"], cwd="sub")

        with store.build("a", fn) as result:
            assert files(result.path) == {"sub/f": ""}

    @pytest.mark.parametrize("cwd", ["..", "/", "/tmp", "sub/../..", "missing", "a\0b"])
    @needs("sh")
    def test_in_no_folder_outside(self, store: Store, cwd: str) -> None:
        def fn(work: Workspace) -> None:
            with pytest.raises(StoreError):
                work.run(["true"], cwd=cwd)

        inside(store, fn)

    @needs("sh")
    def test_that_is_not_to_be_checked_returns_the_status(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            assert work.run(["sh", "-c", "exit 3"], check=False).returncode == 3
            assert work.run(["sh", "-c", "kill -9 $$"], check=False).returncode == -9

        inside(store, fn)

    @pytest.mark.parametrize("check", [True, False])
    def test_of_a_missing_program_says_so(self, store: Store, check: bool) -> None:
        def fn(work: Workspace) -> None:
            with pytest.raises(CommandFailed, match="no-such-program") as caught:
                work.run(["no-such-program"], check=check)
            assert caught.value.returncode is None

        inside(store, fn)

    @needs("sh")
    def test_past_its_timeout_is_ended_with_all_it_started(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            with pytest.raises(CommandFailed, match="longer than 0.2 s"):
                work.run(["sh", "-c", "sleep 1000 & echo $! > pid; wait"], timeout=0.2)
            assert not _runs(int((work.path / "pid").read_text()))

        inside(store, fn)

    @needs("sh")
    def test_ends_what_it_left_in_the_background(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            work.run(["sh", "-c", "sleep 1000 & echo $! > pid"])
            assert not _runs(int((work.path / "pid").read_text()))

        inside(store, fn)

    @needs("sh")
    def test_of_a_cancelled_build_is_ended(self, store: Store) -> None:
        pids: list[int] = []

        def fn(work: Workspace) -> None:
            try:
                work.run(["sh", "-c", "echo $$ > part; mv part pid; exec sleep 1000"])
            finally:
                pids.append(int((work.path / "pid").read_text()))
                assert work.cancelled

        build = store.start("a", fn)
        log = build.log
        until(lambda: list(store.root.glob("in-progress/a~*/rootfs/pid")))
        build.cancel()
        with log.tail() as reader:
            assert b"".join(reader) == b""

        with pytest.raises(Cancelled):
            build.wait()
        assert not _runs(pids[0])

    @needs("root")
    @needs("sh")
    def test_as_another_user_has_a_home_of_its_own(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            os.chmod(work.path, 0o777)
            script = "id -un; touch $HOME/x $TMPDIR/y mine; echo $HOME"
            name, home = work.run(["sh", "-c", script], user="nobody", capture=True).stdout.decode().split()
            assert name == "nobody"
            assert not Path(home).exists()
            assert os.stat(work.path / "mine").st_uid == 65534

        inside(store, fn)

    @needs("sh")
    def test_leaves_no_scratch(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            (work.scratch / "kept").mkdir()
            work.run(["sh", "-c", "mkdir -p $HOME/.cache/deep && chmod 0 $HOME/.cache"])

        inside(store, fn)

        assert left_in_progress(store.root) == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


class TestCopyIn:
    @needs("symlinks")
    def test_copies_files_links_and_folders_with_their_metadata(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "source"
        (source / "sub").mkdir(parents=True)
        (source / "f").write_text("1")
        os.chmod(source / "f", 0o640)
        os.utime(source / "f", ns=(1, 1_234_567_891))
        os.symlink("/etc/passwd", source / "link")

        def fn(work: Workspace) -> None:
            work.copy_in(source, "all/of/it")
            work.copy_in(source / "f", "g")
            work.copy_in(source / "link", "link")

        with store.build("a", fn) as result:
            copied = os.stat(result.path / "all/of/it/f")
            assert (copied.st_mtime_ns, stat.S_IMODE(copied.st_mode)) == (1_234_567_891, 0o640)
            assert os.readlink(result.path / "link") == "/etc/passwd"
            assert (result.path / "g").read_text() == "1"

    @pytest.mark.parametrize("dest", ["../x", "/x", "a/../../x", "", "a\0b"])
    def test_refuses_what_leaves_the_tree(self, store: Store, tmp_path: Path, dest: str) -> None:
        (tmp_path / "f").write_text("1")

        with pytest.raises(BuildFailed):
            store.build("a", lambda work: work.copy_in(tmp_path / "f", dest))

        assert left_in_progress(store.root) == []

    def test_of_a_missing_source_names_it(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(BuildFailed, match="missing-source"):
            store.build("a", lambda work: work.copy_in(tmp_path / "missing-source", "x"))

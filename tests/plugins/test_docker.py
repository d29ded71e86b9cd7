"""The backend `docker`: daemons, volumes, containers. What every backend must do is in test_docker_conformance.py."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pydantic
import pytest

import storebackends
import storebackends_docker
from storebackends import BuildFailed, Cancelled, NotFound, NotSupported, Store, StoreError, Workspace, process
from storebackends.plugin import Capability, Command, NoSpace
from storebackends_docker import DockerOptions, probe
from storebackends_docker.driver import DockerBackend
from tests.capabilities import needs
from tests.dockerd import IMAGE, Dockerd, dockerd
from tests.stores import WAIT, files, kept, python, until, writes

pytestmark = needs("docker")
MODES: dict[str, dict[str, Any]] = {
    "host": {"access": "host"},
    "containers on the host": {"access": "host", "image": IMAGE},
    "containers only": {"access": "container", "image": IMAGE},
}
every_mode = pytest.mark.parametrize("mode", MODES)


def opened(root: Path, daemon: Dockerd, mode: str = "host", **options: Any) -> Store:
    options = {"host": daemon.host, "durability": "none", **MODES[mode], **options}
    return storebackends.open_store(backend="docker", path=root, **options)


def ours(daemon: Dockerd, root: Path) -> list[str]:
    """The volumes and containers of the store in *root*, by a way that is not the backend's."""
    uuid = json.loads((root / "store.json").read_text())["uuid"]
    return [name for name in [*daemon.volumes(), *daemon.containers()] if uuid in name]


def runs(script: str, **options: Any) -> Callable[[Workspace], None]:
    def fn(work: Workspace) -> None:
        work.run(["sh", "-c", script], **options)

    return fn


def said(store: Store, id: str, script: str) -> str:
    """What a script prints in a build on *id*."""
    with store.build(f"ask-{os.urandom(4).hex()}", runs(script), base=id) as result:
        return b"".join(result.log.tail()).decode()


class TestOptions:
    def test_the_spec_names_this_driver(self) -> None:
        (spec,) = storebackends_docker.storebackends_backends()

        assert spec.name == "docker"
        assert spec.factory == f"{DockerBackend.__module__}:{DockerBackend.__name__}"
        assert spec.options is DockerOptions

    @pytest.mark.parametrize(
        "options",
        [
            {"access": "container"},
            {"access": "folder"},
            {"image": "--privileged"},
            {"host": "-v"},
            {"host": "/run/docker.sock"},
            {"network": "-x"},
            {"images": IMAGE},
        ],
    )
    def test_that_mean_nothing_or_could_be_options_of_a_command_are_refused(self, options: dict[str, object]) -> None:
        with pytest.raises(pydantic.ValidationError):
            DockerOptions.model_validate(options)

    def test_the_default_daemon_is_probed_and_never_chosen_unasked(
        self, overlay2: Dockerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DOCKER_HOST", overlay2.host)
        there = probe(tmp_path)
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
        missing = probe(tmp_path)

        assert (there.usable, there.rank) == (True, 0)
        assert not missing.usable
        assert "start its daemon" in missing.fix

    def test_a_store_without_the_docker_command_is_explained(
        self, overlay2: Dockerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))

        with pytest.raises(NotSupported, match="install the docker command line"):
            opened(tmp_path / "store", overlay2)


class TestBuilds:
    @every_mode
    def test_a_step_and_a_deletion_leave_one_volume_or_none(self, overlay2: Dockerd, tmp_path: Path, mode: str) -> None:
        with opened(tmp_path / "store", overlay2, mode) as store:
            store.build("base", runs("echo old >file; mkdir folder; echo x >folder/inner")).release()
            store.build("child", runs("echo new >file"), base="base").release()

            assert len(ours(overlay2, store.root)) == 2
            assert said(store, "base", "cat file folder/inner") == "old\nx\n"
            assert said(store, "child", "cat file folder/inner") == "new\nx\n"
            for id in sorted(store.ids(), reverse=True):
                store.delete(id, recursive=True)
            assert ours(overlay2, store.root) == []

    @pytest.mark.parametrize(
        ("mode", "step", "removal"), [("host", 1, 1), ("containers on the host", 1, 2), ("containers only", 3, 1)]
    )
    def test_a_step_starts_few_programs(
        self, overlay2: Dockerd, tmp_path: Path, mode: str, step: int, removal: int
    ) -> None:
        def nothing(work: Workspace) -> None:
            pass

        with opened(tmp_path / "store", overlay2, mode) as store:
            store.build("base", nothing).release()
            before = process.started

            store.build("child", nothing, base="base").release()
            built = process.started
            kept(store, "child").release()
            hit = process.started
            store.delete("child")

            assert (built - before, hit - built, process.started - hit) == (step, 0, removal)

    @pytest.mark.parametrize("mode", ["containers on the host", "containers only"])
    def test_a_command_runs_in_a_container_with_the_tree_at_build(
        self, overlay2: Dockerd, tmp_path: Path, mode: str
    ) -> None:
        found: dict[str, bytes] = {}

        def fn(work: Workspace) -> None:
            work.run(["mkdir", "-p", "a/b"])
            found["cwd"] = work.run(["pwd"], cwd="a/b", capture=True).stdout
            found["stdin"] = work.run(["cat"], input=b"given", capture=True).stdout
            found["env"] = work.run(
                ["sh", "-c", "echo $SECRET $DOCKER_HOST $HOME $TMPDIR"],
                env={"SECRET": "s3", "DOCKER_HOST": "tcp://its-own"},
                capture=True,
            ).stdout
            found["user"] = work.run(["id", "-u"], user=1234, capture=True).stdout
            work.run(["ln", "-s", "/tmp", "link"])
            for cwd in ("link", "a/missing", "../x", "/tmp"):
                with pytest.raises(StoreError):
                    work.run(["pwd"], cwd=cwd)
            assert work.run(["false"], check=False).returncode == 1

        with opened(tmp_path / "store", overlay2, mode) as store, store.build("id", fn):
            assert found == {
                "cwd": b"/build/a/b\n",
                "stdin": b"given",
                "env": b"s3 tcp://its-own /tmp /tmp\n",
                "user": b"1234\n",
            }

    def test_a_value_of_the_environment_is_on_no_command_line(self, overlay2: Dockerd, tmp_path: Path) -> None:
        commands: list[Command] = []

        with opened(tmp_path / "store", overlay2, "containers only") as store:
            command = store._backend.command
            store._backend.command = lambda *a: commands.append(made := command(*a)) or made  # type: ignore
            store.build("id", runs("true", env={"TOKEN": "s3cret"})).release()

        assert not any("s3cret" in word for word in commands[0].argv)
        assert commands[0].env["TOKEN"] == "s3cret"

    def test_a_copy_replaces_what_it_meets_and_follows_no_link(self, overlay2: Dockerd, tmp_path: Path) -> None:
        source = tmp_path / "source"
        (source / "folder").mkdir(parents=True)
        (source / "folder" / "inner").write_text("new")
        (source / "run me").write_text("#!")
        os.chown(source / "run me", 1234, 555)
        (source / "run me").chmod(0o4750)  # after the owner, which clears it
        (source / "link").symlink_to("nowhere")

        def fn(work: Workspace) -> None:
            work.run(
                ["sh", "-c", "mkdir -p at/folder; echo old >at/folder/inner; ln at/folder/inner other; ln -s /tmp out"]
            )
            work.copy_in(source, "at")
            work.copy_in(source / "run me", "-odd $(name)")
            work.copy_in(source / "link", "a/b/link")
            for bad in ("out/x", "../x", "/x", "", ".", "at/folder"):
                with pytest.raises(StoreError):
                    work.copy_in(source / "run me", bad)
            for bad in ("out", "out/x", "at/folder/inner"):
                with pytest.raises(StoreError):
                    work.copy_in(source, bad)
            work.run(
                ["sh", "-c", "cat at/folder/inner other; stat -c '%a %u %g' -- '-odd $(name)'; ls -l a/b at; ls /tmp"]
            )

        with opened(tmp_path / "store", overlay2, "containers only") as store, store.build("id", fn) as result:
            printed = b"".join(result.log.tail()).decode()
        assert printed.startswith("newold\n4750 1234 555\n")
        assert printed.count("link -> nowhere") == 2

    @every_mode
    def test_an_image_becomes_a_base(self, overlay2: Dockerd, tmp_path: Path, mode: str) -> None:
        with opened(tmp_path / "store", overlay2, mode) as store:
            store.build("base", lambda work: work.import_image(IMAGE)).release()
            with pytest.raises(BuildFailed):
                store.build("missing", lambda work: work.import_image("localhost:1/missing"))

            assert said(store, "base", "bin/busybox echo it runs; ls -l bin/sh").startswith("it runs\nlrwxrwxrwx")
            assert len(ours(overlay2, store.root)) == 2

    def test_what_containers_drop_is_no_capability_of_theirs(self, overlay2: Dockerd, tmp_path: Path) -> None:
        source = tmp_path / "file"
        with source.open("wb") as file:
            file.truncate(1 << 20)
        os.setxattr(source, "user.x", b"1")
        os.utime(source, ns=(10**18 + 1, 10**18 + 1))

        with opened(tmp_path / "store", overlay2, "containers only") as store:
            lacks = frozenset(Capability) - store.capabilities
            with pytest.raises(StoreError):  # also by name
                store.build("path", lambda work: work.path)
            store.build("id", lambda work: work.copy_in(source, "file")).release()
            store.build("child", writes(), base="id").release()
        with opened(tmp_path / "store", overlay2) as store, kept(store, "child") as result:
            found = (result.path / "file").stat()
            attributes = os.listxattr(result.path / "file")

        assert {
            Capability.HOST_TREE,
            Capability.XATTRS,
            Capability.NS_MTIME,
            Capability.SPARSE,
            Capability.ACLS,
        } <= lacks
        assert (found.st_mtime_ns % 10**9, found.st_blocks * 512, attributes) == (0, 1 << 20, [])

    def test_trees_of_containers_are_read_where_the_host_can(self, overlay2: Dockerd, tmp_path: Path) -> None:
        with opened(tmp_path / "store", overlay2, "containers only") as store:
            with store.build("id", runs("echo 1 >file")) as result, pytest.raises(NotSupported, match="as root"):
                print(result.path)
            assert store.size("id").bytes < 10_000
            assert 0 < store.usage().free < store.usage().total
            with pytest.raises(NotSupported), store.cache("name"):
                pass
        with opened(tmp_path / "store", overlay2) as store, kept(store, "id") as result:
            assert files(result.path) == {"file": "1\n"}

    def test_results_survive_a_power_cut_only_where_the_disk_can_be_synced(
        self, overlay2: Dockerd, tmp_path: Path
    ) -> None:
        with opened(tmp_path / "full", overlay2, durability="full") as store:
            store.build("id", writes(f="1")).release()
            assert (store.root / "result" / "id" / "synced").exists()
        with pytest.raises(NotSupported, match='durability = "none"'):
            opened(tmp_path / "group", overlay2, "containers only", durability="group")


class TestCancelling:
    @pytest.mark.parametrize("mode", ["containers on the host", "containers only"])
    def test_a_cancelled_build_takes_its_container_with_it(self, overlay2: Dockerd, tmp_path: Path, mode: str) -> None:
        with opened(tmp_path / "store", overlay2, mode) as store:
            build = store.start("id", runs("echo begun; sleep 600"))
            with build.log.tail() as reader:
                assert next(reader) == b"begun\n"
            build.cancel()

            with pytest.raises(Cancelled):
                build.wait(WAIT)
            until(lambda: ours(overlay2, store.root) == [])

    def test_a_container_that_outlives_its_time_is_gone_before_the_build_goes_on(
        self, overlay2: Dockerd, tmp_path: Path
    ) -> None:
        def fn(work: Workspace) -> None:
            with pytest.raises(StoreError, match="ran longer"):
                work.run(["sh", "-c", "while :; do echo x >>file; sleep 0.01; done"], timeout=1)
            assert overlay2.containers() == []
            work.run(["touch", "after"])

        with opened(tmp_path / "store", overlay2, "containers on the host") as store, store.build("id", fn) as result:
            assert set(files(result.path)) == {"file", "after"}


KILLED = """
import sys, storebackends
root, host, mode = sys.argv[1:]
options = {"host": {"access": "host"}, "container": {"access": "container", "image": "storebackends-tests"}}[mode]
with storebackends.open_store(backend="docker", path=root, durability="none", host=host, **options) as store:
    print("open", flush=True)
    for n in range(1000):
        with store.build(f"id-{n}", lambda work: work.run(["sh", "-c", "echo 1 >new"]), base="base"):
            pass
        store.delete(f"id-{n}")
"""


class TestKills:
    def _kill(self, daemon: Dockerd, root: Path, rng: random.Random, modes: list[str]) -> None:
        """Kill a builder at a random moment; then nothing but the base and whole results may be there."""
        mode = rng.choice(modes)
        with python(KILLED, root, daemon.host, mode) as builder:
            assert builder.stdout
            assert builder.stdout.readline() == b"open\n"
            threading.Event().wait(rng.uniform(0, 1.5 if mode == "container" else 0.4))
            os.kill(builder.pid, signal.SIGKILL)
        with opened(root, daemon, "containers on the host") as store:
            for id in store.ids():
                with kept(store, id) as result:
                    assert files(result.path) == ({"file": "x"} if id == "base" else {"file": "x", "new": "1\n"})
            assert len(ours(daemon, root)) == len(list(store.ids()))
            assert [os.listdir(root / room) for room in ("in-progress", "trash", "scratch")] == [[], [], []]
            # A row of the index may outlive its killed builder.
            assert {finding.kind for finding in store.fsck().findings} <= {"index"}
            for id in [id for id in store.ids() if id != "base"]:
                store.delete(id)

    def _kill_some(self, daemon: Dockerd, root: Path, rng: random.Random, count: int) -> None:
        with opened(root, daemon) as store:
            store.build("base", writes(file="x")).release()
        other = [daemon("volume", "create", name).strip() for name in ("storebackends-other", f"foreign-{root.name}")]
        with opened(root.with_name("other"), daemon) as neighbour:
            neighbour.build("theirs", writes(file="theirs")).release()

            for _ in range(count):
                self._kill(daemon, root, rng, ["host", "container"])

            with kept(neighbour, "theirs") as result:
                assert files(result.path) == {"file": "theirs"}
            assert set(other) <= set(daemon.volumes())
            neighbour.delete("theirs")
        with opened(root, daemon) as store:
            store.delete("base")
        assert ours(daemon, root) == []
        daemon("volume", "rm", *other)

    @pytest.mark.slow
    def test_ten_killed_builders_leave_nothing_and_touch_nobody_else(
        self, overlay2: Dockerd, tmp_path: Path, rng: random.Random
    ) -> None:
        self._kill_some(overlay2, tmp_path / "store", rng, 10)

    @pytest.mark.soak
    def test_fifty_killed_builders(self, vfs: Dockerd, tmp_path: Path, rng: random.Random) -> None:
        self._kill_some(vfs, tmp_path / "store", rng, 50)

    def test_a_container_of_a_killed_builder_is_ended_before_its_volume(
        self, overlay2: Dockerd, tmp_path: Path
    ) -> None:
        root = tmp_path / "store"
        program = KILLED.replace("echo 1 >new", "while :; do echo x >>new; done").replace(', base="base"', "")
        with python(program, root, overlay2.host, "container") as builder:
            until(lambda: any("Up" in line for line in overlay2("ps", "--format", "{{.Status}}").splitlines()))
            os.kill(builder.pid, signal.SIGKILL)
            assert ours(overlay2, root) != []

        opened(root, overlay2, "containers only").close()

        assert ours(overlay2, root) == []


class TestOutsiders:
    @every_mode
    def test_a_base_that_was_pruned_is_no_empty_base(self, overlay2: Dockerd, tmp_path: Path, mode: str) -> None:
        with opened(tmp_path / "store", overlay2, mode) as store:
            store.build("base", runs("echo 1 >file")).release()
            (volume,) = ours(overlay2, store.root)
            overlay2("volume", "rm", volume)
            for again in (False, True):
                if again:
                    overlay2("volume", "create", volume)

                with pytest.raises(NotFound, match=r"removed or replaced.*delete 'base' and build it again"):
                    store.build("child", runs("true"), base="base")
                assert store.result("child") is None
                assert [f.what for f in store.fsck().findings if f.kind != "index"] == ["base"]
                overlay2("volume", "rm", "--force", volume)

            store.delete("base")
            store.build("base", runs("echo 2 >file")).release()
            assert said(store, "base", "cat file") == "2\n"

    @every_mode
    def test_a_tree_that_is_pruned_while_it_is_built_is_not_published(
        self, overlay2: Dockerd, tmp_path: Path, mode: str
    ) -> None:
        with opened(tmp_path / "store", overlay2, mode) as store:

            def fn(work: Workspace) -> None:
                work.run(["touch", "file"])
                overlay2("volume", "rm", *ours(overlay2, store.root))
                if mode == "host":
                    work.path.mkdir(parents=True)

            with pytest.raises(StoreError, match="removed or replaced|its function removed"):
                store.build("id", fn)
            assert store.result("id") is None
        opened(tmp_path / "store", overlay2, mode).close()
        assert ours(overlay2, tmp_path / "store") == []

    def test_a_volume_that_somebody_else_uses_stays_until_they_are_done(
        self, overlay2: Dockerd, tmp_path: Path
    ) -> None:
        with opened(tmp_path / "store", overlay2) as store:
            store.build("id", writes(file="x")).release()
            (volume,) = ours(overlay2, store.root)
            overlay2("create", "--name", "theirs", "--volume", f"{volume}:/x", IMAGE, "true")

            with pytest.raises(StoreError, match="in use"):
                store.delete("id")

            assert store.result("id") is None
            assert "theirs" in overlay2.containers()
            overlay2("rm", "theirs")
        opened(tmp_path / "store", overlay2).close()
        assert ours(overlay2, tmp_path / "store") == []

    def test_orphans_are_told_and_repaired_and_whatever_lives_is_kept(self, overlay2: Dockerd, tmp_path: Path) -> None:
        begun, go = threading.Event(), threading.Event()

        def waits(work: Workspace) -> None:
            (work.path / "file").write_text("x")
            begun.set()
            assert go.wait(WAIT)

        with opened(tmp_path / "store", overlay2) as store:
            build = store.start("building", waits)
            assert begun.wait(WAIT)
            with store.cache("lent") as lent:
                uuid = json.loads((store.root / "store.json").read_text())["uuid"]
                label = f"storebackends.store={uuid}"
                orphan = overlay2("volume", "create", "--label", label, f"storebackends-{uuid}-0123").strip()
                quarantine = store.root / "quarantine"
                quarantine.mkdir()
                store.build("damaged", writes(file="x")).release()
                os.rename(store.root / "result" / "damaged", quarantine / "damaged~0123")

                report = store.fsck(repair=True)
                opened(tmp_path / "store", overlay2).close()

                assert [f.what for f in report.findings if f.kind == "outside"] == [orphan]
                assert orphan not in ours(overlay2, store.root)
                assert len(ours(overlay2, store.root)) == 3
                (lent / "file").write_text("x")
            go.set()
            with build.wait(WAIT) as result:
                assert files(result.path) == {"file": "x"}

    def test_a_mount_that_a_build_left_in_its_tree_is_not_emptied(
        self, overlay2: Dockerd, tmp_path: Path, small_tmpfs: Callable[..., AbstractContextManager[Path]]
    ) -> None:
        from tests.capabilities import mounted

        with small_tmpfs() as precious, opened(tmp_path / "store", overlay2) as store:
            (precious / "file").write_text("precious")
            with store.build("id", writes(file="x")) as result:
                tree = result.path
            with mounted(tree / "mnt", "--bind", precious), pytest.raises(StoreError, match="mounted"):
                store.delete("id")
            assert (precious / "file").read_text() == "precious"
        opened(tmp_path / "store", overlay2).close()
        assert ours(overlay2, tmp_path / "store") == []


class TestDaemons:
    @pytest.fixture
    def own(self) -> Iterator[Dockerd]:
        with dockerd("vfs") as daemon:
            yield daemon

    def test_a_daemon_that_stops_fails_what_needs_it_and_all_works_when_it_is_back(
        self, own: Dockerd, tmp_path: Path
    ) -> None:
        with opened(tmp_path / "store", own) as store:
            store.build("base", writes(file="x")).release()
            store.build("gone", writes(file="x")).release()
            own.stop()

            for attempt in (
                lambda: store.build("child", writes(), base="base"),
                lambda: store.delete("gone"),
                lambda: opened(tmp_path / "new", own),
            ):
                with pytest.raises(StoreError, match=r"does not answer.*start it"):
                    attempt()
            with kept(store, "base") as result:
                assert files(result.path) == {"file": "x"}

            own.start()
            with store.build("child", writes(new="1"), base="base") as result:
                assert files(result.path) == {"file": "x", "new": "1"}
        with opened(tmp_path / "store", own) as store:
            assert sorted(store.ids()) == ["base", "child"]
            assert len(ours(own, store.root)) == 2

    def test_a_daemon_that_dies_with_a_command_fails_the_build(self, own: Dockerd, tmp_path: Path) -> None:
        with opened(tmp_path / "store", own, "containers only") as store:
            build = store.start("id", runs("echo begun; sleep 600"))
            with build.log.tail() as reader:
                assert next(reader) == b"begun\n"
            own.stop()

            with pytest.raises(StoreError):
                build.wait(WAIT)

            own.start()
        with opened(tmp_path / "store", own, "containers only") as store:
            assert ours(own, store.root) == []
            store.build("id", runs("true")).release()

    @pytest.mark.parametrize("mode", ["host", "containers only"])
    def test_a_full_disk_of_the_daemon_is_told_and_the_store_works_when_there_is_room(
        self, tmp_path: Path, small_tmpfs: Callable[..., AbstractContextManager[Path]], mode: str
    ) -> None:
        source = tmp_path / "source"
        source.write_bytes(bytes(9 << 20))
        with small_tmpfs(size=48 << 20) as disk, dockerd("vfs", disk) as own:
            with opened(tmp_path / "store", own, mode) as store:
                store.build("base", lambda work: work.copy_in(source, "file")).release()
                ballast = disk / "ballast"
                free = os.statvfs(disk)
                ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - (5 << 20))))

                with pytest.raises((NoSpace, BuildFailed), match=r"(?i)no space"):
                    store.build("child", writes(), base="base")
                assert store.result("child") is None

                ballast.unlink()
                store.build("child", writes(), base="base").release()
            assert len(ours(own, tmp_path / "store")) == 2

    def test_a_host_that_is_nobody_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"unix:///nowhere/sock.*does not answer"):
            storebackends.open_store(backend="docker", path=tmp_path / "store", host="unix:///nowhere/sock")


def test_a_tree_is_closed_to_other_users(overlay2: Dockerd, tmp_path: Path) -> None:
    with opened(tmp_path / "store", overlay2) as store, store.build("id", writes(file="x")) as result:
        above = [parent.stat().st_mode for parent in result.path.parents if parent.is_relative_to(overlay2.folder)]

    assert any(not mode & stat.S_IXOTH for mode in above)

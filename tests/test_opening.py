from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import platformdirs
import pytest

from storebackends import ConfigError, PluginError, StoreError, opening
from storebackends.locks import Locks
from storebackends.opening import open_store, sync
from tests.capabilities import needs
from tests.distributions import PLUGIN, install
from tests.stores import files, left_in_progress, open_copy, writes


def reboot(monkeypatch: pytest.MonkeyPatch, boot: str) -> None:
    monkeypatch.setattr(opening, "boot_id", lambda: boot)


def test_a_store_is_opened_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"default = 'b'\n[stores.a]\npath = '{tmp_path}/a'\n[stores.b]\npath = '{tmp_path}/b'\n")
    monkeypatch.setenv("STOREBACKENDS_CONFIG", str(config))

    with open_store("a") as a, open_store() as b:
        assert (a.root, b.root) == (tmp_path / "a", tmp_path / "b")
        assert (a.backend, a.durability) == ("copy", "group")


def test_without_a_configuration_there_is_a_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":  # its folders are not told by the environment
        monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: tmp_path)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with open_store() as store, store.build("a", writes(f="1")) as result:
        assert store.root.is_relative_to(tmp_path)
        assert files(result.path) == {"f": "1"}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"backend": "copy"}, ConfigError, "backend= and path="),
        ({"path": "/x"}, ConfigError, "backend= and path="),
        ({"backend": "zfs"}, ConfigError, "dataset: is missing"),
        ({"name": "a", "backend": "copy", "path": "/x"}, ConfigError, "or nothing"),
        ({"backend": "cpoy", "path": "/x"}, PluginError, "did you mean 'copy'"),
        ({"backend": "copy", "path": "/x", "relfink": "auto"}, ConfigError, "did you mean 'reflink'"),
        ({"backend": "auto", "path": "/x", "reflink": "auto"}, ConfigError, "reflink: is an option of no backend"),
        ({"backend": "copy", "path": "/x", "durability": "some"}, ConfigError, "'some' is none of group, full, none"),
    ],
)
def test_wrong_arguments_are_told(arguments: dict[str, str], error: type[StoreError], match: str) -> None:
    with pytest.raises(error, match=match):
        open_store(**arguments)  # type: ignore[arg-type]


class TestAuto:
    """Which one is chosen where is tested with the backends."""

    @pytest.fixture(autouse=True)
    def site(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "site"
        folder.mkdir()
        monkeypatch.syspath_prepend(folder)
        return folder

    def offer(self, site: Path, answer: str) -> None:
        """Have a plugin that gives this answer, and keeps its trees as copy does."""
        source = PLUGIN.replace("toy_driver:Toy", "storebackends_copy.driver:CopyBackend")
        source = source.replace(
            "class ToyOptions(Options):", "class ToyOptions(Options):\n        reflink: str = 'auto'"
        )
        install(site, "toys", {"toy": "toy_plugin"}, toy_plugin=source.replace("Support(True)", answer))

    def test_the_best_is_chosen_and_kept_in_the_store(self, site: Path, tmp_path: Path) -> None:
        self.offer(site, "Support(not (path.parent / 'gone').exists(), rank=1000)")
        with open_store(backend="auto", path=tmp_path / "store") as store:
            assert store.backend == "toy"
        (tmp_path / "gone").touch()

        with open_store(backend="auto", path=tmp_path / "store") as again:
            assert again.backend == "toy"
        assert json.loads((tmp_path / "store" / "store.json").read_text())["backend"] == "toy"

    def test_a_store_that_was_made_stays_what_it_is(self, site: Path, tmp_path: Path) -> None:
        open_copy(tmp_path / "store").close()
        self.offer(site, "Support(True, rank=1000)")

        with open_store(backend="auto", path=tmp_path / "store") as store:
            assert store.backend == "copy"

    def test_it_can_be_configured(self, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offer(site, "Support(True, rank=1000)")
        config = tmp_path / "config.toml"
        config.write_text(f"stores.a = {{path = '{tmp_path}/a', backend = 'auto'}}")
        monkeypatch.setenv("STOREBACKENDS_CONFIG", str(config))

        with open_store() as store, store.build("a", writes(f="1")) as result:
            assert (store.backend, files(result.path)) == ("toy", {"f": "1"})

    def test_a_folder_that_is_no_store_is_refused_as_ever(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()

        with pytest.raises(ConfigError, match="is a file, not a folder"):
            open_store(backend="auto", path=tmp_path / "file")


class TestRoot:
    @needs("modes")
    def test_is_made_closed_to_others(self, tmp_path: Path) -> None:
        with open_copy(tmp_path / "new" / "store") as store:
            assert stat.S_IMODE(os.stat(store.root).st_mode) == 0o700

    def test_that_is_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")

        with pytest.raises(ConfigError, match="is a file"):
            open_copy(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    def test_of_another_program_is_refused_and_left_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "in-progress").mkdir()
        (tmp_path / "in-progress" / "a~0123").mkdir()
        os.chmod(tmp_path, 0o755)
        mode = os.stat(tmp_path).st_mode

        with pytest.raises(ConfigError, match="holds other things .*'in-progress'"):
            open_copy(tmp_path)
        assert (tmp_path / "in-progress" / "a~0123").is_dir()
        assert os.stat(tmp_path).st_mode == mode

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "1"}', '{"format": 1}'])
    def test_with_a_broken_marker_is_refused(self, tmp_path: Path, content: str) -> None:
        open_copy(tmp_path / "store").close()
        (tmp_path / "store" / "store.json").write_text(content)

        with pytest.raises(ConfigError, match="store.json"):
            open_copy(tmp_path / "store")

    def test_of_a_newer_format_is_refused(self, tmp_path: Path) -> None:
        open_copy(tmp_path / "store").close()
        marker = json.loads((tmp_path / "store" / "store.json").read_text())
        (tmp_path / "store" / "store.json").write_text(json.dumps(marker | {"format": 99}))

        with pytest.raises(ConfigError, match="format 99.*upgrade"):
            open_copy(tmp_path / "store")

    def test_of_another_backend_or_durability_is_refused(self, tmp_path: Path) -> None:
        open_copy(tmp_path / "store").close()

        with pytest.raises(ConfigError, match="'none', not 'full'"):
            open_store(backend="copy", path=tmp_path / "store", durability="full")
        with open_store(backend="copy", path=tmp_path / "store") as store:
            assert store.durability == "none"

    @needs("unprivileged")
    def test_that_is_not_writable_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir(mode=0o500)

        with pytest.raises(StoreError, match="cannot be used as a store.*ermission"):
            open_copy(tmp_path / "closed" / "store")

    @needs("tmpfs")
    def test_without_room_for_a_marker_is_refused(
        self, small_tmpfs: Callable[..., AbstractContextManager[Path]]
    ) -> None:
        with small_tmpfs(size=1 << 20) as folder:
            with pytest.raises(OSError, match="space"), (folder / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(1 << 16))
            with pytest.raises(StoreError, match="space"):
                open_copy(folder / "store")

    def test_keeps_what_is_not_the_stores(self, tmp_path: Path) -> None:
        with open_copy(tmp_path / "store") as store:
            store.build("a", writes(f="1")).release()
        for name in ("mine", "result/mine.txt", "in-progress/notes", "failed/x"):
            (tmp_path / "store" / name).write_text("kept")

        with open_copy(tmp_path / "store") as store:
            assert list(store.ids()) == ["a"]
        for name in ("mine", "result/mine.txt", "in-progress/notes", "failed/x"):
            assert (tmp_path / "store" / name).read_text() == "kept"


class TestReboot:
    def test_drops_what_may_not_have_reached_the_disk_and_what_was_built_on_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reboot(monkeypatch, "first")
        with open_store(backend="copy", path=tmp_path / "store") as store:
            for id, base in (("a", None), ("b", "a"), ("c", "b"), ("d", "a"), ("e", None)):
                store.build(id, writes(f=id), base=base).release()
        (tmp_path / "store" / "result" / "b" / "synced").unlink()
        (tmp_path / "store" / "result" / "e" / "synced").unlink()
        (tmp_path / "store" / "result" / "e" / "build.json").write_bytes(b"\0" * 200)  # as seen after a power cut

        reboot(monkeypatch, "second")
        with open_store(backend="copy", path=tmp_path / "store") as store:
            assert sorted(store.ids()) == ["a", "d"]
            store.build("b", writes(f="again"), base="a").release()
        assert left_in_progress(tmp_path / "store") == []

    def test_keeps_what_this_boot_published(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reboot(monkeypatch, "first")
        open_store(backend="copy", path=tmp_path / "store").close()
        reboot(monkeypatch, "second")
        with open_store(backend="copy", path=tmp_path / "store") as store:
            store.build("a", writes(f="1")).release()
        (tmp_path / "store" / "result" / "a" / "synced").unlink()

        with open_store(backend="copy", path=tmp_path / "store") as store:
            assert list(store.ids()) == ["a"]

    def test_of_a_throw_away_store_drops_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reboot(monkeypatch, "first")
        with open_copy(tmp_path / "store") as store:
            store.build("a", writes(f="1")).release()
        reboot(monkeypatch, "second")

        with open_copy(tmp_path / "store") as store:
            assert list(store.ids()) == ["a"]


def test_a_failure_to_open_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_copy(tmp_path / "store").close()
    with monkeypatch.context() as patch:
        patch.setattr(opening, "recover", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_copy(tmp_path / "store")

    with Locks(tmp_path / "store" / "locks").store(exclusive=True, timeout=0):
        pass


@needs("syncfs")
def test_sync_marks_what_others_left_unmarked(tmp_path: Path) -> None:
    called: list[int] = []
    store = open_store(backend="copy", path=tmp_path / "store", detach_barrier=lambda: called.append(1))
    store.build("a", writes(f="1")).release()
    store.close()
    mark = tmp_path / "store" / "result" / "a" / "synced"
    assert called == [1]
    assert not mark.exists()

    sync(tmp_path / "store")

    assert mark.exists()

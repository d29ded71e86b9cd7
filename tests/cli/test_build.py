"""Commands that build: recipes, single commands, first bases."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.capabilities import needs
from tests.cli.host import Host
from tests.stores import WAIT, files

posix = needs("sh")

STEPS = """
[args]
WHO = "world"

[steps.one]
run = "echo making; echo one > f"

[steps.two]
run = "echo hello {{ WHO }} >> f"
"""


def tree(host: Host, id: str) -> Path:
    return Path(host("result", id).out.removesuffix("\n"))


@posix
class TestBuild:
    def test_runs_what_is_not_there_and_shows_the_rest_as_cached(self, host: Host) -> None:
        recipe = host.recipe(STEPS)

        first = host("build", recipe).out.splitlines()
        again = host("build", recipe).out.splitlines()
        changed = host("build", recipe, "--set", "WHO=you").out.splitlines()

        assert first[:3] == ["-> one", "   $ echo making; echo one > f", "   making"]
        assert [line.split(" in ")[0] for line in first if line.startswith("<-")] == ["<- one: built", "<- two: built"]
        assert first[-1].startswith("2 steps in ")
        assert first[-1].endswith(": 2 built")
        assert again[:2] == ["<- one: cached", "<- two: cached"]
        assert again[-1].endswith(": 2 cached")
        assert changed[-1].endswith(": 1 cached, 1 built")

    def test_quiet_prints_the_ids_of_what_was_asked_for(self, host: Host) -> None:
        recipe = host.recipe(STEPS)

        last = host("build", "-q", recipe)
        both = host("build", "-q", recipe, "two", "one").out.split()

        assert last.err == ""
        assert last.out.split() == both[:1]
        assert [files(tree(host, id)) for id in both] == [{"f": "one\nhello world\n"}, {"f": "one\n"}]

    def test_json_is_alone_on_stdout(self, host: Host) -> None:
        recipe = host.recipe(STEPS)

        said = host("build", "--json", recipe)

        one, two = said.json
        assert (one["step"], one["outcome"], one["base"]) == ("one", "built", None)
        assert (two["step"], two["outcome"], two["base"]) == ("two", "built", one["id"])
        assert "<- two: built" in said.err

    def test_dry_run_tells_what_would_run_and_runs_nothing(self, host: Host) -> None:
        recipe = host.recipe(STEPS)
        host("build", recipe, "one")

        said = host("build", "--dry-run", recipe).out.splitlines()
        facts = host("build", "-n", "--json", recipe).json

        assert [line.split(" (")[0] for line in said] == ["one: cached", "two: would be built"]
        assert [(fact["step"], fact["cached"]) for fact in facts] == [("one", True), ("two", False)]
        assert host("ls").out.split() == [facts[0]["id"]]

    def test_takes_its_files_from_the_folder_it_is_told(self, host: Host, tmp_path: Path) -> None:
        recipe = host.recipe('[steps.copy]\ncopy = "f"\n')
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "f").write_text("other")

        id = host("build", "-q", recipe, "--source", tmp_path / "other").out.strip()

        assert files(tree(host, id)) == {"f": "other"}

    def test_stops_at_the_first_failure_and_names_the_step(self, host: Host) -> None:
        recipe = host.recipe('[steps.bad]\nrun = "echo why; exit 7"\n[steps.next]\nrun = "echo never"\n')

        said = host("build", recipe, code=1)

        assert "   why\n<- bad: failed in " in said.out
        assert "never" not in said.out
        assert "ended with status 7" in said.err
        assert f"in step 'bad' of {recipe}" in said.err

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--set", "WHO"], "'WHO' is not of the form NAME=VALUE"),
            (["--set", "WO=x"], "did you mean 'WHO'?"),
            (["on"], "did you mean 'one'?"),
            (["--source", "missing"], "'missing' does not exist"),
        ],
    )
    def test_refuses_what_the_recipe_has_not(self, host: Host, argv: list[str], message: str) -> None:
        assert message in host("build", host.recipe(STEPS), *argv, code=2).err


@posix
class TestRun:
    @needs("sh")
    def test_keeps_the_tree_the_command_leaves(self, host: Host) -> None:
        said = host("run", "--id", "app", "--", "sh", "-c", "echo working; echo text > f")

        assert files(tree(host, "app")) == {"f": "text\n"}
        assert said.out.splitlines()[:3] == ["-> app", "   $ sh -c 'echo working; echo text > f'", "   working"]

    @needs("sh")
    def test_without_an_id_does_not_run_again_on_the_same_base(self, host: Host) -> None:
        def run() -> tuple[str, str]:
            facts = host("run", "--json", "--base", "base", "sh", "-c", "date +%N > f").json
            return facts["id"], facts["outcome"]

        host("run", "--id", "base", "--", "true")
        first, again = run(), run()
        host("rm", "-r", "base")
        host("run", "--id", "base", "--", "true")
        rebuilt = run()

        assert first[1] == rebuilt[1] == "built"
        assert again == (first[0], "hit")
        assert rebuilt[0] != first[0]

    def test_shows_no_more_of_a_line_than_a_terminal_would(self, host: Host) -> None:
        said = host("run", "--", "printf", r"10%%\r20%%\n\033[1mbold\033[0m\a\nend")

        assert said.out.splitlines()[2:5] == ["   20%", "   bold\\x07", "   end"]


class TestImport:
    def test_of_a_folder(self, host: Host) -> None:
        (host.folder / "tree").mkdir()
        (host.folder / "tree" / "f").write_text("text")

        host("import", host.folder / "tree", "--id", "base")

        assert files(tree(host, "base")) == {"f": "text"}
        assert host("log", "base").out == f"copying {host.folder / 'tree'}\n"

    @posix
    def test_of_an_archive_by_name_or_by_pipe(self, host: Host) -> None:
        (host.folder / "f").write_text("text")
        packed = host.folder / "a.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(host.folder / "f", "f")

        host("import", packed, "--id", "named")
        with packed.open("rb") as stdin, host.start("import", "-q", "-", "--id", "piped", stdin=stdin) as process:
            out, err = process.communicate(timeout=WAIT)

        assert (process.returncode, out, err) == (0, b"piped\n", b"")
        assert files(tree(host, "named")) == files(tree(host, "piped")) == {"f": "text"}

    def test_under_an_id_that_is_taken_is_refused(self, host: Host) -> None:
        for name in ("old", "new"):
            (host.folder / name).mkdir()
            (host.folder / name / "f").write_text(name)
        host("import", host.folder / "old", "--id", "base")

        said = host("import", host.folder / "new", "--id", "base", code=3)

        assert "'base' was there already, and nothing was imported" in said.err
        assert files(tree(host, "base")) == {"f": "old"}

    @posix
    def test_of_no_archive_fails_the_build(self, host: Host) -> None:
        said = host("import", host.config, "--id", "base", code=1)

        assert f"{host.config} is damaged or cut short" in said.err
        assert host("ls").out == ""

    def test_of_what_is_no_file_asks_the_backend_for_an_image(self, host: Host) -> None:
        said = host("import", "debian:12", "--id", "base", code=1)

        assert "taking the image 'debian:12' is not possible here: this backend has none" in said.err
        assert "there is no file debian:12" in host("log", "base").out
        assert host("ls").out == ""

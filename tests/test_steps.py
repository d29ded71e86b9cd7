"""Recipes, run in a real store: what is built, what is not built again, and what is kept out of it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from storebackends import BuildFailed, BuildLog, Busy, RecipeError, Store
from storebackends.recipe import Recipe, load
from storebackends.steps import Planned, Watcher, plan, run_recipe
from tests.capabilities import PROJECT, needs
from tests.stores import files, left_in_progress, open_copy, writes

pytestmark = needs("sh")

SANDBOXES = [pytest.param("bwrap", marks=needs("bwrap")), "host"]
THREE = """
[recipe]
sandbox = "host"
[steps.first]
run = "echo 1 >one"
[steps.second]
copy = "input"
run = "cat one input >two"
[steps.third]
run = "cat two >three"
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_copy(tmp_path / "store") as store:
        yield store


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "input").write_text("in\n")
    return folder


class Recorder(Watcher):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    def started(self, planned: Planned) -> None:
        self.told.append(("started", planned.step.name))

    def running(self, planned: Planned, log: BuildLog) -> None:
        log.write(b"told of this log\n")
        self.told.append(("running", planned.step.name))

    def ended(self, planned: Planned, outcome: str, seconds: float) -> None:
        self.told.append(("ended", planned.step.name, outcome))


def recipe(folder: Path, text: str, name: str = "recipe") -> Recipe:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def outcomes(store: Store, recipe: Recipe, *targets: str) -> Mapping[str, str]:
    with run_recipe(store, recipe, targets) as done:
        return {step.planned.step.name: step.result.outcome for step in done}


def built(store: Store, recipe: Recipe) -> Mapping[str, str]:
    """The files of the last step, and what is in them."""
    with run_recipe(store, recipe) as done:
        return files(done[-1].result.path)


def log_of(store: Store, recipe: Recipe) -> str:
    """The log of the last step."""
    with store.log(plan(store, recipe)[-1].id).tail() as reader:
        return b"".join(reader).decode()


def holding(root: Path, needle: bytes) -> Sequence[str]:
    """The files below *root* that hold *needle*, links and names included."""
    found = []
    for path in root.rglob("*"):
        data = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        if needle in data or needle in os.fsencode(path.name):
            found.append(str(path.relative_to(root)))
    return found


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_step_is_its_base_its_copies_and_its_commands(store: Store, source: Path, sandbox: str) -> None:
    text = f"""
    [recipe]
    sandbox = "{sandbox}"
    [steps.base]
    run = "mkdir work; echo base >work/base"
    [steps.top]
    copy = {{ source = "input", dest = "work/copied" }}
    env = {{ WORD = "some words" }}
    workdir = "work"
    run = ["cat base copied >both", ["/bin/sh", "-c", 'echo "$WORD" "$0" >words', "a b"]]
    """

    tree = built(store, recipe(source, text))

    assert tree == {
        "work/base": "base\n",
        "work/copied": "in\n",
        "work/both": "base\nin\n",
        "work/words": "some words a b\n",
    }


def test_running_again_builds_nothing(store: Store, source: Path) -> None:
    first = outcomes(store, recipe(source, THREE))

    second = outcomes(store, recipe(source, THREE))

    assert set(first.values()) == {"built"}
    assert set(second.values()) == {"hit"}


def test_a_changed_step_is_built_again_with_what_follows(store: Store, source: Path) -> None:
    outcomes(store, recipe(source, THREE))

    changed = outcomes(store, recipe(source, THREE.replace("cat one input", "cat input one")))

    assert changed == {"first": "hit", "second": "built", "third": "built"}


def test_all_that_may_change_a_tree_is_in_the_id(store: Store, source: Path) -> None:
    variants = [
        "",
        'env = { A = "b" }',
        'shell = ["/bin/sh", "-c"]',
        'workdir = "sub"',
        "network = true",
        'secrets = { token = { env = "PATH" } }',
        'from = "scratch"',
    ]
    recipes = [recipe(source, THREE.replace('copy = "input"', f'copy = "input"\n{more}')) for more in variants]
    recipes.append(recipe(source, THREE.replace('copy = "input"', 'copy = { source = "input", dest = "other" }')))

    first, second, third = (
        {planned.id for planned in step} for step in zip(*(plan(store, each) for each in recipes), strict=True)
    )

    assert len(first) == 1
    assert len(second) == len(third) == len(recipes)


def test_a_changed_file_is_as_a_changed_step(store: Store, source: Path) -> None:
    outcomes(store, recipe(source, THREE))
    (source / "input").write_text("IN\n")

    changed = outcomes(store, recipe(source, THREE))

    assert changed == {"first": "hit", "second": "built", "third": "built"}


def test_what_cannot_change_a_tree_builds_nothing(store: Store, source: Path) -> None:
    outcomes(store, recipe(source, THREE))
    os.utime(source / "input", (0, 0))
    (source / "input").chmod(0o600)

    changed = outcomes(store, recipe(source, THREE.replace("[steps.third]", "[steps.third]\ntimeout = 60")))

    assert set(changed.values()) == {"hit"}


def test_recipes_share_the_steps_they_have_in_common_whatever_they_call_them(store: Store, source: Path) -> None:
    outcomes(store, recipe(source, THREE))
    other = '[recipe]\nsandbox = "host"\n[steps.one]\nrun = "echo 1 >one"\n[steps.other]\nrun = "cat one >other"'

    shared = outcomes(store, recipe(source, other, "other"))

    assert shared == {"one": "hit", "other": "built"}


def test_a_rebuilt_base_rebuilds_all_on_it(store: Store, source: Path) -> None:
    store.build("base", writes(file="1")).release()
    on_base = recipe(source, '[steps.a]\nfrom = { id = "base" }\nrun = "cat file >copy"')
    before = built(store, on_base)
    store.delete("base", recursive=True)
    store.build("base", writes(file="2")).release()

    after = built(store, on_base)

    assert (before["copy"], after["copy"]) == ("1", "2")


def test_only_what_a_target_takes_is_built(store: Store, source: Path) -> None:
    done = outcomes(store, recipe(source, THREE), "second")

    assert done == {"first": "built", "second": "built"}


def test_a_plan_has_the_ids_and_builds_nothing(store: Store, source: Path) -> None:
    three = recipe(source, THREE)

    planned = plan(store, three)

    assert list(store.ids()) == []
    with run_recipe(store, three) as done:
        assert [step.result.id for step in done] == [step.id for step in planned]
        assert [step.result.base for step in done] == [None, planned[0].id, planned[1].id]


def test_a_run_leases_its_steps(store: Store, source: Path) -> None:
    with run_recipe(store, recipe(source, THREE)) as done:
        last = done[-1].result.id
        with pytest.raises(Busy):
            store.delete(last)

    store.delete(last)
    assert store.result(last) is None


def test_a_watcher_hears_of_each_step(store: Store, source: Path) -> None:
    three = recipe(source, THREE)
    outcomes(store, three, "first")
    recorder = Recorder()

    with run_recipe(store, three, ["second"], recorder):
        pass

    assert recorder.told == [
        ("started", "first"),
        ("ended", "first", "hit"),
        ("started", "second"),
        ("running", "second"),
        ("ended", "second", "built"),
    ]
    assert "told of this log" in log_of(store, recipe(source, THREE.partition("[steps.third]")[0]))


def test_a_failing_step_stops_those_after_it_and_keeps_those_before(store: Store, source: Path) -> None:
    broken = recipe(source, THREE.replace("cat one input >two", "echo said; exit 3"))
    recorder = Recorder()

    with (
        pytest.raises(BuildFailed, match=r"echo said; exit 3 ended with status 3") as caught,
        run_recipe(store, broken, watcher=recorder),
    ):
        pytest.fail("it was to fail")

    assert caught.value.__notes__ == [f"in step 'second' of {source / 'recipe.toml'}"]
    assert [told for told in recorder.told if told[0] == "ended"] == [
        ("ended", "first", "built"),
        ("ended", "second", "failed"),
    ]
    with store.log(caught.value.id).tail() as reader:
        assert b"".join(reader).endswith(b"$ echo said; exit 3\nsaid\n")
    assert len(list(store.ids())) == 1


def test_an_interrupted_step_leaves_nothing(store: Store, source: Path) -> None:
    class Interrupting(Recorder):
        def running(self, planned: Planned, log: BuildLog) -> None:
            raise KeyboardInterrupt

    recorder = Interrupting()

    with pytest.raises(KeyboardInterrupt), run_recipe(store, recipe(source, THREE), watcher=recorder):
        pytest.fail("it was to be interrupted")

    assert recorder.told == [("started", "first"), ("ended", "first", "cancelled")]
    assert list(store.ids()) == left_in_progress(store.root) == []


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_step_that_takes_too_long_is_ended(store: Store, source: Path, sandbox: str) -> None:
    text = f'[recipe]\nsandbox = "{sandbox}"\n[steps.a]\nrun = ["true", "sleep 600"]\ntimeout = 1'

    with pytest.raises(BuildFailed, match="sleep 600 ran longer than"), run_recipe(store, recipe(source, text)):
        pytest.fail("it was to fail")

    assert left_in_progress(store.root) == []


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_secret_is_seen_by_its_step_and_kept_nowhere(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch, sandbox: str
) -> None:
    monkeypatch.setenv("TOKEN", "s3cret-1")
    (source / "key").write_text("s3cret-2")
    text = f"""
    [recipe]
    sandbox = "{sandbox}"
    [steps.a]
    secrets = {{ token = {{ env = "TOKEN" }}, key = {{ file = "key" }} }}
    run = "cat $SECRETS/token $SECRETS/key | tr s S >seen; ls $TMPDIR $HOME; env"
    """

    tree = built(store, recipe(source, text))

    assert tree == {"seen": "S3cret-1S3cret-2"}
    assert holding(store.root, b"s3cret-") == []
    assert left_in_progress(store.root) == []


def test_another_secret_builds_nothing(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = recipe(source, '[steps.a]\nsecrets = { token = { env = "TOKEN" } }\nrun = "true"')
    monkeypatch.setenv("TOKEN", "1")
    outcomes(store, one)
    monkeypatch.delenv("TOKEN")

    again = outcomes(store, one)

    assert again == {"a": "hit"}


def test_secrets_that_are_missing_are_found_out_before_anything_is_built(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKEN", raising=False)
    secrets = (
        '[steps.a]\nrun = "true"\n[steps.b]\nsecrets = { t = { env = "TOKEN" }, f = { file = "none" } }\nrun = "x"'
    )

    with pytest.raises(RecipeError) as caught, run_recipe(store, recipe(source, secrets)):
        pytest.fail("it was to fail")

    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        "steps.b.secrets.t",
        "steps.b.secrets.f",
    ]
    assert list(store.ids()) == []


def test_all_that_is_missing_is_reported_at_once(store: Store, source: Path) -> None:
    (source / "out").symlink_to("/etc")
    text = """
    [steps.a]
    from = { id = "debian" }
    copy = ["none", "out/passwd", "input"]
    [steps.b]
    copy = "input/below"
    """

    with pytest.raises(RecipeError) as caught:
        plan(store, recipe(source, text))

    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        "steps.a.copy.0",
        "steps.a.copy.1",
        "steps.a.from",
        "steps.b.copy.0",
    ]


def test_a_step_copies_from_another_one(store: Store, source: Path) -> None:
    text = """
    [steps.made]
    run = "mkdir -p out/sub; echo x >out/sub/kept; echo y >out/dropped.o"
    [steps.image]
    from = "scratch"
    copy = { step = "made", source = "out", dest = "opt", exclude = ["*.o"] }
    """

    tree = built(store, recipe(source, text))

    assert tree == {"opt/sub/kept": "x\n"}


def test_no_copy_leaves_the_tree_of_a_step_by_its_links(store: Store, source: Path) -> None:
    text = """
    [steps.hostile]
    run = "ln -s /etc out"
    [steps.image]
    copy = { step = "hostile", source = "out/passwd", dest = "stolen" }
    """

    with pytest.raises(BuildFailed, match="leads out of"), run_recipe(store, recipe(source, text)):
        pytest.fail("it was to fail")

    assert holding(store.root, b"root:x:0") == []


def test_no_copy_leaves_the_tree_it_goes_to(store: Store, source: Path) -> None:
    outside = source / "outside"
    outside.mkdir()
    text = f"""
    [steps.hostile]
    run = "ln -s {outside} out"
    [steps.image]
    copy = {{ source = "input", dest = "out/input" }}
    """

    with pytest.raises(BuildFailed), run_recipe(store, recipe(source, text)):
        pytest.fail("it was to fail")

    assert list(outside.iterdir()) == []


def test_a_file_that_changes_between_digest_and_copy_fails_the_step(store: Store, source: Path) -> None:
    text = f"""
    [recipe]
    sandbox = "host"
    [steps.a]
    run = "echo changed >{source}/input"
    [steps.b]
    copy = "input"
    """

    with pytest.raises(BuildFailed, match="input changed while it was copied"), run_recipe(store, recipe(source, text)):
        pytest.fail("it was to fail")

    assert len(list(store.ids())) == 1


def test_copies_are_of_one_time_and_have_plain_modes(store: Store, source: Path) -> None:
    folder = source / "folder"
    folder.mkdir(mode=0o700)
    for name, mode in (("program", 0o710), ("file", 0o600)):
        (folder / name).touch()
        (folder / name).chmod(mode)
        os.utime(folder / name, (0, 0))

    with run_recipe(store, recipe(source, '[steps.a]\ncopy = ["folder", "input"]')) as done:
        tree = done[-1].result.path
        found = {name: (tree / name).lstat() for name in ("folder", "folder/program", "folder/file", "input")}

    assert [stat.S_IMODE(status.st_mode) for status in found.values()] == [0o755, 0o755, 0o644, 0o644]
    assert len({status.st_mtime_ns for status in found.values()}) == 1


def test_on_the_host_published_files_that_hold_the_path_of_the_build_are_named(store: Store, source: Path) -> None:
    text = """
    [recipe]
    sandbox = "host"
    [steps.a]
    run = "pwd >path; ln -s $PWD/path link; echo clean >clean"
    """

    with run_recipe(store, recipe(source, text)) as done:
        warnings = done[0].warnings

    assert len(warnings) == 1
    assert warnings[0].startswith("step 'a': link, path hold the path")


@needs("bwrap")
def test_in_bubblewrap_the_path_of_the_build_is_always_the_same(store: Store, source: Path) -> None:
    text = '[recipe]\nsandbox = "bwrap"\n[steps.a]\nrun = "pwd >path"'

    with run_recipe(store, recipe(source, text)) as done:
        warnings, tree = done[0].warnings, files(done[0].result.path)

    assert warnings == []
    assert tree == {"path": "/build\n"}


@needs("bwrap")
def test_in_bubblewrap_the_store_cannot_be_seen(store: Store, source: Path) -> None:
    text = f'[recipe]\nsandbox = "bwrap"\n[steps.a]\nrun = "ls -A {store.root} >seen"'

    tree = built(store, recipe(source, text))

    assert tree == {"seen": ""}


@needs("bwrap")
def test_where_a_step_runs_is_part_of_its_id(store: Store, source: Path) -> None:
    text = '[recipe]\nsandbox = "host"\n[steps.a]\nrun = "true"'

    ids = [plan(store, recipe(source, text.replace("host", sandbox)))[0].id for sandbox in ("host", "bwrap", "auto")]

    assert ids[0] != ids[1] == ids[2]


def test_the_example_of_the_reference_is_valid(source: Path) -> None:
    reference = Path(__file__).parents[1] / "docs" / "reference" / "recipes.md"
    example = reference.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]

    steps = recipe(source, example).steps

    assert list(steps) == ["tools", "app", "image"]


@needs("source")
def test_the_example_builds_this_projects_wheel(store: Store) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling: pip install hatchling")
    example = load(PROJECT / "docs" / "examples" / "wheel.toml", {"PYTHON": sys.executable})

    first = outcomes(store, example)

    assert first == dict.fromkeys(["code", "wheel", "check"], "built")
    assert set(outcomes(store, example).values()) == {"hit"}

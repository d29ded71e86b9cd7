"""Recipes as files: what they mean, and what is said of those that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from storebackends import RecipeError
from storebackends.recipe import Copy, Recipe, Secret, load

GOOD = """
[recipe]
source = "src"
network = true
env = { LANG = "C", MODE = "fast" }

[args]
CC = "cc"

[steps.tools]
from = { id = "debian-12" }
run = "apt-get install {{ CC }}"

[steps.app]
copy = ["./Makefile", { source = "lib", dest = "vendor/lib", exclude = ["*.o"] }]
run = ["make CC={{CC}} all", ["./check", "a b"]]
env = { MODE = "slow" }
workdir = "vendor"
shell = ["/bin/bash", "-c"]
timeout = "1.5m"
network = false
secrets = { token = { env = "TOKEN" }, netrc = { file = "keys/netrc" } }

[steps.image]
from = "scratch"
copy = { step = "app", source = "out", dest = "." }
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, **args: str) -> Recipe:
    return load(write(folder, text), args)


def problems(folder: Path, text: str, **args: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, **args)
    assert caught.value.source == str(folder / "recipe.toml")
    return caught.value.problems


def test_a_step_has_what_its_table_says(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)

    step = recipe.steps["app"]

    assert step.copies == [Copy("Makefile", "Makefile", None, ()), Copy("lib", "vendor/lib", None, ("*.o",))]
    assert [step.argv(command) for command in step.commands] == [
        ["/bin/bash", "-c", "make CC=cc all"],
        ["./check", "a b"],
    ]
    assert (step.workdir, step.timeout, step.network) == ("vendor", 90, False)
    assert step.secrets == [Secret("token", "TOKEN", None), Secret("netrc", None, tmp_path / "keys" / "netrc")]


def test_what_holds_for_the_recipe_holds_for_each_step_unless_it_says_otherwise(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)

    tools, app = recipe.steps["tools"], recipe.steps["app"]

    assert recipe.source == tmp_path / "src"
    assert (tools.network, tools.argv("x")) == (True, ["/bin/sh", "-ec", "x"])
    assert (tools.env, app.env) == ({"LANG": "C", "MODE": "fast"}, {"LANG": "C", "MODE": "slow"})


def test_a_step_starts_from_a_result_from_the_step_before_or_from_nothing(tmp_path: Path) -> None:
    steps = read(tmp_path, GOOD).steps

    starts = {step.name: (step.base, step.step) for step in steps.values()}

    assert starts == {"tools": ("debian-12", None), "app": (None, "tools"), "image": (None, None)}
    assert steps["image"].inputs == ["app"]


def test_an_arg_that_is_set_replaces_its_default(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD, CC="tcc")

    commands = recipe.steps["tools"].commands

    assert commands == ["apt-get install tcc"]


def test_braces_that_hold_no_name_are_left_alone(tmp_path: Path) -> None:
    recipe = read(tmp_path, "[steps.a]\nrun = \"docker inspect -f '{{.Id}}' ${x}\"")

    commands = recipe.steps["a"].commands

    assert commands == ["docker inspect -f '{{.Id}}' ${x}"]


def test_steps_come_after_those_they_need_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    text = """
    [steps.last]
    from = "middle"
    copy = { step = "side", source = "f" }
    [steps.middle]
    from = "first"
    run = "true"
    [steps.side]
    from = "scratch"
    run = "true"
    [steps.first]
    from = "scratch"
    run = "true"
    """

    order = list(read(tmp_path, text).steps)

    assert order.index("first") < order.index("middle") < order.index("last") > order.index("side")


def test_a_target_needs_only_what_it_is_made_of(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD + '[steps.docs]\nfrom = "scratch"\nrun = "true"')

    needed = [step.name for step in recipe.needed(["image"])]

    assert sorted(needed) == ["app", "image", "tools"]
    assert len(recipe.needed()) == 4


def test_an_unknown_target_is_refused_with_a_close_match(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)

    with pytest.raises(RecipeError) as caught:
        recipe.needed(["imgae"])

    assert caught.value.problems == ("there is no step 'imgae'; did you mean 'image'?",)


def test_a_cycle_is_named(tmp_path: Path) -> None:
    text = """
    [steps.a]
    from = "c"
    run = "true"
    [steps.b]
    from = "scratch"
    copy = { step = "a", source = "f" }
    [steps.c]
    from = "b"
    run = "true"
    """

    found = problems(tmp_path, text)

    assert len(found) == 1
    assert any(
        cycle in found[0]
        for cycle in ("a needs c needs b needs a", "b needs a needs c needs b", "c needs b needs a needs c")
    )


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = """
    [recipe]
    sandbox = "chroot"
    [steps.a]
    comand = "make"
    env = { "A-B" = "x", C = 1 }
    run = "echo {{ NAME }}"
    [steps.b]
    copy = [{ sorce = "x" }]
    timeout = "soon"
    """

    found = problems(tmp_path, text, COLOUR="red")

    assert {problem.partition(": ")[0] for problem in found} == {
        "args",
        "recipe.sandbox",
        "steps.a.comand",
        "steps.a.env.A-B",
        "steps.a.env.C",
        "steps.a.run",
        "steps.b.copy.0.source",
        "steps.b.copy.0.sorce",
        "steps.b.timeout",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps = 3", "steps: should be a table, not 3"),
        ("", "steps: is missing"),
        ("[steps]", "steps: Dictionary should have at least 1 item, not 0"),
        ("[stepps.a]", "stepps: is no known key; did you mean 'steps'?"),
        ("[recipe]\nnetwrok = true", "recipe.netwrok: is no known key; did you mean 'network'?"),
        ('[steps.a]\nfrom = { idd = "x" }', "steps.a.from.idd: is no known key; did you mean 'id'?"),
        ("[steps.a]\nsecrets.t = { x = 1 }", "steps.a.secrets.t.x: is no known key; these are: env, file"),
        ("[steps.a]", "steps.a: does nothing; give it 'run' or 'copy'"),
        ("[steps.a]\nrun = 1", "steps.a.run: should be a command for the shell, or a list of commands"),
        ("[steps.a]\nrun = [[]]", "steps.a.run: should be a command for the shell, or a list of commands"),
        ('[steps.a]\nrun = [["x", 1]]', "steps.a.run: should be a command for the shell, or a list of commands"),
        ('[steps.a]\nrun = "a\\u0000b"', "steps.a.run: holds a NUL"),
        (
            '[steps.a]\nrun = "{{ NAMES }}"\n[args]\nNAME = ""',
            "steps.a.run: there is no 'NAMES' under [args]; did you mean 'NAME'?",
        ),
        ('[steps.a]\ncopy = ""', "steps.a.copy.0.source: is empty"),
        ('[steps.a]\ncopy = "../x"', "steps.a.copy.0.source: '../x' leads out of its folder"),
        ('[steps.a]\ncopy = "/etc/passwd"', "steps.a.copy.0.source: '/etc/passwd' leads out of its folder"),
        ('[steps.a]\ncopy = { source = "x", dest = "y/../../z" }', "steps.a.copy.0.dest: 'y/../../z' leads out"),
        ('[steps.a]\ncopy = { step = "b", source = "x" }', "steps.a.copy.0.step: there is no step 'b'"),
        ('[steps.a]\nrun = "x"\nfrom = "debian"', "steps.a.from: there is no step 'debian'"),
        ('[steps.a]\nrun = "x"\nfrom = { id = "CON" }', "steps.a.from.id: 'CON' cannot be an id"),
        ('[steps.a]\nrun = "x"\nfrom = {}', "steps.a.from: should name a step, or a result of the store"),
        ('[steps.a]\nrun = "x"\nworkdir = ".."', "steps.a.workdir: '..' leads out of its folder"),
        ('[steps.a]\nrun = "x"\nshell = []', "steps.a.shell: List should have at least 1 item"),
        ('[steps.a]\nrun = "x"\ntimeout = 0', "steps.a.timeout: should be a positive number of seconds"),
        ('[steps.a]\nrun = "x"\ntimeout = inf', "steps.a.timeout: should be a positive number of seconds"),
        ('[steps.a]\nrun = "x"\nsecrets.t = {}', "steps.a.secrets.t: should have either 'env' or 'file'"),
        ('[steps.a]\nrun = "x"\nsecrets."../t" = { env = "T" }', "steps.a.secrets.../t: '../t' is no name"),
        ('[steps."a b"]\nrun = "x"', "steps.a b: 'a b' is no name"),
        ('[steps.scratch]\nrun = "x"', "steps.scratch: stands for the empty tree"),
        ('[steps.a]\nrun = "x"\nfrom = "a"', "steps: a needs a"),
        ("[steps.a", "is not valid TOML"),
    ],
)
def test_a_mistake_is_reported_at_its_key(tmp_path: Path, text: str, problem: str) -> None:
    found = problems(tmp_path, text)

    assert any(line.startswith(problem) for line in found), found


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b'[steps.a]\nrun = "\xff"')

    with pytest.raises(RecipeError, match="is not valid TOML"):
        load(path)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"

    with pytest.raises(RecipeError, match=r"none\.toml: cannot be read: No such file"):
        load(path)

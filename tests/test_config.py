from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storebackends import config
from storebackends.config import Config, load, validate_options
from storebackends.errors import ConfigError
from storebackends.prune import Policy
from storebackends.registry import Registry
from tests.capabilities import needs
from tests.distributions import PLUGIN, install

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration file, which is not there yet; nothing of this host is seen."""
    monkeypatch.delenv(config.VARIABLE, raising=False)
    for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "WIN_PD_OVERRIDE_LOCAL_APPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "user"))
    monkeypatch.setattr(config, "SITE", tmp_path / "site")
    file = config.places()[0]
    file.parent.mkdir(parents=True)
    return file


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration, /ABS in it standing for an absolute path of this platform."""

    def write(text: str, file: Path = tmp_path / "host.toml") -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text).replace("/ABS", tmp_path.as_posix()))
        return file

    return write


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend called toy, with options level, mode and folder."""
    monkeypatch.syspath_prepend(tmp_path / "packages")
    install(tmp_path / "packages", "toy-store", {"toy": "toy_plugin"}, toy_plugin=PLUGIN)


def problems(path: Path | None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return list(caught.value.problems)


def test_without_a_file_there_is_a_copy_store_in_the_users_cache_folder(tmp_path: Path) -> None:
    found = load()

    store = found.store()
    assert (found.source, store.name, store.backend, store.durability) == (None, "default", "copy", "group")
    assert store.path
    assert store.path.is_relative_to(tmp_path / "user")


def test_a_file_without_stores_has_that_one_too(write: Write) -> None:
    found = load(write(""))

    assert list(found.stores) == ["default"]


def test_a_store_has_all_that_opening_it_takes(write: Write, toy: None, tmp_path: Path) -> None:
    file = write("""
        [stores.fast]
        backend = "toy"
        path = "/ABS/fast"
        durability = "full"
        level = 3
        folder = "sub"
    """)

    store = load(file).store("fast")

    assert (store.backend, store.path, store.durability) == ("toy", tmp_path / "fast", "full")
    assert store.options.model_dump() == {"level": 3, "mode": "safe", "folder": Path("sub")}
    assert store.spec is not None
    assert store.spec.name == "toy"


def test_a_backend_that_knows_where_its_store_is_needs_no_path(write: Write, tmp_path: Path) -> None:
    file = write("""
        default = "own"

        [stores.own]
        backend = "zfs"
        dataset = "tank/own"

        [stores.elsewhere]
        backend = "zfs"
        dataset = "tank/own"
        path = "/ABS/elsewhere"
    """)
    own, elsewhere = (load(file).stores[name] for name in ("own", "elsewhere"))
    assert own.spec
    asking = replace(own, spec=replace(own.spec, folder=lambda options: tmp_path / options.dataset))

    assert own.path is None
    assert own.show()["path"] is None
    assert asking.folder() == tmp_path / "tank/own"
    assert elsewhere.folder() == tmp_path / "elsewhere"


def test_auto_is_decided_when_the_store_is_opened(write: Write) -> None:
    store = load(write('stores.fast = {path = "/ABS/fast", backend = "auto"}')).store()

    assert (store.backend, store.spec, store.options.model_dump()) == ("auto", None, {})


def test_auto_takes_no_options_of_a_backend(write: Write) -> None:
    file = write('stores.fast = {path = "/ABS/fast", backend = "auto", reflink = "never", verfy = "none"}')

    reason = 'is an option of no backend while that is "auto"; name the backend that it is for'
    assert problems(file) == [
        f"stores.fast.reflink: {reason}",
        f"stores.fast.verfy: {reason}; did you mean 'verify'?",
    ]


def test_a_tilde_is_the_users_home(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))

    found = load(write('stores.fast.path = "~/builds"'))

    assert found.store().path == tmp_path / "builds"


def test_the_first_file_found_is_all_there_is(
    write: Write, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for file in (config.SITE / "config.toml", user, tmp_path / "mine.toml"):
        write(f'stores.{file.parent.name}.path = "/ABS/{file.name}"', file)
        if file.name == "mine.toml":
            monkeypatch.setenv(config.VARIABLE, str(file))
        found = load()
        seen.append((found.source, len(found.stores)))

    assert seen == [(config.SITE / "config.toml", 1), (user, 1), (tmp_path / "mine.toml", 1)]


def test_a_file_that_the_variable_names_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(config.VARIABLE, str(tmp_path / "none.toml"))

    with pytest.raises(ConfigError, match="no such file, though") as caught:
        load()

    assert caught.value.source == str(tmp_path / "none.toml")


def test_a_file_given_must_be_there(tmp_path: Path) -> None:
    assert "no such file" in problems(tmp_path / "none.toml")[0]


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.VARIABLE, "")

    assert load().source is None


def test_a_file_that_cannot_be_read_is_an_error_not_skipped(user: Path) -> None:
    user.mkdir()  # what even root cannot read

    assert "cannot be read" in problems(None)[0]


def test_a_syntax_error_comes_with_line_and_column(write: Write) -> None:
    (problem,) = problems(write("default = 'a'\nplugins = ["))

    assert "not valid TOML" in problem
    assert "line 2" in problem or "end of document" in problem


@pytest.mark.parametrize("text", [b"a = 1\nb = 'caf\xe9'\n", b"a = 1\n\xff\xfe"])
def test_a_file_in_another_encoding_comes_with_the_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "host.toml").write_bytes(text)

    (problem,) = problems(tmp_path / "host.toml")

    assert "not UTF-8" in problem
    assert "line 2" in problem


def test_a_byte_order_mark_does_no_harm(write: Write) -> None:
    file = write('stores.fast.path = "/ABS/fast"')
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())

    assert list(load(file).stores) == ["fast"]


def test_every_problem_is_in_one_report(write: Write, toy: None) -> None:
    file = write("""
        defualt = "fast"
        plugins = ["copi"]
        [stores.fast]
        backend = "toy"
        path = "relative"
        durability = "most"
        level = "3"
        mode = "slow"
        floder = "x"
        [stores.slow]
        backend = "tyo"
        path = "/ABS/slow"
        [stores]
        odd = 1
    """)

    found = problems(file)

    for start, part in [
        ("defualt: ", "did you mean 'default'?"),
        ("plugins.0: ", "did you mean 'copy'?"),
        ("stores.fast.path: ", "absolute"),
        ("stores.fast.durability: ", "'group', 'full' or 'none', not 'most'"),
        ("stores.fast.level: ", "should be a valid integer, not '3'"),
        ("stores.fast.mode: ", "'fast' or 'safe', not 'slow'"),
        ("stores.fast.floder: ", "did you mean 'folder'"),
        ("stores.slow.backend: ", "did you mean 'toy'?"),
        ("stores.odd: ", "should be a table, not 1"),
        ("default: ", "is missing"),
    ]:
        matching = [problem for problem in found if problem.startswith(start)]
        assert len(matching) == 1, start
        assert part in matching[0]
        found.remove(matching[0])
    assert not found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("default = 5", "default: should be a valid string, not 5"),
        ("plugins = 'copy'", "plugins: should be a valid array, not 'copy'"),
        ("stores = 5", "stores: should be a table, not 5"),
        ("[[stores]]", "stores: should be a table, not [{}]"),
        ("[stores.fast]", "stores.fast.path: is missing"),
        ("stores.fast.path = 5", "stores.fast.path: "),
        ("stores.fast = { path = '/ABS/x', backend = 5 }", "stores.fast.backend: should be a valid string, not 5"),
        ("stores.fast.path = '/ABS/x\\u0000'".replace("'", '"'), "stores.fast.path: "),
        ("stores.fast = { path = '/ABS/x', pth = 1 }", "stores.fast.pth: is no known key; did you mean 'path'?"),
        ("stores.'a b'.path = '/ABS/x'", 'stores."a b": a store\'s name has letters'),
        ("default = 'fsat'\nstores.fast.path = '/ABS/x'", "default: there is no store 'fsat'; did you mean 'fast'?"),
        ("stores.fast = { path = '/ABS/x', prune = 5 }", "stores.fast.prune: should be a table, not 5"),
        (
            "stores.fast = { path = '/ABS/x', prune = { min_fre = 5 } }",
            "stores.fast.prune.min_fre: is no known key; did you mean 'min_free'?",
        ),
        (
            "stores.fast = { path = '/ABS/x', prune = { max_used = '10GX' } }",
            "stores.fast.prune.max_used: should be a number of bytes, an amount like",
        ),
        (
            "stores.fast = { path = '/ABS/x', prune = { keep_for = true } }",
            "stores.fast.prune.keep_for: should be a number of seconds, or a duration like",
        ),
        ("stores.fast = { path = '/ABS/x', prune = { max_items = -1 } }", "stores.fast.prune.max_items: should be"),
        ("stores.fast = { path = '/ABS/x', verify = 'md5' }", "stores.fast.verify: should be 'none' or 'digest'"),
    ],
)
def test_a_wrong_value_is_reported_with_its_dotted_key(write: Write, text: str, problem: str) -> None:
    (found,) = problems(write(text))

    assert found.startswith(problem)


def test_the_rules_of_prune_are_kept_as_they_were_written(write: Write) -> None:
    file = write("""
        [stores.fast]
        path = "/ABS/fast"
        verify = "digest"
        prune = { min_free = "15%", max_used = 1000, keep_for = "7d", max_items = 3 }
    """)

    store = load(file).store()

    assert store.prune == Policy(min_free="15%", max_used=1000, keep_for="7d", max_items=3)
    assert store.verify == "digest"
    assert store.show()["prune"] == {"min_free": "15%", "max_used": 1000, "keep_for": "7d", "max_items": 3}


@needs("symlinks")
def test_two_stores_in_one_folder_are_refused_through_a_link_too(write: Write, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)

    (problem,) = problems(
        write("""
            default = "a"
            stores.a.path = "/ABS/real/x"
            stores.b.path = "/ABS/link/x"
        """)
    )

    assert problem.startswith("stores.b.path: ")
    assert "stores.a" in problem


def test_the_default_is_the_store_named_or_the_only_one_or_the_one_so_called(write: Write) -> None:
    stores = 'stores.fast.path = "/ABS/fast"\n'
    two = stores + 'stores.default.path = "/ABS/slow"\n'

    chosen = [load(write(text)).default for text in (stores, two, 'default = "fast"\n' + two)]

    assert chosen == ["fast", "default", "fast"]


def test_a_store_that_is_not_there_brings_the_close_ones(write: Write) -> None:
    found = load(write('stores.fast.path = "/ABS/fast"'))

    with pytest.raises(ConfigError, match=r"no store 'fsat'; did you mean 'fast'\?"):
        found.store("fsat")


def test_what_is_shown_is_json_with_every_default(write: Write, toy: None, tmp_path: Path) -> None:
    file = write('plugins = ["toy"]\nstores.fast = { backend = "toy", path = "/ABS/fast", folder = "sub" }')

    shown = json.loads(json.dumps(load(file).show()))

    assert shown == {
        "source": str(file),
        "default": "fast",
        "plugins": ["toy"],
        "stores": {
            "fast": {
                "backend": "toy",
                "path": str(tmp_path / "fast"),
                "durability": "group",
                "verify": "none",
                "level": 1,
                "mode": "safe",
                "folder": "sub",
            }
        },
    }


def test_stores_of_a_backend_do_not_import_others(write: Write, tmp_path: Path, toy: None) -> None:
    install(tmp_path / "packages", "other", {"other": "other_plugin"}, other_plugin="raise AssertionError('imported')")

    load(write('stores.fast = { backend = "toy", path = "/ABS/fast" }'))

    assert "other_plugin" not in sys.modules


def test_options_spelled_out_in_python_are_checked_alike(toy: None) -> None:
    spec = Registry().spec("toy")

    good = validate_options(spec, {"folder": Path("sub"), "level": 2}, "open_store")
    with pytest.raises(ConfigError) as caught:
        validate_options(spec, {"levle": 2, "level": None, "mode": object()}, "open_store")
    with pytest.raises(ConfigError) as other:
        validate_options(spec, {"levle": 2, "level": None}, "open_store")

    assert good.model_dump() == {"level": 2, "mode": "safe", "folder": Path("sub")}
    assert "cannot be written as TOML" in caught.value.problems[0]
    assert other.value.source == "open_store"
    assert set(other.value.problems) == {
        "level: should be a valid integer, not None",
        "levle: is no known key; did you mean 'level'?",
    }


WORDS = [
    "default",
    "plugins",
    "stores",
    "path",
    "backend",
    "durability",
    "copy",
    "rsync",
    "reflink",
    "group",
    "/x",
    "~",
]
SCALARS = (
    st.sampled_from(WORDS)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
)
KEYS = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def toml(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return str(value).lower()
        case date():
            return value.isoformat()
    return repr(value)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("garbage") / "host.toml"


@given(data=st.dictionaries(KEYS, VALUES, max_size=4), stores=st.dictionaries(KEYS, VALUES, max_size=3))
def test_whatever_toml_can_say_is_a_configuration_or_a_report(scratch: Path, data: Any, stores: Any) -> None:
    data.setdefault("stores", stores)
    scratch.write_text("".join(f"{toml(key)} = {toml(value)}\n" for key, value in data.items()), encoding="utf-8")

    assert_judged(scratch)


@given(st.binary() | st.text(st.sampled_from("[]{}=\"'.#\n stores0")).map(str.encode))
def test_whatever_bytes_are_in_the_file_are_a_configuration_or_a_report(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)

    assert_judged(scratch)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, "a." * 2000 + "a = 1", "a = " + "9" * 5000, "a = [1,2]\na.b = 1"]
)
def test_what_would_exhaust_a_parser_is_a_report(scratch: Path, text: str) -> None:
    scratch.write_text(text)

    assert problems(scratch)


def assert_judged(file: Path) -> None:
    try:
        found: Config | ConfigError = load(file)
    except ConfigError as error:
        found = error

    if isinstance(found, Config):
        assert found.default in found.stores
    else:
        assert found.source == str(file)
        assert found.problems


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX paths, as the example has them")
def test_the_example_of_the_reference_is_valid(write: Write) -> None:
    reference = Path(__file__).parent.parent / "docs" / "reference" / "configuration.md"
    example = reference.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]

    found = load(write(example))

    assert (found.default, list(found.stores)) == ("fast", ["fast", "scratch"])

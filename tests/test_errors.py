from __future__ import annotations

import copy
import errno
import pickle

import pytest

from storebackends import errors

EXAMPLES = [
    errors.StoreError("plain"),
    errors.InvalidId("a/b", "no slash"),
    errors.NotFound("a"),
    errors.BaseNotFound("a", "b"),
    errors.Busy("a", "in use", ["pid 1"]),
    errors.BuildFailed("a", "0123", "make ended with status 2"),
    errors.Cancelled("a", "0123"),
    errors.BuilderDied("a", "0123", "its builder (pid 7) died"),
    errors.CommandFailed(["make", "all"], 2, "ended with status 2", "no rule"),
    errors.NoSpace("/store", "disk quota exceeded"),
    errors.NotSupported("mounting", "not root", "run as root"),
    errors.ConfigError("config.toml", ["stores.a.path: is missing", "default: no such store"]),
    errors.RecipeError("recipe.toml", ["steps.a: a circle"]),
    errors.PluginError("zfs", "broken", "storebackends-zfs 1.0"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling_and_copying_with_all_its_facts(error: errors.StoreError) -> None:
    error.add_note("seen twice")

    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_every_error_of_the_tree_has_an_example_here() -> None:
    def tree(cls: type[errors.StoreError]) -> set[type[errors.StoreError]]:
        below = [tree(sub) for sub in cls.__subclasses__()]
        return {cls}.union(*below)

    public = {cls for cls in tree(errors.StoreError) if cls.__module__ == errors.__name__}
    assert {type(error) for error in EXAMPLES} == public


def test_errors_are_also_the_builtin_kind_that_callers_expect() -> None:
    assert issubclass(errors.InvalidId, ValueError)
    assert issubclass(errors.NotFound, LookupError)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_no_space(number: int) -> None:
    with pytest.raises(errors.NoSpace, match="writing: .*delete results") as caught, errors.explained("writing", "/s"):
        raise OSError(number, "no room")

    assert isinstance(caught.value.__cause__, OSError)


def test_another_system_error_is_explained_and_kept() -> None:
    with (
        pytest.raises(errors.StoreError, match="writing failed: .*denied") as caught,
        errors.explained("writing", "/s"),
    ):
        raise PermissionError(errno.EACCES, "denied", "/s/f")

    assert isinstance(caught.value.__cause__, PermissionError)

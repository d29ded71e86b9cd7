from __future__ import annotations

import re
from pathlib import Path

import pytest

import storebackends
from storebackends import Workspace
from tests.capabilities import PROJECT, needs

pytestmark = [pytest.mark.docs, needs("source")]


def blocks(page: str, language: str) -> list[str]:
    """The fenced examples of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", (PROJECT / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_tutorial_works_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    exec("\n".join(blocks("docs/tutorial/first-build.md", "python")), {})


def test_the_readmes_python_works_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "Makefile").write_text("all:\n\t@echo compiled > app\n")
    (example,) = blocks("README.md", "python")
    with storebackends.open_store() as store:
        store.build("tools-7", lambda work: None).release()

    exec(example, {})
    exec(example, {})

    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["built", "hit"]
    assert len(example.strip().splitlines()) <= 12


def test_the_readmes_recipe_builds(tmp_path: Path) -> None:
    from storebackends.recipe import load
    from storebackends.steps import run_recipe

    (recipe,) = blocks("README.md", "toml")
    (tmp_path / "app.toml").write_text(recipe)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "Makefile").write_text("all:\n\t@echo compiled > app\n")
    (tmp_path / "Makefile").write_text("check:\n\tgrep compiled src/app\n")

    with (
        storebackends.open_store(backend="copy", path=tmp_path / "store") as store,
        run_recipe(store, load(tmp_path / "app.toml")) as done,
    ):
        assert [step.result.outcome for step in done] == ["built", "built"]


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(PROJECT)) for p in [PROJECT / "README.md", *PROJECT.glob("docs/**/*.md")])
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (PROJECT / page).read_text())

    assert not [target for target in targets if not (PROJECT / page).parent.joinpath(target).exists()]


def test_the_api_page_names_everything_public() -> None:
    page = (PROJECT / "docs/reference/api.md").read_text()
    names = {*storebackends.__all__} - {"LogReader", "Workspace", "Store"}
    names |= {name for cls in (storebackends.Store, Workspace) for name in vars(cls) if not name.startswith("_")}
    names -= {"root", "backend", "durability", "capabilities", "end"}

    assert not [name for name in sorted(names) if not re.search(rf"\b{name}\b", page)]

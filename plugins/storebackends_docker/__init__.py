"""The backend `docker`: every tree is a volume of a Docker daemon, on this host or another, for Linux or Windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from storebackends.plugin import BackendSpec, CommandFailed, Options, Support, hookimpl, tool

# No option of a command line: none begins with a dash.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][^\s]*$")]


class DockerOptions(Options):
    """What ``[stores.NAME]`` may say of a docker store."""

    host: Annotated[str, Field(pattern=r"^[a-z]+://\S+$")] | None = None
    """The daemon, as `docker --host` takes it; by default the one that `docker` itself would take."""

    image: Word | None = None
    """An image of the daemon. Where it is given, a build's commands run in containers of it, with the tree at /build.
    Where this host cannot read the volumes, they are also copied there, so it must have sh, cp, cat, find
    and df."""

    access: Literal["auto", "host", "container"] = "auto"
    """How trees are reached: as folders of this host, or through containers of *image* only; "auto": the first where
    this process may."""

    network: Word = "none"
    """The network of a build's commands, as `docker run --network` takes it. All other containers have none."""

    @model_validator(mode="after")
    def _containers_are_of_an_image(self) -> Self:
        if self.access == "container" and self.image is None:
            raise ValueError('access = "container" takes an image')
        return self


def probe(path: Path) -> Support:
    """Does the daemon answer that `docker` takes by default? Never chosen unasked."""
    try:
        said = tool(["docker", "version", "--format", "{{.Server.Version}} ({{.Server.Os}})"], timeout=30).stdout
    except CommandFailed as error:
        return Support(False, str(error), 'install docker and start its daemon, or name one: host = "..."')
    return Support(True, f"Docker {said.decode(errors='replace').strip()}")


@hookimpl
def storebackends_backends() -> Sequence[BackendSpec]:
    """Announce the backend."""
    return [
        BackendSpec(
            name="docker",
            options=DockerOptions,
            factory="storebackends_docker.driver:DockerBackend",
            probe=probe,
            summary="volumes of a Docker daemon, here or elsewhere, for Linux or Windows containers",
        )
    ]

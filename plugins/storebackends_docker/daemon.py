"""One Docker daemon, by its command line: volumes and containers that bear a store's uuid in their names and labels.

    storebackends-UUID-ATTEMPT          a volume
    storebackends-UUID-ATTEMPT-NONCE    a container that works on it

A volume that was removed is made again, empty, by whoever mounts it; so it has its attempt as a label too, which
nobody can add later.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import IO

from storebackends.plugin import CommandFailed, Finished, NoSpace, NotSupported, StoreError, tool

STORE, ATTEMPT = "storebackends.store", "storebackends.attempt"
COPYING = 24 * 3600.0  # a bound, not an expectation: how long a copy takes depends on the tree alone
_TIMEOUT = 300.0

_SILENT = re.compile(
    r"cannot connect|error during connect|is the docker daemon running|connection re(fused|set)|permission denied while"
    r"|failed to connect|no such host|i/o timeout|context deadline exceeded|unexpected EOF",
    re.IGNORECASE,
)
_FULL = re.compile(r"no space left on device|disk quota exceeded|not enough space on the disk", re.IGNORECASE)
_NO_IMAGE = re.compile(r"no such image|unable to find image|pull access denied|manifest unknown", re.IGNORECASE)


class Daemon:
    """The daemon that `docker --host` reaches, and what the store *uuid* has there."""

    def __init__(self, host: str | None, uuid: str) -> None:
        self._client = ["docker", *(["--host", host] if host else [])]
        self._where = host or os.environ.get("DOCKER_HOST") or "that docker takes by default"
        self.prefix, self._store = f"storebackends-{uuid}-", f"{STORE}={uuid}"

    def argv(self, *words: str) -> list[str]:
        """The command line of the client."""
        return [*self._client, *words]

    def call(
        self,
        *words: str,
        input: bytes | IO[bytes] | None = None,
        timeout: float = _TIMEOUT,
        ok: Container[int] = (0,),
        env: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run one command of the client. Raises StoreError with what the daemon said, NoSpace where it is full."""
        try:
            return tool(self.argv(*words), input=input, timeout=timeout, ok=ok, env=env)
        except CommandFailed as error:
            raise self._explain(error) from error

    def _explain(self, error: CommandFailed) -> StoreError:
        said = error.stderr.strip()
        if error.returncode is None:
            return NotSupported("a docker store", str(error), "install the docker command line")
        if _FULL.search(said):
            return NoSpace(f"the Docker daemon {self._where}", said)
        if _NO_IMAGE.search(said):
            return StoreError(f"the Docker daemon {self._where} has no such image: {said}; pull or load it there")
        if _SILENT.search(said):
            return StoreError(f"the Docker daemon {self._where} does not answer: {said}; start it, or correct 'host'")
        return error

    # Volumes.

    def volume(self, attempt: str) -> str:
        """The name of an attempt's volume."""
        return f"{self.prefix}{attempt}"

    def create_volume(self, attempt: str) -> str:
        """Make an attempt's volume, and return its name."""
        name = self.volume(attempt)
        self.call("volume", "create", "--label", self._store, "--label", f"{ATTEMPT}={attempt}", name)
        return name

    def mount_point(self, volume: str) -> str | None:
        """Where the daemon's host has it; None where it is gone, or was made again by somebody else."""
        done = self.call("volume", "inspect", "--format", "{{json .}}", volume, ok=(0, 1))
        if done.returncode:
            said = done.stderr.decode(errors="replace")
            if "no such volume" in said.lower():
                return None
            raise self._explain(CommandFailed(["docker", "volume", "inspect"], done.returncode, "failed", said))
        found = json.loads(done.stdout)
        if (found.get("Labels") or {}).get(ATTEMPT) != volume.removeprefix(self.prefix):
            return None
        return str(found["Mountpoint"])

    def volumes(self) -> set[str]:
        """The names of the store's volumes."""
        return self._names("volume", "ls", "--filter", f"label={self._store}", "--format", "{{.Name}}")

    def remove_volume(self, volume: str) -> None:
        """Remove a volume, and first the store's containers that use it. Idempotent. StoreError where others do."""
        for last in (False, True):
            done = self.call("volume", "rm", "--force", volume, ok=(0, 1), timeout=COPYING)
            said = done.stderr.decode(errors="replace").strip()
            if done.returncode == 0 or "no such volume" in said.lower():
                return
            if "in use" not in said.lower():
                raise self._explain(CommandFailed(["docker", "volume", "rm"], done.returncode, "failed", said))
            if last:
                break
            self.end_containers(volume)
        raise StoreError(f"{said}; remove these containers, which are not the store's, and open the store again")

    def sizes(self) -> dict[str, int]:
        """The bytes that each volume takes, as far as the daemon tells. It measures everything it has, for that."""
        said = self.call("system", "df", "--verbose", "--format", "{{json .Volumes}}", timeout=COPYING).stdout
        return {volume["Name"]: _bytes(volume["Size"]) for volume in json.loads(said)}

    # Containers.

    def container(self, volume: str, *, network: str = "none") -> tuple[str, list[str]]:
        """A new name for a container that works on *volume*, and the options that every container of ours has."""
        name = f"{volume}-{secrets.token_hex(4)}"
        return name, ["--name", name, "--label", self._store, "--network", network]

    def containers(self, volume: str | None = None) -> set[str]:
        """The names of the store's containers, running or not; or of those that use *volume*."""
        using = ["--filter", f"volume={volume}"] if volume else []
        words = ("ps", "--all", "--filter", f"label={self._store}", *using, "--format", "{{.Names}}")
        return self._names(*words)

    def remove_containers(self, names: Iterable[str]) -> None:
        """Kill and remove containers. Idempotent."""
        for name in names:
            done = self.call("rm", "--force", "--volumes", name, ok=(0, 1))
            said = done.stderr.decode(errors="replace").strip()
            # A second remover is fine: the first one's wait ends with the container.
            if done.returncode and not re.search(r"no such container|already in progress", said, re.IGNORECASE):
                raise self._explain(CommandFailed(["docker", "rm", name], done.returncode, "failed", said))

    def end_containers(self, volume: str) -> None:
        """Kill and remove those of the store that use *volume*."""
        self.remove_containers(self.containers(volume))

    def _names(self, *words: str) -> set[str]:
        # The prefix too: a label is easily copied.
        names = self.call(*words).stdout.decode(errors="replace").split()
        return {name for name in names if name.startswith(self.prefix)}


def volume_of(container: str) -> str:
    """The volume that a container of ours was made for."""
    return container.rpartition("-")[0]


def mount(volume: str, target: str, *options: str) -> Sequence[str]:
    """Have a volume at *target*, as it is: docker would fill an empty one with what the image has there."""
    return ["--mount", ",".join([f"type=volume,source={volume},target={target},volume-nocopy", *options])]


def _bytes(text: str) -> int:
    """What docker prints for a size: 12B, 3.4kB, 1.2MB, 5GB; N/A is unknown."""
    units = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    found = re.fullmatch(r"([0-9.]+)([kMGT]?B)", text)
    return round(float(found[1]) * units[found[2]]) if found else 0

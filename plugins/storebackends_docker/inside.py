"""What runs in containers: how a tree is copied, filled and mounted there, on Linux and on Windows.

Nothing of a tree, and no name a caller gave, is ever part of a script's text: they come as arguments, or on Windows as
variables that cmd expands after it has parsed the line (`!NAME!`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storebackends.plugin import NotSupported

GONE, REFUSED = 64, 65
"""Status of a script: the base is not the volume it was; a path leads through a link or is no folder."""

_CLONE = """
set -e
if [ -n "$2" ]; then
    [ "$(cat /base/nonce 2>/dev/null)" = "$2" ] || exit 64
    cp -a /base/rootfs /new/rootfs
else
    mkdir /new/rootfs
    chmod 755 /new/rootfs
fi
printf %s "$1" >/new/nonce
"""
_ENTER = """
set -e
enter() {
    if [ -L "./$1" ]; then echo "$1 is a link" >&2; exit 65; fi
    if [ ! -d "./$1" ]; then mkdir "./$1" || exit 65; chmod 755 "./$1"; fi
    cd -P "./$1"
}
cd /build
"""
# What is in the way goes first: cp would write into an old file, which may have other names. A folder comes before what
# is in it, so no link is followed.
_CLEAR = """
top=$1
shift
for it; do
    if [ -d "$it" ] && [ ! -L "$it" ]; then
        if [ -L "$top/$it" ] || { [ -e "$top/$it" ] && [ ! -d "$top/$it" ]; }; then
            echo "$it is no folder there" >&2
            exit 65
        fi
    elif [ -d "$top/$it" ] && [ ! -L "$top/$it" ]; then
        echo "$it is a folder there" >&2
        exit 65
    else
        rm -f "$top/$it"
    fi
done
"""
_FILL = f"""{_ENTER}
clear=$1
last=$2
shift 2
for part; do enter "$part"; done
if [ -d /copied ] && [ ! -L /copied ]; then
    [ -z "$last" ] || enter "$last"
    (top=$PWD && cd /copied && find . -exec sh -c "$clear" sh "$top" {{}} +) || exit 65
    cp -a /copied/. .
else
    if [ -z "$last" ] || {{ [ -d "./$last" ] && [ ! -L "./$last" ]; }}; then echo "a folder is there" >&2; exit 65; fi
    rm -f "./$last"
    cp -a /copied "./$last"
fi
"""
_RUN = """
count=$1
shift
while [ "$count" -gt 0 ]; do
    if [ -L "./$1" ] || [ ! -d "./$1" ]; then echo "$1 is a link, or no folder" >&2; exit 65; fi
    cd -P "./$1"
    shift
    count=$((count - 1))
done
exec "$@"
"""

_ROBOCOPY = "/E /COPYALL /DCOPY:DAT /SL /R:1 /W:1 /NFL /NDL /NJH /NJS /NP"
_CLONE_WINDOWS = (
    "if defined BASE (set /p FOUND=<C:\\base\\nonce & if not !FOUND!==!BASE! exit 64) & "
    f"if defined BASE (robocopy C:\\base\\rootfs C:\\new\\rootfs {_ROBOCOPY} & if !errorlevel! geq 8 exit 1) & "
    "if not exist C:\\new\\rootfs mkdir C:\\new\\rootfs & "
    "(echo !NEW!)>C:\\new\\nonce"
)
_FILL_WINDOWS = (
    "cd /d C:\\build & for /l %i in (1,1,!COUNT!) do ("
    "(fsutil reparsepoint query !PART%i! >nul 2>&1 && exit 65) & "
    "(if not exist !PART%i!\\ mkdir !PART%i! || exit 65) & cd !PART%i!) & "
    f"if exist C:\\copied\\ (robocopy C:\\copied . {_ROBOCOPY} & if !errorlevel! geq 8 exit 1) else "
    "(copy /y C:\\copied !LAST! >nul || exit 1)"
)


@dataclass(frozen=True)
class Script:
    """A program for a container: what follows the image's name on the command line, and what goes before it."""

    options: Sequence[str]
    words: Sequence[str]


@dataclass(frozen=True)
class Linux:
    """How Linux containers are used."""

    separator = "/"
    tree, copied, base, new, pin = "/build", "/copied", "/base", "/new", "/.storebackends"
    home: str | None = "/tmp"  # noqa: S108 (the container's own)
    root = "0:0"

    def clone(self, attempt: str, base: str | None) -> Script:
        """Copy the tree in the volume at /base, whose attempt has to be *base*, into that at /new; or make one."""
        return _sh(_CLONE, attempt, base or "")

    def fill(self, parts: Sequence[str]) -> Script:
        """Move what lies at /copied to the path *parts* in the tree."""
        return _sh(_FILL, _CLEAR, parts[-1] if parts else "", *parts[:-1])

    def run(self, argv: Sequence[str], parts: Sequence[str]) -> Script:
        """Run a command in the folder *parts* of the tree, reached through folders alone."""
        if parts:
            return _sh(_RUN, str(len(parts)), *parts, *argv)
        return Script(["--entrypoint", argv[0]], argv[1:])

    def own_folders(self) -> Sequence[str]:
        """Options for what a command needs beside its tree."""
        return ["--tmpfs", "/tmp:rw,exec,mode=1777"]  # noqa: S108

    def takes(self, name: str) -> bool:
        """Is a variable of this name, from a POSIX host, any good inside?"""
        return True

    def disk(self) -> Script:
        """Print what df does of the daemon's disk, last."""
        return Script(["--entrypoint", "df"], ["-kP", "/"])


@dataclass(frozen=True)
class Windows:
    """How Windows containers are used."""

    separator = "\\"
    tree, copied, base, new, pin = "C:\\build", "C:\\copied", "C:\\base", "C:\\new", "C:\\storebackends"
    home: str | None = None
    root = "ContainerAdministrator"

    def clone(self, attempt: str, base: str | None) -> Script:
        """As for Linux."""
        return _cmd(_CLONE_WINDOWS, NEW=attempt, **({"BASE": base} if base else {}))

    def fill(self, parts: Sequence[str]) -> Script:
        """As for Linux. A folder replaces nothing but what is in it."""
        numbered = {f"PART{number}": part for number, part in enumerate(parts, 1)}
        return _cmd(_FILL_WINDOWS, COUNT=str(len(parts)), LAST=parts[-1] if parts else ".", **numbered)

    def run(self, argv: Sequence[str], parts: Sequence[str]) -> Script:
        """As for Linux, but a link is followed: within the container, as everything there."""
        return Script(["--workdir", "\\".join([self.tree, *parts]), "--entrypoint", argv[0]], argv[1:])

    def own_folders(self) -> Sequence[str]:
        """None: the image has its own."""
        return []

    def takes(self, name: str) -> bool:
        """Not these: what a POSIX host has in them is of another form there."""
        return name not in ("PATH", "HOME", "TMPDIR", "LANG")

    def disk(self) -> Script:
        """Nothing there prints it in a form that is the same in every language."""
        raise NotSupported("measuring the space", "the daemon's disk is not this host's", "measure it there")


System = Linux | Windows


def _sh(script: str, *arguments: str) -> Script:
    return Script(["--entrypoint", "sh"], ["-c", script, "sh", *arguments])


def _cmd(script: str, **variables: str) -> Script:
    options = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    return Script([*options, "--entrypoint", "cmd"], ["/V:ON", "/S", "/C", script])

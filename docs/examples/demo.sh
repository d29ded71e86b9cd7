#!/usr/bin/env bash
# Builds this project's wheel by docs/examples/wheel.toml three times: from nothing, again, and after a change. It takes
# the default backend, no root and no daemon, and writes to a temporary folder, which it removes. `make demo` runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(command -v python)
recipe=docs/examples/wheel.toml
room=$(mktemp -d)
trap 'chmod -R u+rwX "$room"; rm -rf "$room"' EXIT

say() { printf '\n== %s\n' "$*"; }

build() {
    echo "\$ storebackends build $recipe --set PYTHON=$python"
    storebackends build "$recipe" --set PYTHON="$python"
}

say "A copy of the source, and a store, in $room"
mkdir "$room/project"
cp -R pyproject.toml README.md LICENSE storebackends plugins docs "$room/project"
cd "$room/project"
cat >"$room/config.toml" <<END
[stores.demo]
path = "$room/store"
durability = "none"  # thrown away below
END
export STOREBACKENDS_CONFIG=$room/config.toml

say "From nothing: every step runs"
build

say "Again: every step is cached"
build

say "README.md changes: what depends on it runs again, the rest is cached"
echo "One more line." >>README.md
build

say "The wheel, in the result that holds it"
result=$(storebackends result "$(storebackends build --quiet "$recipe" wheel --set PYTHON="$python")")
ls -l "$result/dist"

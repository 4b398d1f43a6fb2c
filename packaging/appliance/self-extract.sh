#!/bin/sh
# Hypeman as one file: this script, and behind its last line a tar.gz of the program. The first call
# unpacks it into a directory of its own, named after its content; later calls only find it there.
# Root's is /var/lib/hypeman-appliance, anybody else's below ~/.cache; HYPEMAN_UNPACK_DIR overrules both.
set -eu
identity=@IDENTITY@
if [ -n "${HYPEMAN_UNPACK_DIR:-}" ]; then
    base=$HYPEMAN_UNPACK_DIR
elif [ "$(id -u)" = 0 ]; then
    base=/var/lib/hypeman-appliance
else
    base=${XDG_CACHE_HOME:-$HOME/.cache}/hypeman-appliance
fi
program=$base/$identity/hypeman
if [ ! -x "$program" ]; then
    umask 022
    mkdir -p "$base"
    chmod 755 "$base"
    work=$(mktemp -d "$base/unpacking.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    begin=$(awk '/^--- payload ---$/ { print NR + 1; exit }' "$0")
    tail -n "+$begin" "$0" | tar -xz -C "$work" --strip-components=1 --no-same-owner -f -
    chmod 755 "$work"
    # Whoever is first wins; the loser takes what the winner made.
    mv -T "$work" "$base/$identity" 2>/dev/null || [ -x "$program" ]
    rm -rf "$work"
    trap - EXIT
fi
# What others may write is not run.
if [ ! -O "$program" ] && [ "$(id -u)" != 0 ]; then
    echo "hypeman: $program belongs to somebody else; set HYPEMAN_UNPACK_DIR" >&2
    exit 1
fi
exec "$program" "$@"
exit 1
--- payload ---

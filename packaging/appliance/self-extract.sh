#!/bin/sh
# Hypeman as one file: this script, and after its last line a tar.gz of the program. The first call unpacks it into a
# directory of its own, named after its content, which later calls use. Root's is below /var/lib/hypeman-appliance,
# other users' below ~/.cache; HYPEMAN_UNPACK_DIR overrides both.
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
me=$(id -u)

# refuse_unless_ours DIRECTORY: it and every directory above must belong to root or to the caller and be writable by
# nobody else, or another user could put a program there for the caller to run. Others may write to a directory with
# the sticky bit, such as /tmp: what is in it can be replaced only by its owner.
refuse_unless_ours() {
    directory=$(cd "$1" && pwd -P) || exit 1
    others=02
    [ "$me" != 0 ] || others=022 # a user's own group may write to that user's directories
    while :; do
        set -- $(stat -c '%u %a' "$directory/")
        if [ "$1" != "$me" ] && [ "$1" != 0 ]; then
            echo "hypeman: $directory belongs to another user; set HYPEMAN_UNPACK_DIR to a directory of your own" >&2
            exit 1
        elif [ $((0$2 & others)) != 0 ] && [ $((0$2 & 01000)) = 0 ]; then
            echo "hypeman: other users may write to $directory; set HYPEMAN_UNPACK_DIR to a directory of your own" >&2
            exit 1
        fi
        [ -n "$directory" ] || break
        directory=${directory%/*}
    done
}

if [ ! -x "$program" ]; then
    umask 022
    mkdir -p "$base"
    refuse_unless_ours "$base"
    work=$(mktemp -d "$base/unpacking.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    begin=$(awk '/^--- payload ---$/ { print NR + 1; exit }' "$0")
    tail -n "+$begin" "$0" | tar -xz -C "$work" --strip-components=1 --no-same-owner -f -
    chmod 755 "$work"
    # Of concurrent calls the first to finish wins; the others use its directory.
    mv -T "$work" "$base/$identity" 2>/dev/null || [ -x "$program" ]
    rm -rf "$work"
    trap - EXIT
fi
refuse_unless_ours "$base/$identity"
exec "$program" "$@"
exit 1
--- payload ---

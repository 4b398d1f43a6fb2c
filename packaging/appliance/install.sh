#!/bin/sh
# Installs Hypeman from this directory, on a host with systemd: program in /usr/lib/hypeman, command
# /usr/bin/hypeman, settings in /etc/hypeman. Running a newer version's install.sh upgrades: the API is unavailable
# for a moment, VMs continue. uninstall.sh removes it. Nothing is written unless every check passes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
fail() { echo "install.sh: $1; nothing was changed" >&2; exit 1; }

# @MACHINE@ is filled in by the build.
[ "$(uname -s) $(uname -m)" = "Linux @MACHINE@" ] || fail "this build is for Linux on @MACHINE@, not $(uname -s) on $(uname -m)"
[ "$(printf '%s\n' 5.10 "$(uname -r)" | sort -V | head -n 1)" = 5.10 ] || fail "Linux 5.10 or newer is required, not $(uname -r)"
[ -d /run/systemd/system ] || fail "systemd must be running (the single-file build works without it)"
for tool in nft:nftables ip:iproute2 mkfs.ext4:e2fsprogs; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${tool%:*}" >/dev/null || fail "${tool%:*} is missing: install ${tool#*:}"
done
[ "$(id -u)" = 0 ] || fail "it must be run as root"

# The server stops before its files are exchanged under it; VMs and their network go on.
systemctl stop hypeman-node.service 2>/dev/null || true
systemctl stop hypeman.service 2>/dev/null || true
rm -rf /usr/lib/hypeman.new
mkdir -p /usr/lib/hypeman.new /usr/bin /etc/systemd/system /usr/share/hypeman /usr/share/doc/hypeman
cp -a "$here/bundle/." /usr/lib/hypeman.new/
if [ -e /usr/lib/hypeman ]; then
    mv /usr/lib/hypeman /usr/lib/hypeman.old
fi
mv /usr/lib/hypeman.new /usr/lib/hypeman
rm -rf /usr/lib/hypeman.old
ln -sfn /usr/lib/hypeman/hypeman /usr/bin/hypeman
cp "$here"/units/* /etc/systemd/system/
mkdir -p /etc/modules-load.d
cp "$here/modules-load.conf" /etc/modules-load.d/hypeman.conf
rm -f /etc/sysctl.d/50-hypeman.conf # of older versions, which made the host a router
cp "$here/config.yaml" "$here/make-config" "$here/uninstall.sh" /usr/share/hypeman/
cp "$here/README.md" "$here/CONFIGURATION.md" "$here/CHANGELOG.md" "$here/LICENSE" "$here/openapi.json" \
    /usr/share/doc/hypeman/
mkdir -p /usr/share/doc/hypeman/docs
cp "$here"/docs/*.md /usr/share/doc/hypeman/docs/
mkdir -p /usr/share/hypeman/monitoring
cp "$here"/monitoring/* /usr/share/hypeman/monitoring/
# Manual pages and completions, in the directories that every distribution reads. uninstall.sh removes them.
mkdir -p /usr/local/share/man/man1 /usr/share/bash-completion/completions /usr/local/share/zsh/site-functions \
    /usr/share/fish/vendor_completions.d
rm -f /usr/local/share/man/man1/hypeman.1 /usr/local/share/man/man1/hypeman-*.1
cp "$here"/man/*.1 /usr/local/share/man/man1/
cp "$here/completions/bash" /usr/share/bash-completion/completions/hypeman
cp "$here/completions/zsh" /usr/local/share/zsh/site-functions/_hypeman
cp "$here/completions/fish" /usr/share/fish/vendor_completions.d/hypeman.fish

[ -e /etc/hypeman/config.yaml ] || first=yes # drop-ins may be there before
/usr/share/hypeman/make-config /usr/share/hypeman/config.yaml
[ -z "${first:-}" ] || [ ! -r /proc/modules ] || cut -d' ' -f1 /proc/modules > /etc/hypeman/modules-before # these stay loaded
while read -r module; do
    case $module in ''|'#'*) ;; *) modprobe -q "$module" 2>/dev/null || true ;; esac
done < "$here/modules-load.conf"
systemctl daemon-reload
systemctl enable --quiet hypeman.service
systemctl start hypeman.service
! systemctl --quiet is-enabled hypeman-node.service || systemctl start hypeman-node.service || true
echo "Hypeman is running. Next: hypeman doctor"

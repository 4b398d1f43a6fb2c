#!/bin/sh
# Installs Hypeman from this directory, on a host with systemd: program in /usr/lib/hypeman, command
# /usr/bin/hypeman, settings in /etc/hypeman. Run again with a newer version it upgrades: the server is
# away for a moment, VMs go on. uninstall.sh takes it away.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" = 0 ] || { echo "install.sh: must be run as root" >&2; exit 1; }
for tool in nft ip mkfs.ext4; do
    command -v $tool >/dev/null || echo "install.sh: $tool is missing: install nftables, iproute2, e2fsprogs" >&2
done

# The server stops before its files are exchanged under it; VMs and their network go on.
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
mkdir -p /etc/modules-load.d /etc/sysctl.d
cp "$here/modules-load.conf" /etc/modules-load.d/hypeman.conf
cp "$here/sysctl.conf" /etc/sysctl.d/50-hypeman.conf
cp "$here/config.yaml" "$here/make-config" "$here/uninstall.sh" /usr/share/hypeman/
cp "$here/README.md" "$here/CONFIGURATION.md" "$here/LICENSE" "$here/openapi.json" /usr/share/doc/hypeman/

/usr/share/hypeman/make-config /usr/share/hypeman/config.yaml
while read -r module; do
    case $module in ''|'#'*) ;; *) modprobe -q "$module" 2>/dev/null || true ;; esac
done < "$here/modules-load.conf"
sysctl -q -p /etc/sysctl.d/50-hypeman.conf || echo 1 > /proc/sys/net/ipv4/ip_forward
systemctl daemon-reload
systemctl enable --quiet hypeman.service
systemctl start hypeman.service
echo "Hypeman runs. Try: hypeman doctor"

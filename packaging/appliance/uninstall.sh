#!/bin/sh
# Removes what install.sh installed and ends all VMs. With --purge also settings, images and disks.
set -eu
[ "$(id -u)" = 0 ] || { echo "uninstall.sh: must be run as root" >&2; exit 1; }
systemctl stop hypeman-node.service hypeman.service hypeman-vms.service hypeman.slice 2>/dev/null || true
hypeman clean-host || true # links and rules, which outlive the server as the VMs do
systemctl disable --quiet hypeman-node.service hypeman.service 2>/dev/null || true
rm -f /etc/systemd/system/hypeman-node.service /etc/systemd/system/hypeman.service /etc/systemd/system/hypeman-vms.service /etc/systemd/system/hypeman.slice
rm -f /etc/modules-load.d/hypeman.conf /etc/sysctl.d/50-hypeman.conf /usr/bin/hypeman
rm -f /usr/local/share/man/man1/hypeman.1 /usr/local/share/man/man1/hypeman-*.1 \
    /usr/share/bash-completion/completions/hypeman /usr/local/share/zsh/site-functions/_hypeman \
    /usr/share/fish/vendor_completions.d/hypeman.fish
rm -rf /usr/lib/hypeman /usr/share/hypeman /usr/share/doc/hypeman
systemctl daemon-reload
if [ "${1:-}" = --purge ]; then
    rm -rf /etc/hypeman /var/lib/hypeman /var/lib/hypeman-node /run/hypeman
    ! getent group hypeman >/dev/null || groupdel hypeman || true
    echo "Hypeman, its settings and its data are removed."
else
    echo "Hypeman is removed; /etc/hypeman and /var/lib/hypeman are kept (uninstall.sh --purge deletes them)."
fi

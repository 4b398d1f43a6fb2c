#!/bin/sh
# A guest inside the virtual host, with real KVM: inner.sh "<modules>" "<script>" <QEMU device arguments...>
#
# Boots the host's own kernel with an initramfs of busybox and <modules> (with what they need), runs
# <script> as its only program and powers off. What the script writes comes out between two marks.
# A guest that hangs is ended after a quarter of an hour; one takes half a minute on a quiet machine.
# With INNER_UID its VMM runs as that user, who may open nothing but /dev/kvm and what was lent to him.
set -e
modules=$1 script=$2
shift 2
work=$(mktemp -d)
release=$(uname -r)
mkdir -p "$work/root/bin" "$work/root/proc" "$work/root/sys" "$work/root/dev" "$work/root/mod"
cp /bin/busybox "$work/root/bin/busybox"
: >"$work/order"
for module in $modules; do
    modprobe --show-depends "$module" | while read -r verb file options; do
        [ "$verb" = insmod ] && echo "$file"
    done >>"$work/order"
done
number=100
awk '!seen[$0]++' "$work/order" | while read -r file; do
    cp "$file" "$work/root/mod/$number-$(basename "$file")"
    number=$((number + 1))
done
cat >"$work/root/init" <<INIT
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in /mod/*; do insmod \$module; done
echo INNER-BEGIN
$script
echo INNER-END
poweroff -f
INIT
chmod 755 "$work/root/init"
(cd "$work/root" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$work/initrd"
cp "/boot/vmlinuz-$release" "$work/vmlinuz"
modprobe kvm-amd
as=
if [ -n "$INNER_UID" ]; then
    chmod 666 /dev/kvm
    chown -R "$INNER_UID" "$work"
    as="prlimit --memlock=unlimited setpriv --reuid=$INNER_UID --regid=$INNER_UID --clear-groups --no-new-privs"
fi
timeout 900 $as qemu-system-x86_64 -M q35,accel=kvm -cpu host -m 256 -smp 1 -nodefaults -display none -vga none \
    -chardev "file,id=console,path=$work/console" -serial chardev:console -no-reboot \
    -kernel "$work/vmlinuz" -initrd "$work/initrd" -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=unstable" \
    "$@" </dev/null >"$work/qemu" 2>&1 || echo "QEMU ended with $?"
if grep -q INNER-END "$work/console"; then
    tr -d '\r' <"$work/console" | sed -n '/INNER-BEGIN/,/INNER-END/p'
else
    tail -c 2000 "$work/qemu"
    tail -c 4000 "$work/console"
fi
rm -rf "$work"

#!/bin/sh
# Runs what the rig (rig.py) asks for, one request after the other, over a virtio port:
#
#   RUN <bytes>  and a shell script      -> DONE <exit code> <bytes>  and its output
#   PUT <bytes>  and a tar archive       -> DONE <exit code> <bytes>  unpacked below /
#   GET <bytes>  and a path              -> DONE <exit code> <bytes>  and the file
#
# dash's read takes single bytes and head takes no more than it is told, so nothing is lost between.
exec 3<>/dev/virtio-ports/rig
out=/var/tmp/rig.out
echo READY >&3
while read -r verb size <&3; do
    head -c "$size" <&3 >/var/tmp/rig.in
    case $verb in
    RUN) sh /var/tmp/rig.in >$out 2>&1 </dev/null 3>&- ;;
    PUT) tar -xf /var/tmp/rig.in -C / >$out 2>&1 3>&- ;;
    GET) cat "$(cat /var/tmp/rig.in)" >$out 2>/dev/null ;;
    esac
    code=$?
    echo "DONE $code $(stat -c %s $out)" >&3
    cat $out >&3
done

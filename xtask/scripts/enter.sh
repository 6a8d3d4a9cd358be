# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# enter ROOTFS [rw|ro OUTSIDE INSIDE]... -- [VARIABLE=VALUE]... COMMAND...
# Runs in a mount namespace of its own.
set -eu
root=$1
shift
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
while [ "$1" != -- ]; do
	mount --bind "$2" "$root$3"
	# A user namespace may not be allowed to remount. The folder is writable then, but nothing writes to it.
	[ "$1" = rw ] || mount -o remount,bind,ro "$root$3" 2>/dev/null || true
	shift 3
done
shift
for library in "$root"/usr/src/rustc-*/library; do :; done
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8 \
	RUST_LIB_SRC="${library#"$root"}" "$@"

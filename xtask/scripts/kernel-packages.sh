# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Runs in the new root file system while apt has its lists. Puts into /kernel, of the newest version of the series $1 that
# apt offers: the stock kernel, its modules and configuration, the symbols for modules, and the source.
set -eu
series=$1
version_of() { apt-cache show --no-all-versions "$1" 2>/dev/null | sed -n 's/^Version: //p' | head -n 1; }

version=$(version_of "linux-source-$series")
[ -n "$version" ] || { echo "apt offers no linux-source-$series" >&2; exit 1; }
release=
for headers in $(apt-cache pkgnames "linux-headers-$series" | grep -x "linux-headers-[^-]*-cloud-amd64"); do
	[ "$(version_of "$headers")" != "$version" ] || release=${headers#linux-headers-}
done
[ -n "$release" ] || { echo "apt offers no linux-headers-$series…-cloud-amd64 of version $version" >&2; exit 1; }
# The signed image comes later than the rest; the unsigned one is the same but for the signature.
image=linux-image-$release
[ "$(version_of "$image")" = "$version" ] || image=$image-unsigned
echo "kernel packages: $image $version"

mkdir -p /kernel /tmp/packages/unpacked
cd /tmp/packages
apt-get download "$image=$version" "linux-headers-$release=$version" "linux-source-$series=$version"
for package in *.deb; do
	dpkg-deb -x "$package" unpacked
	rm "$package"
done
for modules in unpacked/usr/lib/modules/"$release" unpacked/lib/modules/"$release"; do
	[ ! -d "$modules" ] || mv "$modules" /kernel/modules
done
mv unpacked/boot/vmlinuz-"$release" /kernel/vmlinuz
mv unpacked/boot/config-"$release" /kernel/config
mv unpacked/usr/src/linux-headers-"$release"/Module.symvers /kernel/
mv unpacked/usr/src/linux-source-"$series".tar.xz /kernel/linux-source.tar.xz
xz -dc /kernel/modules/kernel/drivers/virtio/virtio_balloon.ko.xz >/kernel/virtio_balloon.ko
echo "$release" >/kernel/release
echo "$version" >/kernel/version
chmod a+r /kernel/*
cd /
rm -r /tmp/packages

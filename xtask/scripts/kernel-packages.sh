# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Runs in the new root file system while apt has its lists. Puts into /kernel the newest version of the series $1 that
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
# The kernel is one package in some versions and several in others. Signed packages appear later than unsigned ones,
# which differ only in the signature.
parts=
for kind in image base binary modules; do
	for package in "linux-$kind-$release" "linux-$kind-$release-unsigned"; do
		[ "$(version_of "$package")" = "$version" ] || continue
		parts="$parts $package=$version"
		break
	done
done
echo "kernel packages:$parts"

mkdir -p /kernel /tmp/packages/unpacked
cd /tmp/packages
chmod a+rwx .
# shellcheck disable=SC2086
apt-get download $parts "linux-headers-$release=$version" "linux-source-$series=$version"
for package in *.deb; do
	dpkg-deb -x "$package" unpacked
	rm "$package"
done
# The paths of these files differ between versions.
take() {
	target=$1
	shift
	for source in "$@"; do
		[ ! -e "unpacked/$source" ] || { mv "unpacked/$source" "/kernel/$target"; return; }
	done
	echo "no package of the kernel has $*" >&2
	exit 1
}
take vmlinuz usr/lib/modules/"$release"/vmlinuz boot/vmlinuz-"$release"
take config usr/lib/modules/"$release"/config boot/config-"$release"
take modules usr/lib/modules/"$release" lib/modules/"$release"
take Module.symvers usr/src/linux-headers-"$release"/Module.symvers
take linux-source.tar.xz usr/src/linux-source-"$series".tar.xz
xz -dc /kernel/modules/kernel/drivers/virtio/virtio_balloon.ko.xz >/kernel/virtio_balloon.ko
echo "$release" >/kernel/release
echo "$version" >/kernel/version
chmod a+r /kernel/*
cd /
rm -r /tmp/packages

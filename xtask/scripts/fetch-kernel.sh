# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Runs on the host, with package lists of its own. Fetches into $FOLDER the newest cloud kernel of the series $SERIES in
# $SUITE: the image, its configuration, and the modules that guests may load. With $SOURCE=1 also fetches the symbols
# and the source that modules are built from.
set -eu
cd "$FOLDER"
mkdir -p apt/lists/partial apt/cache/archives/partial apt/unpacked modules
echo "deb [arch=amd64 signed-by=$KEYS] $MIRROR $SUITE main" >apt/sources
apt() {
	program=$1
	shift
	"$program" -o "Dir::Etc::SourceList=$FOLDER/apt/sources" -o Dir::Etc::SourceParts=/dev/null \
		-o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
		-o "Dir::State::Lists=$FOLDER/apt/lists" -o "Dir::Cache=$FOLDER/apt/cache" -o Dir::State::status=/dev/null \
		-o APT::Architecture=amd64 -o APT::Sandbox::User= -o Debug::NoLocking=true \
		-o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false -o Acquire::Languages=none "$@"
}
apt apt-get update --error-on=any
version_of() { apt apt-cache show --no-all-versions "$1" 2>/dev/null | sed -n 's/^Version: //p' | head -n 1; }

# Takes the newest image. If modules are built for it, takes the newest image with headers and source.
wanted=
[ "$SOURCE" != 1 ] || wanted=$(version_of "linux-source-$SERIES")
release=
newest=
for package in $(apt apt-cache pkgnames "linux-image-$SERIES." | grep -x "linux-image-[0-9].*-cloud-amd64"); do
	version=$(version_of "$package")
	[ -z "$wanted" ] || [ "$version" = "$wanted" ] || continue
	[ -z "$newest" ] || dpkg --compare-versions "$version" gt "$newest" || continue
	newest=$version
	release=${package#linux-image-}
done
[ -n "$release" ] || { echo "$SUITE offers no linux-image-$SERIES…-cloud-amd64 $wanted" >&2; exit 1; }

# The kernel is one package in some versions and several in others.
parts=
for kind in image base binary modules; do
	[ "$(version_of "linux-$kind-$release")" != "$newest" ] || parts="$parts linux-$kind-$release=$newest"
done
[ "$SOURCE" != 1 ] || parts="$parts linux-headers-$release=$newest linux-source-$SERIES=$newest"
echo "kernel packages:$parts"
cd apt
# shellcheck disable=SC2086
apt apt-get download $parts
for package in *.deb; do
	dpkg-deb -x "$package" unpacked
	rm "$package"
done
# The paths of these files differ between versions.
take() {
	target=$1
	shift
	for source in "$@"; do
		[ ! -e "unpacked/$source" ] || { mv "unpacked/$source" "$FOLDER/$target"; return; }
	done
	echo "no package of the kernel has $*" >&2
	exit 1
}
take vmlinuz usr/lib/modules/"$release"/vmlinuz boot/vmlinuz-"$release"
take config usr/lib/modules/"$release"/config boot/config-"$release"
if [ "$SOURCE" = 1 ]; then
	take Module.symvers usr/src/linux-headers-"$release"/Module.symvers
	take linux-source.tar.xz usr/src/linux-source-"$SERIES".tar.xz
fi
for module in $MODULES; do
	find unpacked \( -name "$module.ko" -o -name "$module.ko.xz" \) -exec mv {} "$FOLDER/modules/" \;
done
echo "$release" >"$FOLDER/release"
cd "$FOLDER"
rm -r apt

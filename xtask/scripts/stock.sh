# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Rebuilds, in /src/stock, what Debian's headers package leaves out: the Rust metadata of the stock kernel. Same source,
# same configuration, same compilers, hence the same symbols.
cd /src/linux
release=$(cat /kernel/release)
cp /kernel/config /src/stock/.config
# Debian's keys are not in its source, and nothing here is signed.
scripts/config --file /src/stock/.config --set-str SYSTEM_TRUSTED_KEYS "" --set-str MODULE_SIG_KEY ""
make O=/src/stock olddefconfig
# An option that is lost (because a tool is missing, or of another version) may change the layout of the kernel's types.
# These may differ: the name by which the compiler is called, and what concerns signatures.
lost=$(grep '^CONFIG_' /kernel/config | grep -vxFf /src/stock/.config |
	grep -vE '^CONFIG_(CC_VERSION_TEXT|OPENSSL_SUPPORTS_ML_DSA|MODULE_SIG[A-Z_]*|SYSTEM_TRUSTED_KEYS)=' || true)
[ -z "$lost" ] || { echo "the stock kernel's configuration was not taken whole; lost: $lost" >&2; exit 1; }
make -j"$(nproc)" O=/src/stock prepare modules_prepare
# The package's release and symbols, so that the stock kernel takes the modules.
echo "$release" >/src/stock/include/config/kernel.release
echo "#define UTS_RELEASE \"$release\"" >/src/stock/include/generated/utsrelease.h
cp /kernel/Module.symvers /src/stock/

# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Rebuilds in /src/stock the Rust metadata of the stock kernel, which Debian's headers package does not include. The
# source, the configuration and the compilers are the same, so the symbols are the same.
cd /src/linux
release=$(cat /kernel/release)
cp /kernel/config /src/stock/.config
# Debian's keys are not in its source, and nothing is signed here.
scripts/config --file /src/stock/.config --set-str SYSTEM_TRUSTED_KEYS "" --set-str MODULE_SIG_KEY ""
make O=/src/stock olddefconfig
# A lost option, because a tool is missing or has another version, may change the layout of the kernel's types. Only the
# compiler's name and options about signatures may differ.
lost=$(grep '^CONFIG_' /kernel/config | grep -vxFf /src/stock/.config |
	grep -vE '^CONFIG_(CC_VERSION_TEXT|OPENSSL_SUPPORTS_ML_DSA|MODULE_SIG[A-Z_]*|SYSTEM_TRUSTED_KEYS)=' || true)
[ -z "$lost" ] || { echo "the stock kernel's configuration was not taken whole; lost: $lost" >&2; exit 1; }
make -j"$(nproc)" O=/src/stock prepare modules_prepare
# The stock kernel loads the modules only with the package's release and symbols.
echo "$release" >/src/stock/include/config/kernel.release
echo "#define UTS_RELEASE \"$release\"" >/src/stock/include/generated/utsrelease.h
cp /kernel/Module.symvers /src/stock/

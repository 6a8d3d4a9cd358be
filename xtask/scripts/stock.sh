# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Rebuilds, in /src/stock, what Debian's headers package leaves out: the Rust metadata of the stock kernel. Same source,
# same configuration, same compilers, hence the same symbols.
cd /src/linux
release=$(cat /kernel/release)
cp /kernel/config /src/stock/.config
# Debian's keys are not in its source, and nothing here is signed.
scripts/config --file /src/stock/.config --set-str SYSTEM_TRUSTED_KEYS "" --set-str MODULE_SIG_KEY ""
make O=/src/stock olddefconfig
grep -qx CONFIG_RUST=y /src/stock/.config || { echo "this kernel's configuration is not accepted with RUST" >&2; exit 1; }
make -j"$(nproc)" O=/src/stock prepare modules_prepare
# The package's release and symbols, so that the stock kernel takes the modules.
echo "$release" >/src/stock/include/config/kernel.release
echo "#define UTS_RELEASE \"$release\"" >/src/stock/include/generated/utsrelease.h
cp /kernel/Module.symvers /src/stock/

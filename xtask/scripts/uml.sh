# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Builds user-mode Linux in /src/uml, only from the configuration fragment in that folder.
cd /src/linux
make ARCH=um O=/src/uml KCONFIG_ALLCONFIG=/src/uml/fragment allnoconfig
missing=$(grep '^CONFIG_' /src/uml/fragment | grep -vxFf /src/uml/.config || true)
[ -z "$missing" ] || { echo "the configuration does not take: $missing" >&2; exit 1; }
make ARCH=um O=/src/uml -j"$(nproc)"

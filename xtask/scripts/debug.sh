# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Runs before uml.sh, for the debug kernel. The linker script of a static user-mode Linux sets __bss_start before .bss
# is aligned. With two processors .bss is aligned to the size of a stack, and kmemleak faults in the gap before it.
script=arch/um/kernel/uml.lds.S
sed 's/^  __bss_start = \.;/  . = ALIGN(KERNEL_STACK_SIZE);\n&/' "/src/linux/$script" >/src/uml/mended.lds.S
! cmp -s "/src/linux/$script" /src/uml/mended.lds.S || { echo "$script has changed: adapt debug.sh" >&2; exit 1; }
busybox mount --bind /src/uml/mended.lds.S "/src/linux/$script"


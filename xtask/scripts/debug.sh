# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Goes before uml.sh, for the debug kernel. The linker script of a static user-mode Linux says where .bss begins before it is
# aligned; with two processors it is, to the size of a stack, and kmemleak falls into the hole between.
script=arch/um/kernel/uml.lds.S
sed 's/^  __bss_start = \.;/  . = ALIGN(KERNEL_STACK_SIZE);\n&/' "/src/linux/$script" >/src/uml/mended.lds.S
! cmp -s "/src/linux/$script" /src/uml/mended.lds.S || { echo "$script is not as it was" >&2; exit 1; }
busybox mount --bind /src/uml/mended.lds.S "/src/linux/$script"


# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Runs before uml.sh, for the debug kernel. Mends two faults of user-mode Linux that stop this kernel, in copies that are
# mounted over the files of the source.

# Edits a file of the source with sed, and fails if that changes nothing.
mend() {
    file=$1
    shift
    copy=/src/uml/mended.${file##*/}
    sed "$@" "/src/linux/$file" >"$copy"
    ! cmp -s "/src/linux/$file" "$copy" || { echo "$file has changed: adapt debug.sh" >&2; exit 1; }
    busybox mount --bind "$copy" "/src/linux/$file"
}

# The linker script of a static user-mode Linux sets __bss_start before .bss is aligned. With two processors .bss is
# aligned to the size of a stack, and kmemleak faults in the gap before it.
mend arch/um/kernel/uml.lds.S -e 's/^  __bss_start = \.;/  . = ALIGN(KERNEL_STACK_SIZE);\n&/'

# A read that may fault (copy_from_kernel_nofault) sets where to continue, and clears it afterwards. The handler of the
# fault enables interrupts. Lockdep warns about that if an interrupt was interrupted. A warning in a worker reads the
# worker's name in the same way, so the first read has no place to continue: "Segfault without recovery target". A
# device that disconnects causes it, because vu_interrupt warns. The macros now restore what was set before.
mend arch/um/include/asm/uaccess.h \
    -e 's/^\tint __faulted;\(\t*\)\\$/\tint __faulted; void *volatile __outer = current->thread.segv_continue;\1\\/' \
    -e 's/^\t___backtrack_faulted(__faulted);\(\t*\)\\$/&\n\tif (__faulted) current->thread.segv_continue = __outer;\1\\/' \
    -e 's/^\tcurrent->thread.segv_continue = NULL;\(\t*\)\\$/\tcurrent->thread.segv_continue = __outer;\1\\/'

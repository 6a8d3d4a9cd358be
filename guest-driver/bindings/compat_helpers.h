/* SPDX-License-Identifier: GPL-2.0 */

/*
 * Static inlines that only kernels before 7.3 need, as functions that Rust can call. Only built for
 * those kernels.
 */

#ifndef VIRTIO_BALLOON_RS_COMPAT_HELPERS_H
#define VIRTIO_BALLOON_RS_COMPAT_HELPERS_H

#include <linux/spinlock.h>

unsigned long vbrs_spin_lock_irqsave(spinlock_t *lock);
bool vbrs_spin_trylock_irqsave(spinlock_t *lock, unsigned long *flags);
void vbrs_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags);

#endif

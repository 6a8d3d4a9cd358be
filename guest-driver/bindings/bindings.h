/* SPDX-License-Identifier: GPL-2.0 */

/*
 * What bindgen reads: the kernel headers that the kernel crate's own bindings leave out, and the helpers of this
 * module. Which names come over is said in bindgen_parameters.
 */

#include <linux/types.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <uapi/linux/virtio_balloon.h>
#include <uapi/linux/virtio_ids.h>

#include "virtio_helpers.h"
#include "mm_helpers.h"
#include "trace_helpers.h"
#include "compat_helpers.h"

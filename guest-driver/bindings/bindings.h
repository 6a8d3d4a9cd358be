/* SPDX-License-Identifier: GPL-2.0 */

/*
 * Input of bindgen: the kernel headers that the bindings of the kernel crate omit, and the helpers
 * of this module. bindgen_parameters lists the names to generate.
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

/* SPDX-License-Identifier: GPL-2.0 */

/*
 * Input of bindgen: the kernel headers that the bindings of the kernel crate omit, and the helpers
 * of this module. bindgen_parameters lists the names to generate.
 */

#include <linux/gfp.h>
#include <linux/memory.h>
#include <linux/page_reporting.h>
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

/* Macros with a cast as constants, because bindgen evaluates only those. */
static const gfp_t VBRS_GFP_DMA = __GFP_DMA;
static const gfp_t VBRS_GFP_DMA32 = __GFP_DMA32;
static const gfp_t VBRS_GFP_MOVABLE = __GFP_MOVABLE;
static const gfp_t VBRS_GFP_NOMEMALLOC = __GFP_NOMEMALLOC;
static const gfp_t VBRS_GFP_NORETRY = __GFP_NORETRY;
static const gfp_t VBRS_GFP_NOWARN = __GFP_NOWARN;
static const gfp_t VBRS_GFP_RECLAIM = __GFP_RECLAIM;
static const gfp_t VBRS_GFP_RECLAIMABLE = __GFP_RECLAIMABLE;
static const gfp_t VBRS_GFP_THISNODE = __GFP_THISNODE;

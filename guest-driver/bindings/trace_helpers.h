/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The tracepoints of virtio_balloon_rs_trace.h as functions that Rust can call. Any context but
 * NMI. The device may be NULL.
 */
#ifndef VIRTIO_BALLOON_RS_TRACE_HELPERS_H
#define VIRTIO_BALLOON_RS_TRACE_HELPERS_H

#include <linux/types.h>

struct device;

void vbrs_trace_request(const struct device *device, const char *queue, u64 pages);
void vbrs_trace_acknowledge(const struct device *device, const char *queue, u64 pages);
void vbrs_trace_hint_start(const struct device *device, u32 id, u64 reserve);
void vbrs_trace_hint_block(const struct device *device, u64 address, u32 order);
void vbrs_trace_hint_stop(const struct device *device, u64 microseconds);
void vbrs_trace_hint_return(const struct device *device, u64 pages);
void vbrs_trace_report(const struct device *device, u32 blocks, u64 pages, bool acknowledged);

#endif

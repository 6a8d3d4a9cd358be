// SPDX-License-Identifier: GPL-2.0

#include "trace_helpers.h"

#define CREATE_TRACE_POINTS
#include "virtio_balloon_rs_trace.h"

/*
 * declare_trace!() of the kernel crate expects a tracepoint in the bindings of the kernel crate,
 * which do not contain those of a module. Therefore these functions check the static key, one call
 * away from Rust.
 */

void vbrs_trace_request(const struct device *device, const char *queue, u64 pages)
{
	trace_balloon_request(device, queue, pages);
}

void vbrs_trace_acknowledge(const struct device *device, const char *queue, u64 pages)
{
	trace_balloon_acknowledge(device, queue, pages);
}

void vbrs_trace_hint_start(const struct device *device, u32 id, u64 reserve)
{
	trace_balloon_hint_start(device, id, reserve);
}

void vbrs_trace_hint_block(const struct device *device, u64 address, u32 order)
{
	trace_balloon_hint_block(device, address, order);
}

void vbrs_trace_hint_stop(const struct device *device, u64 microseconds)
{
	trace_balloon_hint_stop(device, microseconds);
}

void vbrs_trace_hint_return(const struct device *device, u64 pages)
{
	trace_balloon_hint_return(device, pages);
}

void vbrs_trace_report(const struct device *device, u32 blocks, u64 pages, bool acknowledged)
{
	trace_balloon_report(device, blocks, pages, acknowledged);
}

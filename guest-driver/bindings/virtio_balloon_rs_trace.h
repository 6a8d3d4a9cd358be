/* SPDX-License-Identifier: GPL-2.0 */

/*
 * The tracepoints of the module. docs/driver.md describes their fields. Existing fields keep their
 * name and their meaning.
 */

#undef TRACE_SYSTEM
#define TRACE_SYSTEM virtio_balloon_rs

#if !defined(VIRTIO_BALLOON_RS_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define VIRTIO_BALLOON_RS_TRACE_H

#include <linux/device.h>
#include <linux/tracepoint.h>

#define vbrs_device_name(device) ((device) ? dev_name(device) : "")

DECLARE_EVENT_CLASS(balloon_request_class,
	TP_PROTO(const struct device *device, const char *queue, u64 pages),
	TP_ARGS(device, queue, pages),
	TP_STRUCT__entry(
		__string(device, vbrs_device_name(device))
		__string(queue, queue)
		__field(u64, pages)
	),
	TP_fast_assign(
		__assign_str(device);
		__assign_str(queue);
		__entry->pages = pages;
	),
	TP_printk("%s queue=%s pages=%llu", __get_str(device), __get_str(queue), __entry->pages)
);

DEFINE_EVENT(balloon_request_class, balloon_request,
	TP_PROTO(const struct device *device, const char *queue, u64 pages),
	TP_ARGS(device, queue, pages)
);

DEFINE_EVENT(balloon_request_class, balloon_acknowledge,
	TP_PROTO(const struct device *device, const char *queue, u64 pages),
	TP_ARGS(device, queue, pages)
);

TRACE_EVENT(balloon_hint_start,
	TP_PROTO(const struct device *device, u32 id, u64 reserve),
	TP_ARGS(device, id, reserve),
	TP_STRUCT__entry(
		__string(device, vbrs_device_name(device))
		__field(u32, id)
		__field(u64, reserve)
	),
	TP_fast_assign(
		__assign_str(device);
		__entry->id = id;
		__entry->reserve = reserve;
	),
	TP_printk("%s id=%#x reserve=%llu", __get_str(device), __entry->id, __entry->reserve)
);

TRACE_EVENT(balloon_hint_block,
	TP_PROTO(const struct device *device, u64 address, u32 order),
	TP_ARGS(device, address, order),
	TP_STRUCT__entry(
		__string(device, vbrs_device_name(device))
		__field(u64, address)
		__field(u32, order)
	),
	TP_fast_assign(
		__assign_str(device);
		__entry->address = address;
		__entry->order = order;
	),
	TP_printk("%s address=%#llx order=%u", __get_str(device), __entry->address, __entry->order)
);

TRACE_EVENT(balloon_hint_stop,
	TP_PROTO(const struct device *device, u64 microseconds),
	TP_ARGS(device, microseconds),
	TP_STRUCT__entry(
		__string(device, vbrs_device_name(device))
		__field(u64, microseconds)
	),
	TP_fast_assign(
		__assign_str(device);
		__entry->microseconds = microseconds;
	),
	TP_printk("%s microseconds=%llu", __get_str(device), __entry->microseconds)
);

TRACE_EVENT(balloon_hint_return,
	TP_PROTO(const struct device *device, u64 pages),
	TP_ARGS(device, pages),
	TP_STRUCT__entry(
		__string(device, vbrs_device_name(device))
		__field(u64, pages)
	),
	TP_fast_assign(
		__assign_str(device);
		__entry->pages = pages;
	),
	TP_printk("%s pages=%llu", __get_str(device), __entry->pages)
);

TRACE_EVENT(balloon_report,
	TP_PROTO(const struct device *device, u32 blocks, u64 pages, bool acknowledged),
	TP_ARGS(device, blocks, pages, acknowledged),
	TP_STRUCT__entry(
		__string(device, vbrs_device_name(device))
		__field(u32, blocks)
		__field(u64, pages)
		__field(bool, acknowledged)
	),
	TP_fast_assign(
		__assign_str(device);
		__entry->blocks = blocks;
		__entry->pages = pages;
		__entry->acknowledged = acknowledged;
	),
	TP_printk("%s blocks=%u pages=%llu acknowledged=%d", __get_str(device), __entry->blocks, __entry->pages,
		  __entry->acknowledged)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE virtio_balloon_rs_trace
#include <trace/define_trace.h>

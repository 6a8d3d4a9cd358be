/* SPDX-License-Identifier: GPL-2.0 */

/*
 * Static inlines, macros and variadic functions of the virtio, device, wait queue and work queue
 * headers as functions that Rust can call.
 */

#ifndef VIRTIO_BALLOON_RS_VIRTIO_HELPERS_H
#define VIRTIO_BALLOON_RS_VIRTIO_HELPERS_H

#include <linux/device.h>
#include <linux/pci.h>
#include <linux/scatterlist.h>
#include <linux/sched.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <uapi/linux/virtio_pci.h>

bool vbrs_virtio_has_feature(const struct virtio_device *vdev, unsigned int bit);
void vbrs_virtio_clear_feature(struct virtio_device *vdev, unsigned int bit);
bool vbrs_virtio_has_config(const struct virtio_device *vdev);
u32 vbrs_virtio_config_length(const struct virtio_device *vdev);
void vbrs_virtio_config_read(struct virtio_device *vdev, unsigned int offset, void *value, unsigned int size);
void vbrs_virtio_config_write(struct virtio_device *vdev, unsigned int offset, const void *value, unsigned int size);
void vbrs_virtio_device_ready(struct virtio_device *vdev);
int vbrs_virtio_find_vqs(struct virtio_device *vdev, unsigned int count, struct virtqueue *vqs[],
			 struct virtqueue_info infos[]);
void vbrs_virtio_del_vqs(struct virtio_device *vdev);
void vbrs_sg_set_buf(struct scatterlist *sg, const void *address, unsigned int length);
void vbrs_sg_set_page(struct scatterlist *sg, struct page *page, unsigned int length, unsigned int offset);

void vbrs_wait_queue_init(struct wait_queue_head *waiters);
void vbrs_wake_up_all(struct wait_queue_head *waiters);
bool vbrs_wait_event_timeout(struct wait_queue_head *waiters, const u32 *counter, u32 seen, unsigned long jiffies);

void vbrs_set_wakeup_capable(struct device *dev, bool capable);
void vbrs_stay_awake(struct device *dev);
void vbrs_relax(struct device *dev);

struct workqueue_struct *vbrs_alloc_workqueue(const char *name, unsigned int flags, int max_active);

void vbrs_cond_resched(void);

#if IS_BUILTIN(CONFIG_KUNIT)
void vbrs_test_device_init(struct virtio_device *vdev);
void vbrs_test_set_feature(struct virtio_device *vdev, unsigned int bit);
void *vbrs_test_phys_to_virt(u64 address);
#endif

#endif

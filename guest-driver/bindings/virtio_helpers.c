// SPDX-License-Identifier: GPL-2.0

#include "virtio_helpers.h"

/*
 * Unlike virtio_has_feature(), returns false instead of calling BUG() for a bit that is not in the
 * feature table of the driver.
 */
bool vbrs_virtio_has_feature(const struct virtio_device *vdev, unsigned int bit)
{
	return bit < VIRTIO_FEATURES_BITS && __virtio_test_bit(vdev, bit);
}

void vbrs_virtio_clear_feature(struct virtio_device *vdev, unsigned int bit)
{
	if (bit < VIRTIO_FEATURES_BITS)
		__virtio_clear_bit(vdev, bit);
}

bool vbrs_virtio_has_config(const struct virtio_device *vdev)
{
	return vdev->config->get && vdev->config->set;
}

/*
 * Returns the size of the configuration space that the transport gives access to, or 0 if it is
 * unknown. For PCI this is the size that virtio_pci_find_capability() finds and
 * vp_modern_map_capability() maps. vp_get() and vp_set() call BUG() for an access beyond it.
 */
u32 vbrs_virtio_config_length(const struct virtio_device *vdev)
{
#ifdef CONFIG_PCI
	struct device *parent = vdev->dev.parent;
	struct pci_dev *pci;
	int pos;

	if (!parent || !dev_is_pci(parent))
		return 0;
	pci = to_pci_dev(parent);
	for (pos = pci_find_capability(pci, PCI_CAP_ID_VNDR); pos > 0;
	     pos = pci_find_next_capability(pci, pos, PCI_CAP_ID_VNDR)) {
		u8 type, bar;
		u32 length;

		pci_read_config_byte(pci, pos + offsetof(struct virtio_pci_cap, cfg_type), &type);
		pci_read_config_byte(pci, pos + offsetof(struct virtio_pci_cap, bar), &bar);
		if (type != VIRTIO_PCI_CAP_DEVICE_CFG || bar >= PCI_STD_NUM_BARS || !pci_resource_len(pci, bar) ||
		    !(pci_resource_flags(pci, bar) & (IORESOURCE_IO | IORESOURCE_MEM)))
			continue;
		pci_read_config_dword(pci, pos + offsetof(struct virtio_pci_cap, length), &length);
		return min_t(u32, length, PAGE_SIZE);
	}
#endif
	return 0;
}

/* Reads one field. Repeats the read if the device changed its configuration meanwhile. */
void vbrs_virtio_config_read(struct virtio_device *vdev, unsigned int offset, void *value, unsigned int size)
{
	__virtio_cread_many(vdev, offset, value, 1, size);
}

void vbrs_virtio_config_write(struct virtio_device *vdev, unsigned int offset, const void *value, unsigned int size)
{
	might_sleep();
	vdev->config->set(vdev, offset, value, size);
}

/* Unlike virtio_device_ready(), may be called more than once. */
void vbrs_virtio_device_ready(struct virtio_device *vdev)
{
	if (!(vdev->config->get_status(vdev) & VIRTIO_CONFIG_S_DRIVER_OK))
		virtio_device_ready(vdev);
}

int vbrs_virtio_find_vqs(struct virtio_device *vdev, unsigned int count, struct virtqueue *vqs[],
			 struct virtqueue_info infos[])
{
	return virtio_find_vqs(vdev, count, vqs, infos, NULL);
}

void vbrs_virtio_del_vqs(struct virtio_device *vdev)
{
	vdev->config->del_vqs(vdev);
}

void vbrs_sg_set_buf(struct scatterlist *sg, const void *address, unsigned int length)
{
	sg_set_buf(sg, address, length);
}

void vbrs_sg_set_page(struct scatterlist *sg, struct page *page, unsigned int length, unsigned int offset)
{
	sg_set_page(sg, page, length, offset);
}

void vbrs_wait_queue_init(struct wait_queue_head *waiters)
{
	init_waitqueue_head(waiters);
}

void vbrs_wake_up_all(struct wait_queue_head *waiters)
{
	wake_up_all(waiters);
}

/*
 * Waits until *counter differs from seen, for at most this many jiffies. Returns whether it does.
 */
bool vbrs_wait_event_timeout(struct wait_queue_head *waiters, const u32 *counter, u32 seen, unsigned long jiffies)
{
	return wait_event_timeout(*waiters, READ_ONCE(*counter) != seen, jiffies) > 0;
}

void vbrs_set_wakeup_capable(struct device *dev, bool capable)
{
	device_set_wakeup_capable(dev, capable);
}

void vbrs_stay_awake(struct device *dev)
{
	pm_stay_awake(dev);
}

void vbrs_relax(struct device *dev)
{
	pm_relax(dev);
}

/* Variadic. */
struct workqueue_struct *vbrs_alloc_workqueue(const char *name, unsigned int flags, int max_active)
{
	return alloc_workqueue("%s", flags, max_active, name);
}

void vbrs_cond_resched(void)
{
	cond_resched();
}

#if IS_BUILTIN(CONFIG_KUNIT)
/*
 * Initialises the part of a device that rings and references need, as register_virtio_device()
 * does.
 */
void vbrs_test_device_init(struct virtio_device *vdev)
{
	device_initialize(&vdev->dev);
	INIT_LIST_HEAD(&vdev->vqs);
	spin_lock_init(&vdev->vqs_list_lock);
	spin_lock_init(&vdev->config_lock);
	__virtio_set_bit(vdev, VIRTIO_F_VERSION_1);
}

void vbrs_test_set_feature(struct virtio_device *vdev, unsigned int bit)
{
	__virtio_set_bit(vdev, bit);
}

void *vbrs_test_phys_to_virt(u64 address)
{
	return phys_to_virt(address);
}
#endif

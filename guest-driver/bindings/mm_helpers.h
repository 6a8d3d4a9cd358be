/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Memory management for guest-driver/mm: static inlines, macros and variadic functions of the
 * kernel as functions that Rust can call.
 */
#ifndef VIRTIO_BALLOON_RS_MM_HELPERS_H
#define VIRTIO_BALLOON_RS_MM_HELPERS_H

#include <linux/balloon.h>
#include <linux/mm.h>
#include <linux/notifier.h>
#include <linux/oom.h>
#include <linux/page_reporting.h>
#include <linux/shrinker.h>
#include <linux/workqueue.h>

struct page *vbrs_alloc_free_block(unsigned int order);

struct vbrs_zone {
	unsigned long managed, free, free_cma, min, low, high, lowmem_reserve;
};

enum vbrs_mobility { VBRS_UNMOVABLE, VBRS_MOVABLE, VBRS_RECLAIMABLE };

void vbrs_before_first_zone(int *node, int *zone);
bool vbrs_next_zone(int *node, int *zone);
void vbrs_read_zone(int node, int zone, struct vbrs_zone *state);
bool vbrs_zone_has_free(int node, int zone, unsigned int order, enum vbrs_mobility mobility);
struct page *vbrs_alloc_zone_block(int node, int zone, unsigned int order, enum vbrs_mobility mobility);
bool vbrs_page_is_of_zone(struct page *page, int node, int zone);
bool vbrs_page_is_cma(struct page *page);
unsigned int vbrs_pageblock_order(void);

void vbrs_zero_pages(struct page *page, unsigned long count);
void vbrs_set_offline(struct page *page, unsigned long count);
void vbrs_clear_offline(struct page *page, unsigned long count);
void vbrs_split_block(struct page *page, unsigned int order);
void vbrs_free_single_pages(struct page *page, unsigned long count);
phys_addr_t vbrs_page_to_phys(struct page *page);
struct list_head *vbrs_page_lru(struct page *page);
struct page *vbrs_lru_to_page(struct list_head *lru);
void vbrs_list_del(struct list_head *entry);
unsigned long vbrs_page_private(struct page *page);
void vbrs_set_page_private(struct page *page, unsigned long value);

void vbrs_get_page(struct page *page);
void vbrs_put_page(struct page *page);

typedef int (*vbrs_migrate_page)(struct balloon_dev_info *info, struct page *newpage, struct page *page,
				 enum migrate_mode mode);

void vbrs_balloon_devinfo_init(struct balloon_dev_info *info, bool adjust_managed, vbrs_migrate_page migrate);

unsigned long vbrs_balloon_isolated(struct balloon_dev_info *info);
void vbrs_uncount_balloon_page(struct page *page);
void vbrs_recount_balloon_page(struct page *old, struct page *new);

struct shrinker *vbrs_shrinker_alloc(const char *name);

struct page *vbrs_sg_page(struct scatterlist *sg);
unsigned int vbrs_page_reporting_order(void);
int vbrs_page_reporting_register(struct page_reporting_dev_info *info);
void vbrs_page_reporting_unregister(struct page_reporting_dev_info *info);

unsigned long vbrs_free_pages(void);
unsigned long vbrs_available_and_swap_pages(void);
unsigned long vbrs_managed_pages(void);
unsigned long vbrs_high_watermarks(void);
unsigned long vbrs_min_low_midpoint(void);
bool vbrs_has_one_node(void);
void vbrs_nodes_below_watermark(nodemask_t *nodes);
bool vbrs_page_is_on_nodes(struct page *page, const nodemask_t *nodes);
unsigned int vbrs_max_page_order(void);
bool vbrs_fills_free_pages(u32 *pattern);
bool vbrs_allocator_fills_pages(void);

struct vbrs_meminfo {
	u64 free, total, available, file_pages;
};

struct vbrs_vm_events {
	u64 swapped_in, swapped_out, major_faults, faults, oom_kills, allocation_stalls;
	u64 async_scanned, direct_scanned, async_reclaimed, direct_reclaimed;
};

struct vbrs_hugetlb_events {
	u64 allocations, failures;
};

void vbrs_read_meminfo(struct vbrs_meminfo *memory);
bool vbrs_read_vm_events(struct vbrs_vm_events *events, struct vbrs_hugetlb_events *hugetlb,
			 bool *has_hugetlb);

enum vbrs_pm_phase { VBRS_PM_OTHER, VBRS_PM_PREPARE, VBRS_PM_POST };

int vbrs_register_memory_notifier(struct notifier_block *block);
void vbrs_unregister_memory_notifier(struct notifier_block *block);
bool vbrs_mem_going_offline(unsigned long action, void *argument, u64 *start, u64 *end);
int vbrs_register_pm_notifier(struct notifier_block *block);
void vbrs_unregister_pm_notifier(struct notifier_block *block);
enum vbrs_pm_phase vbrs_pm_event_phase(unsigned long action);

struct workqueue_struct *vbrs_alloc_workqueue(const char *name);

#if IS_BUILTIN(CONFIG_KUNIT)
void vbrs_test_fill_page(struct page *page, u8 value);
bool vbrs_test_page_holds(struct page *page, u8 value);
bool vbrs_test_page_is_offline(struct page *page);
void vbrs_test_get_page(struct page *page);
void vbrs_test_put_page(struct page *page);
#endif

#endif

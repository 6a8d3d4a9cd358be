// SPDX-License-Identifier: GPL-2.0

#include <linux/gfp.h>
#include <linux/highmem.h>
#include <linux/list.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>
#include <linux/poison.h>
#include <linux/string.h>
#include <linux/swap.h>
#include <linux/vmstat.h>

#include "mm_helpers.h"

/*
 * A block that is free right now: no reclaim, no reserves, no warning.
 *
 * The kernel's own balloon driver asks for unmovable memory; taking nearly all
 * free memory as such would turn pageblock after pageblock unmovable, for good,
 * and boost the watermarks on the way. The blocks are on loan, and free memory
 * is mostly movable: so they are asked for as what they are. (Without
 * __GFP_HIGHMEM they do not come from ZONE_MOVABLE.)
 */
struct page *vbrs_alloc_free_block(unsigned int order)
{
	return alloc_pages(__GFP_MOVABLE | __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC, order);
}

void vbrs_zero_block(struct page *page, unsigned int order)
{
	unsigned long i;

	for (i = 0; i < 1UL << order; i++)
		clear_highpage(page + i);
}

/*
 * Marks pages that have no content for anybody: "logically offline" is what
 * dump tools, hibernation and memory offlining call them.
 */
void vbrs_set_offline(struct page *page, unsigned long count)
{
	unsigned long i;

	for (i = 0; i < count; i++)
		__SetPageOffline(page + i);
}

/* The page allocator wants pages back without a type. */
void vbrs_clear_offline(struct page *page, unsigned long count)
{
	unsigned long i;

	for (i = 0; i < count; i++)
		__ClearPageOffline(page + i);
}

/* Makes single pages of a block. */
void vbrs_split_block(struct page *page, unsigned int order)
{
	set_page_private(page, 0);
	split_page(page, order);
}

void vbrs_free_single_pages(struct page *page, unsigned long count, bool zero)
{
	unsigned long i;

	for (i = 0; i < count; i++) {
		if (zero)
			clear_highpage(page + i);
		__free_page(page + i);
	}
}

phys_addr_t vbrs_page_to_phys(struct page *page)
{
	return page_to_phys(page);
}

struct list_head *vbrs_page_lru(struct page *page)
{
	return &page->lru;
}

struct page *vbrs_lru_to_page(struct list_head *lru)
{
	return list_entry(lru, struct page, lru);
}

void vbrs_list_del(struct list_head *entry)
{
	list_del(entry);
}

unsigned long vbrs_page_private(struct page *page)
{
	return page_private(page);
}

void vbrs_set_page_private(struct page *page, unsigned long value)
{
	set_page_private(page, value);
}

void vbrs_get_page(struct page *page)
{
	get_page(page);
}

void vbrs_put_page(struct page *page)
{
	put_page(page);
}

void vbrs_balloon_devinfo_init(struct balloon_dev_info *info, bool adjust_managed,
			       vbrs_migrate_page migrate)
{
	balloon_devinfo_init(info);
	info->adjust_managed_page_count = adjust_managed;
	info->migratepage = migrate;
}

struct shrinker *vbrs_shrinker_alloc(const char *name)
{
	return shrinker_alloc(0, "%s", name);
}

struct page *vbrs_sg_page(struct scatterlist *sg)
{
	return sg_page(sg);
}

/* As drivers/virtio/virtio_balloon.c has it: the kernel's default but where that is half a gigabyte. */
unsigned int vbrs_page_reporting_order(void)
{
	if (IS_ENABLED(CONFIG_ARM64) && IS_ENABLED(CONFIG_ARM64_64K_PAGES))
		return 5;
	return PAGE_REPORTING_ORDER_UNSPECIFIED;
}

int vbrs_page_reporting_register(struct page_reporting_dev_info *info)
{
	return IS_ENABLED(CONFIG_PAGE_REPORTING) ? page_reporting_register(info) : -EOPNOTSUPP;
}

void vbrs_page_reporting_unregister(struct page_reporting_dev_info *info)
{
	if (IS_ENABLED(CONFIG_PAGE_REPORTING))
		page_reporting_unregister(info);
}

unsigned long vbrs_free_pages(void)
{
	return global_zone_page_state(NR_FREE_PAGES);
}

/* Free, reclaimable by the kernel's estimate, or to be had by swapping. */
unsigned long vbrs_obtainable_pages(void)
{
	long available = si_mem_available();
	long swap = get_nr_swap_pages();

	return (available > 0 ? available : 0) + (swap > 0 ? swap : 0);
}

unsigned long vbrs_managed_pages(void)
{
	return totalram_pages();
}

/* The mean of two watermarks, summed over all zones, without any boost. */
static unsigned long mean_watermarks(enum zone_watermarks one, enum zone_watermarks other)
{
	unsigned long sum = 0;
	int nid, zid;

	for_each_online_node(nid) {
		for (zid = 0; zid < MAX_NR_ZONES; zid++) {
			struct zone *zone = &NODE_DATA(nid)->node_zones[zid];

			if (managed_zone(zone))
				sum += (zone->_watermark[one] + zone->_watermark[other]) / 2;
		}
	}
	return sum;
}

unsigned long vbrs_high_watermarks(void)
{
	return mean_watermarks(WMARK_HIGH, WMARK_HIGH);
}

/* Half-way between where an allocation has to wait and where reclaim begins. */
unsigned long vbrs_reclaim_watermarks(void)
{
	return mean_watermarks(WMARK_MIN, WMARK_LOW);
}

/* The nodes of which no zone has more than its high watermark free for an ordinary allocation. */
void vbrs_short_nodes(nodemask_t *nodes)
{
	int nid, zid;

	nodes_clear(*nodes);
	for_each_online_node(nid) {
		bool has_memory = false, is_short = true;

		for (zid = 0; zid < MAX_NR_ZONES && is_short; zid++) {
			struct zone *zone = &NODE_DATA(nid)->node_zones[zid];
			unsigned long needed = zone->_watermark[WMARK_HIGH] +
					       zone->lowmem_reserve[ZONE_MOVABLE] +
					       zone_page_state(zone, NR_FREE_CMA_PAGES);

			if (!managed_zone(zone))
				continue;
			has_memory = true;
			is_short = zone_page_state(zone, NR_FREE_PAGES) <= needed;
		}
		if (has_memory && is_short)
			node_set(nid, *nodes);
	}
}

bool vbrs_page_is_on(struct page *page, const nodemask_t *nodes)
{
	return node_isset(page_to_nid(page), *nodes);
}

unsigned int vbrs_max_page_order(void)
{
	return MAX_PAGE_ORDER;
}

/* What the guest fills its free pages with; false if it leaves them as they are. */
bool vbrs_fills_free_pages(u32 *pattern)
{
	if (want_init_on_free()) {
		*pattern = 0;
		return true;
	}
	if (page_poisoning_enabled_static()) {
		memset(pattern, PAGE_POISON, sizeof(*pattern));
		return true;
	}
	return false;
}

/* All in pages. */
void vbrs_read_memory(struct vbrs_memory *memory)
{
	long available = si_mem_available();
	struct sysinfo info;

	si_meminfo(&info);
	memory->free = info.freeram;
	memory->total = info.totalram;
	memory->available = available > 0 ? available : 0;
	memory->file_pages = global_node_page_state(NR_FILE_PAGES);
}

/* False if the kernel does not count. May sleep. */
bool vbrs_read_vm_events(struct vbrs_vm_events *events, struct vbrs_hugetlb_events *hugetlb,
			 bool *has_hugetlb)
{
#ifdef CONFIG_VM_EVENT_COUNTERS
	unsigned long count[NR_VM_EVENT_ITEMS];
	int zone;

	all_vm_events(count);
	*events = (struct vbrs_vm_events) {
		.swapped_in = count[PSWPIN],
		.swapped_out = count[PSWPOUT],
		.major_faults = count[PGMAJFAULT],
		.faults = count[PGFAULT],
		.oom_kills = count[OOM_KILL],
		.async_scanned = global_node_page_state(PGSCAN_KSWAPD),
		.direct_scanned = global_node_page_state(PGSCAN_DIRECT),
		.async_reclaimed = global_node_page_state(PGSTEAL_KSWAPD),
		.direct_reclaimed = global_node_page_state(PGSTEAL_DIRECT),
	};
	for (zone = 0; zone < MAX_NR_ZONES; zone++)
		events->allocation_stalls += count[ALLOCSTALL_NORMAL - ZONE_NORMAL + zone];

	*has_hugetlb = IS_ENABLED(CONFIG_HUGETLB_PAGE);
#ifdef CONFIG_HUGETLB_PAGE
	hugetlb->allocations = count[HTLB_BUDDY_PGALLOC];
	hugetlb->failures = count[HTLB_BUDDY_PGALLOC_FAIL];
#endif
	return true;
#else
	return false;
#endif
}

struct workqueue_struct *vbrs_alloc_workqueue(const char *name)
{
	return alloc_workqueue("%s", WQ_UNBOUND | WQ_FREEZABLE, 0, name);
}

#if IS_BUILTIN(CONFIG_KUNIT)
void vbrs_test_fill_page(struct page *page, u8 value)
{
	void *address = kmap_local_page(page);

	memset(address, value, PAGE_SIZE);
	kunmap_local(address);
}

bool vbrs_test_page_holds(struct page *page, u8 value)
{
	void *address = kmap_local_page(page);
	bool holds = !memchr_inv(address, value, PAGE_SIZE);

	kunmap_local(address);
	return holds;
}

bool vbrs_test_page_is_offline(struct page *page)
{
	return PageOffline(page);
}

/* Keeps the page when its block is freed. */
void vbrs_test_get_page(struct page *page)
{
	get_page(page);
}

void vbrs_test_put_page(struct page *page)
{
	put_page(page);
}
#endif

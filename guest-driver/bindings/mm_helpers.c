// SPDX-License-Identifier: GPL-2.0

#include <linux/gfp.h>
#include <linux/highmem.h>
#include <linux/list.h>
#include <linux/memory.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>
#include <linux/poison.h>
#include <linux/string.h>
#include <linux/suspend.h>
#include <linux/swap.h>
#include <linux/vmstat.h>

#include "mm_helpers.h"

/* Allocates a free block if one is available now: no reclaim, no reserves, no warning. */
struct page *vbrs_alloc_free_block(unsigned int order)
{
	return alloc_pages(__GFP_MOVABLE | __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC, order);
}

/* Sets the position before the first zone, for vbrs_next_zone(). */
void vbrs_before_first_zone(int *node, int *zone)
{
	*node = first_online_node;
	*zone = ZONE_NORMAL + 1;
}

/*
 * Advances to the next zone for kernel allocations that has managed pages: node by node, from the
 * highest zone to the lowest. Returns false after the last.
 */
bool vbrs_next_zone(int *node, int *zone)
{
	while (*node < MAX_NUMNODES) {
		while (--*zone >= 0)
			if (managed_zone(&NODE_DATA(*node)->node_zones[*zone]))
				return true;
		*node = next_online_node(*node);
		*zone = ZONE_NORMAL + 1;
	}
	return false;
}

/* Reads the state of a zone, in pages. The watermarks do not include any boost. */
void vbrs_read_zone(int node, int zone, struct vbrs_zone *state)
{
	struct zone *z = &NODE_DATA(node)->node_zones[zone];

	*state = (struct vbrs_zone) {
		.managed = zone_managed_pages(z),
		.free = zone_page_state(z, NR_FREE_PAGES),
		.free_cma = zone_page_state(z, NR_FREE_CMA_PAGES),
		.min = z->_watermark[WMARK_MIN],
		.low = z->_watermark[WMARK_LOW],
		.high = z->_watermark[WMARK_HIGH],
		.lowmem_reserve = z->lowmem_reserve[ZONE_NORMAL],
	};
}

static enum migratetype migratetype_of(enum vbrs_mobility mobility)
{
	switch (mobility) {
	case VBRS_MOVABLE:
		return MIGRATE_MOVABLE;
	case VBRS_RECLAIMABLE:
		return MIGRATE_RECLAIMABLE;
	default:
		return MIGRATE_UNMOVABLE;
	}
}

/*
 * Returns whether a zone has a free block of at least this order in the free lists of this
 * mobility. Takes no lock: another task may allocate the block at any time.
 */
bool vbrs_zone_has_free(int node, int zone, unsigned int order, enum vbrs_mobility mobility)
{
	struct zone *z = &NODE_DATA(node)->node_zones[zone];
	enum migratetype type = migratetype_of(mobility);

	for (; order < NR_PAGE_ORDERS; order++)
		if (!list_empty(&z->free_area[order].free_list[type]))
			return true;
	return false;
}

/*
 * Allocates a free block from this zone or a lower zone of the node, if one is available now: no
 * reclaim, no reserves, no warning.
 */
struct page *vbrs_alloc_zone_block(int node, int zone, unsigned int order,
				   enum vbrs_mobility mobility)
{
	gfp_t gfp = __GFP_THISNODE | __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC;

	switch (zone) {
#ifdef CONFIG_ZONE_DMA
	case ZONE_DMA:
		gfp |= __GFP_DMA;
		break;
#endif
#ifdef CONFIG_ZONE_DMA32
	case ZONE_DMA32:
		gfp |= __GFP_DMA32;
		break;
#endif
	}
	if (mobility == VBRS_MOVABLE)
		gfp |= __GFP_MOVABLE;
	else if (mobility == VBRS_RECLAIMABLE)
		gfp |= __GFP_RECLAIMABLE;
	return alloc_pages_node(node, gfp, order);
}

bool vbrs_page_is_of_zone(struct page *page, int node, int zone)
{
	return page_to_nid(page) == node && page_zonenum(page) == zone;
}

/*
 * Returns whether a page belongs to CMA. is_migrate_cma_page() cannot be used, because it needs
 * functions that are not exported. The migrate type of a CMA pageblock never changes, so this reads
 * it from where get_pfnblock_migratetype() in mm/page_alloc.c does.
 */
bool vbrs_page_is_cma(struct page *page)
{
#ifdef CONFIG_CMA
	unsigned long pfn = page_to_pfn(page);
	unsigned long *bitmap, bit, type;

#ifdef CONFIG_SPARSEMEM
	bitmap = section_to_usemap(__pfn_to_section(pfn));
	pfn &= PAGES_PER_SECTION - 1;
#else
	bitmap = page_zone(page)->pageblock_flags;
	pfn -= pageblock_start_pfn(page_zone(page)->zone_start_pfn);
#endif
	bit = (pfn >> pageblock_order) * NR_PAGEBLOCK_BITS;
	type = READ_ONCE(bitmap[bit / BITS_PER_LONG]) >> (bit % BITS_PER_LONG);
	return (type & PAGEBLOCK_MIGRATETYPE_MASK) == MIGRATE_CMA;
#else
	return false;
#endif
}

/* Returns the order of a pageblock. */
unsigned int vbrs_pageblock_order(void)
{
	return pageblock_order;
}

void vbrs_zero_pages(struct page *page, unsigned long count)
{
	unsigned long i;

	for (i = 0; i < count; i++)
		clear_highpage(page + i);
}

/*
 * Gives pages without content the type PageOffline. Crash dump tools, hibernation and memory
 * offlining call such pages "logically offline".
 */
void vbrs_set_offline(struct page *page, unsigned long count)
{
	unsigned long i;

	for (i = 0; i < count; i++)
		__SetPageOffline(page + i);
}

/* Clears the type PageOffline. The page allocator requires freed pages to have no type. */
void vbrs_clear_offline(struct page *page, unsigned long count)
{
	unsigned long i;

	for (i = 0; i < count; i++)
		__ClearPageOffline(page + i);
}

/* Splits a block into single pages. Clears the order that PageBlock stores in page->private. */
void vbrs_split_block(struct page *page, unsigned int order)
{
	set_page_private(page, 0);
	split_page(page, order);
}

void vbrs_free_single_pages(struct page *page, unsigned long count)
{
	unsigned long i;

	for (i = 0; i < count; i++)
		__free_page(page + i);
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

unsigned long vbrs_balloon_isolated(struct balloon_dev_info *info)
{
	return READ_ONCE(info->isolated_pages);
}

/*
 * Corrects the count of balloon pages for a page that page migration deflated without a
 * replacement. The balloon code (7.3) counts the page as deflated, but does not remove it from
 * NR_BALLOON_PAGES.
 */
void vbrs_uncount_balloon_page(struct page *page)
{
	dec_node_page_state(page, NR_BALLOON_PAGES);
}

/*
 * Corrects the counts of balloon pages if page migration has replaced a page by one of another
 * node. The balloon code (7.3) does not update NR_BALLOON_PAGES, which is counted per node: the old
 * page remains counted for its node, and the new page is later subtracted from the count of its
 * node.
 */
void vbrs_recount_balloon_page(struct page *old, struct page *new)
{
	if (page_to_nid(old) == page_to_nid(new))
		return;
	dec_node_page_state(old, NR_BALLOON_PAGES);
	inc_node_page_state(new, NR_BALLOON_PAGES);
}

struct shrinker *vbrs_shrinker_alloc(const char *name)
{
	return shrinker_alloc(0, "%s", name);
}

struct page *vbrs_sg_page(struct scatterlist *sg)
{
	return sg_page(sg);
}

/*
 * The default order of page reporting. As in drivers/virtio/virtio_balloon.c: the default of the
 * kernel, except where that would be 512 MiB.
 */
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

/* Free pages, pages that the kernel expects to reclaim, and free pages of swap. */
unsigned long vbrs_available_and_swap_pages(void)
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

/*
 * The midpoint between the watermark at which allocations must reclaim and the one at which
 * background reclaim begins.
 */
unsigned long vbrs_min_low_midpoint(void)
{
	return mean_watermarks(WMARK_MIN, WMARK_LOW);
}

/* Returns whether an ordinary allocation finds the zone at or below its high watermark. */
static bool zone_is_below_watermark(struct zone *zone)
{
	unsigned long kept = zone->lowmem_reserve[ZONE_MOVABLE] +
			     zone_page_state(zone, NR_FREE_CMA_PAGES);

	return zone_page_state(zone, NR_FREE_PAGES) <= high_wmark_pages(zone) + kept;
}

bool vbrs_has_one_node(void)
{
	return nr_online_nodes == 1;
}

/*
 * Finds the nodes that are short of memory and have balloon pages. The zones for kernel allocations
 * determine whether a node is short of memory, if it has such zones: free pages of ZONE_MOVABLE do
 * not help all allocations.
 */
void vbrs_nodes_below_watermark(nodemask_t *nodes)
{
	int nid, zid;

	nodes_clear(*nodes);
	for_each_online_node(nid) {
		pg_data_t *node = NODE_DATA(nid);
		bool has_memory = false, is_below = true;

		if (atomic_long_read(&node->vm_stat[NR_BALLOON_PAGES]) <= 0)
			continue;
		for (zid = 0; zid < MAX_NR_ZONES && is_below; zid++) {
			struct zone *zone = &node->node_zones[zid];

			if (zid > ZONE_NORMAL && has_memory)
				break;
			if (!managed_zone(zone))
				continue;
			has_memory = true;
			is_below = zone_is_below_watermark(zone);
		}
		if (has_memory && is_below)
			node_set(nid, *nodes);
	}
}

bool vbrs_page_is_on_nodes(struct page *page, const nodemask_t *nodes)
{
	return node_isset(page_to_nid(page), *nodes);
}

unsigned int vbrs_max_page_order(void)
{
	return MAX_PAGE_ORDER;
}

/* Returns whether the guest fills free pages, and with which pattern. */
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

/* Returns whether pages are overwritten between free and allocation. */
bool vbrs_allocator_fills_pages(void)
{
	return want_init_on_alloc(0) || want_init_on_free() || page_poisoning_enabled_static();
}

/* Reads the memory usage, in pages. */
void vbrs_read_meminfo(struct vbrs_meminfo *memory)
{
	long available = si_mem_available();
	struct sysinfo info;

	si_meminfo(&info);
	memory->free = info.freeram;
	memory->total = info.totalram;
	memory->available = available > 0 ? available : 0;
	memory->file_pages = global_node_page_state(NR_FILE_PAGES);
}

/*
 * Reads the counts of events since boot. Returns false if the kernel does not count events. May
 * sleep.
 */
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

int vbrs_register_memory_notifier(struct notifier_block *block)
{
	return register_memory_notifier(block);
}

void vbrs_unregister_memory_notifier(struct notifier_block *block)
{
	unregister_memory_notifier(block);
}

/*
 * Returns whether a memory notifier is called for memory that goes offline, and its address range.
 */
bool vbrs_mem_going_offline(unsigned long action, void *argument, u64 *start, u64 *end)
{
#ifdef CONFIG_MEMORY_HOTPLUG
	const struct memory_notify *memory = argument;

	if (action != MEM_GOING_OFFLINE)
		return false;
	*start = PFN_PHYS(memory->start_pfn);
	*end = PFN_PHYS(memory->start_pfn + memory->nr_pages);
	return true;
#else
	return false;
#endif
}

int vbrs_register_pm_notifier(struct notifier_block *block)
{
	return register_pm_notifier(block);
}

void vbrs_unregister_pm_notifier(struct notifier_block *block)
{
	unregister_pm_notifier(block);
}

enum vbrs_pm_phase vbrs_pm_event_phase(unsigned long action)
{
	switch (action) {
	case PM_SUSPEND_PREPARE:
	case PM_HIBERNATION_PREPARE:
	case PM_RESTORE_PREPARE:
		return VBRS_PM_PREPARE;
	case PM_POST_SUSPEND:
	case PM_POST_HIBERNATION:
	case PM_POST_RESTORE:
		return VBRS_PM_POST;
	default:
		return VBRS_PM_OTHER;
	}
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

/* Takes a reference, which keeps the page when its block is freed. */
void vbrs_test_get_page(struct page *page)
{
	get_page(page);
}

void vbrs_test_put_page(struct page *page)
{
	put_page(page);
}
#endif

// SPDX-License-Identifier: GPL-2.0

#include <linux/gfp.h>
#include <linux/highmem.h>
#include <linux/list.h>
#include <linux/memory.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>
#include <linux/string.h>
#include <linux/suspend.h>
#include <linux/swap.h>
#include <linux/vmstat.h>

#include "mm_helpers.h"

struct page *vbrs_alloc_pages(gfp_t gfp, unsigned int order)
{
	return alloc_pages(gfp, order);
}

struct page *vbrs_alloc_pages_node(int node, gfp_t gfp, unsigned int order)
{
	return alloc_pages_node(node, gfp, order);
}

unsigned int vbrs_nr_memory_nodes(void)
{
	return num_node_state(N_MEMORY);
}

/* Returns MAX_NUMNODES if no node is online. */
int vbrs_first_online_node(void)
{
	return first_online_node;
}

/* Returns MAX_NUMNODES after the last node. */
int vbrs_next_online_node(int node)
{
	return next_online_node(node);
}

/*
 * Reads the counts of a zone, in pages. The zone is found here, because NODE_DATA() is a macro. The
 * watermarks do not include any boost.
 */
void vbrs_read_zone(int node, int zone, struct vbrs_zone *counts)
{
	struct zone *z = &NODE_DATA(node)->node_zones[zone];

	*counts = (struct vbrs_zone) {
		.managed = zone_managed_pages(z),
		.free = zone_page_state(z, NR_FREE_PAGES),
		.free_cma = zone_page_state(z, NR_FREE_CMA_PAGES),
		.min = z->_watermark[WMARK_MIN],
		.low = z->_watermark[WMARK_LOW],
		.high = z->_watermark[WMARK_HIGH],
		.boost = z->watermark_boost,
	};
	memcpy(counts->lowmem_reserve, z->lowmem_reserve, sizeof(counts->lowmem_reserve));
}

/* Takes no lock: another task may change the free list at any time. */
bool vbrs_free_list_is_empty(int node, int zone, unsigned int order, enum migratetype type)
{
	return list_empty(&NODE_DATA(node)->node_zones[zone].free_area[order].free_list[type]);
}

bool vbrs_page_is_of_zone(struct page *page, int node, int zone)
{
	return page_to_nid(page) == node && page_zonenum(page) == zone;
}

/*
 * Returns whether a page belongs to CMA. is_migrate_cma_page() cannot be used, because it needs
 * functions that are not exported. The migrate type of a CMA pageblock never changes, so this reads
 * it from where get_pfnblock_migratetype() in mm/page_alloc.c does. In C, because in Rust it would
 * need a copy of the layout of the memory section.
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

/* This loop and those below run once per page, so they call the inline functions from C. */
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

unsigned long vbrs_global_zone_page_state(enum zone_stat_item item)
{
	return global_zone_page_state(item);
}

unsigned long vbrs_global_node_page_state(enum node_stat_item item)
{
	return global_node_page_state(item);
}

/* node_page_state() is not exported. May be negative for a moment. */
long vbrs_node_page_state(int node, enum node_stat_item item)
{
	return atomic_long_read(&NODE_DATA(node)->vm_stat[item]);
}

long vbrs_nr_swap_pages(void)
{
	return get_nr_swap_pages();
}

unsigned long vbrs_managed_pages(void)
{
	return totalram_pages();
}

void vbrs_node_set(int node, nodemask_t *nodes)
{
	node_set(node, *nodes);
}

bool vbrs_page_is_on_nodes(struct page *page, const nodemask_t *nodes)
{
	return node_isset(page_to_nid(page), *nodes);
}

bool vbrs_want_init_on_alloc(gfp_t gfp)
{
	return want_init_on_alloc(gfp);
}

bool vbrs_want_init_on_free(void)
{
	return want_init_on_free();
}

bool vbrs_page_poisoning_enabled(void)
{
	return page_poisoning_enabled_static();
}

int vbrs_register_memory_notifier(struct notifier_block *block)
{
	return register_memory_notifier(block);
}

void vbrs_unregister_memory_notifier(struct notifier_block *block)
{
	unregister_memory_notifier(block);
}

int vbrs_register_pm_notifier(struct notifier_block *block)
{
	return register_pm_notifier(block);
}

void vbrs_unregister_pm_notifier(struct notifier_block *block)
{
	unregister_pm_notifier(block);
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

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Memory management for guest-driver/mm: static inlines and macros of the kernel as functions that
 * Rust can call.
 */
#ifndef VIRTIO_BALLOON_RS_MM_HELPERS_H
#define VIRTIO_BALLOON_RS_MM_HELPERS_H

#include <linux/balloon.h>
#include <linux/mm.h>
#include <linux/notifier.h>
#include <linux/oom.h>
#include <linux/page_reporting.h>
#include <linux/shrinker.h>

struct page *vbrs_alloc_pages(gfp_t gfp, unsigned int order);
struct page *vbrs_alloc_pages_node(int node, gfp_t gfp, unsigned int order);

struct vbrs_zone {
	unsigned long managed, free, free_cma, min, low, high, boost;
	long lowmem_reserve[MAX_NR_ZONES];
};

unsigned int vbrs_nr_memory_nodes(void);
int vbrs_first_online_node(void);
int vbrs_next_online_node(int node);
void vbrs_read_zone(int node, int zone, struct vbrs_zone *counts);
bool vbrs_free_list_is_empty(int node, int zone, unsigned int order, enum migratetype type);
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

unsigned long vbrs_global_zone_page_state(enum zone_stat_item item);
unsigned long vbrs_global_node_page_state(enum node_stat_item item);
long vbrs_node_page_state(int node, enum node_stat_item item);
long vbrs_nr_swap_pages(void);
unsigned long vbrs_managed_pages(void);
void vbrs_node_set(int node, nodemask_t *nodes);
bool vbrs_page_is_on_nodes(struct page *page, const nodemask_t *nodes);
bool vbrs_want_init_on_alloc(gfp_t gfp);
bool vbrs_want_init_on_free(void);
bool vbrs_page_poisoning_enabled(void);

int vbrs_register_memory_notifier(struct notifier_block *block);
void vbrs_unregister_memory_notifier(struct notifier_block *block);
int vbrs_register_pm_notifier(struct notifier_block *block);
void vbrs_unregister_pm_notifier(struct notifier_block *block);

#if IS_BUILTIN(CONFIG_KUNIT)
void vbrs_test_fill_page(struct page *page, u8 value);
bool vbrs_test_page_holds(struct page *page, u8 value);
bool vbrs_test_page_is_offline(struct page *page);
void vbrs_test_get_page(struct page *page);
void vbrs_test_put_page(struct page *page);
#endif

#endif

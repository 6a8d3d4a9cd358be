# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Each target calls cargo, Kbuild or xtask. `make help` lists the targets.

CARGO ?= cargo
XTASK := $(CARGO) xtask

.PHONY: all daemon module modules_install demo test fuzz bench guest setup check book doc clean distclean help

all: module daemon ## build the kernel module and the daemon

daemon: ## build the daemon and balloonctl, into target/release
	$(CARGO) build --release --package vhost-device-balloon --package balloonctl

ifdef KDIR
module: ## build the module; for your own kernel: make module KDIR=/lib/modules/$(uname -r)/build
	$(MAKE) -C $(KDIR) M=$(CURDIR) MO=$(CURDIR)/target/module/kdir modules

modules_install: module
	$(MAKE) -C $(KDIR) M=$(CURDIR) MO=$(CURDIR)/target/module/kdir modules_install
else
module:
	$(XTASK) module --kernel stock

modules_install:
	@echo "modules_install needs the kernel to install for: make modules_install KDIR=/lib/modules/$$(uname -r)/build" >&2; exit 2
endif

demo: ## boot a guest with driver and device, hint, inflate, deflate, migrate; ends with tables
	$(XTASK) demo

test: ## run all tests, from unit tests to guests in QEMU; with T=name those that have it in their names
	$(XTASK) test $(if $(T),'$(T)') $(ARGS)

fuzz: ## run the fuzz targets (choose with T=name, and the seconds for each with TIME=60)
	$(XTASK) fuzz $(if $(T),'$(T)') $(if $(TIME),--time $(TIME)) $(ARGS)

bench: ## measure against the peers, in one run
	$(XTASK) bench

guest: ## open a shell in a guest (choose with ARGS="--vmm uml --driver c --device ours")
	$(XTASK) guest $(ARGS)

setup: ## make the root file system and the kernels that demo and test need
	$(XTASK) setup

check: ## formats and lints, of the host crates and of the kernel module
	$(XTASK) check

book: ## make the documentation as a book, into target/book
	$(XTASK) book

doc: ## make rustdoc's pages of the host crates and of the kernel module
	$(XTASK) doc

clean: ## remove what was built here
	$(CARGO) clean

distclean: clean ## remove the cached root file system and kernels as well
	$(XTASK) setup --remove

help:
	@awk -F ':.*## ' '/^[a-z_]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

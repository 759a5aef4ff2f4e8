# The pipeline. Phases are names; every step is a file, so an interrupted run
# goes on where it was by the same command.
#
#   make data && make train && make eval        with a GPU, keys and Qwen3-8B
#   make demo                                   the same, small, on a laptop
#
# A step depends on a .key file that holds only its own resolved settings and
# changes only with them: a comment in a YAML, a fresh checkout or a recompiled
# binary rebuilds nothing.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

# What can be set on the command line.
RUN    ?= main
DATA   ?= $(RUN)
METHOD ?= apify
INPUT  ?=
MODEL  ?=
JUDGE  ?=
CONFIG ?= config
CONTROL ?=
TARGET ?=
DEVICE ?= auto
TRACK  ?=

# The demo is the real pipeline with other inputs.
ifneq ($(filter demo,$(MAKECMDGOALS)),)
RUN     := demo
DATA    := demo
METHOD  := file
INPUT   := tests/demo/tweets.jsonl
MODEL   := tests/demo/model
JUDGE   := reference
CONFIG  := tests/demo
CONTROL := shuffled
DEVICE  := cpu
endif

# A name becomes a folder's: letters, digits, and . _ - inside it.
allowed := A B C D E F G H I J K L M N O P Q R S T U V W X Y Z a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9 . _ -
without = $(if $(1),$(call without,$(wordlist 2,99,$(1)),$(subst $(firstword $(1)),,$(2))),$(2))
bad_name = $(if $(1),$(call without,$(allowed),$(1))$(filter .% -%,$(1)),it is empty)
$(foreach name,RUN DATA,$(if $(call bad_name,$($(name))),$(error $(name)=$($(name)) is no name: use letters, digits, . _ and -)))

# A name with a slip in it would do nothing, after hours.
$(foreach value,$(filter-out shuffled,$(CONTROL)),$(error CONTROL=$(value): there is only CONTROL=shuffled))
$(foreach value,$(filter-out tensorboard tensorboard=% mlflow mlflow=% wandb wandb=%,$(firstword $(TRACK))),$(error TRACK=$(value): there are tensorboard, mlflow[=URI] and wandb[=ENTITY/PROJECT]))

BIN     := target/release
RAW     := data/raw/$(DATA)
PAIRS   := data/processed/$(DATA)
ADAPTER := output/models/$(RUN)
SHUFFLED := output/models/$(RUN)-shuffled
EVAL    := output/eval/$(RUN)
MINILM  := data/cache/models/all-MiniLM-L6-v2
STAMP   := $(shell date +%Y%m%d_%H%M%S)
log      = --log output/logs/$(1)_$(STAMP).log

# A path that has other characters, such as spaces, is quoted for the shell. As a source, make
# could have it as no prerequisite, so that its date and size are in the key instead.
plain   = $(if $(call without,$(allowed) / ~,$(1)),,plain)
quoted  = $(if $(plain),$(1),'$(subst ','\'',$(1))')
input   := $(call quoted,$(INPUT))
config  := $(call quoted,$(CONFIG))

# Data that is there is used as it is, unless `make data` or a source is asked for.
given   := $(strip $(filter data demo,$(MAKECMDGOALS)) $(foreach v,METHOD INPUT TARGET,$(filter command environment override,$(origin $(v)))))
ifneq ($(given)$(if $(wildcard $(RAW)/pairs.jsonl),,missing),)
sources := $(RAW)/fetch.key $(if $(filter file,$(METHOD)),$(if $(call plain,$(INPUT)),$(INPUT)))
dated   := $(if $(filter file,$(METHOD)),$(if $(call plain,$(INPUT)),,; date -r $(input) '+of %s'; wc -c < $(input)))
endif
ifneq ($(filter data train eval demo $(RAW)/% $(PAIRS)/%,$(MAKECMDGOALS)),)
ifneq ($(if $(sources),$(filter file,$(METHOD))),)
ifeq ($(INPUT),)
$(error METHOD=file needs INPUT=path: an Apify or twscrape export, or pairs)
endif
ifneq ($(shell [ -r $(input) ] && [ ! -d $(input) ] || echo none),)
$(error INPUT=$(INPUT): there is no such file, or it cannot be read)
endif
endif
endif

# Settings given by variable go to a tool as flags.
model   := $(if $(MODEL),--model $(call quoted,$(MODEL)))
judge   := $(if $(JUDGE),--provider $(JUDGE))
fetch   := --config $(config)/data.yaml --method $(METHOD) $(if $(INPUT),--input $(input)) $(if $(TARGET),--target $(TARGET))
train   := --config $(config)/train.yaml $(model)
card     = [ ! -e $(ADAPTER)/README.md ] || $(BIN)/qlora-train card --quiet --evaluation $(EVAL)/tests.jsonl $(ADAPTER)
adapters := --adapter lora=$(ADAPTER) $(if $(CONTROL),--adapter shuffled=$(SHUFFLED))

.PHONY: help setup build models data review train eval results demo test lint check test-parity bench gpu-kit asan kernels tiny-model demo-data FORCE
.DEFAULT_GOAL := help

help: ## this page
	@echo 'usage: make PHASE [VARIABLE=value]...'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo
	@echo '  RUN=name        of what is trained and evaluated [main]'
	@echo '  DATA=name       of its data [the same name as RUN]'
	@echo '  METHOD=apify    collect; or METHOD=file INPUT=path: import'
	@echo '  TARGET=number   of pairs to collect [that of data.yaml]'
	@echo '  MODEL=base      a folder, or a name on the hub [that of train.yaml]'
	@echo '  JUDGE=anthropic or JUDGE=reference, offline [that of eval.yaml]'
	@echo '  CONTROL=shuffled trains and evaluates the control too'
	@echo '  DEVICE=auto     or cpu, cuda:N'
	@echo '  TRACK=place     show training in tensorboard, mlflow[=URI] or wandb[=PROJECT]'
	@echo '  CONFIG=folder   of data.yaml, train.yaml, eval.yaml [config]'

setup: ## check what is installed, and say how to get what is missing
	@tools/setup/check

build: ## compile the tools
	@cargo build --release --quiet --workspace --bins

models: ## fetch the sentence-embedding model (90 MB), or check it
	@tools/setup/fetch-minilm $(MINILM)

data: $(PAIRS)/pairs.jsonl ## collect, validate, deduplicate
review: | build ## look at the valid pairs, and reject some, before training
	@[ -s $(PAIRS)/valid.jsonl ] || { echo "make: there are no pairs in $(PAIRS)/valid.jsonl to look at: make data makes them" >&2; exit 2; }
	@$(BIN)/pair-review --config $(config)/data.yaml $(PAIRS)/valid.jsonl --decisions $(PAIRS)/review.jsonl
train: $(ADAPTER)/adapter_model.safetensors ## fine-tune
eval: $(EVAL)/tests.jsonl ## generate, judge, test
	@$(card)
	@$(BIN)/report --run $(RUN) --data $(DATA) --html output/figures/$(RUN).html

results: | build ## print the results again, and make their page anew
	@$(BIN)/report --run $(RUN) --data $(DATA) --html output/figures/$(RUN).html

demo: $(EVAL)/tests.jsonl ## the whole pipeline on bundled data and a tiny model, on the CPU
	@$(card)
	@$(BIN)/report --run $(RUN) --data $(DATA) --html output/figures/$(RUN).html

# A key file is looked at in every run and changes only with its content. Another make may
# do so at the same time: each has a draft of its own. Once the tools are built, `make -n`
# sees the truth as well (`+`) and writes nothing: a line without `+` has a key taken for new.
# `form` is that of what a step writes: it rises where files of an older build would not do.
FORCE:
dry  = $(findstring n,$(filter-out --%,$(firstword -$(MAKEFLAGS))))
seen = $(shell [ -x $(BIN)/sigtest ] || { echo +; exit; }; trap 'echo +@exit 2' EXIT; new=$$(set -e; $(1)); \
  trap - EXIT; if cmp -s $@ <(echo "$$new"); then echo +; else echo ': $@ changes'; fi)
define key
$(if $(dry),$(seen),+@[ -x $(BIN)/sigtest ] || exit 0; mkdir -p $(@D) output/logs; new=$@.new.$$$$; trap 'rm -f $$new' EXIT; { $(1); } > $$new; cmp -s $$new $@ || mv $$new $@)
endef

$(RAW)/fetch.key: FORCE | build
	$(call key,$(BIN)/tw-fetch $(fetch) --print-config=key; echo "method = $(METHOD)"; echo "input = "$(input)$(dated))
$(PAIRS)/validate.key: FORCE | build
	$(call key,$(BIN)/pair-validate --config $(config)/data.yaml --print-config=key)
$(PAIRS)/dedup.key: FORCE | build
	$(call key,$(BIN)/pair-dedup --config $(config)/data.yaml --print-config=key; echo 'form = 2'$(if $(reviewed),; $(reviewed) --print-config=key))
$(SHUFFLED)/%: private train += --shuffled-replies
$(ADAPTER)/train.key $(SHUFFLED)/train.key: FORCE | build
	$(call key,$(BIN)/qlora-train $(train) --data - --out - --print-config=key)
$(EVAL)/generate.key: FORCE | build
	$(call key,$(BIN)/gen-eval --config $(config)/eval.yaml $(model) $(adapters) --print-config=key; echo "adapters = $(adapters)"; echo 'form = 2')
$(EVAL)/judge.key: FORCE | build
	$(call key,$(BIN)/judge --config $(config)/eval.yaml $(judge) --print-config=key)
$(EVAL)/statistics.key: FORCE | build
	$(call key,$(BIN)/sigtest --config $(config)/eval.yaml --a systems.base --b systems.lora --print-config=key)

# Two makes that write the same files would spoil each other's: a step holds the lock until
# its file has its name. One that fails, be it for the lock, must not delete what the other
# has just finished.
lock = . tools/setup/locked $(@D);
.PRECIOUS: %/adapter_model.safetensors $(RAW)/pairs.jsonl $(PAIRS)/valid.jsonl $(PAIRS)/pairs.jsonl $(EVAL)/items.jsonl $(EVAL)/judged.jsonl $(EVAL)/tests.jsonl

# Data. What one method brought is not replaced by another's. A collection goes on from its
# state, and it is tw-fetch that refuses other searches; where it changes no pair, the key
# takes their time, so that nothing is done again for it.
$(RAW)/pairs.jsonl: $(sources)
	@if [ -s $@ ] && ! { grep -qsx 'method = $(METHOD)' $(RAW)/fetched.key && [ $(METHOD) = file -o -s $(RAW)/state/journal.jsonl ]; }; then \
	  echo "make: $@ was collected with other settings (< those, > these), or its state is gone:" >&2; diff $(RAW)/fetched.key $< >&2 || true; \
	  echo "make: keep them, or collect under another name: make data RUN=new" >&2; exit 2; fi
	$(lock) $(BIN)/tw-fetch $(fetch) --state $(RAW)/state --unpaired $(RAW)/unpaired.jsonl $(call log,fetch) > $@.part; \
	cp $< $(RAW)/fetched.key; \
	if [ $(METHOD) = apify ] && cmp -s $@.part $@; then rm $@.part; touch -r $@ $<; else mv $@.part $@; fi

$(PAIRS)/valid.jsonl: $(RAW)/pairs.jsonl $(PAIRS)/validate.key
	$(lock) $(BIN)/pair-validate --config $(config)/data.yaml --rejects $(PAIRS)/rejects.jsonl --summary $(PAIRS)/validate-summary.json $(call log,validate) < $< > $@.part; \
	mv $@.part $@

# What a person has rejected goes first, so that a duplicate of it may take its place. The key
# holds what is rejected, and nothing where that is none: looking alone repeats nothing.
reviewed = $(if $(wildcard $(PAIRS)/review.jsonl),$(BIN)/pair-review --apply $(PAIRS)/review.jsonl)
$(PAIRS)/pairs.jsonl: $(PAIRS)/valid.jsonl $(PAIRS)/dedup.key | $(MINILM)/model.safetensors
	$(lock) rm -f $(PAIRS)/reviewed.jsonl; $(if $(reviewed),$(reviewed) --rejects $(PAIRS)/reviewed.jsonl $(call log,review) < $< | )$(BIN)/pair-dedup --config $(config)/data.yaml --dropped $(PAIRS)/dropped.jsonl --summary $(PAIRS)/dedup-summary.json $(call log,dedup) $(if $(reviewed),,< $<) > $@.part; \
	mv $@.part $@

$(MINILM)/model.safetensors:
	tools/setup/fetch-minilm $(MINILM)

# What the model card tells of the data; data from before may lack one.
provenance = $(foreach step,validate dedup,$(addprefix --provenance ,$(shell ls $(PAIRS)/$(step)-summary.json 2>/dev/null)))

# Training. qlora-train finishes what was begun, does nothing to what is done,
# and refuses (2) where settings or data are no longer those of the run. The
# control, RUN-shuffled, is trained alike, but each tweet has another's reply.
# TRACK: a service that does not take the figures fails the step once the training is done;
# the same command then sends them.
to_board = $(filter tensorboard%,$(TRACK))
tracked = $(if $(TRACK),| $(BIN)/track --settings $(@D)/run.json --to $(call quoted,$(TRACK)$(if $(to_board),$(if $(findstring =,$(TRACK)),,=output/tensorboard)/$(1))) \
  $(if $(to_board),,--name $(1) --state output/track/$(1)/$(firstword $(subst =, ,$(TRACK)))) $(call log,track-$(1)))
%/adapter_model.safetensors: $(PAIRS)/pairs.jsonl %/train.key
	$(BIN)/qlora-train $(train) --data $< $(provenance) --out $(@D) --resume --device $(DEVICE) $(call log,$(@D:output/models/%=train-%)) $(call tracked,$(@D:output/models/%=%)) > /dev/null
	@touch $@

# Evaluation. The judge's key is asked for before anything is generated.
$(EVAL)/items.jsonl: $(PAIRS)/pairs.jsonl $(ADAPTER)/adapter_model.safetensors $(if $(CONTROL),$(SHUFFLED)/adapter_model.safetensors) $(EVAL)/generate.key
	@$(BIN)/judge --config $(config)/eval.yaml $(judge) --check
	$(lock) $(BIN)/gen-eval --config $(config)/eval.yaml $(model) $(adapters) --device $(DEVICE) --state $(EVAL)/generate-state --rejects $(EVAL)/rejects.jsonl $(call log,generate) < $< > $@.part; \
	mv $@.part $@; rm -rf $(EVAL)/generate-state

$(EVAL)/judged.jsonl: $(EVAL)/items.jsonl $(EVAL)/judge.key
	$(lock) $(BIN)/judge --config $(config)/eval.yaml $(judge) --state $(EVAL)/judge-state $(call log,judge) < $< > $@.part; \
	mv $@.part $@

$(EVAL)/tests.jsonl: $(EVAL)/judged.jsonl $(EVAL)/statistics.key
	$(lock) compare() { $(BIN)/sigtest --config $(config)/eval.yaml --a $$1 --b $$2 --cluster split_group $(call log,sigtest) < $< >> $@.part; }; \
	rm -f $@.part; compare systems.base systems.lora; \
	! tail -n 1 $< | grep -q '"prompted":{"examples":' || compare systems.prompted systems.lora; \
	$(if $(CONTROL),compare systems.shuffled systems.lora;) \
	judged=$$(sed -n 's/^judge.compare = \[\(.*\)\]$$/\1/p' $(EVAL)/judge.key | tr -d '" ' | tr , ' '); \
	for pair in $${judged:-base:lora}; do \
	  compare verdicts.scores.$$pair.$${pair%:*} verdicts.scores.$$pair.$${pair#*:}; \
	done; \
	mv $@.part $@

# Checks.
test: $(MINILM)/model.safetensors ## all tests
	cargo test --release --workspace --quiet
	tests/makefile

lint: ## formatting and lints, warnings denied
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --quiet -- -D warnings

check: lint test ## formatting, lints, tests

test-parity: $(MINILM)/model.safetensors | build ## compare with the Python packages, live
	tests/parity/run

bench: | build ## time training on this CPU (PEER=python: beside PEFT)
	@mkdir -p output/logs
	@$(BIN)/bench $(if $(PEER),--peer $(PEER)) > output/logs/bench_$(STAMP).jsonl.part
	@mv output/logs/bench_$(STAMP).jsonl{.part,} && echo output/logs/bench_$(STAMP).jsonl

gpu-kit: ## what a machine with a GPU needs for docs/gpu.md, in target/gpu
	@rm -rf target/gpu && mkdir -p target/gpu
	cargo build --profile dist --quiet -p qlora-train
	@cp target/dist/qlora-train tests/gpu/bench tests/gpu/run target/gpu
	cargo test --release -p cuda-on-cpu --test backend --no-run 2>&1 | tee target/gpu/build.log
	@strip -o target/gpu/kernel-checks "$$(sed -n 's/.*Executable.*(\(.*\))/\1/p' target/gpu/build.log)"
	@rm target/gpu/build.log && ls -sh target/gpu

asan: ## the CUDA kernels on the processor, through AddressSanitizer
	CUDA_ON_CPU_ASAN=1 CARGO_TARGET_$(shell rustc -vV | sed -n 's/^host: //p' | tr a-z- A-Z_)_RUNNER="env \
	  LD_PRELOAD=$(shell gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0" \
	  cargo test --release -p cuda-on-cpu

# What is generated and committed.
demo-data: | build ## regenerate the demo's tweets
	$(BIN)/tiny-model data --out tests/demo/tweets.jsonl
kernels: ## compile the CUDA kernels, after one has changed (no GPU needed)
	@tools/setup/compile-kernels
tiny-model: | build ## regenerate the demo's model (minutes)
	$(BIN)/tiny-model train --out tests/demo/model

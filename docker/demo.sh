#!/bin/sh
# The demo: `make demo` without make.
set -eu
haq-lab -m +experiment=demo quantizer=none,rtn,smoothquant,gptq,haq hydra.sweep.dir=runs/demo
haq-lab results runs/demo --csv runs/demo/table.csv --figure runs/demo/perplexity.png

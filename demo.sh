#!/bin/sh
# The demo: four quantizers on a real model, each compared with full precision. `make demo` and the containers run it.
set -eu
haq-lab -m +experiment=demo quantizer=rtn,smoothquant,gptq,haq hydra.sweep.dir=runs/demo
haq-lab results runs/demo --csv runs/demo/table.csv --figure runs/demo/perplexity.png

haq_lab=$(command -v haq-lab)
haq_lab=${haq_lab#"$PWD/"}
case $haq_lab in /*) haq_lab=haq-lab ;; esac
cat <<END

What to do next:
  $haq_lab model=smol quantizer=haq checkpoint.dir=checkpoints/smol    # quantise the model and keep it
  $haq_lab generate checkpoints/smol                                   # chat with it
  $haq_lab --help                                                      # all groups, options and settings
END

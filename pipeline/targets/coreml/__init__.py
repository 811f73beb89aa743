"""Core ML: an ML Program package with image input, class labels and logits.

target.py     what the pipeline sees: build, open, emulate, inspect
network.py    the network with its normalization and softmax, exported by torch
rewrites.py   what coremltools misreads, in equal forms
refusals.py   what Core ML cannot express, and what to do
convert.py    conversion, and what the package says of itself
siblings.py   depthwise convolutions side by side become one
package.py    saved packages: canonical bytes, a classifier's face, the twin for devices
compress.py   weights in fewer bits
runner.py     pixels and the two ways to run a package: Core ML, or the executor
verify.py     every build is held against the module before it counts
quiet.py      coremltools' chatter
"""

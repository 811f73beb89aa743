"""Core AI: Apple's format for iOS 27, macOS 27 and later, judged by Apple's own runtime on Linux.

target.py     what the pipeline sees: build, open, emulate, inspect
network.py    the network exported by torch, in operations that coreai-torch converts
norms.py      batch norms folded in float32
convert.py    conversion, and names that do not change from build to build
quantize.py   weights in fewer bits
package.py    saved assets: canonical bytes, what they say of themselves, damage
program.py    a saved program as plain values
operators.py  its operations on torch tensors
executor.py   evaluates a program, rounded to its types
runtime.py    Apple's runtime
runner.py     the two ways to run an asset: Apple's runtime, or the executor that it judges
build.py      how each precision is made
verify.py     every build is held against the module before it counts
fitness.py    checks of a program, and what was reported of devices
device.py     measuring on a Mac
results.py    measurements from devices
quiet.py      what the packages say goes to the log
"""

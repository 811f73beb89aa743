"""What the TensorRT target is made of.

builder
    ONNX graph to engine: one adapter over TensorRT-RTX and full TensorRT 10 and 11.
process
    The builder as a process of its own, for TensorRT-RTX.
api
    What of the two is installed, and loading it.
limits
    Which precisions exist on which compute capabilities, and why the others do not.
build
    What is to be built, and what is known of the engine afterwards.
facts
    What the network inside an engine consists of.
device
    What the driver says about the GPU, without a CUDA runtime.
runner, session
    Running an engine on a GPU: buffers, streams and time; the engine itself.
cuda
    The GPU by `torch.cuda`, with its errors in the pipeline's own words.
nvml
    Clocks, temperature and power of the GPU.
emulation
    The strict executor's word on an engine that cannot run here.

Nothing here imports a runtime when it is itself imported, except that what runs on a GPU (runner,
cuda) imports torch.
"""

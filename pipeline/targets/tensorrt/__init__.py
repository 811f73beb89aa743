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
cuda, gpu
    Running an engine on a GPU, without torch.
nvml
    Clocks, temperature and power of the GPU.
emulation
    The strict executor's word on an engine that cannot run here.

Nothing here imports a runtime when it is itself imported.
"""

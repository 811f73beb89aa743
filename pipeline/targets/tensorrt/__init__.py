"""What the TensorRT target is made of.

api
    One adapter over TensorRT-RTX and full TensorRT 10 and 11.
limits
    Which precisions exist on which compute capabilities, and why the others do not.
build
    ONNX graph to engine.
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

// Stands for CUDA's header in tests: the GPU's memory is the host's.
#pragma once
#include <cstdlib>
#include <cstring>

enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaMalloc(void** address, std::size_t size) {
    *address = std::malloc(size);
    return cudaSuccess;
}
inline cudaError_t cudaFree(void* address) {
    std::free(address);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size, cudaMemcpyKind,
                                   void*) {
    std::memcpy(to, from, size);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(void** stream) {
    *stream = nullptr;
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(void*) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(void*) { return cudaSuccess; }

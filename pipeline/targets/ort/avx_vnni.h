/* What as_cpu.c needs of avx_vnni.c. */
#include <stdint.h>
#include <ucontext.h>

/* Prepare; 1 where a process may be told of AVX-VNNI that the CPU lacks, 0 where it may not. */
int avx_vnni_start(void);

/* Compute the illegal instruction that a signal tells of, and go on behind it; 0 if it is none of
   AVX-VNNI's. */
int avx_vnni_compute(ucontext_t *context);

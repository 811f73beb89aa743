/* What as_cpu.c needs of avx_vnni.c. */
#include <stdint.h>
#include <ucontext.h>

/* Whether instructions are computed, or each is replaced by one that takes as long and computes
   something else. */
enum avx_vnni_way { COMPUTE = 1, REPLACE };

/* Prepare; 1 where a process may be told of AVX-VNNI that the CPU lacks, 0 where it may not. */
int avx_vnni_start(enum avx_vnni_way asked);

/* Do with the illegal instruction that a signal tells of what was asked for, and go on; 0 if it is
   none of AVX-VNNI's. */
int avx_vnni_handle(ucontext_t *context);

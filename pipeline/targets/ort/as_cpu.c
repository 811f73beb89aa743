/* Answers CPUID with some features hidden, so that a runtime takes the kernels of a lesser CPU.
   AVX-VNNI may be claimed by a CPU that has none: avx_vnni.c stands in for its instructions.

   Two ways lead here. Where the kernel lets a process ask for it (arch_prctl, ARCH_SET_CPUID), every
   CPUID instruction of the process faults. Elsewhere the runtime's own CPUID instructions were
   replaced by as many bytes that no 64-bit program holds (06, once PUSH ES; not UD2, which compilers
   write where a program must not come). Either signal is answered with what the CPU says, less or
   with the bits that the rules name; any other one goes to whoever handled it before. */
#define _GNU_SOURCE
#include "avx_vnni.h"

#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define MOST_RULES 16

struct rule {
  uint32_t leaf, subleaf, clear[4], set[4];
};

static struct rule rules[MOST_RULES];
static int rule_count, faulting, emulating;
static struct sigaction before_ill, before_segv;

static void look_up(uint32_t leaf, uint32_t subleaf, uint32_t found[4]) {
  /* CPUID faults in here too: it has to be let through for this one. */
  if (faulting) syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
  if (faulting) syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  for (int i = 0; i < rule_count; i++)
    if (rules[i].leaf == leaf && rules[i].subleaf == subleaf)
      for (int k = 0; k < 4; k++) found[k] = (found[k] & ~rules[i].clear[k]) | rules[i].set[k];
}

static void answer(int number, siginfo_t *info, void *context) {
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  /* For a jump into nowhere there is no code to read. */
  int nowhere = number == SIGSEGV && info->si_code > 0 && (greg_t)info->si_addr == r[REG_RIP] &&
                info->si_code == SEGV_MAPERR;
  const uint8_t *code = (const uint8_t *)r[REG_RIP];
  int ours = !nowhere && (number == SIGILL ? code[0] == 0x06 && code[1] == 0x06
                                           : code[0] == 0x0f && code[1] == 0xa2);
  if (!ours) {
    if (emulating && number == SIGILL && avx_vnni_handle(context)) return;
    sigaction(number, number == SIGILL ? &before_ill : &before_segv, 0);
    /* The instruction runs again, and meets the handler before this one; a signal that somebody
       sent has none. */
    if (info->si_code <= 0) raise(number);
    return;
  }
  uint32_t found[4];
  look_up((uint32_t)r[REG_RAX], (uint32_t)r[REG_RCX], found);
  r[REG_RAX] = found[0];
  r[REG_RBX] = found[1];
  r[REG_RCX] = found[2];
  r[REG_RDX] = found[3];
  r[REG_RIP] += 2;
}

/* Whether the kernel lets this process's CPUID fault. */
int as_cpu_can_fault(void) {
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) return 0;
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  return 1;
}

/* Change bits from now on; where `way` is not 0, stand in for AVX-VNNI in that way. Returns 0, or
   why it cannot, as errno. */
int as_cpu_start(const struct rule *asked, int count, int by_fault, int way) {
  struct sigaction action;
  if (count > MOST_RULES) return E2BIG;
  if (way && !avx_vnni_start(way)) return ENOTSUP;
  emulating = way;
  memcpy(rules, asked, count * sizeof *rules);
  rule_count = count;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (sigaction(SIGILL, &action, &before_ill) || sigaction(SIGSEGV, &action, &before_segv))
    return errno;
  if (by_fault && syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) return errno;
  faulting = by_fault;
  return 0;
}

/* What the CPU says, unrestricted as long as nothing faults. */
void as_cpu_real(uint32_t leaf, uint32_t subleaf, uint32_t found[4]) {
  __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
}

/* What a runtime sees: by the instruction that stands in its place. */
void as_cpu_seen(uint32_t leaf, uint32_t subleaf, uint32_t found[4]) {
  uint32_t a = leaf, b = 0, c = subleaf, d = 0;
  if (faulting)
    __asm__ volatile("cpuid" : "+a"(a), "+b"(b), "+c"(c), "+d"(d));
  else
    __asm__ volatile(".byte 0x06, 0x06" : "+a"(a), "+b"(b), "+c"(c), "+d"(d));
  found[0] = a, found[1] = b, found[2] = c, found[3] = d;
}

/* Computes the instructions of AVX-VNNI on a CPU that has none of them, or imitates their pace.

   A runtime that is told of AVX-VNNI takes kernels with VPDPBUSD, VPDPBUSDS, VPDPWSSD and VPDPWSSDS
   in their VEX form. Each of them is an illegal instruction here, and is computed in the handler of
   its signal. That alone would take seconds for an image; so, where code can be written to, five
   bytes of an instruction (it has no fewer) become a jump to a stub when it is met first: a piece of
   code that does the same with instructions of AVX2, and jumps back.

   Where only time counts, each becomes VPMADDUBSW, which is written the same way but for one byte:
   one instruction of the multipliers, two of which can begin in each cycle, as of VPDPBUSD on the
   CPUs that have it (measured for both by uops.info; latencies of 3 to 5 cycles). It does not wait
   for the sum before it, which matters where one sum alone is added to; kernels of matrix products
   have several.

   What they compute, and how they are written: Intel's Software Developer's Manual, volume 2,
   VPDPBUSD and those after it, and chapter 2. */
#define _GNU_SOURCE
#include "avx_vnni.h"

#include <cpuid.h>
#include <linux/membarrier.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_SITES 8192
#define STUB 256
#define STUBS_AT_ONCE (1 << 16)
#define WAITING 0x07 /* POP ES, illegal as well: code that is being rewritten */
#define JUMP 0xe9
#define VPMADDUBSW 0x04 /* in the place of 0x50 to 0x53 */
#define OPCODE 3
#define JUMP_LENGTH 5
#define STACK_POINTER 4

typedef uint8_t vector[32];

struct instruction {
  const uint8_t *code;
  int saturates, words, wide; /* the sum; 16-bit factors; 256 bits */
  int sum, first, second;     /* registers; -1 for second factors in memory */
  int base, index, shift;     /* registers of their address, -1 for none */
  int length;
  int64_t offset;
};

static const uint8_t *sites[MOST_SITES]; /* where stubs are jumped to from */
static int site_count, lock, writes_code;
static enum avx_vnni_way way;
static uint8_t *stubs, *stubs_end;
static uint32_t upper_halves; /* of registers, in what a signal saves */

/* The order in which instructions number registers. */
static const int GENERAL[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};

/* Reads an instruction; returns whether it is one of AVX-VNNI. */
static int decode(const uint8_t *code, struct instruction *found) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x83) != 1 || code[3] < 0x50 ||
      code[3] > 0x53)
    return 0;
  int more_sum = code[1] & 0x80 ? 0 : 8, more_index = code[1] & 0x40 ? 0 : 8,
      more_base = code[1] & 0x20 ? 0 : 8;
  const uint8_t *next = code + 4;
  int mode = *next >> 6, last = *next & 7, alone = 0;
  memset(found, 0, sizeof *found);
  found->code = code;
  found->saturates = code[3] & 1;
  found->words = code[3] >= 0x52;
  found->wide = code[2] >> 2 & 1;
  found->first = ~code[2] >> 3 & 15;
  found->sum = (*next++ >> 3 & 7) | more_sum;
  found->second = found->base = found->index = -1;
  if (mode == 3) {
    found->second = last | more_base;
  } else if (last == 4) {
    int index = (*next >> 3 & 7) | more_index;
    if (index != STACK_POINTER) found->index = index;
    found->shift = *next >> 6;
    alone = mode == 0 && (*next & 7) == 5; /* without a base */
    if (!alone) found->base = (*next & 7) | more_base;
    next++;
  } else {
    alone = mode == 0 && last == 5; /* relative to what follows */
    if (!alone) found->base = last | more_base;
  }
  if (mode == 1) {
    found->offset = (int8_t)*next++;
  } else if (mode == 2 || alone) {
    int32_t offset;
    memcpy(&offset, next, sizeof offset);
    next += sizeof offset;
    found->offset = offset + (last == 5 && alone ? (int64_t)next : 0);
  }
  found->length = next - code;
  return 1;
}

/* Does what an instruction does; registers in the order of their numbers. */
static void compute(const struct instruction *what, const uint64_t *general, vector *vectors) {
  size_t bytes = what->wide ? sizeof(vector) : sizeof(vector) / 2;
  uint64_t address = what->offset;
  vector first, second;
  int32_t sums[8];
  if (what->base >= 0) address += general[what->base];
  if (what->index >= 0) address += general[what->index] << what->shift;
  memcpy(second, what->second >= 0 ? vectors[what->second] : (const void *)address, bytes);
  memcpy(first, vectors[what->first], bytes);
  memcpy(sums, vectors[what->sum], bytes);
  for (size_t i = 0; i < bytes / 4; i++) {
    int64_t sum = sums[i];
    for (size_t k = 4 * i; k < 4 * i + 4; k += what->words ? 2 : 1) {
      int16_t one = first[k], other = (int8_t)second[k];
      if (what->words) {
        memcpy(&one, first + k, sizeof one);
        memcpy(&other, second + k, sizeof other);
      }
      sum += (int64_t)one * other;
    }
    if (what->saturates) sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
    sums[i] = (int32_t)(uint32_t)sum;
  }
  memset(vectors[what->sum], 0, sizeof(vector));
  memcpy(vectors[what->sum], sums, bytes);
}

/* Computes an instruction with the registers that a signal saved. Where all upper halves are 0 they
   may be neither saved nor restored: then a sum of theirs is 0 as well. */
static void compute_interrupted(const struct instruction *what, ucontext_t *context) {
  greg_t *saved = context->uc_mcontext.gregs;
  uint8_t *lower = (uint8_t *)context->uc_mcontext.fpregs->_xmm;
  uint8_t *upper = (uint8_t *)context->uc_mcontext.fpregs + upper_halves;
  const size_t half = sizeof(vector) / 2;
  uint64_t general[16];
  vector vectors[16];
  for (int i = 0; i < 16; i++) {
    general[i] = saved[GENERAL[i]];
    memcpy(vectors[i], lower + half * i, half);
    memcpy(vectors[i] + half, upper + half * i, half);
  }
  compute(what, general, vectors);
  memcpy(lower + half * what->sum, vectors[what->sum], half);
  memcpy(upper + half * what->sum, vectors[what->sum] + half, half);
  saved[REG_RIP] += what->length;
}

static uint8_t *append(uint8_t *end, const void *bytes, size_t count) {
  memcpy(end, bytes, count);
  return end + count;
}

/* Appends how far it is from behind these four bytes, once they lie at `place`. */
static uint8_t *append_distance(uint8_t *end, const uint8_t *place, const uint8_t *to) {
  int32_t distance = to - (place + sizeof distance);
  return append(end, &distance, sizeof distance);
}

/* Appends an instruction of AVX2 whose operands are registers: `map` and `prefix` as chapter 2 has
   them, `to` where results go (or more of the opcode), `from` the second source. */
static uint8_t *append_avx(uint8_t *end, int map, int prefix, int opcode, int wide, int to,
                           int source, int from) {
  uint8_t code[5] = {0xc4, (to & 8 ? 0 : 0x80) | 0x40 | (from & 8 ? 0 : 0x20) | map,
                     (~source & 15) << 3 | wide << 2 | prefix, opcode,
                     0xc0 | (to & 7) << 3 | (from & 7)};
  return append(end, code, sizeof code);
}

enum { LEFT_16 = 0x716, RIGHT_16 = 0x712, SIGNED_16 = 0x714, SIGNED_32 = 0x724, RIGHT_32 = 0x722 };
enum { ADD = 0xfe, MULTIPLY_AND_ADD = 0xf5, XOR = 0xef, AND_NOT = 0xdf, EQUAL = 0x76 };

static uint8_t *append_shift(uint8_t *end, int which, int wide, int to, int from, int by) {
  end = append_avx(end, 1, 1, which >> 4, wide, which & 15, to, from);
  *end++ = by;
  return end;
}

static uint8_t *append_sum(uint8_t *end, int which, int wide, int to, int one, int other) {
  return append_avx(end, 1, 1, which, wide, to, one, other);
}

/* Saves some of the first eight registers on the stack, or restores them. */
static uint8_t *append_saved(uint8_t *end, const int *registers, int count, int restores) {
  for (int i = 0; i < count; i++) { /* vmovdqu 32 * i(%rsp) */
    uint8_t code[6] = {0xc5, 0xfe, restores ? 0x6f : 0x7f, 0x44 | registers[i] << 3, 0x24, 32 * i};
    end = append(end, code, sizeof code);
  }
  return end;
}

/* Loads the second factors from where the instruction has them into one of these registers. */
static uint8_t *append_load(uint8_t *end, const struct instruction *what, int to) {
  uint8_t code[5] = {0xc4, 0x80 | (what->code[1] & 0x60) | 1, 0x7a | what->wide << 2, 0x6f,
                     (what->code[4] & 0xc7) | to << 3};
  return append(append(end, code, sizeof code), what->code + 5, what->length - 5);
}

/* What the instruction does, in AVX2: bytes are multiplied as numbers of 16 bits, the even ones and
   the odd ones. No flag changes. */
static uint8_t *append_computation(uint8_t *end, const struct instruction *what, const int *spare) {
  int wide = what->wide, sum = what->sum, first = what->first, second = what->second;
  int even = spare[0], odd = spare[1], more = spare[2], added = spare[0];
  if (second < 0) end = append_load(end, what, second = spare[3]);
  if (what->words) {
    end = append_sum(end, MULTIPLY_AND_ADD, wide, added, first, second);
  } else {
    end = append_shift(end, LEFT_16, wide, even, first, 8);
    end = append_shift(end, RIGHT_16, wide, even, even, 8);
    end = append_shift(end, LEFT_16, wide, more, second, 8);
    end = append_shift(end, SIGNED_16, wide, more, more, 8);
    end = append_sum(end, MULTIPLY_AND_ADD, wide, even, even, more);
    end = append_shift(end, RIGHT_16, wide, odd, first, 8);
    end = append_shift(end, SIGNED_16, wide, more, second, 8);
    end = append_sum(end, MULTIPLY_AND_ADD, wide, odd, odd, more);
    end = append_sum(end, ADD, wide, added, even, odd);
  }
  if (!what->saturates) return append_sum(end, ADD, wide, sum, sum, added);
  /* A sum is beyond its range where both terms have one sign and it has the other. */
  int plain = spare[1], beyond = spare[2], limit = spare[0], largest = spare[3];
  end = append_sum(end, ADD, wide, plain, sum, added);
  end = append_sum(end, XOR, wide, beyond, sum, added);
  end = append_sum(end, XOR, wide, limit, sum, plain);
  end = append_sum(end, AND_NOT, wide, beyond, beyond, limit);
  end = append_sum(end, EQUAL, wide, largest, largest, largest);
  end = append_shift(end, RIGHT_32, wide, largest, largest, 1);
  end = append_shift(end, SIGNED_32, wide, limit, sum, 31);
  end = append_sum(end, XOR, wide, limit, limit, largest);
  end = append_avx(end, 3, 1, 0x4a, wide, sum, plain, limit); /* vblendvps */
  *end++ = beyond << 4;
  return end;
}

/* Writes a stub. It keeps clear of what lies below the stack's end: functions that call none have
   values there. */
static const uint8_t *make_stub(const struct instruction *what) {
  int spare[4], count = 0;
  for (int i = 0; count < 4; i++) /* at most to 6 */
    if (i != what->sum && i != what->first && i != what->second) spare[count++] = i;
  uint8_t *begin = stubs, *end = begin;
  end = append(end, "\x48\x8d\xa4\x24\x00\xff\xff\xff", 8); /* lea -256(%rsp), %rsp */
  end = append_saved(end, spare, count, 0);
  end = append_computation(end, what, spare);
  end = append_saved(end, spare, count, 1);
  end = append(end, "\x48\x8d\xa4\x24\x00\x01\x00\x00\xe9", 9); /* lea 256(%rsp), %rsp; jmp */
  append_distance(end, end, what->code + what->length);
  stubs += STUB;
  return begin;
}

/* Whether a stub can do it: the stack's end is moved in there, and a product of two numbers of 16
   bits takes 33 bits at worst. */
static int has_stub(const struct instruction *what) {
  int is_relative = what->second < 0 && what->base < 0 && what->index < 0;
  return what->base != STACK_POINTER && !is_relative && !(what->words && what->saturates);
}

/* Finds memory for stubs that a jump of 32 bits reaches from there; 0 where there is none. */
static int find_stubs(const uint8_t *code) {
  const intptr_t step = 1 << 26, reach = INT32_MAX - 2 * STUBS_AT_ONCE;
  intptr_t from = (intptr_t)code & -(intptr_t)STUBS_AT_ONCE;
  if (stubs + STUB <= stubs_end && labs(stubs - code) < reach) return 1;
  for (intptr_t away = step; away < reach; away = away > 0 ? -away : step - away) {
    uint8_t *found = mmap((void *)(from + away), STUBS_AT_ONCE, PROT_READ | PROT_WRITE | PROT_EXEC,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return 0;
    if (labs(found - code) < reach) {
      stubs = found;
      stubs_end = found + STUBS_AT_ONCE;
      return 1;
    }
    munmap(found, STUBS_AT_ONCE);
  }
  return 0;
}

/* Lets every thread see what was written before it goes on. */
static void synchronize(void) {
  syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0);
}

/* Makes some bytes of code writable; returns whether they are. */
static int open_code(uint8_t *code, size_t length) {
  uintptr_t page = sysconf(_SC_PAGESIZE), first = (uintptr_t)code & -page;
  size_t size = ((uintptr_t)code + length - first + page - 1) & -page;
  return writes_code && !mprotect((void *)first, size, PROT_READ | PROT_WRITE | PROT_EXEC);
}

/* Replaces an instruction by a jump to a stub; 0 where that cannot be done. Other threads may come
   along at any moment: the first byte is illegal until the others are there. */
static int rewrite(uint8_t *code, const struct instruction *what) {
  if (site_count == MOST_SITES || !has_stub(what) || !find_stubs(code) ||
      !open_code(code, JUMP_LENGTH))
    return 0;
  volatile uint8_t *place = code;
  uint8_t distance[JUMP_LENGTH - 1];
  append_distance(distance, code + 1, make_stub(what));
  sites[site_count++] = code;
  place[0] = WAITING;
  synchronize();
  for (int i = 1; i < JUMP_LENGTH; i++) place[i] = distance[i - 1];
  synchronize();
  place[0] = JUMP;
  return 1;
}

/* Whether another thread has put a jump there in the meantime. */
static int is_rewritten(const uint8_t *code) {
  for (int i = 0; i < site_count; i++)
    if (sites[i] == code) return code[0] == JUMP;
  return 0;
}

/* Replaces an instruction by the one that imitates its pace; 0 where that cannot be done. A single
   byte changes, so that other threads meet the one or the other. */
static int replace(uint8_t *code) {
  if (!open_code(code + OPCODE, 1)) return 0;
  ((volatile uint8_t *)code)[OPCODE] = VPMADDUBSW;
  synchronize();
  return 1;
}

/* Whether another thread has replaced it in the meantime: that instruction is not illegal. */
static int is_replaced(const uint8_t *code) { return code[0] == 0xc4 && code[OPCODE] == VPMADDUBSW; }

int avx_vnni_start(enum avx_vnni_way asked) {
  uint32_t size, other, unused;
  way = asked;
  if (!__builtin_cpu_supports("avx2")) return 0;
  __cpuid_count(0xd, 2, size, upper_halves, other, unused);
  writes_code =
      !syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0);
  return way == COMPUTE || writes_code;
}

int avx_vnni_handle(ucontext_t *context) {
  uint8_t *code = (uint8_t *)context->uc_mcontext.gregs[REG_RIP];
  struct instruction what;
  if (way == REPLACE) return decode(code, &what) ? replace(code) : is_replaced(code);
  while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE)) sched_yield();
  int known = decode(code, &what), done = known ? rewrite(code, &what) : is_rewritten(code);
  __atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
  if (known && !done) compute_interrupted(&what, context);
  return known || done;
}

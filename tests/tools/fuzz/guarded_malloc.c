/* Preloaded into a process: while `guarded_malloc_on`, every block of posix_memalign and
 * aligned_alloc, which is where torch's tensors and the kernels' scratch come from, ends at a page
 * that must not be touched, is full of 0xFF (NaN in every floating dtype), and is surrounded by
 * 0xFF that free() finds unchanged, or ends the process.
 *
 * Blocks lie in one reserved range of addresses: by it free() knows them. A span of pages that has
 * been freed serves the next block of its size, so that a block costs no system call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void* __libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void* block);

#define PAGE ((size_t)4096)
#define RANGE_PAGES ((size_t)1 << 24) /* 64 GiB of addresses */
#define MOST_PAGES ((size_t)1 << 15)  /* of a block: 128 MiB */
#define FILLING 0xFF

struct span { /* of the block that begins on a page */
  uint32_t pages, next_free;
  size_t begin, size; /* of the block, in bytes from the page */
};

int guarded_malloc_on = 0;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char* range;
static struct span* spans;                /* one for each page of the range */
static uint32_t fresh = 1;                /* first page never used; page 0 guards the first block */
static uint32_t reusable[MOST_PAGES + 1]; /* by pages: first of a list of spans; 0 ends it */

static void die(const char* why) {
  if (write(STDERR_FILENO, why, strlen(why)) < 0) abort();
  abort();
}

static void* reserve(size_t bytes, int protection) {
  void* at = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) die("guarded_malloc: cannot reserve addresses\n");
  return at;
}

static void* guarded(size_t alignment, size_t size) {
  const size_t rounded = (size + alignment - 1) / alignment * alignment;
  const size_t pages = rounded ? (rounded + PAGE - 1) / PAGE : 1;
  if (alignment > PAGE || pages > MOST_PAGES) return NULL;
  pthread_mutex_lock(&lock);
  if (range == NULL) {
    range = reserve(RANGE_PAGES * PAGE, PROT_NONE);
    spans = reserve(RANGE_PAGES * sizeof(struct span), PROT_READ | PROT_WRITE);
  }
  uint32_t first = reusable[pages];
  if (first) {
    reusable[pages] = spans[first].next_free;
  } else {
    if (fresh + pages + 1 > RANGE_PAGES) die("guarded_malloc: out of addresses\n");
    first = fresh;
    fresh += pages + 1; /* the last one stays out of bounds */
    if (mprotect(range + first * PAGE, pages * PAGE, PROT_READ | PROT_WRITE))
      die("guarded_malloc: cannot map pages\n");
  }
  const size_t begin = pages * PAGE - rounded;
  spans[first] = (struct span){(uint32_t)pages, 0, begin, size};
  pthread_mutex_unlock(&lock);
  memset(range + first * PAGE, FILLING, pages * PAGE);
  return range + first * PAGE + begin;
}

static int is_filling(const char* from, const char* to) {
  unsigned char all = FILLING;
  for (; from < to; from++) all &= (unsigned char)*from;
  return all == FILLING;
}

int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = guarded_malloc_on ? guarded(alignment, size) : __libc_memalign(alignment, size);
  return *block ? 0 : ENOMEM;
}

void* aligned_alloc(size_t alignment, size_t size) {
  return guarded_malloc_on ? guarded(alignment, size) : __libc_memalign(alignment, size);
}

void free(void* block) {
  const size_t offset = (size_t)((char*)block - range);
  if (range == NULL || (char*)block < range || offset >= RANGE_PAGES * PAGE) {
    __libc_free(block);
    return;
  }
  const uint32_t first = (uint32_t)(offset / PAGE);
  char* page = range + first * PAGE;
  pthread_mutex_lock(&lock);
  struct span* span = &spans[first];
  if (span->pages == 0 || offset % PAGE != span->begin) die("guarded_malloc: no block is freed\n");
  if (!is_filling(page, page + span->begin)) die("guarded_malloc: written before a block\n");
  if (!is_filling(page + span->begin + span->size, page + span->pages * PAGE))
    die("guarded_malloc: written beyond a block\n");
  const uint32_t pages = span->pages;
  *span = (struct span){0, reusable[pages], 0, 0};
  reusable[pages] = first;
  pthread_mutex_unlock(&lock);
}
